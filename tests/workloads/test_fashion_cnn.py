"""The convolutional network with exits: its pieces, and a whole small run on made-up pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparingly.nn.cascade import NEVER
from sparingly.nn.exits import add_exits_, train_exits
from sparingly.report import result
from sparingly.workloads import fashion_cnn, fashion_data
from sparingly.workloads._exits_onnx import InPieces


def pictures(n: int, seed: int) -> fashion_data.Pictures:
    """A bright bar whose height and width tell the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    images = torch.randint(0, 60, (n, 28, 28), generator=generator)
    for place, label in enumerate(labels.tolist()):
        images[place, 4 + label : 12 + label, 4 : 10 + 2 * (label % 5)] += 150
    return fashion_data.Pictures(images.view(n, -1).to(torch.uint8), labels)


@pytest.mark.parametrize("measure", ["maximum", "margin", "entropy"])
def test_pieces_leave_where_the_network_in_pytorch_does(measure):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = add_exits_(fashion_cnn.convolutions(4).eval(), at=["2", "4"], measure=measure)
    x = torch.randn(40, 1, 28, 28)
    train_exits(model, [x])
    answers = model.stage_answers(x)
    middle = [float(model.sure(stage, place).quantile(0.5)) for place, stage in enumerate(answers[:-1])]
    middle = [value + 1e-4 for value in middle]  # Between two pictures: engines round differently.
    pieces = InPieces(model, x)
    for thresholds in ([0.0, 0.0], [NEVER, 0.0], [NEVER, NEVER], middle, [middle[0], NEVER]):
        model.thresholds.copy_(torch.tensor(thresholds))
        wanted = model(x)
        np.testing.assert_allclose(pieces.set(thresholds)(x), wanted.numpy(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(pieces(x[:1]), wanted[:1].numpy(), rtol=1e-3, atol=1e-5)


def test_only_sequences_are_cut():
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    with pytest.raises(TypeError, match=r"only exits in an nn\.Sequential"):
        InPieces(add_exits_(Other(), at=["layer"]), torch.zeros(1, 3))


def test_softmax():
    scores = torch.randn(5, 7) * 50
    np.testing.assert_allclose(fashion_cnn.softmax(scores), scores.softmax(1).numpy(), rtol=1e-5)


def test_a_small_run(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fashion_cnn.data, "load", lambda train: pictures(3000, 0) if train else pictures(1600, 1))
    mode = replace(
        fashion_cnn.MODES["quick"], trained=2000, calibrating=1600, width=4, epochs=2, scout_epochs=1, pairs=5
    )
    document = fashion_cnn.bench(mode, lambda what, part: None)
    (workload,) = result.parse(document).workloads
    entry = document["workloads"]["fashion-cnn"]
    assert workload.is_cascade and [stage["name"] for stage in entry["stages"]] == list(fashion_cnn.STAGES)
    assert sum(stage["left"] for stage in entry["stages"]) == pytest.approx(1)
    assert set(entry["inference"]["batch_1"]["saving"]) == {"cpu_s", "macs", "bytes"}
    assert fashion_cnn.bench(mode, lambda what, part: None)["workloads"] == document["workloads"]
