"""Methods, how they are found, and how they run."""

from weft.engine.bench import Bench
from weft.engine.method import METHODS, Beats, Method, method
from weft.engine.registry import get, names
from weft.engine.transports import Span
from weft.model import Evidence, Group, Permute, Rotate, Scale, Select, Site

__all__ = [
    "METHODS", "Beats", "Bench", "Evidence", "Group", "Method", "Permute", "Rotate", "Scale", "Select", "Site", "Span", "get", "method",
    "names",
]  # fmt: skip
