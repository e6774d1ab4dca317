"""Models: sites, weave, unweave."""

from weft.model.adapted import name_of
from weft.model.adapters import Adapter, activate, adapters, delete_adapter, per_row, rename_adapter
from weft.model.axes import axes
from weft.model.axis import Axis, Part
from weft.model.bottleneck import Bottleneck
from weft.model.branch import BRANCHES, Branch, add_branch, begin_step, branches, unbranch
from weft.model.context import Context
from weft.model.cut import cut, stack_of
from weft.model.devices import DeviceMap, dispatch
from weft.model.edges import refusals, set_taps, untap
from weft.model.experts import take_apart
from weft.model.heads import Heads
from weft.model.invertible import Invertible
from weft.model.modes import Resident, mode
from weft.model.pretrained import pretrained
from weft.model.recall import Recall
from weft.model.rounding import Rounding
from weft.model.sharded import gathered, must_be_whole
from weft.model.shift import Shift, shifts
from weft.model.side import Side
from weft.model.site import Evidence, Group, Kind, Site, finite
from weft.model.sites import MATRIX, TAGS, fits, match, put, site, tagged, vectors
from weft.model.soft import harden
from weft.model.sources import Scope, Sources
from weft.model.taps import Tap
from weft.model.transforms import Permute, Rotate, Scale, Select, Transform
from weft.model.transport import rotation, transport, untie
from weft.model.virtual import Prefix, Prompt, own_keys, table_of, trunk
from weft.model.weave import (
    Place,
    expression,
    expressions,
    fingerprint,
    first_vectors,
    fork,
    is_woven,
    output_sites,
    places,
    plain_tensors,
    set_expressions,
    taps,
    unweave,
    weave,
)

__all__ = [
    "BRANCHES", "MATRIX", "TAGS", "Adapter", "Axis", "Bottleneck", "Branch", "Context", "DeviceMap", "Evidence", "Group", "Heads",
    "Invertible", "Kind", "Part", "Permute", "Place", "Prefix", "Prompt", "Recall", "Resident", "Rotate", "Rounding", "Scale", "Scope",
    "Select", "Shift", "Side", "Site", "Sources", "Tap", "Transform", "activate", "adapters", "add_branch", "axes", "begin_step",
    "branches", "cut", "delete_adapter", "dispatch", "expression", "expressions", "fingerprint", "finite", "first_vectors", "fits",
    "fork", "gathered", "harden", "is_woven", "match", "mode", "must_be_whole", "name_of", "output_sites", "own_keys", "per_row",
    "places", "plain_tensors", "pretrained", "put", "refusals", "rename_adapter", "rotation", "set_expressions", "set_taps", "shifts",
    "site", "stack_of", "table_of", "tagged", "take_apart", "taps", "transport", "trunk", "unbranch", "untap", "untie", "unweave",
    "vectors", "weave",
]  # fmt: skip
