"""Make an existing network selective."""

from sparingly.convert._convert import CONTRACT, Change, Changes, convert_, restore_
from sparingly.convert._find import Place, Skipped, find

__all__ = ["CONTRACT", "Change", "Changes", "Place", "Skipped", "convert_", "find", "restore_"]
