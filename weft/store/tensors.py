"""Tensors in files: mapped when they are read, streamed when they are written, one in memory at a time, summed either way.

The sum of a tensor is that of its bytes as little-endian 64-bit words, the last one filled up with zeros, modulo 2^64. It
is as fast as memory is and changes with any single damaged word: it finds bit rot, not forgery.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from weft.error import ChangedError, NumericError, ShapeError, WeftError
from weft.model.parts import Take
from weft.store import disk
from weft.store.audit import DTYPES, header
from weft.store.behind import Behind
from weft.store.files import beside, told
from weft.store.part import Part

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""What files call a dtype."""
_CHUNK = 16 << 20
_AHEAD, _LOOK = 16 << 20, 1 << 20
"""Bytes that are written while others are made, and numbers that are looked at together."""
_INFINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80_0000, torch.float64: 0x7FF0 << 48}
"""The bits of infinity."""
_OF_READ = "take another copy of the model, or import it with --zero"
_OF_MADE = "look for NaN, infinite or huge values in what it is made of, or leave that out"
Step = Callable[[int], None]


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is written, and then forgotten."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[Take | None], Tensor]
    """Makes it; or hands it on in slices and returns one without values (on meta)."""
    about: Callable[[], str] | None = None
    """A hash of all that it is made from, so that one which a killed process had written is not made again."""
    slices: bool = False
    """Whether it may be handed on in slices."""


Content = Mapping[str, Tensor | Later]


def size_of(t: Tensor | Later) -> int:
    """Bytes of a tensor."""
    return math.prod(t.shape) * t.dtype.itemsize


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of an audited file, mapped from disk (no copy). Errors: PathError, FormatError; ChangedError if the
    file has a seal and its content is another."""
    said = header(path).notes.get("seal")
    with safe_open(path, framework="pt") as f:
        made: dict[str, Tensor] = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    if said is not None and said != seal(made):
        raise ChangedError(
            "a file is damaged", where=str(path), got="other content", want="what was written", fix="delete the file"
        )
    return made


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of an audited file, mapped from disk. Errors: PathError, FormatError."""
    header(path)
    with safe_open(path, framework="pt") as f:
        return f.get_tensor(name)


