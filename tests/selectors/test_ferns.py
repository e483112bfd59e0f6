"""Ferns: comparisons that name rows, the same in every form, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch

import sparingly as sp
from sparingly.energy import count
from sparingly.selectors import selector_class
from sparingly.selectors.ferns import noisy


def ferns(**options) -> sp.Ferns:
    return sp.Ferns((6, 5), **{"ferns": 11, "tests": 3, "window": 3, "margin": 0.3, **options})


def named(selector: sp.Ferns, x: torch.Tensor) -> list[list[int]]:
    """One comparison after the other."""
    found = []
    for row in x.tolist():
        ids = []
        for fern in range(selector.setting):
            bits = [
                row[int(selector.first[test, fern])] - row[int(selector.second[test, fern])]
                > float(selector.cut[test, fern])
                for test in range(selector.tests)
            ]
            flat = [float(selector.cut[test, fern]) < 0 for test in range(selector.tests)]
            number = sum(bit << test for test, bit in enumerate(bits))
            ids.append(-1 if bits == flat else (fern << selector.tests) + number)
        found.append(ids)
    return found


def test_a_fern_names_the_row_of_its_pattern():
    selector, x = ferns(), torch.randn(9, 30)
    chosen = selector.select(x)
    assert chosen.num_units == 88 and chosen.ids.shape == (9, selector.width) and (chosen.ids == -1).any()
    assert chosen.ids.tolist() == named(selector, x)
    # As PyTorch alone does it, for other devices.
    traced = torch.compile(lambda values: selector.select(values).ids, backend="eager")(x)
    assert torch.equal(traced, chosen.ids)


@pytest.mark.parametrize("shape", [7, (6, 5), (3, 4, 5), (2, 9)])
def test_pairs_lie_within_a_window_and_differ(shape):
    selector = sp.Ferns(shape, 200, 5, window=3)
    sizes = (shape,) if isinstance(shape, int) else shape
    assert (selector.first != selector.second).all()
    places = [torch.stack(torch.unravel_index(part.long(), sizes)) for part in (selector.first, selector.second)]
    every = torch.cat(places, dim=1)
    assert ((every.amax(dim=1) - every.amin(dim=1)) < 3).all()
    # Every feature is looked at.
    assert len(set(selector.first.flatten().tolist()) | set(selector.second.flatten().tolist())) == selector.in_features


def test_a_run_of_ferns_covers_the_whole_input():
    selector = sp.Ferns((28, 28), 64, window=7)
    for start in range(0, 64, 16):
        corners = torch.stack(torch.unravel_index(selector.first[:, start : start + 16].long(), (28, 28)))
        assert (corners.amin(dim=(1, 2)) < 7).all() and (corners.amax(dim=(1, 2)) > 20).all()


def test_what_is_flat_names_nothing():
    selector = ferns()
    assert (selector.select(torch.full((2, 30), 3.5)).ids == -1).all()


def test_the_first_ferns_alone():
    selector, x = ferns(), torch.randn(4, 30)
    whole = selector.select(x).ids
    assert selector.settings() == [1, 2, 5, 11]
    selector.setting = 5
    assert torch.equal(selector.select(x).ids, whole[:, :5])


def test_config_state_and_copy_name_alike():
    selector, x = ferns(seed=3), torch.randn(4, 30)
    again = selector_class("Ferns").from_config(selector.config() | {"setting": selector.setting})
    other = ferns(seed=4)
    assert not torch.equal(other.select(x).ids, selector.select(x).ids)
    other.load_state_dict(selector.state_dict())
    for one in (again, other, copy.deepcopy(selector)):
        assert torch.equal(one.select(x).ids, selector.select(x).ids)


def test_noise_is_for_training_only_and_for_half_of_the_tokens():
    torch.manual_seed(0)
    x = torch.randn(400, 30)
    selector = ferns(noise=5.0)
    calm = selector.eval().select(x).ids
    assert torch.equal(calm, selector.select(x).ids)
    moved = (selector.train().select(x).ids != calm).any(dim=1).float().mean()
    assert 0.3 < moved < 0.6
    left = (noisy(x, 5.0) == x).all(dim=1).float().mean()
    assert 0.4 < left < 0.6


def test_count():
    selector, x = ferns().eval(), torch.randn(4, 30)
    with count() as ledger:
        selector.select(x)
    (work,) = [entry for (name, *_), entry in ledger.entries.items() if name == "sparingly::ferns"]
    assert work.macs == 0 and work.other == 2 * 4 * 11 * 3 and work.bytes_written == 4 * 11 * 8


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tests": 17}, r"tests must be in 1\.\.16"),
        ({"window": 1}, "window must be None or at least 2, got 1"),
        ({"margin": -0.1}, "margin must be finite and at least 0"),
        ({"noise": float("inf")}, "noise must be finite"),
        ({"ferns": 0}, "ferns must be a whole number from 1"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        ferns(**options)


def test_bad_inputs():
    with pytest.raises(ValueError, match="at least 2 features"):
        sp.Ferns(1)
    with pytest.raises(ValueError, match=r"11 ferns \* 2 \*\* 3 tests = 88 rows, got 87"):
        ferns().fit(torch.randn(87, 4))
    with pytest.raises(ValueError, match=r"\[tokens, 30\], got \[4, 29\]"):
        ferns().select(torch.randn(4, 29))
