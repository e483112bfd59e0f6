"""Contracts: what they say, that they survive JSON, and that damaged ones are refused."""

import json
import math

import numpy as np
import pytest

from sparingly.contract import Contract
from sparingly.guard import Promise, Step, binomial_upper, walk

PPL = Promise(0.01, relative=True)


def contract(factor: float = 1.0, **rest) -> Contract:
    drops = np.random.default_rng(0).normal(0.004 * factor, 0.01, 300)
    drops[:2] = 0.2
    settings = [{"0.mlp": 90}, {"0.mlp": 70}]
    found = walk(settings, lambda _: drops, PPL)
    given = {"metric": "perplexity", "data_hash": "00", "dense_quality": 12.0, "selective_quality": 12.1}
    return Contract.of(found, PPL, settings, **given, **rest)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("rest", [{}, {"versions": {"torch": "2"}, "date": "2026-01-01"}])
def test_a_contract_survives_json(factor, rest):
    one = contract(factor, **rest)
    values = json.loads(json.dumps(one.as_dict()))
    assert Contract.from_dict(values) == one
    assert ("date" in values) == ("date" in rest)
    assert one.holds == (factor == 1.0)


def test_what_a_contract_says():
    one = contract()
    assert one.setting == {"0.mlp": 70} and one.clipped == 2 and one.clip == 10.0
    assert one.drop is not None and one.upper is not None and one.drop < one.upper < 0.01
    assert one.clipped_upper == pytest.approx(binomial_upper(2, 300, 0.95))
    assert "perplexity" in str(one) and "holds" in str(one) and "2 examples" in str(one)
    none = contract(3.0)
    assert (none.setting, none.drop, none.upper, none.p_value, none.holds) == (None, None, None, None, False)
    assert "nothing passed" in str(none) and "dense" in str(none)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n": "300"}, "n must be int, got '300'"),
        ({"n": True}, "n must be int"),
        ({"max_drop": math.nan}, "max_drop must be float"),
        ({"max_drop": 0}, "max_drop must be more than 0"),
        ({"setting": None}, "last step that passed"),
        ({"drop": 0.5}, "last step that passed"),
        ({"tried": []}, "tried must hold steps"),
        ({"tried": [3]}, r"tried\[0\] must be a mapping, got 3"),
        ({"tried": "x"}, "tried must be tuple"),
        ({"tried": [{"drop": 1.0}]}, r"tried\[0\]: missing \['clipped', 'n', 'p_value', 'passed'\]"),
        ({"extra": 1}, r"unknown \['extra'\]"),
        ({"metric": None}, "metric must be str"),
    ],
)
def test_a_damaged_contract_is_refused(change, message):
    values = contract().as_dict() | change
    with pytest.raises(ValueError, match=message):
        Contract.from_dict(values)


def test_a_truncated_contract_or_one_with_steps_in_disorder_is_refused():
    values = contract().as_dict()
    with pytest.raises(ValueError, match=r"missing \['metric'\]"):
        Contract.from_dict({name: value for name, value in values.items() if name != "metric"})
    with pytest.raises(ValueError, match="must be a mapping"):
        Contract.from_dict([])  # type: ignore[arg-type]
    failed = {"drop": 0.1, "p_value": 1.0, "clipped": 0, "passed": False, "n": 500}
    with pytest.raises(ValueError, match="then at most one that failed"):
        Contract.from_dict(values | {"tried": [failed, *values["tried"]]})
    assert Step(**failed) == Step(0.1, 1.0, 0, False, 500)
