"""Change coordinates along the axes of a model: the transform goes into what writes an axis, its inverse into what reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.error import ConflictError, OptionError, WeftError, raise_all
from weft.expr import Expr
from weft.model.axes import axes
from weft.model.axis import KINDS, Axis, Norm, Part
from weft.model.branch import refuse_branches
from weft.model.taps import Tap
from weft.model.transforms import Rotate, Scale, Select, Transform, carried, selectable
from weft.model.weave import Original, Place, expression, expressions, first_vectors, places, taps


def transport(model: nn.Module, changes: Mapping[str, Transform]) -> list[tuple[str, str]]:
    """Change the coordinates of these axes, in place; returns what had to change besides: (where, what).

    Scale, Permute and Rotate leave the model's output as it is, up to rounding to the weights' dtype; Select gives a smaller
    model of the same class. Dense and low-rank terms take new values, other terms get a side; each site's pretrained value is
    seen in the new coordinates from then on. A rotation of the residual axis first folds norms into what reads them, which
    unties a tied head.
    Errors, all at once and before anything changes: OptionError for no such axis; ConflictError for what an axis does not
    admit, with the reason, and for readers behind a tap; ShapeError for a transform of another size; NumericError for one
    that is not finite or has no inverse; ConflictError for branches, which are in today's coordinates.
    """
    refuse_branches(model, "a change of coordinates")
    known, exprs, on = axes(model), expressions(model), taps(model)
    problems = [p for name, by in changes.items() for p in _refusals(known, name, by, exprs, on)]
    raise_all(problems + list(_uneven(known, changes)))
    notes: list[tuple[str, str]] = []
    if any(isinstance(by, Rotate) and known[name].kind == "residual" for name, by in changes.items()):
        notes = _folded(model, known["residual"])
        known = axes(model)
    for name, by in changes.items():
        axis = known[name]
        scales = isinstance(by, Scale)
        for part in (*axis.writers, *(() if scales or isinstance(by, Rotate) else axis.riders)):
            _carry(model, axis, by, part, reads=False)
        for part in axis.readers:
            _carry(model, axis, by, part, reads=True)
    _widths(model, known, changes)
    cast(Any, model)._weft_base = None
    return notes


def _carry(model: nn.Module, axis: Axis, by: Transform, part: Part, *, reads: bool) -> None:
    """One part in the new coordinates."""
    if part.name not in places(model):
        parameter, first = model.get_parameter(part.name), first_vectors(model)
        parameter.data = by.on(parameter.data, part, axis.blocks, axis.size, reads=reads)
        if (was := first.get(part.name)) is not None:
            first[part.name] = Original(lambda: by.on(was(), part, axis.blocks, axis.size, reads=reads))
        return
    place = places(model)[part.name]
    made = carried(expression(model, place), by, part, axis.blocks, axis.size, reads=reads)
    read = place.original

    def moved(read: Original = read) -> Tensor:
        return by.on(read(), part, axis.blocks, axis.size, reads=reads)

    place.original = Original(moved)
    if made.shape != expression(model, place).shape:
        place.shape = tuple(made.shape[::-1] if place.kind == "conv1d" else made.shape)
    for path in place.modules:
        _put(model.get_submodule(path), made)


def _put(module: nn.Module, expr: Any) -> None:
    """The expression, and the features that a linear layer says it has."""
    cast(Any, module).expr = expr
    m, n = expr.shape
    for name, size in {"out_features": m, "in_features": n, "nf": m, "nx": n}.items():
        if hasattr(module, name):
            setattr(module, name, size)


def _refusals(
    known: Mapping[str, Axis], name: str, by: Transform, exprs: Mapping[str, Expr], on: Mapping[str, Tap]
) -> Iterable[WeftError]:
    """Why this transform cannot go to this axis."""
    if name not in known:
        yield OptionError(
            "no such axis", where=name, got=name, want="an axis of this model", fix="weft.axes(model) lists them"
        )
        return
    axis = known[name]
    if not axis.admits(by.kind):
        can = ", ".join(k for k in KINDS if axis.admits(k)) or "nothing"
        yield ConflictError(
            f"this axis does not admit {by.kind}",
            where=name,
            got=axis.refused[by.kind],
            want=can,
            fix="choose another axis",
        )
        return
    read = [(p.name, on[p.name]) for p in axis.readers if p.name in on]
    if problem := by.problem(axis):
        yield problem
    elif read:
        (where, tap), fix = read[0], "change coordinates first, or take the tap off with weft.untap(model)"
        yield ConflictError("an input has a tap", where=where, got=tap.describe(), want="plain inputs", fix=fix)
    elif isinstance(by, Select):
        for part in axis.readers:
            if not selectable(exprs[part.name]):
                what, got = "columns of a compressed weight cannot be selected", exprs[part.name].describe()
                want, fix = "a dense or low-rank weight", "select before compressing"
                yield ConflictError(what, where=part.name, got=got, want=want, fix=fix)


def _uneven(known: Mapping[str, Axis], changes: Mapping[str, Transform]) -> Iterable[WeftError]:
    """Selections that leave axes unlike for which the configuration has one width."""
    for width in dict.fromkeys(known[n].width for n, by in changes.items() if n in known and isinstance(by, Select)):
        alike = [a for a in known.values() if width and a.width == width]
        sizes = {a.name: changes[a.name].size(a.size) if a.name in changes else a.size for a in alike}
        if len(set(sizes.values())) > 1:
            got = ", ".join(f"{n}: {s}" for n, s in list(sizes.items())[:4])
            what, want = "the configuration has one width for all", "the same number everywhere"
            yield ConflictError(what, where=alike[0].name, got=got, want=want, fix="select as many of each")


def rotation(axis: Axis, *, seed: int = 0) -> Rotate:
    """A random rotation that the axis admits: Haar in each block; where norms subtract the mean it keeps the vector of ones."""
    d = axis.size // axis.blocks
    rng = torch.Generator().manual_seed(seed)
    free = d - 1 if axis.centred else d
    q = torch.randn(axis.blocks, free, free, generator=rng, dtype=torch.float64)
    q, r = torch.linalg.qr(q)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    if not axis.centred:
        return Rotate(q)
    u = torch.ones(d, dtype=torch.float64)  # the mirror takes the ones to the first axis, and back
    u[0] += d**0.5
    mirror = torch.eye(d, dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u)
    inner = torch.block_diag(torch.eye(1, dtype=torch.float64), q[0])
    return Rotate((mirror @ inner @ mirror).unsqueeze(0))


def _folded(model: nn.Module, axis: Axis) -> list[tuple[str, str]]:
    """Fold every norm's weight and bias into what reads it. Errors: ConflictError where a bias has no place to go."""
    stuck = [
        f"{n.name}.bias: {p.name} has no bias"
        for n in axis.norms
        for p in n.readers
        if _moves(model, n) and _bias(model, p) is None
    ]
    if stuck:
        want, fix = "a reader with a bias", "leave the residual axis as it is"
        raise ConflictError("a norm's bias cannot be folded", where="residual", got=stuck[0], want=want, fix=fix)
    folded = {f"{n.name}.{leaf}" for n in axis.norms for leaf in ("weight", "bias")}
    folded |= {f"{_reader(model, p)}.bias" for n in axis.norms for p in n.readers}
    if changed := [n for n in first_vectors(model) if n in folded]:
        got, want = (
            "a value that is not the pretrained one",
            "pretrained norms and biases, which fold into both values of a weight",
        )
        fix = "rotate first, or weft.unweave(model) and weave it again: today's values are then the first ones"
        raise ConflictError("a vector that was changed cannot be folded", where=changed[0], got=got, want=want, fix=fix)
    notes = untie(model)
    for norm in (a for a in axes(model)["residual"].norms):
        weight = model.get_parameter(f"{norm.name}.weight")
        by = Scale(1 / (weight.data.cpu().double() + norm.offset))
        for part in norm.readers:
            if _moves(model, norm):
                into = cast(nn.Parameter, _bias(model, part))
                gain = _matrix(model, part) @ model.get_parameter(f"{norm.name}.bias").data.float()
                into.data = (into.data.float() + gain).to(into.dtype)
            _carry(model, replace(axis, size=len(weight), blocks=1), by, part, reads=True)
        weight.data = torch.full_like(weight.data, 1 - norm.offset)
        if _moves(model, norm):
            bias = model.get_parameter(f"{norm.name}.bias")
            bias.data = torch.zeros_like(bias.data)
    return notes


