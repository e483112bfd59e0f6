"""Make an existing network selective."""

from sparingly.convert._convert import CONTRACT, Change, Changes, convert_, restore_
from sparingly.convert._find import find
from sparingly.convert._place import Place, Skipped

__all__ = ["CONTRACT", "Change", "Changes", "Place", "Skipped", "convert_", "find", "restore_"]
