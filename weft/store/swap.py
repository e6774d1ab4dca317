"""A folder that is always whole: staged beside its place, hashed and synced, the manifest last, then exchanged."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weft.error import ConflictError, FormatError, PathError, ResourceError, WeftError
from weft.progress import Progress, Silent
from weft.store.files import beside_of, must_be_text, read_json, safe_name, sync, told, unique, write_json
from weft.store.lock import claimed, sweep
from weft.store.tensors import Content, Step, read_tensors, stream, word_sum

MANIFEST = "weft.json"


class Stage:
    """A folder that is being written."""

    def __init__(self, path: Path, step: Step | None = None, resume: bool = False) -> None:
        self.path, self.step, self.resume = path, step, resume
        self.files: dict[str, dict[str, Any]] = {}
        """What is written and known: `size`, `blake2b`, and the sums of `tensors`."""

    def tensors(self, name: str, content: Content, loose: Collection[str] = ()) -> None:
        """Write a safetensors file. Errors: NumericError naming a tensor that is neither finite nor `loose`."""
        self.files[name] = stream(self.path / name, content, loose=loose, step=self.step, resume=self.resume)

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text, "utf8")

    def put(self, name: str, held: str | Path) -> None:
        """Write a text file, or copy one."""
        if isinstance(held, Path):
            self.copy(held, name)
        else:
            self.text(name, held)

    def json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        write_json(self.path / name, value)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file's content."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, self.path / name)


@contextmanager
def staged(
    out: Path,
    *,
    replace: bool,
    manifest: Mapping[str, Any],
    keep: bool = False,
    step: Step | None = None,
    resume: bool = False,
) -> Generator[Stage]:
    """A folder to write into that becomes `out` at the end, with `manifest` and every file's size and hash as weft.json.

    Whatever happens, `out` is the old folder or the new one. `keep`: what else the old folder holds besides a model stays.
    `resume`: what a killed process left of it, beside `out`, is gone on with; without, it is removed.
    Errors: ConflictError if `out` exists and is not to be replaced, holds what weft did not write, or is being written;
    ResourceError for a full disk; PathError for a place that cannot be written.
    """
    must_be_text(out)
    out = out.resolve()
    with claimed(out), told(out):
        may_replace(out, replace, keep)
        sweep(out.parent)
        part = beside_of(out, "part")
        if not resume:
            shutil.rmtree(part, ignore_errors=True)
        stage = Stage(part if resume else out.with_name(unique()), step, resume)
        _resumed(stage.path)
        stage.path.mkdir(exist_ok=resume)
        stopped = False
        try:
            yield stage
            _tidied(stage)
            if keep and out.is_dir():
                _carry(out, stage.path)
            for path in sorted(p for p in stage.path.rglob("*") if p.is_file()):
                name = path.relative_to(stage.path).as_posix()
                if name not in stage.files and safe_name(name):
                    sync(path)
                    stage.files[name] = digest(path)
            write_json(stage.path / MANIFEST, {**manifest, "files": dict(sorted(stage.files.items()))})
            sync(stage.path)
            may_replace(out, replace, keep)
            exchange(stage.path, out)
            sync(out.parent)
        except KeyboardInterrupt:
            stopped = resume
            raise
        finally:
            if not stopped:
                shutil.rmtree(stage.path, ignore_errors=True)


def _resumed(part: Path) -> None:
    """Leave of what a killed process staged the tensors alone, and no links."""
    for path in [part, *part.rglob("*")]:
        if path.is_symlink() or (path.is_file() and path.suffix not in (".safetensors", ".made")):
            path.unlink()


def _tidied(stage: Stage) -> None:
    """Remove tensors that this process did not write."""
    for path in stage.path.glob("*"):
        if path.suffix in (".safetensors", ".made") and path.name not in stage.files:
            path.unlink()


def amend(folder: Path, files: Mapping[str, str]) -> None:
    """Replace texts of a folder that weft wrote; it is the old one or the new one. Errors: those of `staged`."""
    manifest = read_manifest(folder)
    known = {n: d for n, d in manifest["files"].items() if n not in files}
    del manifest["files"]
    with staged(folder, replace=True, manifest=manifest) as stage:
        for name in known:
            (stage.path / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / name, stage.path / name)
        stage.files |= known
        for name, text in files.items():
            stage.text(name, text)


def _carry(old: Path, stage: Path) -> None:
    """Take along what an old folder holds that is no part of a model and has no successor."""
    for path in old.rglob("*"):
        to = stage / path.relative_to(old)
        model = path.suffix == ".safetensors" or path.name.endswith(".index.json") or path.name == MANIFEST
        if path.is_file() and not model and not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)


def may_replace(out: Path, replace: bool, keep: bool = False) -> None:
    """Refuse to write over a folder that was not to be replaced, or holds what is not weft's. Errors: ConflictError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not replace:
        raise ConflictError(
            "the output exists already",
            where=str(out),
            got="a folder with files" if out.is_dir() else "a file",
            want="a new folder",
            fix="choose another, or replace it",
        )
    if keep and out.is_dir():
        return
    if not (out / MANIFEST).is_file():
        raise ConflictError(
            "this folder is not weft's to replace",
            where=str(out),
            got=f"no {MANIFEST}",
            want="a folder that weft wrote",
            fix="choose another folder, or empty it",
        )
    known = set(read_manifest(out)["files"]) | {MANIFEST}
    if foreign := sorted(_files(out) - known):
        raise ConflictError(
            "this folder holds files that are not weft's to delete",
            where=str(out),
            got=", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""),
            want="only what its manifest lists",
            fix="move them away, or choose another folder",
        )


