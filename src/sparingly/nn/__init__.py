"""Modules that own banks."""

from sparingly.nn.bag import SelectiveBag
from sparingly.nn.head import SelectiveHead
from sparingly.nn.plan import Plan
from sparingly.nn.tune import Tried, TuneReport

__all__ = ["Plan", "SelectiveBag", "SelectiveHead", "Tried", "TuneReport"]
