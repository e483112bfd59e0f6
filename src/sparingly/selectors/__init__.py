"""Ways of choosing units, one per file; ``controls.py`` holds the ones that claims are held against."""

from sparingly.selectors.base import Selector
from sparingly.selectors.controls import Dense, Oracle, Random
from sparingly.selectors.graph import Graph
from sparingly.selectors.partition import Partition

__all__ = ["SELECTORS", "Dense", "Graph", "Oracle", "Partition", "Random", "Selector", "selector_class"]

SELECTORS: dict[str, type[Selector]] = {cls.__name__: cls for cls in (Dense, Random, Oracle, Graph, Partition)}
"""Class name -> class. A selector of your own that is to be saved and loaded is one more row."""


def selector_class(name: str) -> type[Selector]:
    """The selector class of that name. Raises ValueError for one that :data:`SELECTORS` does not hold."""
    if name not in SELECTORS:
        raise ValueError(f"selector must be one of {', '.join(sorted(SELECTORS))}, got {name!r}")
    return SELECTORS[name]
