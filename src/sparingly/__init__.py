"""Run only the parts of a neural network that an input needs, train it that way too, and see what that saved."""

from sparingly.calibrate import calibrate
from sparingly.compare import compare
from sparingly.contract import Contract
from sparingly.convert import convert_, restore_
from sparingly.distributed import average_gradients
from sparingly.energy import count, measure
from sparingly.explain import explain
from sparingly.metrics import accuracy, agreement, perplexity
from sparingly.monitor import Drift, monitor
from sparingly.nn import (
    Cascade,
    Events,
    Gate,
    Plan,
    SelectiveBag,
    SelectiveFFN,
    SelectiveHead,
    add_exits_,
    compile_plan,
    train_exits,
)
from sparingly.nn.scout import distill_scout
from sparingly.optim import optimizer
from sparingly.recover import recover
from sparingly.selection import Selection
from sparingly.selectors import (
    Dense,
    Experts,
    Ferns,
    Graph,
    InputThreshold,
    LowRank,
    Oracle,
    Partition,
    ProductKey,
    Random,
    Screen,
    Selector,
    Threshold,
    Tree,
    Zeros,
)
from sparingly.store import load, save

__version__ = "0.1.0"

__all__ = [
    "Cascade",
    "Contract",
    "Dense",
    "Drift",
    "Events",
    "Experts",
    "Ferns",
    "Gate",
    "Graph",
    "InputThreshold",
    "LowRank",
    "Oracle",
    "Partition",
    "Plan",
    "ProductKey",
    "Random",
    "Screen",
    "Selection",
    "SelectiveBag",
    "SelectiveFFN",
    "SelectiveHead",
    "Selector",
    "Threshold",
    "Tree",
    "Zeros",
    "__version__",
    "accuracy",
    "add_exits_",
    "agreement",
    "average_gradients",
    "calibrate",
    "compare",
    "compile_plan",
    "convert_",
    "count",
    "distill_scout",
    "explain",
    "load",
    "measure",
    "monitor",
    "optimizer",
    "perplexity",
    "recover",
    "restore_",
    "save",
    "train_exits",
]
