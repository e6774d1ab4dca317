"""Single files: safetensors and JSON, written whole or not at all, audited before they are mapped."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.error import FormatError, PathError, WeftError, raise_all

MAX_HEADER = 100 << 20
_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4,
    "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor as a file's header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header(path: Path) -> dict[str, Entry]:
    """The audited header of a safetensors file: every size, offset and dtype checked, nothing mapped.

    Errors: PathError if it is missing, FormatError with every problem found.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = struct.unpack("<Q", f.read(8))[0] if size >= 8 else -1
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise FormatError(
                    "this is no safetensors file",
                    where=path.name,
                    got=f"header of {length} bytes in {size}",
                    want="a header inside the file",
                    fix="copy the file again",
                )
            raw = f.read(length)
    except OSError as e:
        raise PathError(
            "a file cannot be read",
            where=str(path),
            got=e.strerror or "unreadable",
            want="a safetensors file",
            fix="check the path",
        ) from None
    return _audit(path, parse_json(raw, path.name), size - 8 - length)


def _audit(path: Path, table: Any, room: int) -> dict[str, Entry]:
    problems: list[WeftError] = []
    found: dict[str, Entry] = {}

    def bad(name: str, got: object, want: str) -> None:
        problems.append(
            FormatError(
                "a tensor's header is wrong",
                where=f"{path.name}: {name}",
                got=got,
                want=want,
                fix="copy the file again",
            )
        )

    if not isinstance(table, dict):
        raise FormatError(
            "a header is no table",
            where=path.name,
            got=type(table).__name__,
            want="a JSON object",
            fix="copy the file again",
        )
    for name, item in table.items():
        if name == "__metadata__":
            continue
        match item:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)], **rest} if (
                not rest
            ):
                good = dtype in _SIZES and all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in shape)
                if not good or stop - start != math.prod(shape) * _SIZES[dtype] or not 0 <= start <= stop <= room:
                    bad(
                        name,
                        f"{dtype} {shape} at {start}..{stop} of {room}",
                        "dtype, shape and offsets that agree and lie in the file",
                    )
                else:
                    found[name] = Entry(dtype, tuple(shape), start, stop)
            case _:
                bad(name, item, "dtype, shape, data_offsets")
    end = 0
    for name, entry in sorted(found.items(), key=lambda kv: (kv[1].start, kv[1].stop)):
        if entry.start != end:
            bad(name, f"starts at {entry.start}", f"{end}: tensors neither overlap nor leave holes")
        end = entry.stop
    if not problems and end != room:
        bad("(end)", f"{room} bytes", f"{end} bytes of data")
    raise_all(problems)
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of an audited file, mapped from disk (no copy)."""
    header(path)
    with safe_open(path, framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole: beside its place, synced, then renamed. Tensors that share storage are written each."""
    seen: set[int] = set()
    made: dict[str, Tensor] = {}
    for name, t in tensors.items():
        held = t.detach().contiguous()
        shared = held.untyped_storage().data_ptr() in seen
        made[name] = held.clone() if shared else held
        seen.add(made[name].untyped_storage().data_ptr())
    with _beside(path) as part:
        save_file(made, part, metadata={"format": "pt"})


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with _beside(path) as part:
        part.write_text(text, "utf8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole: sorted by nothing, indented, finite numbers only."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parsed JSON. Errors: PathError, FormatError; duplicate keys and NaN are refused."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise PathError(
            "a file cannot be read",
            where=str(path),
            got=e.strerror or "unreadable",
            want="a JSON file",
            fix="check the path",
        ) from None
    return parse_json(raw, path.name)


def parse_json(raw: bytes, where: str) -> Any:
    """JSON without duplicate keys, NaN or infinity. Errors: FormatError."""

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

    try:
        return json.loads(raw, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        refuse(str(e))


@contextmanager
def _beside(path: Path) -> Generator[Path]:
    """A temporary name beside `path` that becomes it at the end, synced; removed if the body fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file's or folder's content to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
