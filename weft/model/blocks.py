"""Where a model repeats: the stack of blocks that evidence and compression go through one at a time."""

from __future__ import annotations

from torch import nn

from weft.error import OptionError
from weft.model.weave import places


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and modules of the longest list of like modules that holds woven sites.

    Errors: OptionError for a model with no such list.
    """
    names = [path for place in places(model).values() for path in place.modules]
    found: list[tuple[int, str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(b) for b in module}) == 1:
            held = sum(n.startswith(f"{path}.") for n in names)
            found.append((held, path, module))
    if not found or max(f[0] for f in found) == 0:
        raise OptionError(
            "this model has no stack of blocks",
            where=type(model).__name__,
            got="no list of like modules",
            want="a transformer",
            fix="use mode dense",
        )
    _, path, module = max(found, key=lambda f: (f[0], -len(f[1])))
    return path, module


def block_of(model: nn.Module, name: str) -> int | None:
    """The block a site belongs to; None outside the stack."""
    path, _ = blocks(model)
    return int(name[len(path) + 1 :].split(".")[0]) if name.startswith(f"{path}.") else None
