"""Put another PEFT LoRA into the terms that a model has, by writing their numbers: shapes stay, so a compiled model stays compiled."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn

from weft.error import ConflictError, OptionError, WeftError, raise_all
from weft.expr import Expr, LowRank, terms_of
from weft.expr.gated import Gated
from weft.model import expressions, fork
from weft.store.adapter import attach


def hotswap(model: nn.Module, folder: Path | str, *, name: str = "default", unverified_base: bool = False) -> list[str]:
    """Write an adapter's numbers over those of the model's adapter `name`, in place; returns the new one's sites.

    A smaller rank is filled up with zeros, the scale goes into B; sites that the new one has not are zero from now on, and so is
    what the old one had started with. A fork that shares frozen terms with the model has the new numbers too.
    Errors, the model being as it was: those of `attach`; OptionError for a name that no term has; ConflictError, site by
    site, for a rank above the term's, for a site without such a term, and for terms that are no LoRA.
    """
    role, fresh = f"adapter:{name}", f"adapter:{name}-new"
    slots = {n: _bare(t) for n, e in expressions(model).items() if (t := terms_of(e).get(role)) is not None}
    if not slots:
        want, fix = "an adapter of the model", "weft.attach it, or see weft.adapters(model)"
        raise OptionError("there is no such adapter to replace", where="name", got=name, want=want, fix=fix)
    beside = fork(model)
    sites = attach(beside, folder, name=f"{name}-new", unverified_base=unverified_base)
    now = expressions(beside)
    given = {n: terms_of(now[n]).get(fresh) if n in now else None for n in sites}
    raise_all([_no_lora(n, now.get(n)) for n, new in given.items() if not isinstance(new, LowRank)])
    raise_all([p for n in dict.fromkeys([*slots, *given]) if (p := _misfit(n, slots.get(n), given.get(n)))])
    starts = [_bare(t) for e in expressions(model).values() if (t := terms_of(e).get(f"{role}-start")) is not None]
    with torch.no_grad():
        for term in (*starts, *slots.values()):
            for t in term.parameters():
                t.zero_()
        for site, new in given.items():
            _write(cast(LowRank, slots[site]), cast(LowRank, new))
    return sites


def _write(slot: LowRank, new: LowRank) -> None:
    """Fill the first rows and columns of a term of zeros."""
    r, wide = new.a.shape[0], torch.promote_types(new.b.dtype, torch.float32)
    slot.a[:r].copy_(new.a)
    slot.b[:, :r].copy_(new.b.to(wide) * (new.scale / slot.scale))


def _bare(term: Expr) -> Expr:
    return term.kept if isinstance(term, Gated) else term


def _no_lora(site: str, new: Expr | None) -> WeftError:
    """Only a LoRA's numbers can be written over another's."""
    got = new.describe() if new is not None else "no term of a weight"
    fix = "delete the old one (weft.delete_adapter), then attach this one"
    return ConflictError("this adapter cannot replace a LoRA in place", where=site, got=got, want="a LoRA", fix=fix)


def _misfit(site: str, slot: Expr | None, new: Expr | None) -> WeftError | None:
    """Why these numbers do not go there."""
    what, fix = "this adapter cannot be replaced in place", "delete it (weft.delete_adapter), then attach the new one"
    if slot is None:
        return ConflictError(what, where=site, got="no term of that name", want="a term", fix=fix)
    if not isinstance(slot, LowRank) or slot.scale == 0:
        return ConflictError(what, where=site, got=slot.describe(), want="a LowRank term", fix=fix)
    if isinstance(new, LowRank) and new.a.shape[0] > slot.a.shape[0]:
        got, want = f"rank {new.a.shape[0]}", f"at most {slot.a.shape[0]}, the term's"
        return ConflictError(what, where=site, got=got, want=want, fix=fix)
    return None