def _moves(model: nn.Module, norm: Norm) -> bool:
    """Whether a norm adds something."""
    bias = getattr(model.get_submodule(norm.name), "bias", None)
    return bias is not None and bool((bias != 0).any())


def _matrix(model: nn.Module, part: Part) -> Tensor:
    return (
        expressions(model)[part.name].dense().detach()
        if part.name in places(model)
        else model.get_parameter(part.name).data
    ).float()


def _reader(model: nn.Module, part: Part) -> str:
    """The path of the module that reads."""
    known = places(model)
    return known[part.name].modules[-1] if part.name in known else part.name.rpartition(".")[0]


def _bias(model: nn.Module, part: Part) -> nn.Parameter | None:
    """The bias of the module that reads."""
    return cast(nn.Parameter | None, getattr(model.get_submodule(_reader(model, part)), "bias", None))


def untie(model: nn.Module) -> list[tuple[str, str]]:
    """Give the output head a weight of its own where it is tied to an embedding, and say so in the configuration."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    for name, place in list(places(model).items()):
        path = next((p for p in place.modules if model.get_submodule(p) is head), None)
        if path is None or len(place.modules) < 2:
            continue
        rest = tuple(p for p in place.modules if p != path)
        own = Place(f"{path}.weight", "linear", (path,), place.original, place.dtype, place.shape)
        places(model)[name] = replace(place, modules=rest)
        places(model)[own.name] = own
        cast(Any, model).config.tie_word_embeddings = False
        return [(own.name, f"untied from {name}: the model is larger by its bytes")]
    return []


def _widths(model: nn.Module, known: Mapping[str, Axis], changes: Mapping[str, Transform]) -> None:
    """The configuration's widths after a selection."""
    config = cast(Any, model).config
    chosen = {
        known[n].width: (known[n].size, by.size(known[n].size)) for n, by in changes.items() if isinstance(by, Select)
    }
    for keys, (before, after) in chosen.items():
        for key in keys:
            setattr(config, key, getattr(config, key) // before * after if getattr(config, key) is not None else after)