def laid_out(t: Tensor, beside: Path) -> Tensor:
    """The same values in a file without a name, on the disk where `beside` lies or will, mapped: it is gone with the tensor.

    Unlike memory of a process, the system can take its pages back. Errors: PathError, ResourceError.
    """
    raw = octets(t)
    if not len(raw):
        return t
    folder = next(p for p in beside.resolve().parents if p.exists())
    with told(folder), tempfile.TemporaryFile(dir=folder) as f:
        f.write(raw)
        f.flush()
        held = mmap.mmap(f.fileno(), len(raw))
    return torch.frombuffer(held, dtype=t.dtype).view(t.shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole, sealed with the sum of its content. Errors: PathError, ResourceError."""
    with beside(path) as part:
        stream(part, tensors, {"seal": seal(tensors)}, hashed=False)


def seal(tensors: Mapping[str, Tensor], sums: Mapping[str, str] | None = None) -> str:
    """One number for a set of tensors: the hash of their names, dtypes, shapes and sums (computed if not given)."""
    table = sorted((n, str(t.dtype), list(t.shape), sums[n] if sums else word_sum(t)) for n, t in tensors.items())
    return hashlib.blake2b(json.dumps(table).encode(), digest_size=8).hexdigest()


def stream(
    path: Path,
    content: Content,
    notes: Mapping[str, str] | None = None,
    *,
    hashed: bool = True,
    loose: Collection[str] = (),
    step: Step | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Write a new safetensors file and sync it. Returns its manifest entry: `size`, `blake2b` and the `tensors`' sums.

    Every tensor, or slice of one, goes to the file as it is made, and while the next ones are: together they are no larger than the
    largest tensor, and than 16 MB if they are several.
    Not `hashed`: neither hash nor sums are computed, nor values checked. `resume`: go on with what a killed process left at this path.
    Errors: NumericError for a float tensor with a value that is not finite, unless it is `loose` (or not `hashed`); ShapeError for one
    that is made otherwise than it was announced.
    """
    order = sorted(content, key=lambda n: (-content[n].dtype.itemsize, n))
    head, starts = _head(order, content, notes or {})
    word, most = hashlib.blake2b(head, digest_size=16), max(map(size_of, content.values()), default=0)
    with told(path), ExitStack() as held:
        part = Part(path, head) if resume else None
        f = held.enter_context(part.file if part else path.open("xb"))
        f.write(head)
        under_way = _UnderWay(f, content, starts, hashed, loose, part, step)

        def add(_: str, value: Tensor) -> None:
            word.update(octets(value))

        with Behind(min(_AHEAD, most), under_way.put, *([add] if hashed else [])) as behind:
            for name in order:
                under_way.make(name, behind)
        f.flush()
        os.fsync(f.fileno())
        if part:
            part.over()
    size = len(head) + sum(size_of(t) for t in content.values())
    sums = {name: f"{total:016x}" for name, total in under_way.sums.items()} if hashed else {}
    return {"size": size, "blake2b": word.hexdigest() if hashed else "", "tensors": sums}


@dataclass
class _UnderWay:
    """A file of tensors that are made, and put into it behind that, in the order of their places."""

    file: BinaryIO
    content: Content
    starts: Mapping[str, int]
    hashed: bool
    loose: Collection[str]
    part: Part | None
    step: Step | None
    sums: dict[str, int] = field(default_factory=dict[str, int])
    """Of the words of each tensor, as far as it is there."""
    there: dict[str, int] = field(default_factory=dict[str, int])
    """How many bytes of each."""
    made_from: dict[str, str] = field(default_factory=dict[str, str])

    def make(self, name: str, behind: Behind) -> None:
        """Make a tensor, or take what a killed process had made of it, and give it on."""
        t = self.content[name]
        given = 0

        def take(rows: Tensor) -> None:
            nonlocal given
            given += rows.nbytes
            behind.room(rows.nbytes)
            behind.give(name, rows)

        if not isinstance(t, Later):
            take(t)
            return
        self.made_from[name] = about = t.about() if self.part and t.about else ""
        if (found := self._held(name, t, about)) is not None:
            take(found)
            return
        if not t.slices:
            behind.room(size_of(t))
        value = t.make(take if t.slices else None)
        if value.device.type != "meta":
            take(value)
        if value.dtype != t.dtype or tuple(value.shape) != tuple(t.shape) or given != size_of(t):
            got, want = f"{value.dtype} {list(value.shape)}", f"{t.dtype} {list(t.shape)}, as announced"
            raise ShapeError("a tensor was made otherwise", where=name, got=got, want=want, fix="mend its maker")

    def _held(self, name: str, t: Later, about: str) -> Tensor | None:
        """What a killed process had made of this."""
        if not self.part or not about:
            return None
        like = torch.empty(t.shape, dtype=t.dtype, device="meta")
        found = self.part.held(name, about, self.starts[name], like)
        return found[0] if found is not None and word_sum(found[0]) == found[1] else None

    def put(self, name: str, value: Tensor) -> None:
        """Put a tensor, or the next slice of one, into the file."""
        raw, at = octets(value), self.there.get(name, 0)
        self.file.seek(self.starts[name] + at)
        for i in range(0, len(raw), _CHUNK):
            begun, chunk = self.file.tell(), raw[i : i + _CHUNK]
            self.file.write(chunk)
            self.file.flush()
            disk.write_soon(self.file.fileno(), begun, len(chunk))
            if self.step:
                self.step(len(chunk))
        if self.hashed and name not in self.loose:
            check_finite(value, name, _OF_MADE if isinstance(self.content[name], Later) else _OF_READ)
        if self.hashed or self.part:
            self.sums[name] = (self.sums.get(name, 0) + _words(raw, at % 8)) % (1 << 64)
        self.there[name] = at + len(raw)
        if self.part and self.made_from.get(name) and at + len(raw) == size_of(self.content[name]):
            self.part.note(name, self.made_from[name], f"{self.sums[name]:016x}")


def _head(order: Sequence[str], content: Content, notes: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """How a file with these tensors in this order begins, and where each of them does."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **notes}}
    ends = list(itertools.accumulate((size_of(content[n]) for n in order), initial=0))
    for name, start, end in zip(order, ends, ends[1:], strict=False):
        t = content[name]
        table[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + start for name, start in zip(order, ends, strict=False)}


def examine(
    content: Mapping[str, Tensor], loose: Collection[str] = (), step: Step | None = None
) -> tuple[dict[str, str], list[WeftError]]:
    """Every tensor's sum, and those that have values which are not finite (the `loose` ones may), several at a time."""

    def one(name: str) -> tuple[str, WeftError | None]:
        problem = None
        try:
            if name not in loose:
                check_finite(content[name], name)
        except NumericError as e:
            problem = e
        found = word_sum(content[name])
        done(content[name])
        return found, problem

    sums: dict[str, str] = {}
    problems: list[WeftError] = []
    with disk.reading_ahead(content.values()) as done, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as workers:
        for name, (found, problem) in zip(content, workers.map(one, content), strict=True):
            sums[name] = found
            problems += [problem] if problem else []
            if step:
                step(1)
    return sums, problems


def octets(t: Tensor) -> Any:
    """A tensor's bytes, as an array over its storage where it is contiguous."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def word_sum(t: Tensor) -> str:
    """The sum of a tensor's 64-bit words, 16 hex digits."""
    return f"{_words(octets(t)):016x}"


def _words(raw: Any, ahead: int = 0) -> int:
    """The sum of the words of these bytes, of which the first has so many bytes ahead of them."""
    raw = np.concatenate([np.zeros(ahead, np.uint8), raw]) if ahead else raw
    whole = len(raw) // 8 * 8
    total = int(np.add.reduce(raw[:whole].view("<u8"), dtype=np.uint64)) if whole else 0
    return (total + int.from_bytes(raw[whole:].tobytes(), "little")) % (1 << 64)


def finite(t: Tensor) -> bool:
    """Whether a float tensor has neither NaN nor infinity. As whole numbers, the bits of both are above those of all finite values."""
    flat = t.detach().reshape(-1)
    if t.dtype not in _INFINITE:
        return all(bool(torch.isfinite(part.float()).all()) for part in flat.split(1 << 24))
    if t.device.type != "cpu":
        return not flat.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(flat))).all())
    raw, size = octets(flat), t.dtype.itemsize
    positive, either, least = raw.view(f"<i{size}"), raw.view(f"<u{size}"), _INFINITE[t.dtype]
    return all(
        int(positive[at : at + _LOOK].max()) < least
        and int(either[at : at + _LOOK].max()) < least + (1 << 8 * size - 1)
        for at in range(0, len(either), _LOOK)
    )


def check_finite(t: Tensor, where: str, fix: str = _OF_READ) -> None:
    """Refuse NaN and infinity. Errors: NumericError with the count and the first place."""
    if not t.is_floating_point() or not t.numel():
        return
    flat = t.detach().reshape(-1)
    if finite(flat):
        return
    wrong = torch.cat([~torch.isfinite(part.float()) for part in flat.split(1 << 24)]).nonzero().flatten()
    if not len(wrong):
        return
    first = [int(i) for i in np.unravel_index(int(wrong[0]), t.shape)]
    raise NumericError(
        "a weight is not finite",
        where=where,
        got=f"{len(wrong)} of {t.numel()} values, the first at {first}",
        want="finite numbers",
        fix=fix,
    )
