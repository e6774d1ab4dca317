"""Methods, how they are found, and how they run."""

from weft.engine.bench import Bench
from weft.engine.branches import Trunk
from weft.engine.cuts import Tower
from weft.engine.findings import Findings
from weft.engine.method import METHODS, Asks, Beats, Each, Method, method
from weft.engine.outline import Outline, Planned
from weft.engine.registry import get, names
from weft.engine.transports import Span
from weft.model import Evidence, Group, Permute, Rotate, Scale, Scope, Select, Site, Sources

__all__ = [
    "METHODS", "Asks", "Beats", "Bench", "Each", "Evidence", "Findings", "Group", "Method", "Outline", "Permute", "Planned", "Rotate",
    "Scale", "Scope", "Select", "Site", "Sources", "Span", "Tower", "Trunk", "get", "method", "names",
]  # fmt: skip
