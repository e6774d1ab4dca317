"""Read a PEFT LoRA folder onto a woven model: all of it is checked against the model before any of the model changes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from weft.error import (
    ConflictError,
    FormatError,
    NumericError,
    OptionError,
    PathError,
    ShapeError,
    WeftError,
    raise_all,
)
from weft.expr import Expr, LowRank, terms_of, total
from weft.model import Place, expressions, places, set_expressions, taps
from weft.model.devices import device_of
from weft.store.audit import Entry, header
from weft.store.checkpoint import read_object
from weft.store.lora import (
    CONFIG,
    COPY,
    LIMIT,
    MERGE,
    TENSORS,
    Settings,
    brief,
    ends,
    key,
    settings,
    some,
    split,
    unsupported,
)
from weft.store.peft import fingerprint_of_base
from weft.store.swap import MANIFEST, digest, inside, read_manifest
from weft.store.tensors import read_tensors

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_UNVERIFIED = "pass unverified_base=True (--unverified-base)"


def attach(model: nn.Module, folder: Path | str, *, name: str = "default", unverified_base: bool = False) -> list[str]:
    """Add a PEFT LoRA adapter's terms `adapter:NAME` = scale B A, frozen, to a woven model; returns their sites.

    The tensors say which modules are meant; a list of targets must agree with them, a regular expression is never run.
    `unverified_base` takes an adapter whose base cannot be told; one made for other weights is refused all the same.
    Errors, the model being as it was: PathError, FormatError, ShapeError, NumericError, ConflictError, OptionError.
    """
    place, role, sites = Path(folder), _role(model, name), _sites(model)
    _only_plain_files(place)
    table = read_object(place / CONFIG)
    given = settings(table)
    pairs, strays = _pairs(header(place / TENSORS).tensors, sites)
    mark, problems = _manifest(place)
    problems += _other_base(model, given, mark, unverified_base) + unsupported(table, given) + strays
    problems += [p for path in pairs for p in _misfits(model, path, sites[path], pairs[path], given.rank(path))]
    raise_all(problems + _unlike_targets(model, given, set(pairs)))
    held = read_tensors(place / TENSORS)
    raise_all(some([k for k, t in held.items() if _beyond(t, LIMIT)], lambda k: _unsound(k, held[k])))
    now, on = expressions(model), {n: tap for n, tap in taps(model).items() if tap.turns()}
    made: dict[str, Expr] = {}
    for path in pairs:
        site, expr = sites[path].name, now[sites[path].name]
        device = device_of(expr)
        down = held[key(path, "A")].to(device)
        if site in on:  # what it was made for is read before the turns
            down = on[site].turned(down.to(torch.promote_types(down.dtype, torch.float32)))
        term = LowRank(held[key(path, "B")].to(device).clone(), down.clone(), given.scale(path))
        made[site] = total({**terms_of(expr), role: term})
    wrong = {n: count for n, e in made.items() if (count := _overflows(e, places(model)[n].dtype))}
    raise_all(some(list(wrong), lambda n: _overflow(n, f"{wrong[n]} of {math.prod(made[n].shape)} values")))
    set_expressions(model, made)
    return list(made)


def _role(model: nn.Module, name: str) -> str:
    """The terms' role, if the name is sound and free."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise OptionError(
            "an adapter cannot have this name",
            where="name",
            got=repr(name),
            want="letters, digits, _ and -",
            fix="choose another name",
        )
    role = f"adapter:{name}"
    taken = [n for n, e in expressions(model).items() if role in terms_of(e)]
    if taken:
        raise ConflictError(
            "the model has an adapter of this name",
            where=taken[0],
            got=f"{role} at {len(taken)} sites",
            want="a free name",
            fix="attach it under another name",
        )
    return role


