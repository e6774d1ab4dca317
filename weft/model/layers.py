"""Which layers are woven, and as what."""

from __future__ import annotations

import functools
import sys

from torch import nn

from weft.model.site import Kind
from weft.model.woven import WovenConv1d, WovenConv2d, WovenEmbedding, WovenLinear

WEAVES: dict[type[nn.Module], tuple[type[nn.Module], Kind]] = {
    nn.Linear: (WovenLinear, "linear"),
    nn.Embedding: (WovenEmbedding, "embedding"),
    nn.Conv2d: (WovenConv2d, "conv"),
    nn.Conv1d: (WovenConv1d, "conv"),
}
PLAIN = {woven: plain for plain, (woven, _) in WEAVES.items()}


@functools.cache
def _woven(kind: type[nn.Module]) -> tuple[type[nn.Module], Kind] | None:
    """The woven class of a class of layers; of a subclass too, if its forward is its parent's with something before or after."""
    if kind in WEAVES:
        return WEAVES[kind]
    parent = next((p for p in WEAVES if issubclass(kind, p)), None)
    code = getattr(kind.forward, "__code__", None)
    if (
        parent is None
        or code is None
        or "__class__" not in code.co_freevars
        or {"linear", "embedding"} & set(code.co_names)
    ):
        return None
    woven, name = WEAVES[parent]
    made = type(kind.__name__, (kind, woven), {"__module__": __name__})
    PLAIN[made] = kind
    return made, name


def layer(module: nn.Module) -> tuple[type[nn.Module], Kind] | None:
    """The woven class of a module, where it can have one."""
    if getattr(module, "groups", 1) != 1 or getattr(module, "max_norm", None) is not None:
        return None
    _know_conv1d()
    return _woven(type(module))


def _know_conv1d() -> None:
    """List GPT-2's layer once transformers has been imported, without which there is none."""
    plain = vars(sys.modules.get("transformers.pytorch_utils", sys)).get("Conv1D")
    if plain is not None and plain not in WEAVES:
        from weft.model.conv1d import WovenConv1D

        WEAVES[plain] = WovenConv1D, "conv1d"
        PLAIN[WovenConv1D] = plain
