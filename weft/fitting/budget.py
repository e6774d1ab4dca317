"""Budgets: what a user writes, and what it means in bytes of all tensors of the saved model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import nn

from weft.error import OptionError
from weft.expr import tensors
from weft.model import expressions, plain_tensors

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Size:
    """A model's size before compression: parameters, and the bytes they take in bfloat16 (other buffers as they are)."""

    parameters: int
    bf16_bytes: int


def size(model: nn.Module) -> Size:
    """The size of a woven model whose weights are still plain."""
    held = [t for e in expressions(model).values() for t in tensors(e).values()] + list(plain_tensors(model).values())
    floats = sum(t.numel() for t in held if t.is_floating_point())
    rest = sum(t.numel() * t.element_size() for t in held if not t.is_floating_point())
    return Size(floats, 2 * floats + rest)


def parse(text: str, model: Size, where: str = "--budget") -> int:
    """Bytes of a budget: `27%` of the bfloat16 bytes, `350MB`, or `3.2bpw` (bits per parameter). Errors: OptionError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|bpw|[kKMG]?i?B)\s*", text)
    if not found:
        raise OptionError(
            "a budget cannot be read",
            where=where,
            got=text,
            want="27%, 350MB or 3.2bpw",
            fix="give a number and one of %, kB, MB, GB, bpw",
        )
    number, unit = float(found[1]), found[2]
    if unit == "%":
        limit = model.bf16_bytes * number / 100
    elif unit == "bpw":
        limit = model.parameters * number / 8
    else:
        limit = number * _UNITS[unit.upper()]
    if not 0 < limit < math.inf:
        raise OptionError("a budget must be positive", where=where, got=text, want="more than nothing", fix="raise it")
    return int(limit)


def percentage(text: str, where: str) -> float:
    """`1%` as 0.01. Errors: OptionError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", text)
    if not found:
        raise OptionError("a percentage cannot be read", where=where, got=text, want="a number and %", fix="write 1%")
    return float(found[1]) / 100


def share(nbytes: int, model: Size) -> float:
    """Bytes as a share of the bfloat16 bytes."""
    return nbytes / model.bf16_bytes
