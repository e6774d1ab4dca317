"""Methods, how they are found, and how they run."""

from weft.engine.method import METHODS, Beats, Method, method
from weft.engine.registry import get, names
from weft.model import Evidence, Group, Site

__all__ = ["METHODS", "Beats", "Evidence", "Group", "Method", "Site", "get", "method", "names"]
