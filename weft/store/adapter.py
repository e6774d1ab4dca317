"""Read a PEFT folder onto a woven model: all of it is checked against the model before any of the model changes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from weft.error import (
    ConflictError,
    FormatError,
    NumericError,
    OptionError,
    PathError,
    WeftError,
    raise_all,
)
from weft.expr import Expr, terms_of, total
from weft.model import add_branch, expressions, places, set_expressions
from weft.model.adapted import around
from weft.model.sites import set_vectors
from weft.store.audit import header
from weft.store.checkpoint import read_object
from weft.store.peft import KINDS, fingerprint_of_base
from weft.store.peft.kind import Kind
from weft.store.peft.settings import (
    CONFIG,
    COPY,
    LIMIT,
    MERGE,
    SHOWN,
    TENSORS,
    Settings,
    brief,
    some,
    unsupported,
    wrong,
)
from weft.store.swap import MANIFEST, digest, inside, read_manifest
from weft.store.tensors import read_tensors

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_UNVERIFIED = "pass unverified_base=True (--unverified-base)"


def attach(model: nn.Module, folder: Path | str, *, name: str = "default", unverified_base: bool = False) -> list[str]:
    """Put a PEFT adapter of any type in `KINDS` on a woven model, frozen; returns the sites, vectors and branches that have it.

    LoRA and what else adds to a weight is a term `adapter:NAME`, virtual tokens are a branch NAME; IA3 and OFT are sides of a
    weight of this name, LN tuning is in the norms' own values, and has none. The tensors say which modules are meant; a list of targets
    must agree with them, a regular expression is never run. `unverified_base` takes an adapter whose base cannot be told; one
    made for other weights is refused all the same.
    Errors, the model being as it was: PathError, FormatError, ShapeError, NumericError, ConflictError, OptionError.
    """
    place = Path(folder)
    must_be_free(model, name)
    _only_plain_files(place)
    kind, given, odd = settings(read_object(place / CONFIG))
    mark, problems = _manifest(place)
    misfits, make = kind.read(model, given, header(place / TENSORS).tensors)
    raise_all(problems + _other_base(model, given, mark, unverified_base) + odd + misfits)
    held = read_tensors(place / TENSORS)
    raise_all(some([k for k, t in held.items() if _beyond(t, LIMIT)], lambda k: _unsound(k, held[k])))
    change = make(held, name)
    refuse_overflow(model, change.exprs)
    add_branch(model, *change.branches)
    set_vectors(model, change.vectors)
    set_expressions(model, change.exprs)
    return [*change.exprs, *change.vectors, *(b.key for b in change.branches)]


def settings(table: Mapping[str, Any]) -> tuple[Kind, Settings, list[WeftError]]:
    """The type of an adapter, its settings, and those of them under which its value is not known.

    Errors: FormatError naming all that are missing or ill-typed; ConflictError for a type that weft does not read.
    """
    name = table.get("peft_type")
    if not isinstance(name, str) or name not in KINDS:
        problem = (ConflictError if isinstance(name, str) else FormatError)(
            "this kind of adapter cannot be attached",
            where=f"{CONFIG}: peft_type",
            got=brief(name),
            want=", ".join(KINDS),
            fix=MERGE,
        )
        raise problem
    kind = KINDS[name]
    try:
        given = kind.settings.model_validate(table)
    except ValidationError as e:
        bad = {".".join(map(str, p["loc"])): p for p in e.errors()[:SHOWN]}
        got = {k: "nothing" if p["type"] == "missing" else brief(p["input"]) for k, p in bad.items()}
        raise FormatError(
            "the adapter's settings are wrong",
            where=f"{CONFIG}: {', '.join(bad)}",
            got=", ".join(f"{k}={v}" for k, v in got.items()),
            want="; ".join(f"{k}: {p['msg']}" for k, p in bad.items()),
            fix=COPY,
        ) from None
    return kind, given, unsupported(table, given, kind.idle)


def must_be_free(model: nn.Module, name: str) -> None:
    """Refuse a name that is none, or that an adapter's terms have."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise OptionError(
            "an adapter cannot have this name",
            where="name",
            got=repr(name),
            want="letters, digits, _ and -",
            fix="choose another name",
        )
    taken = [n for n, e in expressions(model).items() if f"adapter:{name}" in terms_of(e)]
    taken += [site for site, _ in around(model).get(name, [])]
    if taken:
        raise ConflictError(
            "the model has an adapter of this name",
            where=taken[0],
            got=f"adapter:{name} at {len(taken)} sites",
            want="a free name",
            fix="attach it under another name",
        )


def _only_plain_files(folder: Path) -> None:
    """Refuse a folder whose two files are not there, are pickles, or lie elsewhere."""
    pickles = [p.name for p in ([folder] if isfile(folder) else sorted(folder.glob("*"))) if p.suffix in _PICKLES]
    missing = [name for name in (CONFIG, TENSORS) if not isfile(folder / name)]
    if pickles and TENSORS in missing:
        raise FormatError(
            "an adapter in a pickle is never opened: it could run code",
            where=str(folder),
            got=", ".join(pickles[:3]),
            want=TENSORS,
            fix="save the adapter as safetensors with what made it",
        )
    if missing:
        raise PathError(
            "this is no adapter's folder",
            where=str(folder),
            got=f"no {' and no '.join(missing)}",
            want=f"{CONFIG} and {TENSORS}",
            fix="check the path",
        )
    if outside := [name for name in (CONFIG, TENSORS, MANIFEST) if not inside(folder, folder / name)]:
        raise FormatError(
            "a file of the adapter lies elsewhere",
            where=str(folder),
            got=f"a link out of the folder: {', '.join(outside)}",
            want="files in the folder",
            fix="do not use this adapter",
        )


