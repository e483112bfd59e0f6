"""Ways of choosing units, one per file; ``controls.py`` holds the ones that claims are held against."""

from sparingly.selectors.base import Selector
from sparingly.selectors.controls import Dense, Oracle, Random
from sparingly.selectors.experts import Experts
from sparingly.selectors.ferns import Ferns
from sparingly.selectors.graph import Graph
from sparingly.selectors.lowrank import LowRank
from sparingly.selectors.partition import Partition
from sparingly.selectors.product_key import ProductKey
from sparingly.selectors.screen import Screen
from sparingly.selectors.threshold import InputThreshold, Threshold, Zeros
from sparingly.selectors.tree import Tree

__all__ = [
    "SELECTORS",
    "Dense",
    "Experts",
    "Ferns",
    "Graph",
    "InputThreshold",
    "LowRank",
    "Oracle",
    "Partition",
    "ProductKey",
    "Random",
    "Screen",
    "Selector",
    "Threshold",
    "Tree",
    "Zeros",
    "selector_class",
]

SELECTORS: dict[str, type[Selector]] = {
    cls.__name__: cls
    for cls in (
        *(Dense, Random, Oracle),
        *(Graph, Partition, Screen),
        *(Threshold, InputThreshold, Zeros, LowRank),
        *(ProductKey, Experts, Tree),
        Ferns,
    )
}
"""Class name -> class. A selector of your own that is to be saved and loaded is one more row."""


def selector_class(name: str) -> type[Selector]:
    """The selector class of that name. Raises ValueError for one that :data:`SELECTORS` does not hold."""
    if name not in SELECTORS:
        raise ValueError(f"selector must be one of {', '.join(sorted(SELECTORS))}, got {name!r}")
    return SELECTORS[name]