def _sites(model: nn.Module) -> dict[str, Place]:
    """Every woven module's site."""
    return {path: place for place in places(model).values() for path in place.modules}


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
            problems.append(_wrong("a file differs from the manifest", name, found["blake2b"], want))
    if not isinstance(mark, str | None):
        problems.append(
            _wrong("a fingerprint is no text", f"{MANIFEST}: base_fingerprint", brief(mark), "32 hex digits")
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


def _pairs(
    found: Mapping[str, Entry], sites: Mapping[str, Place]
) -> tuple[dict[str, dict[str, Entry]], list[WeftError]]:
    """The halves A and B of every module that the model has, and the tensors that belong to none."""
    pairs: dict[str, dict[str, Entry]] = {}
    for name, entry in found.items():
        if at := split(name):
            pairs.setdefault(at[0], {})[at[1]] = entry
    want = f"{key('MODULE', 'A')} and {key('MODULE', 'B')}"
    problems = some(
        [n for n in found if not split(n)],
        lambda n: _wrong("a tensor is no half of a LoRA pair", n, list(found[n].shape), want, MERGE),
    )
    problems += some([path for path in pairs if path not in sites], lambda path: _unknown(path, sites))
    if not pairs:
        problems.append(_wrong("there is no LoRA pair", TENSORS, f"{len(found)} tensors", want))
    return {path: pairs[path] for path in sites if path in pairs}, problems


def _unknown(path: str, sites: Mapping[str, Place]) -> WeftError:
    near = difflib.get_close_matches(path, sites, 3, 0.5)
    want = f"one of the model's; near: {', '.join(near)}" if near else "one of the model's linear layers"
    return _wrong("the adapter is of a module that the model has not", f"{TENSORS}: {path}", path, want)


def _misfits(model: nn.Module, path: str, site: Place, halves: Mapping[str, Entry], rank: int) -> list[WeftError]:
    """Why a module cannot take these tensors."""
    module = model.get_submodule(path)
    if not site.linear or len(site.modules) > 1:
        got = f"a weight shared with {', '.join(p for p in site.modules if p != path)}"
        got = got if len(site.modules) > 1 else type(module).__name__.removeprefix("Woven")
        return [
            ConflictError("the adapter's module takes no LoRA", where=path, got=got, want="a linear layer", fix=MERGE)
        ]
    problems: list[WeftError] = []
    rows, columns = cast(Expr, module.expr).shape
    want = {"A": (rank, columns), "B": (rows, rank)}
    for half, shape in want.items():
        name, entry = key(path, half), halves.get(half)
        if entry is None:
            problems.append(_wrong("half of a pair is missing", name, "no such tensor", f"{list(shape)}"))
        elif entry.shape != shape or entry.dtype not in _FLOATS:
            got = f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
            what, wanted = "a tensor does not fit", f"floats {list(shape)}: rank {rank} by {CONFIG}"
            problems.append(ShapeError(what, where=name, got=got, want=wanted, fix=COPY))
    return problems


def _unlike_targets(model: nn.Module, given: Settings, have: set[str]) -> list[WeftError]:
    """How the pairs differ from a list of targets; a regular expression says nothing."""
    if not isinstance(given.target_modules, list):
        return []
    linear = [path for path, site in _sites(model).items() if site.linear]
    meant = [path for path in linear if given.targets(path)]
    count = f"{len(have.intersection(meant))} of {len(meant)} pairs"
    problems = some(
        [path for path in meant if path not in have],
        lambda path: _wrong(
            "the adapter is incomplete", key(path, "A"), count, "a pair for every module of target_modules"
        ),
    )
    problems += some(
        sorted(have.intersection(linear).difference(meant)),
        lambda path: _wrong(
            "a pair is not meant by the settings", f"{TENSORS}: {path}", path, "a module of target_modules"
        ),
    )
    known = {end for path in linear for end in ends(path)}
    return problems + some(
        [entry for entry in given.target_modules if entry not in known],
        lambda entry: _wrong(
            "a target got no tensor", f"{CONFIG}: target_modules", entry or "''", "a linear layer's name"
        ),
    )


def _beyond(t: Tensor, limit: float) -> int:
    """How many values are NaN or not below `limit` in size."""
    return t.numel() - int((t.to(torch.promote_types(t.dtype, torch.float32)).abs() < limit).sum())


def _unsound(name: str, t: Tensor) -> WeftError:
    got = f"{_beyond(t, LIMIT)} of {t.numel()} values NaN, infinite or at least {LIMIT:g}"
    return NumericError(
        "the adapter holds values that no weight has", where=name, got=got, want="finite values", fix=COPY
    )


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


def _wrong(what: str, where: str, got: object, want: str, fix: str = COPY) -> FormatError:
    return FormatError(what, where=where, got=got, want=want, fix=fix)
