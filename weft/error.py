"""One error, five fields: what went wrong, where, what was found, what was wanted, how to fix it."""

from __future__ import annotations

from collections.abc import Callable

_PLACES = 8
"""How many places of one problem are told."""


def _plain(value: object) -> str:
    text = (
        value
        if isinstance(value, str) and value.isprintable()
        else repr(value)
        if not isinstance(value, str)
        else ascii(value)
    )
    return text if len(text) <= 200 else f"{text[:197]}..."


class WeftError(Exception):
    """The only exception weft raises on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 4

    def __init__(self, what: str, *, where: object, got: object, want: object, fix: str) -> None:
        self.what, self.where, self.got, self.want, self.fix = what, where, got, want, fix
        super().__init__(what, where, got, want, fix)

    def __str__(self) -> str:
        fields = {"where": self.where, "got": self.got, "want": self.want, "fix": self.fix}
        return "\n".join([self.what, *(f"  {k:<6} {_plain(v)}" for k, v in fields.items())])

    def __reduce__(self) -> tuple[Callable[..., WeftError], tuple[type[WeftError], tuple[object, ...]]]:
        return _rebuild, (type(self), (self.what, self.where, self.got, self.want, self.fix))


def _rebuild(kind: type[WeftError], fields: tuple[str, object, object, object, str]) -> WeftError:
    what, where, got, want, fix = fields
    return kind(what, where=where, got=got, want=want, fix=fix)


class PathError(WeftError):
    """A file or folder is missing, or where it must not be."""


class FormatError(WeftError):
    """A file's content is not what its format says."""


class ShapeError(WeftError):
    """A tensor has the wrong shape or dtype."""


class NumericError(WeftError):
    """A value is not finite, or a computation broke down."""


class OptionError(WeftError):
    """An option is unknown, out of range or contradicts another."""

    exit_code = 2


class ResourceError(WeftError):
    """Memory, disk or a package is missing."""

    exit_code = 5


class ConflictError(WeftError):
    """Two things that were asked for cannot both hold."""


class ChangedError(WeftError):
    """Something changed under a run that relied on it."""


def raise_all(problems: list[WeftError]) -> None:
    """Raise every problem of one input together: the first one's type, the texts of those that differ by more than their place.

    No problems: nothing.
    """
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        raise first
    kinds: dict[tuple[str, str, str, str], list[WeftError]] = {}
    for p in problems:
        kinds.setdefault((p.what, _plain(p.got), _plain(p.want), p.fix), []).append(p)
    texts = [f"{alike[0]}{_elsewhere(alike[1:])}" for alike in kinds.values()]
    raise type(first)(
        f"{len(problems)} problems:\n" + "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1)),
        where=first.where,
        got=f"{len(problems)} problems",
        want="none",
        fix=first.fix,
    )


def _elsewhere(others: list[WeftError]) -> str:
    """Where else the same is wrong: the first places, and how many more."""
    if not others:
        return ""
    more = f" and {len(others) - _PLACES} more" if len(others) > _PLACES else ""
    return f"\n  also   {', '.join(_plain(p.where) for p in others[:_PLACES])}{more}"


def whole(least: int = 1, **given: object) -> None:
    """Refuse options that are not whole numbers of at least `least`. Errors: OptionError with all of them."""
    want = f"a whole number, {least} or more"
    raise_all(
        [
            OptionError("an option is out of range", where=n, got=v, want=want, fix="give one")
            for n, v in given.items()
            if type(v) is not int or v < least
        ]
    )
