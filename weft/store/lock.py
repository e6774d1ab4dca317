"""Who else is at work: a lock says which process holds it and dies with that process. What is right never rests on locks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from weft.error import ConflictError, WeftError
from weft.store.files import MARK, beside_of, owner, read_json, told


@contextmanager
def claimed(out: Path) -> Generator[None]:
    """Hold `out` while something is made for it; in one process, holds nest. Errors: ConflictError if another process holds it."""
    path = beside_of(out, "lock")
    mine = {"folder": out.name, "host": socket.gethostname(), "pid": os.getpid(), "since": _since(os.getpid())}
    with told(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        nested = not _take(path, mine)
    try:
        yield
    finally:
        if not nested:
            path.unlink(missing_ok=True)


@contextmanager
def turn(out: Path, *, patience: float = 1800, every: float = 0.5) -> Generator[None]:
    """Hold `out` as `claimed` does, once whoever holds it is done. Errors: ConflictError after `patience` seconds of waiting."""
    late = time.monotonic() + patience
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(claimed(out))
                break
            except ConflictError:
                if time.monotonic() > late:
                    raise
                time.sleep(every)
        yield


def _take(path: Path, mine: dict[str, str | int]) -> bool:
    """Make the lock; False where this process holds it already."""
    for _ in range(2):
        try:
            with path.open("x") as f:
                f.write(json.dumps(mine))
            return True
        except FileExistsError:
            try:
                held = read_json(path)
            except WeftError:
                held = None
            if held == mine:
                return False
            if isinstance(held, dict) and _holds(held):
                raise ConflictError(
                    "another process is writing this",
                    where=str(path.with_name(str(held.get("folder")))),
                    got=f"process {held.get('pid')} on {held.get('host')}",
                    want="one writer at a time",
                    fix=f"wait for it, write elsewhere, or delete {path} if it is gone",
                ) from None
            path.unlink(missing_ok=True)
    return True


def _holds(held: dict[str, object]) -> bool:
    """Whether a lock's owner may still be at work; an owner on another host always may."""
    host, pid = held.get("host"), held.get("pid")
    if not isinstance(host, str) or not isinstance(pid, int):
        return False
    return host != socket.gethostname() or (alive(pid) and _since(pid) == held.get("since"))


def alive(pid: int) -> bool:
    """Whether a process of this host exists."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _since(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where that cannot be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf8", "replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def sweep(folder: Path) -> None:
    """Remove temporary files and folders that dead processes of this host left in a folder."""
    for left in folder.glob(f"{MARK}*"):
        who = owner(left.name)
        if who is not None and who[0] == socket.gethostname() and not alive(who[1]):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
