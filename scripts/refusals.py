"""What the pages of what composes say of a refusal: a letter, and below the table the reason."""

from __future__ import annotations

import weft


class Reasons:
    """Refusals by letter."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def __call__(self, e: weft.WeftError) -> str:
        what = e.what.splitlines()[1].removeprefix("1. ") if "\n" in e.what else e.what
        return self.of.setdefault(what, _letter(len(self.of)))


def _letter(i: int) -> str:
    return chr(97 + i) if i < 26 else _letter(i // 26 - 1) + _letter(i % 26)
