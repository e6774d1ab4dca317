"""Evidence: mergeable sums, the walker, the stats store."""

from weft.stats.evidence import Stats, collect
from weft.stats.fisher import fisher
from weft.stats.objective import Objective, objective
from weft.stats.walker import Edges, Walker, forward, readers

__all__ = ["Edges", "Objective", "Stats", "Walker", "collect", "fisher", "forward", "objective", "readers"]
