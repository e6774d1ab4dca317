"""Budgets: what a user writes is what is counted."""

from __future__ import annotations

import pytest

from weft.error import OptionError
from weft.fitting.budget import Size, parse, percentage, size
from weft.model import weave
from weft.store.save import nbytes

MODEL = Size(parameters=1000, bf16_bytes=2000)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("27%", 540),
        (" 50 % ", 1000),
        ("3.2bpw", 400),
        ("350MB", 350_000_000),
        ("1.5GiB", 1_610_612_736),
        ("2kB", 2000),
        ("9B", 9),
    ],
)
def test_parse(text: str, limit: int) -> None:
    """Shares, bits a weight, and bytes in decimal and binary units."""
    assert parse(text, MODEL) == limit


@pytest.mark.parametrize("text", ["", "27", "-3%", "0%", "MB", "1e3MB", "27 percent", "nan%"])
def test_unreadable(text: str) -> None:
    """What is no budget is refused."""
    with pytest.raises(OptionError):
        parse(text, MODEL)


def test_percentage() -> None:
    """A percentage is a number and its sign."""
    assert percentage("1.5%", "x") == 0.015
    with pytest.raises(OptionError):
        percentage("1.5", "x")


def test_size_counts_every_parameter_once(tiny, family: str) -> None:
    """A tied head counts once; bfloat16 bytes are two a parameter."""
    plain = tiny(family)
    count = sum(p.numel() for p in plain.parameters())
    model = weave(plain)
    made = size(model)
    assert made.parameters == count
    assert made.bf16_bytes >= 2 * count
    assert nbytes(model) <= 2 * made.bf16_bytes