def room(out: Path, nbytes: int) -> None:
    """Refuse before any work what the disk has no room for. Errors: ResourceError."""
    parent = next(p for p in out.resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise ResourceError(
            "the disk has no room for the result",
            where=str(out),
            got=f"{free:,} bytes free",
            want=f"{nbytes:,}, beside what is there now",
            fix="free some space, or write elsewhere",
        )


def _files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() or p.is_symlink()}


def digest(path: Path, step: Step | None = None) -> dict[str, Any]:
    """Size and blake2b-128 of a file."""
    word, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as f:
        while chunk := f.read(4 << 20):
            word.update(chunk)
            size += len(chunk)
            if step:
                step(len(chunk))
    return {"size": size, "blake2b": word.hexdigest()}


def exchange(stage: Path, out: Path) -> None:
    """Put `stage` in `out`'s place in one step where the system can (Linux), else by moving `out` aside and back on failure."""
    if not out.exists():
        stage.rename(out)
        return
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2") and libc.renameat2(-100, os.fsencode(stage), -100, os.fsencode(out), 2) == 0:
            return
        if (code := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, 0):
            got, want = os.strerror(code), "a folder that can be exchanged"
            raise PathError("this cannot be written", where=str(out), got=got, want=want, fix="check its permissions")
    aside = out.with_name(f"{stage.name}.old")
    out.rename(aside)
    try:
        stage.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, its `files` sound. Errors: PathError without one, FormatError."""
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(safe_name(n) and _sound(d) for n, d in files.items()):
        raise FormatError(
            "a manifest cannot be read",
            where=f"{folder.name}/{MANIFEST}",
            got="no list of files, or names and hashes that are none",
            want="the manifest that weft wrote",
            fix="copy the folder again from its source",
        )
    return manifest


def _sound(entry: Any) -> bool:
    match entry:
        case {"size": int(), "blake2b": str(), **rest}:
            sums = rest.pop("tensors", {})
            return not rest and isinstance(sums, dict) and all(isinstance(s, str) for s in sums.values())
        case _:
            return False


def verify(folder: Path, progress: Progress | None = None) -> list[str]:
    """Every way in which a folder differs from its manifest, byte for byte; empty if it is whole. Errors: those of `read_manifest`."""
    files = read_manifest(folder)["files"]
    problems = [f"{name}: not in the manifest" for name in sorted(_files(folder) - set(files) - {MANIFEST})]
    total = sum(entry["size"] for entry in files.values())
    with (progress or Silent()).bar("verify", total) as step:
        for name, want in files.items():
            path = folder / name
            if not inside(folder, path):
                problems.append(f"{name}: leaves the folder")
            elif not path.is_file():
                problems.append(f"{name}: missing")
            elif (size := path.stat().st_size) != want["size"]:
                problems.append(f"{name}: {size} bytes, not {want['size']}")
            elif digest(path, step)["blake2b"] != want["blake2b"]:
                problems.append(f"{name}: content differs from the manifest{_where(path, want.get('tensors', {}))}")
    return problems


def _where(path: Path, sums: Mapping[str, str]) -> str:
    """Which tensors of a damaged file are damaged."""
    if not sums:
        return ""
    try:
        held = read_tensors(path)
    except WeftError:  # its header is what is damaged
        return ", in its header"
    wrong = [n for n, t in held.items() if sums.get(n) != word_sum(t)]
    return f", in {', '.join(wrong[:5])}" + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "") if wrong else ""


def inside(folder: Path, path: Path) -> bool:
    """Whether `path`, links followed, lies in `folder`, or in the blobs of the hub's cache that a snapshot links to."""
    root, end = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs"
    return end.is_relative_to(root) or (
        root.parent.name == "snapshots"
        and path.is_symlink()
        and path.parent.resolve().is_relative_to(root)
        and end.is_relative_to(blobs)
    )
