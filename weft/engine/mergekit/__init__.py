"""mergekit's configurations, read as what weft's merges do."""

from weft.engine.mergekit.plan import Plan, Setting, Slice
from weft.engine.mergekit.read import parse, read
from weft.engine.mergekit.rules import RULES

__all__ = ["RULES", "Plan", "Setting", "Slice", "parse", "read"]
