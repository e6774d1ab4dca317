"""A delta to the bit: a checkpoint's tensors, of any dtype, as differences from another's. No model is made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from weft.error import ChangedError, ConflictError, FormatError, ShapeError, WeftError, raise_all
from weft.model.parts import Take
from weft.progress import Progress
from weft.store.audit import DTYPES
from weft.store.checkpoint import checkpoint, read_object
from weft.store.delta import COPY, KIND, Delta, beside, card, differing, must_lie_apart
from weft.store.exact import packed, unpacked
from weft.store.files import told
from weft.store.library import stem_in
from weft.store.save import FORMAT, travelling, write_shards
from weft.store.swap import MANIFEST, may_replace, read_manifest, room, staged
from weft.store.tensors import NAMES, Later, octets, seal, size_of, word_sum


def write(old: Path, new: Path, out: Path, *, replace: bool, progress: Progress) -> tuple[int, int]:
    """Write what the checkpoint `new` has that `old` has not; returns its tensor bytes, and those of `new`. One tensor is in memory.

    Errors: ConflictError for folders that are no plain checkpoints; ShapeError for tensors that one of them lacks or has in another
    shape or kind of dtype, all at once; those of `staged`.
    """
    must_lie_apart(out, old, new)
    may_replace(out.resolve(), replace)
    was, now = _plain(old), _plain(new)
    same = _twins(now, now.keys() - was.keys())
    raise_all(_unlike(was, {n: t for n, t in now.items() if n not in same}))
    said: dict[str, Any] = {n: {"same": other} for n, other in same.items()}
    content: dict[str, Later] = {}
    with told(out):
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with told(out), tempfile.TemporaryFile(dir=out.resolve().parent) as spool:
        with progress.bar("diff", sum(map(size_of, now.values()))) as step:
            for name, t in now.items():
                if name not in same:
                    data, planes = packed(was[name], t)
                    said[name] = {"dtype": NAMES[t.dtype], "sum": word_sum(t), "planes": planes}
                    if data:
                        content[name] = Later(torch.uint8, (len(data),), _again(spool, spool.tell(), len(data)))
                    spool.write(data)
                step(size_of(t))
        size = sum(map(size_of, content.values()))
        body = {
            "format": FORMAT,
            "kind": KIND,
            "class": _class(new),
            "tensors": dict(sorted(said.items())),
            "bytes": size,
            "base": {"path": str(old.resolve()), "seal": seal(was)},
        }
        room(out, size)
        with progress.bar("save", size) as step, staged(out, replace=replace, manifest=body, step=step) as stage:
            for name, path in differing(old, new, config=True).items():
                stage.copy(path, name)
            stage.text("README.md", card(body))
            if content:
                write_shards(stage, content, "weft")
    return size, sum(map(size_of, now.values()))


def restore(old: Path, delta: Delta, out: Path, *, replace: bool, progress: Progress) -> None:
    """Write the checkpoint that a delta was made of, from the base's. Errors: ChangedError for another base; those of `staged`."""
    must_lie_apart(out, old)
    was = _plain(old)
    delta.must_be_of({"path": str(old), "seal": seal(was)})
    said = _entries(delta.manifest)
    if strange := [n for n, e in said.items() if "planes" in e and n not in was]:
        want = "tensors of its base"
        raise FormatError("a delta has other tensors", where=delta.folder.name, got=strange[:5], want=want, fix=COPY)
    data = checkpoint(delta.folder, "weft").read() if any(sum(e.get("planes", ())) for e in said.values()) else {}
    content: dict[str, Later] = {}
    for name, entry in said.items():
        first = entry.get("same", name)
        dtype = DTYPES[said[first]["dtype"]]
        make = _maker(was[first], dtype, data.get(first), said[first], f"{delta.folder.name}: {first}")
        content[name] = Later(dtype, tuple(was[first].shape), make)
    size = sum(map(size_of, content.values()))
    body = {
        "format": FORMAT,
        "kind": "plain",
        "class": delta.manifest.get("class"),
        "sites": {},
        "bytes": size,
        "base": None,
    }
    files = {**travelling(old), "config.json": old / "config.json", **beside(delta)}
    room(out, size)
    with progress.bar("save", size) as step, staged(out, replace=replace, manifest=body, step=step) as stage:
        for name, path in files.items():
            stage.copy(path, name)
        write_shards(stage, content, stem_in(old), set(content))


