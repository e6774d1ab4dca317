"""A delta of terms: written, put onto a model by name, made into a model's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weft.error import ConflictError, FormatError, WeftError, raise_all
from weft.expr import Dense, Expr, spec, tensors, terms_of, total, valueless
from weft.model import adapters, add_branch, delete_adapter, expressions, set_expressions, shifts, taps, vectors
from weft.model.branch import may_stand
from weft.model.sites import set_vectors
from weft.progress import Progress, Silent
from weft.store import lossless
from weft.store.adapter import must_be_free, refuse_overflow
from weft.store.checkpoint import checkpoint
from weft.store.delta import COPY, KIND, Delta, beside, card, must_lie_apart, opened
from weft.store.load import changed, find, load
from weft.store.save import FORMAT, save, write_shards
from weft.store.save import base as base_of
from weft.store.swap import may_replace, room, staged
from weft.store.tensors import examine, size_of
from weft.store.trees import broken, expressions_of


def terms(delta: Delta) -> dict[str, Expr]:
    """What it adds, by weight and vector (these as rows [1 n]).

    Errors: ConflictError for a lossless delta; FormatError, ChangedError and NumericError with all that is wrong.
    """
    if delta.lossless:
        got, fix = "a lossless delta", "weft patch BASE DELTA --out OUT makes the model, to the bit"
        raise ConflictError("this delta has no terms", where=str(delta.folder), got=got, want="terms", fix=fix)
    name, manifest = delta.folder.name, delta.manifest
    if manifest.get("sites") == {}:
        return {}
    found = checkpoint(delta.folder, "weft")
    content = found.read()
    sums, problems = examine(content)
    exprs, left, wrong = expressions_of(manifest.get("sites"), content, name)
    problems += [*changed(sums, found, manifest), *wrong, *broken(exprs), *valueless(exprs)]
    if left:
        got, want = sorted(left)[:5], "those of its expressions"
        problems.append(FormatError("unexpected tensors", where=name, got=got, want=want, fix=COPY))
    raise_all(problems)
    return exprs


def patch(model: nn.Module, delta: str | Path, *, name: str = "delta", replace: bool = False) -> list[str]:
    """See `weft.patch`."""
    held = opened(delta)
    there = name in adapters(model)
    if not there or not replace:
        must_be_free(model, name)
    if there and not replace:
        want, fix = "a free name", "give another name, or replace it"
        raise ConflictError("the model has a branch of this name", where="name", got=name, want=want, fix=fix)
    weights, loose = _fitting(model, held)
    added = shifts(model, {n: e.dense() for n, e in loose.items()}, name)
    role = f"adapter:{name}"
    before = {n: {r: t for r, t in terms_of(expressions(model)[n]).items() if r != role} for n in weights}
    refuse_overflow(model, {n: total({**before[n], role: e}) for n, e in weights.items()})
    may_stand(model, *added, instead=name)
    if there:
        delete_adapter(model, name)
    add_branch(model, *added)
    set_expressions(model, {n: total({**terms_of(expressions(model)[n]), role: e}) for n, e in weights.items()})
    return [*weights, *(b.key for b in added)]


def restore(
    base: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    dense: bool = False,
    name: str = "delta",
    replace: bool = False,
    progress: Progress | None = None,
) -> None:
    """See `weft.restore`."""
    held = opened(delta)
    must_lie_apart(Path(out), held.folder)
    may_replace(Path(out).resolve(), replace)
    if held.lossless:
        lossless.restore(find(base), held, Path(out), replace=replace, progress=progress or Silent())
        return
    must_lie_apart(Path(out), find(base))
    made = load(base, progress=progress)
    must_be_free(made, name)
    weights, loose = _fitting(made, held)
    exprs = {n: total({**terms_of(expressions(made)[n]), f"adapter:{name}": e}) for n, e in weights.items()}
    refuse_overflow(made, exprs)
    known = vectors(made)
    set_vectors(made, {n: Dense((known[n].reshape(1, -1) + e.dense()).to(known[n].dtype)) for n, e in loose.items()})
    set_expressions(made, exprs)
    save(made, out, dense=dense, replace=replace, files=beside(held), progress=progress)


def _fitting(model: nn.Module, delta: Delta) -> tuple[dict[str, Expr], dict[str, Expr]]:
    """What a delta adds to weights, and to vectors, of this model. Errors: those of `patch`."""
    delta.must_be_of(base_of(model) or {})
    exprs, sites, loose = terms(delta), expressions(model), vectors(model)
    problems: list[WeftError] = []
    for name, expr in exprs.items():
        want = sites[name].shape if name in sites else (1, loose[name].numel()) if name in loose else None
        if expr.shape != want:
            got = f"{expr.describe()} {list(expr.shape)}"
            said = list(want) if want else "no such weight"
            problems.append(FormatError("a delta does not fit", where=name, got=got, want=said, fix=COPY))
    for name, tap in taps(model).items():
        if name in exprs and tap.turns():
            fix = "weft.untap(model) first, or patch before inputs are turned"
            what, want = "a delta is for plain inputs", "the input as it is"
            problems.append(ConflictError(what, where=name, got=tap.describe(), want=want, fix=fix))
    raise_all(problems)
    return {n: e for n, e in exprs.items() if n in sites}, {n: e for n, e in exprs.items() if n not in sites}


def write(
    model: nn.Module,
    exprs: Mapping[str, Expr],
    out: Path,
    *,
    about: Mapping[str, Any],
    files: Mapping[str, Path],
    replace: bool,
    progress: Progress,
) -> int:
    """Write a delta of the base `model`: what is added, by weight and vector. Returns its tensor bytes. Errors: those of `staged`."""
    content: dict[str, Tensor] = {f"{n}:{path}": t.detach() for n, e in exprs.items() for path, t in tensors(e).items()}
    size = sum(map(size_of, content.values()))
    body = {
        "format": FORMAT,
        "kind": KIND,
        "class": type(model).__name__,
        "sites": {n: spec(e) for n, e in exprs.items()},
        "bytes": size,
        "base": base_of(model),
        **about,
    }
    room(out, size)
    with progress.bar("save", size) as step, staged(out, replace=replace, manifest=body, step=step) as stage:
        for name, path in files.items():
            stage.copy(path, name)
        stage.text("README.md", card(body))
        if content:
            write_shards(stage, content, "weft")
    return size


def rows(delta: Delta) -> list[dict[str, Any]]:
    """What it holds for every weight, for people: `weft show`."""
    if delta.lossless:
        return lossless.rows(delta)
    return [
        {"name": n, "shape": e.shape, "expression": e.describe(), "bytes": e.nbytes(), "bits": e.bits_per_weight()}
        for n, e in terms(delta).items()
    ]
