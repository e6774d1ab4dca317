"""What every command ends in: an exit code, and for an error five fields on standard error instead of a traceback."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from weft.error import WeftError

BUG, FALLBACKS, BAD_INPUT, RESOURCES, INTERRUPTED = 1, 3, 4, 5, 130


class State:
    """Options that stand before the command."""

    debug = False


def guarded(command: Callable[..., int | None]) -> Callable[..., None]:
    """The command with its errors told and its result as the exit code (None is 0)."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            code = command(*args, **options) or 0
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as e:
            code = told(e)
        if code:
            raise typer.Exit(code)

    return run


def told(e: BaseException) -> int:
    """Say on standard error what went wrong; returns the exit code. Typer's own errors go on to typer."""
    if type(e).__module__.partition(".")[0] in ("typer", "click"):
        raise e
    if State.debug:
        traceback.print_exception(e)
    if isinstance(e, KeyboardInterrupt):
        say("interrupted. What was finished is kept: the same command goes on from there.")
        return INTERRUPTED
    if isinstance(e, WeftError):
        say(f"error: {e}")
        return e.exit_code
    if isinstance(e, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if _exhausted(e):
        say(f"error: out of memory or disk: {str(e) or type(e).__name__}")
        return RESOURCES
    if isinstance(e, OSError) and e.filename is not None:
        say(f"error: {e.strerror}: {e.filename}")
        return BAD_INPUT
    say(f"This is a bug in weft: {type(e).__name__}: {e}. Please report it with the output of `weft --debug ...`.")
    return BUG


def _exhausted(e: BaseException) -> bool:
    """Whether memory or disk ran out; torch says so of memory in a RuntimeError's text."""
    if isinstance(e, OSError):
        return e.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and any(w in str(e) for w in words))


def say(text: str) -> None:
    """A line for people, on standard error."""
    typer.echo(text, err=True)
