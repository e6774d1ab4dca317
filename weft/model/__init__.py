"""Models: sites, weave, unweave."""

from weft.model.edges import refusals, set_taps, untap
from weft.model.experts import take_apart
from weft.model.rounding import Rounding
from weft.model.site import Evidence, Group, Kind, Site, finite
from weft.model.taps import Tap
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
    taps,
    unweave,
    weave,
)

__all__ = [
    "Evidence", "Group", "Kind", "Place", "Rounding", "Site", "Tap", "expression", "expressions", "fingerprint", "finite", "fork",
    "is_woven", "match", "output_sites", "places", "plain_tensors", "refusals", "set_expressions", "set_taps", "site", "take_apart",
    "taps", "untap", "unweave", "weave",
]  # fmt: skip
