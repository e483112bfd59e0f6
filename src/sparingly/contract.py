"""What a converted model promises: which drop, how surely, tested on which data, and which setting keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sparingly.guard import Promise, Step, Walk, binomial_upper


@dataclass(frozen=True)
class Contract:
    """What was promised, on which data, and what was chosen. Plain JSON values, saved with the model.

    ``drop``, ``upper`` and ``p_value`` are those of the chosen ``setting`` (layer name -> its selector's setting); all
    four are None if nothing passed, and the model is dense then. ``drop`` is the plain mean, ``upper`` the upper bound
    of the clipped one where ``bound`` is "clipped betting". ``clip``: None if nothing is clipped, else in multiples of
    the limit. ``clipped``: how many of the ``n`` examples were worse than that, for the chosen setting.
    """

    metric: str
    max_drop: float
    confidence: float
    n: int
    data_hash: str
    bound: str
    clip: float | None
    clipped: int
    drop: float | None
    upper: float | None
    p_value: float | None
    setting: dict[str, Any] | None
    dense_quality: float
    selective_quality: float
    tried: tuple[Step, ...]
    versions: dict[str, str] = field(default_factory=dict)
    date: str | None = None

    @classmethod
    def of(cls, found: Walk, promise: Promise, settings: Sequence[Mapping[str, Any]], **rest: Any) -> Contract:
        """The contract of a walk over ``settings``; ``rest``: metric, data_hash, both qualities, versions, date."""
        chosen = None if found.chosen is None else found.tried[found.chosen]
        return cls(
            max_drop=promise.max_drop,
            confidence=promise.confidence,
            n=found.n,
            bound=found.bound,
            clip=promise.clip if found.bound == "clipped betting" else None,
            clipped=chosen.clipped if chosen else 0,
            drop=chosen.drop if chosen else None,
            upper=found.upper,
            p_value=chosen.p_value if chosen else None,
            setting=None if found.chosen is None else dict(settings[found.chosen]),
            tried=found.tried,
            **rest,
        )

    @property
    def holds(self) -> bool:
        """True if a setting kept the promise; False: nothing did, and the model is dense."""
        return self.setting is not None

    @property
    def clipped_upper(self) -> float:
        """Upper confidence bound of the share of examples that lose more than the clip, at the same confidence."""
        return 0.0 if self.clip is None else binomial_upper(self.clipped, self.n, self.confidence)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; ``date`` is left out where there is none."""
        values = asdict(self) | {"tried": [asdict(step) for step in self.tried]}
        return {name: value for name, value in values.items() if name != "date" or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Contract:
        """What :meth:`as_dict` gave. Raises ValueError that names what is missing, foreign, or of the wrong type."""
        _check_fields(cls, values, "contract", frozenset({"date", "versions"}))
        for index, step in enumerate(values["tried"]):
            _check_fields(Step, step, f"contract, tried[{index}]")
        contract = cls(**{**values, "tried": tuple(Step(**step) for step in values["tried"])})
        Promise(contract.max_drop, contract.confidence)
        passed = [step.passed for step in contract.tried]
        chosen = contract.tried[sum(passed) - 1] if any(passed) else None
        if not passed or sum(passed) < len(passed) - 1 or sorted(passed, reverse=True) != passed:
            raise ValueError("contract: tried must hold steps that passed, then at most one that failed")
        ours = (contract.drop, contract.p_value, contract.setting is not None, contract.upper is not None)
        if ours != ((chosen.drop, chosen.p_value, True, True) if chosen else (None, None, False, False)):
            raise ValueError("contract: setting, drop, upper and p_value must be those of the last step that passed")
        return contract

    def __str__(self) -> str:
        asked = f"{self.metric}: a drop of at most {self.max_drop:.3g} at {100 * self.confidence:g} % confidence"
        on = f"{self.n:,} examples, {self.bound}"
        if self.drop is None or self.upper is None:
            lost = f"the densest configuration lost {self.tried[0].drop:.3g}"
            return f"{asked}: nothing passed ({on}); {lost}; the model is dense"
        text = f"{asked}: holds ({on}); estimated {self.drop:.3g}, at most {self.upper:.3g}"
        tail = f"{self.clipped} examples (at most {self.clipped_upper:.2%} of all) lose over {self.clip} times as much"
        return text if self.clip is None else f"{text}; {tail}"


_TYPES = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "None": (type(None),)}
_TYPES |= {"dict": (dict,), "tuple": (list, tuple)}


def _check_fields(cls: type, values: Any, where: str, optional: frozenset[str] = frozenset()) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping, got {values!r}")
    names = {one.name: str(one.type) for one in fields(cls)}
    missing, foreign = sorted(names.keys() - values.keys() - optional), sorted(values.keys() - names.keys())
    if missing or foreign:
        raise ValueError(f"{where}: missing {missing}, unknown {foreign}")
    for name, value in values.items():
        kinds = [kind for part in names[name].split(" | ") for kind in _TYPES[part.split("[")[0]]]
        finite = not isinstance(value, float) or math.isfinite(value)
        if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds) or not finite:
            raise ValueError(f"{where}: {name} must be {names[name]}, got {value!r}")
