"""The header of a safetensors file, checked before anything is mapped: names, dtypes, shapes, offsets, and limits on each."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weft.error import FormatError, WeftError, raise_all
from weft.store.files import MAX_JSON, parse_json, unreadable

COPY = "copy the file again from its source"
MAX_TENSORS, MAX_DIMS, MAX_DIM = 100_000, 8, 1 << 40
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_TENSOR = re.compile(r"[\w.\-/:+]{1,512}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """One tensor as a file's header describes it; offsets count from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file holds: its tensors, its own notes, and where the data begins."""

    tensors: dict[str, Entry]
    notes: dict[str, str]
    offset: int


def header(path: Path) -> Header:
    """The audited header of a safetensors file. Errors: PathError if it cannot be read, FormatError with every problem found."""
    try:
        with path.open("rb") as f:
            size = f.seek(0, 2)
            f.seek(0)
            length = struct.unpack("<Q", f.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= min(size - 8, MAX_JSON):
                got, want = _head(size, length), "a header inside the file"
                raise FormatError("this is no safetensors file", where=path.name, got=got, want=want, fix=COPY)
            raw = f.read(length)
    except OSError as e:
        problem = unreadable(path, e, "a safetensors file")
        raise problem from None
    table = parse_json(raw, path.name) if raw[:1] == b"{" else None
    if not isinstance(table, dict):
        got, want = ascii(raw[:20]), "a JSON object"
        raise FormatError("a header is no table", where=path.name, got=got, want=want, fix=COPY)
    if len(table) > MAX_TENSORS:
        want = f"at most {MAX_TENSORS}"
        raise FormatError("too many tensors", where=path.name, got=len(table), want=want, fix=COPY)
    notes = table.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise FormatError("a header's notes are no texts", where=path.name, got=notes, want="texts by name", fix=COPY)
    problems: list[WeftError] = []
    found = {n: e for n, item in table.items() if (e := _entry(path.name, n, item, problems))}
    problems += [] if problems else _gaps(path.name, found, size - 8 - length)
    raise_all(problems)
    return Header(found, notes, 8 + length)


def _head(size: int, length: int) -> str:
    return f"{size} bytes" if size < 8 else f"a header of {length} bytes in a file of {size}"


def _entry(file: str, name: str, item: Any, problems: list[WeftError]) -> Entry | None:
    """A tensor's description if it is sound by itself."""
    if not _TENSOR.fullmatch(name):
        want = "letters, digits and . - / : + _, at most 512"
        problems.append(_wrong("a tensor's name is not plain", file, ascii(name[:80]), want))
        return None
    match item:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if len(item) == 3:
            fine = len(shape) <= MAX_DIMS and all(type(d) is int and 0 <= d < MAX_DIM for d in shape)
            if fine and dtype in DTYPES and type(start) is type(stop) is int and 0 <= start <= stop:
                entry = Entry(DTYPES[dtype], tuple(shape), start, stop)
                if stop - start == math.prod(shape) * entry.dtype.itemsize:
                    return entry
        case _:
            pass
    want = "dtype, shape and offsets that agree"
    problems.append(_wrong("a tensor's header is wrong", f"{file}: {name}", item, want))
    return None


def _gaps(file: str, found: dict[str, Entry], room: int) -> Generator[WeftError]:
    """Tensors that overlap, leave holes, or are cut off."""
    end, last = 0, "(start)"
    for name, entry in sorted(found.items(), key=lambda kv: (kv[1].start, kv[1].stop)):
        if entry.start != end:
            got, want = f"starts at {entry.start}", f"{end}, where {last} ends: neither overlaps nor holes"
            yield _wrong("a tensor's header is wrong", f"{file}: {name}", got, want)
        if entry.stop > room:
            got = f"ends at byte {entry.stop} of the data, of which the file has {room}"
            yield _wrong("a file is cut off", f"{file}: {name}", got, "the whole tensor")
            return
        end, last = entry.stop, name
    if end != room:
        yield _wrong("a file holds more than its tensors", file, f"{room} bytes of data", f"{end}")


def _wrong(what: str, where: str, got: object, want: object) -> FormatError:
    return FormatError(what, where=where, got=got, want=want, fix=COPY)
