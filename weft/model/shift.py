"""What tuning adds to norms, biases and the like, as a branch: terms stand beside weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.error import ShapeError
from weft.model.branch import Branch, Call
from weft.model.sites import vectors


class Shift(Branch):
    """Adds to vectors of its host for as long as a call of it lasts: the next so many `values` to each of `paths`, divided by commas."""

    values: Float[Tensor, "k"]
    paths: str

    def check(self, model: nn.Module) -> None:
        known = {id(p) for p in vectors(model).values()}
        held = dict(model.get_submodule(self.at).named_parameters(remove_duplicate=False))
        mine = [held.get(path) for path in self.paths.split(",")]
        count = sum(p.numel() for p in mine if p is not None)
        if any(id(p) not in known for p in mine) or count != len(self.values):
            got, want = f"{len(self.values)} numbers for {self.paths}", f"{count}, for vectors of the host"
            raise ShapeError("a shift does not fit", where=self.key, got=got, want=want, fix="make it for this model")

    def forward(self, host: nn.Module, call: Call, given: dict[str, Any]) -> Any:
        slots: list[tuple[dict[str, Any], str, Tensor]] = []
        at = 0
        try:
            for path in self.paths.split(","):
                owner, _, leaf = path.rpartition(".")
                held = cast("dict[str, Any]", host.get_submodule(owner)._parameters)  # pyright: ignore[reportPrivateUsage]
                p: Tensor = held[leaf]
                slots.append((held, leaf, p))
                wide = torch.promote_types(p.dtype, self.values.dtype)
                held[leaf] = (p.to(wide) + self.values[at : at + p.numel()].view(p.shape).to(wide)).to(p.dtype)
                at += p.numel()
            return call(given)
        finally:
            for held, leaf, p in reversed(slots):
                held[leaf] = p

    def describe(self) -> str:
        return f"Shift({len(self.paths.split(','))})"


def shifts(model: nn.Module, added: Mapping[str, Tensor], name: str) -> list[Shift]:
    """Branches that add these values to vectors, by name: one a block, of what is in no block one a module that owns some.

    A block, the first module on the way that is an item of a list, is called before anything in it is read.
    """
    wanted = {id(p): n for n, p in vectors(model).items() if n in added}
    parts: dict[str, dict[str, Tensor]] = {}
    for path, p in model.named_parameters(remove_duplicate=False):
        if id(p) in wanted:
            host = _host(model, path)
            inner = path.removeprefix(f"{host}.") if host else path
            parts.setdefault(host, {})[inner] = added[wanted[id(p)]].flatten()
    return [Shift(at=at, name=name, values=torch.cat([*h.values()]), paths=",".join(h)) for at, h in parts.items()]


def _host(model: nn.Module, path: str) -> str:
    """The block that a parameter is in, else its owner; of an attention of torch's, which reads its parts' tensors itself, the whole."""
    steps = path.split(".")[:-1]
    above = [".".join(steps[:i]) for i in range(len(steps) + 1)]
    callable_ = [at for at in above if type(model.get_submodule(at)).forward is not nn.Module.forward]
    for at in callable_:
        owner, _, leaf = at.rpartition(".")
        block = leaf.isdigit() and isinstance(model.get_submodule(owner), nn.ModuleList)
        if block or isinstance(model.get_submodule(at), nn.MultiheadAttention):
            return at
    return callable_[-1]
