"""Modules that own banks."""

from sparingly.nn.bag import SelectiveBag
from sparingly.nn.head import SelectiveHead
from sparingly.nn.tune import Tried, TuneReport

__all__ = ["SelectiveBag", "SelectiveHead", "Tried", "TuneReport"]
