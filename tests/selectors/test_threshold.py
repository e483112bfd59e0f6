"""Thresholds on activations, on inputs, and on exact zeros."""

from __future__ import annotations

import copy

import pytest
import torch

from sparingly.selectors import SELECTORS, InputThreshold, Threshold, Zeros

UNITS = 40


def fitted(kind: type[Threshold] = Threshold, tokens: int = 500, **options) -> tuple[Threshold, torch.Tensor]:
    selector, values = kind(**options), torch.randn(tokens, UNITS) * torch.linspace(0.1, 3, UNITS)
    selector.fit(torch.randn(UNITS, 8), hidden=values)
    return selector, values


@pytest.mark.parametrize("kind", [Threshold, InputThreshold, Zeros])
def test_registered_and_rebuilt_from_its_configuration(kind):
    selector = kind()
    again = SELECTORS[kind.__name__].from_config(selector.config() | {"setting": selector.setting})
    assert type(again) is kind and again.config() == selector.config() and again.threshold == selector.threshold


@pytest.mark.parametrize("threshold", [-0.1, float("inf"), float("nan")])
def test_bad_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be"):
        Threshold(threshold)


def test_a_given_threshold_needs_no_data():
    selector = Threshold(0.5)
    assert not selector.fitted and selector.settings() == []
    selector.prepare(3)
    assert selector.fitted and selector.num_units == 3
    values = torch.tensor([[0.5, -0.5, 0.49999], [0.0, float("nan"), -float("inf")]])
    assert selector.keeps(values).tolist() == [[True, True, False], [False, True, True]]
    Threshold().prepare(3)
    assert not Threshold().fitted


def test_zero_keeps_every_unit():
    selector = Threshold(0.0)
    selector.prepare(2)
    assert selector.keeps(torch.tensor([0.0, -0.0])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zeros_cut_nothing_else(dtype):
    selector = Zeros()
    selector.prepare(5)
    values = torch.tensor([0.0, -0.0, 6e-5, -1.0, float("nan")], dtype=dtype)
    assert selector.keeps(values).tolist() == [False, False, True, True, True]
    torch.testing.assert_close(selector.masked(values), values, equal_nan=True, rtol=0, atol=0)


def test_a_setting_is_the_share_that_passes():
    selector, values = fitted()
    for setting in (0, 5, 50, 95, 100):
        selector.setting = setting
        share = float(selector.keeps(values).float().mean())
        assert share == pytest.approx(setting / 100, abs=0.002)
    selector.setting = 100
    assert selector.keeps(torch.zeros(1, UNITS)).all()


def test_kept_units_of_a_denser_setting_hold_those_of_a_sparser_one():
    selector, values = fitted()
    before = None
    for setting in selector.settings():
        selector.setting = setting
        kept = selector.keeps(values)
        assert before is None or bool((kept | ~before).all())
        before = kept


def test_importance_decides_between_units():
    values, importance = torch.randn(400, UNITS), torch.ones(UNITS)
    importance[:10] = 0.0
    selector = Threshold()
    selector.fit(torch.randn(UNITS, 4), None, values, importance)
    selector.setting = 70
    kept = selector.keeps(values).float().mean(dim=0)
    assert kept[:10].max() == 0 and kept[10:].min() > 0.8


def test_what_is_left_out_counts_as_its_centre():
    shift = torch.linspace(-5, 5, UNITS)
    values = torch.randn(800, UNITS) * 0.3 + shift
    selector = Threshold()
    selector.fit(torch.randn(UNITS, 4), None, values, torch.ones(UNITS))
    selector.setting = 20
    left = values - selector.masked(values)
    assert float((left != 0).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert left.abs().max() < 1.0
    selector.setting = 100
    assert torch.equal(selector.masked(values), values)


def test_a_second_cut_keeps_fewer():
    values, factor = torch.randn(300, UNITS), torch.randn(300, UNITS)
    selector = Threshold()
    selector.fit(torch.randn(UNITS, 4), None, values, torch.ones(UNITS), torch.ones(UNITS))
    selector.setting = 50
    first, both = selector.keeps(values), selector.keeps(values, factor)
    assert bool((first | ~both).all()) and 0 < int(both.sum()) < int(first.sum())
    selector.setting = 100
    assert selector.keeps(values, factor).all()


def test_select_names_what_keeps_says():
    selector, values = fitted()
    selector.setting = 30
    kept, selection = selector.keeps(values[:7]), selector.select(values[:7])
    assert selection.num_units == UNITS
    for ids, keep in zip(selection.ids, kept, strict=True):
        assert ids[ids >= 0].tolist() == keep.nonzero().flatten().tolist()
    assert selector.select(values[:0]).ids.shape[0] == 0


def test_before_a_fit_nothing_is_selected():
    with pytest.raises(RuntimeError, match="not fitted"):
        Threshold().select(torch.randn(1, 4))


BANK, VALUES = torch.ones(UNITS, 4), torch.ones(5, UNITS)


@pytest.mark.parametrize(
    ("bank", "hidden", "importance"),
    [
        (BANK, None, None),
        (BANK, VALUES[:0], None),
        (BANK, VALUES[:, 1:], None),
        (BANK, VALUES * float("nan"), None),
        (BANK, VALUES, torch.ones(UNITS - 1)),
        (BANK, VALUES, -torch.ones(UNITS)),
        (BANK, VALUES, torch.full((UNITS,), float("nan"))),
        (BANK * float("inf"), VALUES, None),
    ],
)
def test_a_fit_that_failed_leaves_the_old_one(bank, hidden, importance):
    selector, _ = fitted()
    selector.setting = 35
    before = {name: value.clone() for name, value in selector.state_dict().items()}
    with pytest.raises(ValueError, match="must be"):
        selector.fit(bank, None, hidden, importance)
    assert selector.setting == 35
    assert all(torch.equal(value, before[name]) for name, value in selector.state_dict().items())


@pytest.mark.parametrize("setting", [-1, 101])
def test_a_setting_is_a_percentage(setting):
    with pytest.raises(ValueError, match="percentage"):
        Threshold().setting = setting


def test_constant_activations_can_be_fitted():
    selector = Threshold()
    selector.fit(torch.zeros(UNITS, 4), None, torch.zeros(1, UNITS))
    for setting in selector.settings():
        selector.setting = setting
        assert torch.equal(selector.masked(torch.zeros(2, UNITS)), torch.zeros(2, UNITS))


def test_copies_casts_and_states_keep_the_fit():
    selector, values = fitted()
    selector.setting = 25
    kept = selector.keeps(values)
    loaded = Threshold()
    loaded.load_state_dict(selector.state_dict())
    loaded.setting = 25
    for again in (copy.deepcopy(selector), copy.deepcopy(selector).half(), copy.deepcopy(selector).double(), loaded):
        assert again.cut.dtype == torch.float32
        assert torch.equal(again.keeps(values), kept)
    assert Threshold(0.5).to("meta").to_empty(device="cpu").cut.device.type == "cpu"
    assert copy.deepcopy(selector).to("meta").to_empty(device="cpu").cut.shape == (UNITS,)


def test_every_buffer_of_a_setting_stays_float32_after_a_cast():
    selector = Threshold()
    selector.fit(torch.randn(12, 5), None, torch.randn(60, 12), torch.rand(12), torch.rand(12))
    selector.setting = 60
    before = {name: value.clone() for name, value in selector._buffers.items() if value is not None}
    selector.to(torch.bfloat16)
    assert before["centre"].numel() and torch.equal(before["centre"], before["middles"])
    assert all(torch.equal(getattr(selector, name), value) for name, value in before.items())
