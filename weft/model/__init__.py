"""Models: sites, weave, unweave."""

from weft.model.axes import axes
from weft.model.axis import Axis, Part
from weft.model.devices import DeviceMap, dispatch
from weft.model.edges import refusals, set_taps, untap
from weft.model.experts import take_apart
from weft.model.modes import Resident, mode
from weft.model.rounding import Rounding
from weft.model.sharded import gathered, must_be_whole
from weft.model.site import Evidence, Group, Kind, Site, finite
from weft.model.sources import Sources
from weft.model.taps import Tap
from weft.model.transforms import Permute, Rotate, Scale, Select, Transform
from weft.model.transport import rotation, transport, untie
from weft.model.weave import (
    Place,
    expression,
    expressions,
    fingerprint,
    fits,
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
    "Axis", "DeviceMap", "Evidence", "Group", "Kind", "Part", "Permute", "Place", "Resident", "Rotate", "Rounding", "Scale", "Select",
    "Site", "Sources", "Tap", "Transform", "axes", "dispatch", "expression", "expressions", "fingerprint", "finite", "fits", "fork",
    "gathered", "is_woven", "match", "mode", "must_be_whole", "output_sites", "places", "plain_tensors", "refusals", "rotation",
    "set_expressions", "set_taps", "site", "take_apart", "taps", "transport", "untap", "untie", "unweave", "weave",
]  # fmt: skip
