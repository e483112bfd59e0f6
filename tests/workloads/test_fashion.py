"""The workload on made-up pictures; the package with the real ones is not needed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparingly.nn import compile_plan
from sparingly.report import html, result, terminal, trained
from sparingly.workloads import _robust, _trained, fashion, fashion_data
from sparingly.workloads.fashion_data import Pictures

pytest.importorskip("onnxruntime")


def pictures(n: int, seed: int) -> Pictures:
    """Ten kinds of stripes, so that something can be learned."""
    torch.manual_seed(seed)
    labels = torch.arange(n) % 10
    images = torch.randint(0, 60, (n, 28, 28))
    for label in range(10):
        images[labels == label, 2 * label + 2 : 2 * label + 6] += 150
    return Pictures(images.to(torch.uint8).flatten(1), labels)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fashion.Mode:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fashion_data, "load", lambda train: pictures(*((200, 0) if train else (50, 1))))
    monkeypatch.setattr(fashion, "ANSWERED", 64)
    for sizes in ("TRAINING", "ANSWERS"):
        monkeypatch.setattr(_trained, sizes, (32,))
    return fashion.Mode("tiny", 256, 200, 6, 1, (), 50, 5, True, batch=20, label_noise=(0.4,))


def nothing(what: str, part: float | None) -> None:
    pass


def test_the_whole_run_has_the_documented_keys_and_both_views_show_it(tiny: fashion.Mode, tmp_path: Path):
    content = fashion.bench(tiny, nothing)
    entry: dict[str, Any] = content["workloads"]["fashion"]
    quality = entry["quality"]
    assert quality["selective"]["value"] > 0.5
    assert quality["n"] == 50 and set(quality["differences"]) == {"dense_same_capacity", "dense_equal_cost"}
    for job in (entry["training"], entry["inference"]["batch_1"], entry["inference"]["best_batch"]):
        assert job["saving"]["cpu_s"]["lo"] <= job["saving"]["cpu_s"]["value"] and job["saving"]["macs"] > 1
    sweep = entry["equal_quality"]["sweep"]
    assert {"dense 256"} < {row["name"] for row in sweep}
    ours = entry["equal_cost"]["dense"]
    # As many multiplications as the selective network, to the next unit.
    macs = {row["name"]: row["macs"] for row in sweep}
    mine = macs["dense 256"] / entry["inference"]["batch_1"]["saving"]["macs"]
    assert 0 <= macs[ours] - mine <= 4 * fashion.WIDTH
    assert len(entry["noise"]["pictures"]["gaussian"]) == 5 and entry["noise"]["labels"][0]["strength"] == 0.4
    report = result.parse(content)
    assert {table.caption for table in trained.tables(report.workloads[0])} >= {
        "Noise, gaussian: accuracy",
        "Noise, labels: accuracy",
    }
    terminal.show(report)
    text = html.page(report)
    assert "equal running cost" in text and "Accuracy under occlusion" in text
    # All parts are kept: nothing is done again.
    assert fashion.bench(tiny, nothing)["workloads"] == content["workloads"]


def test_a_step_gives_the_same_pictures_again_and_an_epoch_each_once():
    some = pictures(60, 0)
    stream, other = fashion.Stream(some, 20), fashion.Stream(some, 20)
    seen = [stream(step) for step in range(stream.per_epoch)]
    images, labels = other(1)
    assert torch.equal(images, seen[1][0]) and torch.equal(labels, seen[1][1])
    assert torch.cat([labels for _, labels in seen]).bincount().tolist() == [6] * 10
    assert not torch.equal(stream(3)[1], seen[0][1])


@pytest.mark.parametrize(("kind", "strength"), _robust.KINDS)
def test_noise_is_of_its_strength_and_the_same_again(kind: str, strength: float):
    images = torch.full((40, 784), 100, dtype=torch.uint8)
    noisy = _robust.disturbed(images, kind, strength)
    assert torch.equal(noisy, _robust.disturbed(images, kind, strength))
    assert noisy.min() >= 0 and noisy.max() <= 255
    changed = (noisy != 100).float().mean(1)
    if kind == "impulse":
        assert abs(float(changed.mean()) - strength) < 0.02
    elif kind == "occlusion":
        assert torch.equal(changed * 784, torch.full((40,), strength**2))
    else:
        assert changed.min() > 0.9


def test_wrong_labels_are_wrong_and_as_many_as_said():
    labels = torch.arange(1000) % 10
    wrong = _robust.wrong_labels(labels, 0.4)
    assert int((wrong != labels).sum()) == 400 and int(wrong.min()) >= 0 and int(wrong.max()) <= 9
    assert torch.equal(labels, torch.arange(1000) % 10)
    with pytest.raises(ValueError, match="gaussian, impulse, occlusion"):
        _robust.disturbed(torch.zeros(1, 784, dtype=torch.uint8), "rain", 1)


def test_the_compiled_network_answers_as_the_selective_one_does():
    torch.manual_seed(0)
    model = fashion.network(lambda: fashion.selective_ffn(1024), fashion.Entrance(fashion.fern_bag(16))).eval()
    bag: Any = model.get_submodule("0.bag")
    bag.weight.data.mul_(100)
    images = fashion.scaled(pictures(7, 0).images)
    with torch.no_grad():
        expected = model(images)
        bag.weight.data.mul_(-1)
        assert not torch.allclose(model(images), expected, atol=0.1)
        bag.weight.data.mul_(-1)
    torch.testing.assert_close(compile_plan(model)(images), expected, rtol=1e-4, atol=1e-4)
