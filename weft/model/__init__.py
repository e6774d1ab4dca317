"""Models: sites, weave, unweave."""

from weft.model.experts import take_apart
from weft.model.modes import Resident, mode
from weft.model.site import Evidence, Group, Kind, Site, finite
from weft.model.weave import (
    Place,
    expression,
    expressions,
    fingerprint,
    fork,
    is_woven,
    match,
    output_sites,
    places,
    plain_tensors,
    set_expressions,
    site,
    unweave,
    weave,
)

__all__ = [
    "Evidence", "Group", "Kind", "Place", "Resident", "Site", "expression", "expressions", "fingerprint", "finite", "fork", "is_woven",
    "match", "mode", "output_sites", "places", "plain_tensors", "set_expressions", "site", "take_apart", "unweave", "weave",
]  # fmt: skip
