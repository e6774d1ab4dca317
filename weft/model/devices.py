"""Where a model's parts lie: one device, or several accelerators with accelerate's hooks between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from weft.error import OptionError, ResourceError
from weft.expr import Expr, fork, tensors

Model = TypeVar("Model", bound=nn.Module)
DeviceMap = str | torch.device | Mapping[str, str | int | torch.device]
"""`auto`, one device, or devices by module path."""


def device_of(expr: Expr) -> torch.device:
    """Where an expression lies."""
    return next(iter(tensors(expr).values())).device


def on(expr: Expr, device: torch.device) -> Expr:
    """The expression on a device; itself if it lies there, or if there or here are no values (`meta`)."""
    here = device_of(expr)
    return expr if here == device or "meta" in (here.type, device.type) else fork(expr).to(device)


def dispatch(model: Model, where: DeviceMap) -> Model:
    """Put a model's parts on devices, in place: `auto`, one device, or devices by module path (`{"model.layers.0": 0, ...}`).

    A part stays where it is put: accelerators are not lent to weights that lie on the CPU or on disk.
    Errors: OptionError for parts that do not exist or are left out, and for what is not a device's memory; ResourceError
    if `auto` finds no room.
    """
    table = _auto(model) if where == "auto" else where if isinstance(where, Mapping) else {"": where}
    table = {path: _device(d) for path, d in cast(Mapping[str, Any], table).items()}
    _check(model, table)
    devices = set(table.values())
    if len(devices) == 1:
        return model.to(cast(torch.device, devices.pop()))
    from accelerate import dispatch_model

    return cast(Model, dispatch_model(model, cast(Any, table)))


_NOWHERE = ("disk", "meta")


def _device(said: Any) -> Any:
    """The device of this name or number. Errors: OptionError if this machine has none."""
    if said in _NOWHERE:
        return said
    try:
        device = torch.device(said)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as e:
        have = [
            "cpu",
            *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
            *["mps"] * torch.backends.mps.is_available(),
        ]
        raise OptionError(
            "no such device", where="device_map", got=said, want=", ".join(have), fix="name one that is there"
        ) from e
    return device


def _auto(model: nn.Module) -> dict[str, Any]:
    from accelerate import infer_auto_device_map

    whole = getattr(model, "_no_split_modules", None)
    table: dict[str, Any] = infer_auto_device_map(model, no_split_module_classes=list(whole or ()))
    left = [path for path, d in table.items() if d in ("cpu", *_NOWHERE)]
    if any(d in _NOWHERE for d in table.values()) or 0 < len(left) < len(table):
        raise ResourceError(
            "the model does not fit on these devices",
            where=left[0] or type(model).__name__,
            got=f"room for {len(table) - len(left)} of {len(table)} parts",
            want="room for all of them",
            fix='compress it first, or load it with device_map="cpu"',
        )
    return table


def _kind(device: Any) -> str:
    return device.type if isinstance(device, torch.device) else str(device)


def _check(model: nn.Module, table: Mapping[str, Any]) -> None:
    """Errors: OptionError for a table that is not of this model, or that leaves weights where they cannot be used."""
    fix = "name a device for every part; weights on the CPU stay mapped from disk as they are"
    kinds = {_kind(d) for d in table.values()}
    if kinds & set(_NOWHERE) or (len(kinds) > 1 and "cpu" in kinds):
        want = "one device, or several accelerators"
        raise OptionError("weights are not offloaded", where="device_map", got=sorted(kinds), want=want, fix=fix)
    known = {name for name, _ in model.named_modules()}
    if wrong := [path for path in table if path not in known]:
        raise OptionError("no such part", where="device_map", got=wrong[:5], want="a module's path", fix=fix)
    names = [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
    if left := [n for n in names if not any(p == "" or n.startswith(f"{p}.") for p in table)]:
        raise OptionError("some parts have no device", where="device_map", got=left[:5], want="all of them", fix=fix)
