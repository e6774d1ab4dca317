"""Models: sites, weave, unweave."""

from weft.model.axes import Axis, axes
from weft.model.experts import take_apart
from weft.model.site import Evidence, Group, Kind, Site, finite
from weft.model.transforms import Part, Permute, Rotate, Scale, Select, Transform
from weft.model.transport import rotation, transport, untie
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
    "Axis", "Evidence", "Group", "Kind", "Part", "Permute", "Place", "Rotate", "Scale", "Select", "Site", "Transform", "axes",
    "expression", "expressions", "fingerprint", "finite", "fork", "is_woven", "match", "output_sites", "places", "plain_tensors",
    "rotation", "set_expressions", "site", "take_apart", "transport", "untie", "unweave", "weave",
]  # fmt: skip
