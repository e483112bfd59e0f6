"""Modules that own banks."""

from sparingly.nn.bag import SelectiveBag
from sparingly.nn.cascade import Cascade
from sparingly.nn.compiled import CompiledPlan, compile_plan
from sparingly.nn.conv import SelectiveConv
from sparingly.nn.exits import ExitNetwork, add_exits_, train_exits
from sparingly.nn.ffn import SelectiveFFN
from sparingly.nn.gate import Events, Gate
from sparingly.nn.head import SelectiveHead
from sparingly.nn.linear import SelectiveLinear
from sparingly.nn.mlp import SelectiveMLP
from sparingly.nn.plan import Plan
from sparingly.nn.screen_head import ScreenHead
from sparingly.nn.selective import Selective
from sparingly.nn.tune import Tried, TuneReport

__all__ = [
    "Cascade",
    "CompiledPlan",
    "Events",
    "ExitNetwork",
    "Gate",
    "Plan",
    "ScreenHead",
    "Selective",
    "SelectiveBag",
    "SelectiveConv",
    "SelectiveFFN",
    "SelectiveHead",
    "SelectiveLinear",
    "SelectiveMLP",
    "Tried",
    "TuneReport",
    "add_exits_",
    "compile_plan",
    "train_exits",
]