def _manifest(folder: Path) -> tuple[str | None, list[WeftError]]:
    """The base's fingerprint, if weft wrote the folder, and how its files differ from the manifest."""
    if not isfile(folder / MANIFEST):
        return None, []
    manifest = read_manifest(folder)
    mark = manifest.get("base_fingerprint")
    problems: list[WeftError] = []
    for name in (CONFIG, TENSORS):
        listed, found = manifest["files"].get(name, {}), digest(folder / name)
        if any(listed.get(k) != v for k, v in found.items()):
            want = listed.get("blake2b") or "a listed file"
            problems.append(wrong("a file differs from the manifest", name, found["blake2b"], want))
    if not isinstance(mark, str | None):
        problems.append(
            wrong("a fingerprint is no text", f"{MANIFEST}: base_fingerprint", brief(mark), "32 hex digits")
        )
    return mark if isinstance(mark, str) else None, problems


def _other_base(model: nn.Module, given: Settings, mark: str | None, unverified: bool) -> list[WeftError]:
    """Why the model cannot be taken for the adapter's base."""
    where, got = f"{CONFIG}: base_model_name_or_path", given.base_model_name_or_path or "no base"
    if mark is None:
        known = _names(model)
        if unverified or any(_alike(n, given.base_model_name_or_path or "") for n in known):
            return []
        what, fix = "the adapter names another base than the model's", f"load its base; if this is it, {_UNVERIFIED}"
        return [ConflictError(what, where=where, got=got, want=" or ".join(known) or "a model with a name", fix=fix)]
    try:
        own = fingerprint_of_base(model)
    except PathError as e:
        what, fix = "the model's base cannot be compared with the adapter's", f"{e.fix}, or {_UNVERIFIED}"
        return [] if unverified else [ConflictError(what, where=e.where, got=e.what, want=str(e.want), fix=fix)]
    if own == mark:
        return []
    what, where, fix = (
        "the adapter was made for other weights",
        f"{MANIFEST}: base_fingerprint",
        f"load its base: {got}",
    )
    return [ConflictError(what, where=where, got=mark, want=f"{own}, the model's", fix=fix)]


def _names(model: nn.Module) -> list[str]:
    """The paths and hub ids that the model's pretrained weights are known by."""
    base = model.__dict__.get("_weft_base") or {}
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    return list(dict.fromkeys(str(n) for n in (base.get("path"), model.__dict__.get("_weft_source"), own) if n))


def _alike(mine: str, other: str) -> bool:
    """Whether two names mean one model: the same folder; or, if the other is no folder here, the same last part."""
    try:
        if other and Path(other).is_dir():
            return Path(mine).resolve() == Path(other).resolve()
    except (OSError, ValueError):
        return False
    return _last(other) != "" and _last(mine) == _last(other)


def _last(name: str) -> str:
    """A model's own name: the last part of a path or hub id, which the hub's cache keeps further up."""
    parts = [p for p in name.replace("\\", "/").split("/") if p not in ("", ".")]
    cached = [p.removeprefix("models--").split("--", 1)[-1] for p in parts if p.startswith("models--")]
    return (cached or parts or [""])[-1]


def _beyond(t: Tensor, limit: float) -> int:
    """How many values are NaN or not below `limit` in size."""
    return t.numel() - int((t.to(torch.promote_types(t.dtype, torch.float32)).abs() < limit).sum())


def _unsound(name: str, t: Tensor) -> WeftError:
    got = f"{_beyond(t, LIMIT)} of {t.numel()} values NaN, infinite or at least {LIMIT:g}"
    return NumericError(
        "the adapter holds values that no weight has", where=name, got=got, want="finite values", fix=COPY
    )


def refuse_overflow(model: nn.Module, exprs: Mapping[str, Expr]) -> None:
    """Errors: NumericError naming sites whose value with the adapter is NaN or infinite in the checkpoint's dtype."""
    large = {n: count for n, e in exprs.items() if (count := _overflows(e, places(model)[n].dtype))}
    raise_all(some(list(large), lambda n: _overflow(n, f"{large[n]} of {math.prod(exprs[n].shape)} values")))


def _overflows(expr: Expr, dtype: torch.dtype) -> int:
    """How many values are NaN or infinite in this dtype, of the terms that have values."""
    fixed = total({r: t for r, t in terms_of(expr).items() if t.is_matrix})
    with torch.no_grad():
        return sum(int((~(part.dense().abs() <= torch.finfo(dtype).max)).sum()) for part in fixed.slices())


def _overflow(site: str, got: str) -> WeftError:
    return NumericError(
        "with the adapter a weight is NaN or infinite in its dtype",
        where=site,
        got=got,
        want="finite values",
        fix="check lora_alpha and the adapter's tensors",
    )
