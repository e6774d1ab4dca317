"""Small files: JSON and text, read within limits, written whole or not at all; and names that may become paths."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from weft.error import FormatError, PathError, ResourceError, WeftError

MAX_JSON = 25 << 20
"""Bytes of JSON that are read at most: a header of 100,000 tensors takes half of it."""
_MAX_BRACKETS, _MAX_QUOTES = 1_000_000, 8_000_000
_BAD = re.compile(r'[\\:<>"|?*\x00-\x1f\x7f]')
MARK = ".weft-"
"""How the names of temporary files, folders and locks begin: then host, process, and chance."""


def safe_name(name: str) -> bool:
    """Whether a name found in a file may become a path: relative, downward, plain on every system."""
    parts = name.split("/")
    return len(name) <= 512 and not _BAD.search(name) and all(p.strip(" .") and p == p.rstrip(" .") for p in parts)


def must_be_text(path: Path) -> None:
    """Refuse a path with bytes that are no text: other libraries cannot open it. Errors: PathError."""
    try:
        str(path).encode("utf8")
    except UnicodeEncodeError as e:
        got, want = str(path).encode("utf8", "backslashreplace").decode(), "a name in UTF-8"
        raise PathError("a path is no text", where="path", got=got, want=want, fix="rename it") from e


def write_text(path: Path, text: str) -> None:
    """Write a text file whole. Errors: PathError, ResourceError."""
    with beside(path) as part:
        part.write_text(text, "utf8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole: indented, finite numbers only. Errors: PathError, ResourceError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parsed JSON. Errors: PathError, FormatError; duplicate keys, NaN and more than 25 MB are refused."""
    try:
        with path.open("rb") as f:
            raw = f.read(MAX_JSON + 1)
    except OSError as e:
        problem = unreadable(path, e, "a JSON file")
        raise problem from None
    return parse_json(raw, path.name)


def parse_json(raw: bytes, where: str) -> Any:
    """JSON without duplicate keys, NaN or infinity, of bounded size once parsed. Errors: FormatError."""

    def refuse(got: str) -> NoReturn:
        raise FormatError(
            "a file is not JSON",
            where=where,
            got=got,
            want="JSON, unique keys, finite numbers",
            fix="copy the file again",
        ) from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            refuse("a duplicate key")
        return made

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(f"{text[:40]}, which is no finite number")

    if len(raw) > MAX_JSON:
        refuse(f"more than {MAX_JSON} bytes")
    if raw.count(b"[") + raw.count(b"{") > _MAX_BRACKETS or raw.count(b'"') > _MAX_QUOTES:
        refuse("more tables and words than any model has")
    try:
        return json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as e:
        refuse(str(e))


@contextmanager
def beside(path: Path) -> Generator[Path]:
    """A temporary name beside `path` that becomes it at the end, synced; removed if the body fails."""
    part = path.with_name(f"{unique()}.part")
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            sync(part)
            part.replace(path)
            sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


def unique() -> str:
    """A name that no other process or thread has: `.weft-HOST-PROCESS-CHANCE`."""
    return f"{MARK}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def beside_of(out: Path, what: str) -> Path:
    """The one hidden file or folder of a kind (a lock, a part) that belongs to `out`, beside it."""
    return out.with_name(f"{MARK}{what}-{hashlib.blake2b(out.name.encode(), digest_size=6).hexdigest()}")


def owner(name: str) -> tuple[str, int] | None:
    """Host and process of a name that `unique` made; None for another name."""
    found = re.fullmatch(re.escape(MARK) + r"(.+)-(\d+)-[0-9a-f]{8}(\.part|\.old)?", name)
    return (found[1], int(found[2])) if found else None


@contextmanager
def told(out: Path) -> Generator[None]:
    """Failures to write `out` with five fields. Errors: ResourceError for a full disk, PathError for what may not be written."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                "the disk is full",
                where=str(out),
                got=e.strerror,
                want="room for the result",
                fix="free some space, or write elsewhere; nothing was changed",
            ) from e
        raise PathError(
            "this cannot be written",
            where=str(out),
            got=e.strerror or str(e),
            want="a place that can be written",
            fix="check the path, its permissions and the disk; nothing was changed",
        ) from e


def unreadable(path: Path, e: OSError, want: str) -> WeftError:
    """The error for a file that cannot be opened or read."""
    return PathError(
        "a file cannot be read", where=str(path), got=e.strerror or "unreadable", want=want, fix="check the path"
    )


def sync(path: Path) -> None:
    """Force a file's or folder's content to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
