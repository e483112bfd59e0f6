"""What selective layers say of themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparingly.convert import CONTRACT, convert_
from sparingly.explain import explain
from sparingly.nn.selective import MANY, OFF, UNFITTED, selective_modules
from sparingly.selectors import InputThreshold, Screen, Threshold


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        self.out = nn.Linear(16, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.mlp(x))


def converted() -> Any:
    model: Any = Net().eval()
    convert_(model, {"mlp": Threshold(0.1), "linear": InputThreshold(0.5), "head": Screen(4)})
    return model


@torch.no_grad()
def test_shares_are_those_of_the_counts():
    model, x = converted(), torch.randn(3, 16)
    kept = int((x.abs() >= 0.5).sum())
    inside = model.mlp.get_submodule("0")
    values = nn.functional.linear(torch.where(x.abs() >= 0.5, x, 0.0), inside.weight, inside.bias).relu()
    ran = int((values >= 0.1).sum())
    model(x)
    rows = {row.name: row for row in explain(model).layers}
    assert set(rows) == set(selective_modules(model)) == {"mlp", "mlp.0", "out"}
    first, hidden, head = rows["mlp.0"], rows["mlp"], rows["out"]
    assert first.share_run == pytest.approx(kept / 48) and hidden.share_run == pytest.approx(ran / 192)
    assert (first.tokens, first.dense_tokens, first.why_dense) == (3, 0, {})
    assert first.size_bytes == pytest.approx(64 * 4 + kept / 3 * 64 * 4)
    assert first.dense_bytes == 64 * 4 + 16 * 64 * 4
    assert hidden.dense_bytes == 64 * 16 * 4 and hidden.size_bytes == pytest.approx(ran / 3 * 16 * 4)
    assert (head.dense_tokens, head.share_run, head.why_dense) == (3, 1.0, {UNFITTED: 3})
    assert (first.kind, first.selector, first.units) == ("SelectiveLinear", "InputThreshold", 16)
    # And after many tokens at once.
    model(torch.randn(12, 16))
    again = {row.name: row for row in explain(model).layers}["mlp.0"]
    assert (again.tokens, again.dense_tokens, again.why_dense) == (15, 12, {MANY: 12})
    assert again.share_run == pytest.approx((kept / 16 + 12) / 15)


@torch.no_grad()
def test_int8_rows_are_named_and_counted():
    model, x = converted(), torch.randn(1, 16)
    layer = model.mlp.get_submodule("0")
    layer.rows = "int8"
    model(x)
    model(torch.randn(9, 16))
    rows = {row.name: row for row in explain(model).layers}
    assert (rows["mlp.0"].rows, rows["mlp"].rows) == ("int8", None)
    kept, whole = int((x.abs() >= 0.5).sum()), 64 * 4 + 16 * 64 * 4
    assert rows["mlp.0"].dense_bytes == whole
    assert rows["mlp.0"].size_bytes == pytest.approx((64 * 4 + kept * (64 + 4) + 9 * whole) / 10)
    assert "int8" in str(explain(model))


@torch.no_grad()
def test_before_the_first_token_shares_are_missing_not_zero():
    rows = explain(converted()).layers
    assert all(row.share_run is None and row.size_bytes is None and row.tokens == 0 for row in rows)


@torch.no_grad()
def test_kernels_and_what_stood_in_for_them():
    model = converted()
    rows = {row.name: row for row in explain(model).layers}
    assert rows["mlp"].kernel == rows["mlp.0"].kernel == "threshold_accumulate (cpu)"
    model.double()(torch.randn(1, 16).double())
    rows = {row.name: row for row in explain(model).layers}
    assert "reference" in rows["mlp"].kernel and "float64" in rows["mlp"].kernel


@torch.no_grad()
def test_text_and_json_hold_everything():
    model = converted()
    selective_modules(model)["mlp"].off = True
    model(torch.randn(2, 16))
    found = explain(model)
    values = json.loads(json.dumps(found.as_dict()))
    assert values["contract"] is None and [row["name"] for row in values["layers"]] == [r.name for r in found.layers]
    assert values["layers"][0]["why_dense"] == found.layers[0].why_dense
    text = " ".join(str(found).split())
    for part in ("mlp", "InputThreshold", "not calibrated", "2 tokens", "100%"):
        assert part in text
    assert OFF in {reason for row in found.layers for reason in row.why_dense}
    assert not hasattr(model, CONTRACT)


def test_a_model_without_selective_layers_says_what_to_do():
    with pytest.raises(ValueError, match="convert_"):
        explain(Net())
