"""Models: sites, weave, unweave."""

from weft.model.devices import DeviceMap, dispatch
from weft.model.experts import take_apart
from weft.model.sharded import gathered, must_be_whole
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
    "DeviceMap", "Evidence", "Group", "Kind", "Place", "Site", "dispatch", "expression", "expressions", "fingerprint", "finite", "fork",
    "gathered", "is_woven", "match", "must_be_whole", "output_sites", "places", "plain_tensors", "set_expressions", "site", "take_apart",
    "unweave", "weave",
]  # fmt: skip
