"""Run only the parts of a neural network that an input needs, train it that way too, and see what that saved."""

from sparingly.compare import compare
from sparingly.energy import count, measure
from sparingly.nn import Plan, SelectiveBag, SelectiveHead
from sparingly.optim import optimizer
from sparingly.selection import Selection
from sparingly.selectors import Dense, Graph, Oracle, Partition, Random, Selector
from sparingly.store import load, save

__version__ = "0.1.0"

__all__ = [
    "Dense",
    "Graph",
    "Oracle",
    "Partition",
    "Plan",
    "Random",
    "Selection",
    "SelectiveBag",
    "SelectiveHead",
    "Selector",
    "__version__",
    "compare",
    "count",
    "load",
    "measure",
    "optimizer",
    "save",
]
