"""Results by content: what they depend on is their name, so a run that is repeated, interrupted or extended reuses them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.error import ConflictError, ResourceError, WeftError
from weft.store.files import MARK, owner, read_json, unique, write_json
from weft.store.lock import alive, sweep
from weft.store.tensors import read_tensors, write_tensors


def default() -> Path:
    """`$WEFT_CACHE`, or `~/.cache/weft`. Errors: ResourceError where there is neither."""
    if told := os.environ.get("WEFT_CACHE"):
        return Path(told)
    try:
        return Path.home() / ".cache" / "weft"
    except RuntimeError as e:
        what, want = "there is no place for intermediate results", "a folder to keep them in"
        raise ResourceError(what, where="$HOME", got=str(e), want=want, fix="set WEFT_CACHE to a folder") from e


def key(*parts: Any) -> str:
    """Hash of JSON-able parts."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


class Cache:
    """A folder of results. `hits` counts those that were there, `misses` those that were made; a damaged one is made again.

    Processes may share it: each result is written whole, and while a process uses the cache, nothing is cleaned out of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hits = self.misses = 0

    def json(self, kind: str, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value called `name`, made when it is not there."""
        path = self.folder / kind / f"{name}.json"
        held = self._held(path, read_json)
        if not isinstance(held, dict) or held.get("seal") != key(held.get("value")):
            self.misses += 1
            value = json.loads(json.dumps(make(), allow_nan=False))
            write_json(path, {"seal": key(value), "value": value})
            return value
        self.hits += 1
        return held["value"]

    def tensors(self, kind: str, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors called `name`, made when they are not there; mapped from disk either way."""
        path = self.folder / kind / f"{name}.safetensors"
        held = self._held(path, read_tensors)
        if held is None:
            self.misses += 1
            write_tensors(path, make())
            return read_tensors(path)
        self.hits += 1
        return held

    def path(self, kind: str, name: str) -> Path:
        """A folder of results of its own."""
        place = self.folder / kind / name
        _use(self.folder)
        _touch(place)
        return place

    def _held(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """A result that is there and sound, else None."""
        _use(self.folder)
        try:
            held = read(path)
        except WeftError:
            return None
        _touch(path)
        return held


@dataclass(frozen=True)
class Kept:
    """One result in a cache."""

    kind: str
    path: Path
    bytes: int
    used: float
    """Seconds since 1970."""


def contents(folder: Path) -> list[Kept]:
    """Everything in a cache, the least recently used first."""
    found: list[Kept] = []
    for kind in sorted(p for p in folder.glob("[!.]*") if p.is_dir()):
        for path in kind.iterdir():
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            with suppress(FileNotFoundError):
                used = max((p.stat().st_mtime for p in [path, *files]), default=0.0)
                found.append(Kept(kind.name, path, sum(p.stat().st_size for p in files), used))
    return sorted(found, key=lambda k: (k.used, k.path))


def clean(folder: Path, limit: int = 0) -> tuple[int, int]:
    """Delete the least recently used results until at most `limit` bytes are left. Returns how many, and their bytes.

    Errors: ConflictError while another process uses the cache.
    """
    if busy := [who for who in _users(folder) if who != (socket.gethostname(), os.getpid())]:
        host, pid = busy[0]
        raise ConflictError(
            "the cache is in use",
            where=str(folder),
            got=f"process {pid} on {host}" + (f" and {len(busy) - 1} more" if len(busy) > 1 else ""),
            want="no other process at work",
            fix=f"wait for it; if it is gone, delete {folder / '.users'}",
        )
    for place in [folder, *(p for p in folder.glob("*") if p.is_dir())]:
        sweep(place)
    held = contents(folder)
    left, count, freed = sum(k.bytes for k in held), 0, 0
    for entry in held:
        if left <= limit:
            break
        gone = entry.path.with_name(unique())
        entry.path.rename(gone)
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        left, count, freed = left - entry.bytes, count + 1, freed + entry.bytes
    return count, freed


def _users(folder: Path) -> list[tuple[str, int]]:
    """Processes that use a cache; those of this host that are gone are forgotten."""
    found: list[tuple[str, int]] = []
    for path in (folder / ".users").glob(f"{MARK}*"):
        who = owner(path.name)
        if who is None or (who[0] == socket.gethostname() and not alive(who[1])):
            path.unlink(missing_ok=True)
        else:
            found.append(who)
    return found


@cache
def _enter(folder: Path, pid: int) -> None:
    import atexit

    mark = folder / ".users" / unique()
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    atexit.register(lambda: mark.unlink(missing_ok=True) if os.getpid() == pid else None)


def _use(folder: Path) -> None:
    """Say that this process uses a cache; one that cannot be written can still be read."""
    with suppress(OSError):
        _enter(folder, os.getpid())


def _touch(path: Path) -> None:
    with suppress(OSError):
        os.utime(path, (time.time(), time.time()))
