"""Where adapters are in expressions: terms, factors and magnitudes; and the trees without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from weft.error import ConflictError, WeftError
from weft.expr import Diagonal, Expr, Product, Sum, terms_of, total
from weft.expr.fields import each, fields
from weft.expr.named import Named
from weft.expr.weightnorm import WeightNorm
from weft.model.sites import first_vectors
from weft.model.weave import expressions, places

Change = Callable[[dict[str, Expr]], dict[str, Expr]]
"""What becomes of the adapter terms of a sum, by role."""


def name_of(role: str) -> str | None:
    """The adapter that a role belongs to: `adapter:NAME`, or `adapter:NAME-start`, which goes with it."""
    return role.removeprefix("adapter:").removesuffix("-start") if role.startswith("adapter:") else None


def terms_at(model: nn.Module) -> dict[str, list[tuple[str, Expr, bool]]]:
    """By adapter its terms: the site, the term, and whether it stands under a magnitude."""
    found: dict[str, list[tuple[str, Expr, bool]]] = {}

    def look(site: str, expr: Expr, under: bool) -> None:
        if isinstance(expr, Sum):
            for role, term in expr.named().items():
                if (name := name_of(role)) is not None:
                    found.setdefault(name, []).append((site, term, under))
                else:
                    look(site, term, under)
            return
        for kid in expr.kids():
            look(site, kid, under or isinstance(expr, WeightNorm))

    for site, expr in expressions(model).items():
        look(site, expr, False)
    return found


def around(model: nn.Module) -> dict[str, list[tuple[str, Named | WeightNorm]]]:
    """By adapter what it puts around weights, with the site: factors, and the magnitudes that were trained with its terms."""
    found: dict[str, list[tuple[str, Named | WeightNorm]]] = {}
    for site, expr in expressions(model).items():
        for node in expr.modules():
            name = owner(node) if isinstance(node, WeightNorm) else node.name if isinstance(node, Named) else None
            if isinstance(node, Named | WeightNorm) and name is not None:
                found.setdefault(name, []).append((site, node))
    return found


def owner(norm: WeightNorm) -> str | None:
    """The adapter that a magnitude belongs to: the last one in it."""
    return next((name for r in reversed(terms_of(norm.v)) if (name := name_of(r)) is not None), None)


def edited(expr: Expr, change: Change) -> Expr:
    """The tree after a change of every sum's adapter terms; itself where nothing changes."""
    if isinstance(expr, Sum):
        old = expr.named()
        rest = {r: edited(t, change) for r, t in old.items() if name_of(r) is None}
        new = rest | change({r: t for r, t in old.items() if name_of(r) is not None})
        return total(new) if _differs(old, new) else expr
    return _rebuilt(expr, partial(edited, change=change))


def without(expr: Expr, name: str) -> Expr:
    """The tree without what an adapter has in it; itself where that is nothing."""
    if isinstance(expr, WeightNorm) and owner(expr) == name:
        return without(expr.v, name)
    if isinstance(expr, Sum):
        old = expr.named()
        new = {r: t if name_of(r) else without(t, name) for r, t in old.items() if name_of(r) != name}
        return total(new) if _differs(old, new) else expr
    bare = unnamed(expr, lambda f: f.name == name)
    return _rebuilt(bare, partial(without, name=name))


def unnamed(expr: Expr, gone: Callable[[Named], bool]) -> Expr:
    """A product without these factors; itself where there are none."""
    factors = list(expr.kids()) if isinstance(expr, Product) else []
    kept = [f for f in factors if not (isinstance(f, Named) and gone(f))]
    if len(kept) == len(factors):
        return expr
    return kept[0] if len(kept) == 1 else Product(*kept)


def _rebuilt(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """The node with other children; itself where nothing changes."""
    made: dict[str, object] = {}
    for f in (f for f in fields(type(expr)) if f.kind in ("child", "children")):
        held = expr.value(f)
        if _differs(held, new := each(change, held)):
            made[f.name] = new
    return expr.rebuild(**made) if made else expr


def _differs(old: object, new: object) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return list(old) != list(new) or any(old[k] is not new[k] for k in old)
    if isinstance(old, tuple) and isinstance(new, tuple):
        return any(a is not b for a, b in zip(old, new, strict=True))
    return old is not new


def scaled_biases(model: nn.Module, held: Sequence[tuple[str, Named | WeightNorm]], what: str) -> list[WeftError]:
    """Why a factor cannot go: a bias has been scaled with the weight's outputs, as PEFT's IA3 does."""
    first, problems = first_vectors(model), list[WeftError]()
    for site, node in held:
        name = f"{places(model)[site].modules[0]}.bias"
        if not (isinstance(node, Named) and isinstance(node.kept, Diagonal) and name in first):
            continue
        now = model.get_parameter(name).detach()
        was, d = first[name]().to(now), node.kept.d.detach().to(now.device)
        if was.shape == d.shape and not torch.equal(was, now) and torch.equal((was * d).to(now.dtype), now):
            fix = "start from the model without it, or merge it (weft.merge)"
            where, got = f"{site}: {node.name}", f"{name}, which was scaled with it"
            told, want = f"this adapter cannot be {what}", "a bias of its own"
            problems.append(ConflictError(told, where=where, got=got, want=want, fix=fix))
    return problems
