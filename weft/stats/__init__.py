"""Evidence: mergeable sums, the walker, the stats store."""

from weft.stats.evidence import Stats, collect
from weft.stats.fisher import fisher, fishers
from weft.stats.influence import influence, without
from weft.stats.objective import Objective, objective
from weft.stats.walker import Batch, Edges, Walker, forward, readers

__all__ = [
    "Batch", "Edges", "Objective", "Stats", "Walker", "collect", "fisher", "fishers", "forward", "influence", "objective", "readers",
    "without",
]  # fmt: skip
