"""The sites of a model by name and by tag: what a pattern means, and what a method is given. Vectors are sites of one row."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.error import ConflictError, OptionError, ShapeError, WeftError, raise_all
from weft.expr import Dense, Expr
from weft.model.axes import layers
from weft.model.devices import on as on_device
from weft.model.sharded import must_be_whole
from weft.model.site import Group, Site
from weft.model.weave import (
    Original,
    expression,
    first_vectors,
    output_sites,
    places,
    plain_tensors,
    set_expressions,
    tap_at,
)

MATRIX = ("matrix",)
LAYERS = ("key", "value", "down")
"""Weights that make keys or values, and those that read a feed-forward part's inner activations: known by family."""
TAGS = (*MATRIX, "vector", "bias", "norm", *LAYERS)
"""What the `on` of a rewrite can name: all weights, all vectors, of these the biases and what norms hold; layers by family."""


def vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that belong to no expression, by name: norms, biases, position tables; one that is used twice under its first name."""
    held = plain_tensors(model).items()
    return {n: p for n, p in held if isinstance(p, nn.Parameter) and p.is_floating_point()}


def tagged(model: nn.Module, on: Collection[str]) -> dict[str, frozenset[str]]:
    """The sites that have one of these tags, each with those that it has; weights first, in module order.

    Errors: ConflictError if the model has none, and for layers of a family that no table describes.
    """
    found: dict[str, set[str]] = {n: set(MATRIX) for n in places(model)} if "matrix" in on else {}
    for name, tag in layers(model) if set(on) & set(LAYERS) else ():
        found.setdefault(name, set()).add(tag)
    for name, tags in _of_vectors(model).items() if set(on) - {*MATRIX, *LAYERS} else ():
        found[name] = tags
    made = {n: frozenset(tags & set(on)) for n, tags in found.items() if tags & set(on)}
    if not made:
        kind, got, fix = type(model).__name__, f"no {', no '.join(on)}", "choose another method"
        raise ConflictError("the model has no such sites", where=kind, got=got, want=" or ".join(on), fix=fix)
    return made


def _of_vectors(model: nn.Module) -> dict[str, set[str]]:
    """Every vector's tags, from all modules that hold it."""
    names = {id(p): n for n, p in vectors(model).items()}
    made = {n: {"vector"} for n in names.values()}
    for module in model.modules():
        norm = {"norm"} if "Norm" in type(module).__name__ else set[str]()
        for leaf, p in module._parameters.items():  # pyright: ignore[reportPrivateUsage]
            if id(p) in names:
                made[names[id(p)]] |= norm | ({"bias"} if leaf == "bias" or leaf.endswith("_bias") else set[str]())
    return made


def match(model: nn.Module, at: str | Iterable[str], on: Collection[str] = MATRIX) -> list[str]:
    """Sites with one of the tags whose name fits any of these globs: the full name, without `.weight`, or a trailing part (`mlp.*`).

    `all-linear` is every linear layer that is not (tied to) the output head. Errors: OptionError for a pattern that fits nothing;
    those of `tagged`.
    """
    names, known, out = tagged(model, on), places(model), set[str]()
    for pattern in [at] if isinstance(at, str) else at:
        if pattern == "all-linear":
            head = output_sites(model)
            found = [n for n in names if n in known and known[n].linear and n not in head]
        else:
            found = [n for n in names if fits(n, pattern)]
        if not found:
            raise OptionError(
                "a pattern matches no site",
                where="at",
                got=pattern,
                want="a name or glob, such as *.mlp.*" + ("" if on == MATRIX else f", of a {' or '.join(on)}"),
                fix="weft show lists the sites",
            )
        out.update(found)
    return [n for n in names if n in out]


def fits(name: str, pattern: str) -> bool:
    """Whether a name, with or without `.weight`, or a trailing part of it fits a glob."""
    return any(
        fnmatch.fnmatchcase(n, p) for n in (name, name.removesuffix(".weight")) for p in (pattern, f"*.{pattern}")
    )


def site(
    model: nn.Module,
    name: str,
    *,
    evidence: tuple[Any, ...] = (),
    seed: int = 0,
    tags: frozenset[str] = frozenset(),
) -> Site:
    """The site as a method sees it, behind its tap: on the CPU, where evidence is and float64 works, wherever the model is."""
    if name not in places(model):
        return _vector(model, name, seed, tags)
    place = places(model)[name]
    now = on_device(expression(model, place), torch.device("cpu"))
    tap, source = tap_at(model, place), place.original
    turned = source if tap is None or not tap.turns() else lambda: copy.deepcopy(tap).cpu().turned(source().float())
    return Site(name, place.kind, now, turned, evidence, seed, tap, tags)


def _vector(model: nn.Module, name: str, seed: int, tags: frozenset[str]) -> Site:
    """A vector as one row [1 n] over its own storage."""
    p = model.get_parameter(name)
    must_be_whole([(name, p)])
    now = Dense(nn.Parameter(p.detach().cpu().reshape(1, -1), requires_grad=p.requires_grad))
    first = first_vectors(model).get(name, Original(p.detach))
    return Site(name, "vector", now, lambda: first().reshape(1, -1), (), seed, tags=tags)


def put(model: nn.Module, group: Group) -> None:
    """Put a group's expressions in place: weights as they are, vectors as parameters of their own shape. Errors: as below."""
    made, known = {s.name: s.now for s in group}, places(model)
    set_vectors(model, {n: e for n, e in made.items() if n not in known})
    set_expressions(model, {n: e for n, e in made.items() if n in known})


def set_vectors(model: nn.Module, exprs: Mapping[str, Expr]) -> None:
    """Give vectors these values [1 n], trainable where the expression is; the parameter stays one object, so ties hold.

    Errors, before anything changes: ShapeError for what is not one plain row of the vector's length; ConflictError for another
    dtype than the vector has, which is that of the activations beside it.
    """
    raise_all([p for name, expr in exprs.items() if (p := _misfit(name, model.get_parameter(name), expr))])
    for name, expr in exprs.items():
        p = model.get_parameter(name)
        first_vectors(model).setdefault(name, Original(p.detach().clone))
        w = expr.dense()
        p.data = w.detach().reshape(p.shape).to(p.device)
        p.requires_grad_(w.requires_grad)


def _misfit(name: str, p: Tensor, expr: Expr) -> WeftError | None:
    """Why an expression is no value of this vector."""
    if not isinstance(expr, Dense) or expr.shape != (1, p.numel()):
        got, want = f"{expr.describe()} {list(expr.shape)}", f"a plain row of {p.numel()}"
        return ShapeError("a vector has one plain row", where=name, got=got, want=want, fix="keep its shape")
    if expr.w.dtype != p.dtype:
        got, want = (
            f"{expr.describe()} for {str(p.dtype).removeprefix('torch.')}",
            "the dtype that the model computes in",
        )
        fix = "load the model in float32 to train its vectors; autocast makes it fast"
        return ConflictError("a vector cannot change its dtype", where=name, got=got, want=want, fix=fix)
    return None
