"""A folder that is always whole: stage beside it, hash and sync, manifest last, then exchange."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weft.error import ConflictError, PathError
from weft.store.files import sync, write_json

MANIFEST = "weft.json"


@contextmanager
def staged(out: Path, *, replace: bool, manifest: dict[str, Any]) -> Generator[Path]:
    """A folder to write into that becomes `out` at the end, with `manifest` and every file's size and hash as weft.json.

    Whatever happens, `out` is the old folder or the new one. Errors: ConflictError if `out` exists and is not to be
    replaced, or holds what weft did not write.
    """
    out = out.absolute()
    may_replace(out, replace)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    stage = out.with_name(f"{out.name}.weft-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        files = {str(p.relative_to(stage)): digest(p) for p in sorted(stage.rglob("*")) if p.is_file()}
        for name in files:
            sync(stage / name)
        write_json(stage / MANIFEST, {**manifest, "files": files})
        sync(stage)
        exchange(stage, out)
        sync(out.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def may_replace(out: Path, replace: bool) -> None:
    """Refuse to write over a folder that was not to be replaced, or is not weft's. Errors: ConflictError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not replace:
        raise ConflictError(
            "the output exists already",
            where=str(out),
            got="a folder with files",
            want="a new folder",
            fix="choose another, or replace it",
        )
    if not (out / MANIFEST).exists():
        raise ConflictError(
            "this folder is not weft's to replace",
            where=str(out),
            got=f"no {MANIFEST}",
            want="a folder that weft wrote",
            fix="choose another folder, or empty it",
        )


def digest(path: Path) -> dict[str, int | str]:
    """Size and blake2b-128 of a file."""
    word, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            word.update(chunk)
            size += len(chunk)
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
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, 0):
            raise PathError(
                "a folder cannot be replaced",
                where=str(out),
                got=os.strerror(ctypes.get_errno()),
                want="a writable parent folder",
                fix="check its permissions",
            )
    aside = out.with_name(f"{stage.name}.old")
    out.rename(aside)
    try:
        stage.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside)


def _sweep(out: Path) -> None:
    """Remove stages that dead processes of this machine left beside `out`."""
    mine = f"{out.name}.weft-{socket.gethostname()}-"
    for left in out.parent.glob(f"{out.name}.weft-*"):
        pid = left.name.removeprefix(mine)
        if left.name.startswith(mine) and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def verify(folder: Path) -> list[str]:
    """Every way in which a folder differs from its manifest; empty if it is whole."""
    from weft.store.files import read_json

    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        return [f"{MANIFEST}: no list of files"]
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    problems = [f"{name}: not in the manifest" for name in sorted(found - set(files))]
    for name, want in files.items():
        path = folder / name
        if not inside(folder, path):
            problems.append(f"{name}: leaves the folder")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif digest(path) != want:
            problems.append(f"{name}: content differs from the manifest")
    return problems


def inside(folder: Path, path: Path) -> bool:
    """Whether `path`, links followed, lies in `folder`."""
    root, end = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs"  # the hub's cache links the files of a snapshot there
    return end.is_relative_to(root) or (
        root.parent.name == "snapshots"
        and path.is_symlink()
        and path.parent.resolve().is_relative_to(root)
        and end.is_relative_to(blobs)
    )
