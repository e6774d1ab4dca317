"""A file of tensors that a killed process left unfinished: what stands in it as it was made is not made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor


class Part:
    """A file under way and, beside it, `NAME.made`: a line for every tensor in it, with what it was made from and its sum."""

    def __init__(self, path: Path, head: bytes) -> None:
        """Go on with the file, where it begins with this head, or begin anew."""
        self._path = path
        self.notes = path.with_name(f"{path.name}.made")
        begun = path.is_file() and self.notes.is_file() and _head(path, len(head)) == head
        self._made = dict(_lines(self.notes)) if begun else {}
        if not begun:
            path.unlink(missing_ok=True)
            self.notes.unlink(missing_ok=True)
        self.file: BinaryIO = path.open("r+b" if begun else "x+b")

    def held(self, name: str, about: str, start: int, like: Tensor) -> tuple[Tensor, str] | None:
        """The tensor that stands there, in the dtype and shape of `like`, and the sum that it should have; None if it is not noted."""
        made_from, total = self._made.get(name, ("", ""))
        if made_from != about:
            return None
        with self._path.open("rb") as f:  # while others are written
            f.seek(start)
            raw = bytearray(f.read(like.numel() * like.element_size()))
        if len(raw) != like.numel() * like.element_size() or not raw:
            return None
        return torch.frombuffer(raw, dtype=like.dtype).view(like.shape), total

    def note(self, name: str, about: str, total: str) -> None:
        """Note that a tensor stands in the file."""
        with self.notes.open("a") as f:
            f.write(json.dumps([name, about, total]) + "\n")

    def over(self) -> None:
        """Close the file, which is whole."""
        self.file.close()
        self.notes.unlink(missing_ok=True)


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as f:
        return f.read(size)


def _lines(path: Path) -> list[tuple[str, tuple[str, str]]]:
    """What the notes say; the last line may be torn."""
    made: list[tuple[str, tuple[str, str]]] = []
    for line in path.read_text("utf8", "replace").splitlines():
        try:
            name, about, total = json.loads(line)
        except ValueError:
            break
        made.append((str(name), (str(about), str(total))))
    return made
