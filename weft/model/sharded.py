"""Models whose parameters are spread over processes (FSDP, tensor parallel): whole again for as long as it takes to save them."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from weft.error import ConflictError


def sharded(t: Tensor) -> bool:
    """Whether a tensor is one process's part of a larger one."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # where it was never imported, nothing is sharded
    return module is not None and isinstance(t, module.DTensor)


def must_be_whole(held: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors that are spread over processes. Errors: ConflictError naming the first."""
    name = next((n for n, t in held if sharded(t)), None)
    if name is not None:
        raise ConflictError(
            "these parameters are spread over processes",
            where=name,
            got="one process's part",
            want="whole parameters",
            fix="in every process: with weft.gathered(model): ...; or do it before fully_shard",
        )


@contextmanager
def gathered(model: nn.Module) -> Generator[nn.Module]:
    """The model as it was before fully_shard, with whole parameters, on the CPU and in the dtype they are kept in; then spread again.

    To save it, export it, or fork it. Every process must enter, since all take part in gathering, and each then holds
    the whole model; one of them writes. What is changed inside is lost.
    """
    modules = list(model.modules())
    for module in modules:
        if hasattr(module, "reshard"):
            cast(Any, module).reshard()  # what a forward left whole may have been cast
    before = [(m, type(m), dict(vars(m))) for m in modules]
    whole: dict[int, nn.Parameter] = {}
    try:
        for module, _, held in before:
            module.__class__ = _class_of(module)
            _set(module, {k: _own(v) for k, v in held.items() if not _theirs(type(k))})
            vars(module)["_parameters"] = {n: _whole(p, whole) for n, p in held["_parameters"].items()}
        yield model
    finally:
        for module, kind, held in before:
            module.__class__ = kind
            _set(module, held)


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The module's own class, under what fully_shard makes of it."""
    return next(c for c in type(module).__mro__ if not _theirs(c))


def _theirs(thing: Any) -> bool:
    """Whether torch.distributed put it there."""
    return str(getattr(thing, "__module__", "")).startswith("torch.distributed.")


def _own(value: Any) -> Any:
    """A module's attribute; of hooks, a table without fully_shard's."""
    if not isinstance(value, OrderedDict):
        return value
    return OrderedDict((k, hook) for k, hook in value.items() if not _theirs(getattr(hook, "hook", hook)))


def _set(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    vars(module).clear()
    vars(module).update(attributes)


def _whole(p: nn.Parameter | None, made: dict[int, nn.Parameter]) -> nn.Parameter | None:
    """A parameter gathered from all processes; one that is used twice is gathered once."""
    if p is None or not sharded(p):
        return p
    if id(p) not in made:
        made[id(p)] = nn.Parameter(cast(Any, p).full_tensor().detach().cpu(), requires_grad=p.requires_grad)
    return made[id(p)]