def rows(delta: Delta) -> list[dict[str, Any]]:
    """What a delta holds for every tensor, for people."""
    return [
        {"name": n, "is": f"that of {e['same']}" if "same" in e else e["dtype"], "bytes": sum(e.get("planes", ()))}
        for n, e in _entries(delta.manifest).items()
    ]


def _plain(folder: Path) -> dict[str, Tensor]:
    """The tensors of a plain checkpoint, mapped. Errors: ConflictError for another kind of folder; those of `checkpoint`."""
    kind = read_manifest(folder).get("kind") if (folder / MANIFEST).is_file() else "plain"
    if kind != "plain":
        want, fix = "a plain checkpoint", "give a budget, or write one: weft export MODEL --to hf --out OUT"
        what = "only plain checkpoints have a lossless difference"
        raise ConflictError(what, where=str(folder), got=f"a folder of kind {kind}", want=want, fix=fix)
    return checkpoint(folder, stem_in(folder)).read()


def _class(folder: Path) -> str:
    said = read_object(folder / "config.json")
    return str(said.get("_class_name") or (said.get("architectures") or ["a model"])[0])


def _twins(held: Mapping[str, Tensor], among: Collection[str]) -> dict[str, str]:
    """Of these names those of tensors that are there under another name too, to the bit, such as tied weights that are stored twice."""
    made: dict[str, str] = {}
    for name in sorted(among):
        t = held[name]
        for other, u in held.items():
            if other not in among and (u.dtype, u.shape) == (t.dtype, t.shape) and bool((octets(u) == octets(t)).all()):
                made[name] = other
                break
    return made


def _unlike(was: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[WeftError]:
    """Tensors that one checkpoint lacks, or has in another shape or kind of dtype."""
    gone = was.keys() - now.keys()
    spare, problems = _twins(was, gone), list[WeftError]()
    for name in sorted(was.keys() | now.keys()):
        old, new = was.get(name), now.get(name)
        if old is not None and new is not None:
            floats = old.is_floating_point() and new.is_floating_point()
            fits = old.shape == new.shape and (floats or old.dtype == new.dtype)
        else:
            fits = name in spare
        if not fits:
            got, want = (f"{t.dtype} {list(t.shape)}" if t is not None else "nothing" for t in (new, old))
            what, fix = "these checkpoints have other tensors", "take the base that the model was tuned from"
            problems.append(ShapeError(what, where=name, got=got, want=want, fix=fix))
    return problems


def _again(spool: IO[bytes], at: int, size: int) -> Callable[[Take | None], Tensor]:
    def make(_: Take | None) -> Tensor:
        spool.seek(at)
        return torch.frombuffer(bytearray(spool.read(size)), dtype=torch.uint8)

    return make


def _maker(
    old: Tensor, dtype: torch.dtype, data: Tensor | None, entry: Mapping[str, Any], where: str
) -> Callable[[Take | None], Tensor]:
    def make(_: Take | None) -> Tensor:
        raw = memoryview(octets(data)) if data is not None else memoryview(b"")
        made = unpacked(old, dtype, raw, entry["planes"], where)
        if (found := word_sum(made)) != entry["sum"]:
            what, want = "a tensor is not what it was made of", entry["sum"]
            raise ChangedError(what, where=where, got=found, want=want, fix=COPY)
        return made

    return make


def _entries(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a manifest says of every tensor. Errors: FormatError with all that cannot be."""
    said: Any = manifest["tensors"]
    if not isinstance(said, dict):
        got, want = type(said).__name__, "tensors by name"
        raise FormatError("a delta has no tensors", where=MANIFEST, got=got, want=want, fix=COPY)
    problems: list[WeftError] = []
    for name, entry in cast("dict[str, Any]", said).items():
        match entry:
            case {"same": str(other)} if isinstance(said.get(other), dict) and "planes" in said[other]:
                continue
            case {"dtype": str(dtype), "sum": str(), "planes": list(planes)} if dtype in DTYPES:
                if all(type(p) is int and p >= 0 for p in planes):
                    continue
            case _:
                pass
        got, want = str(entry)[:100], "a dtype, a sum and planes, or the name of another"
        problems.append(FormatError("a tensor of a delta cannot be read", where=name, got=got, want=want, fix=COPY))
    raise_all(problems)
    return cast("dict[str, dict[str, Any]]", said)
