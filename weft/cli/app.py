"""The application: the core commands, and one command for every method file."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated

import typer

from weft import __version__
from weft.catalog import Entry, entries
from weft.cli import commands, deltas, files, methods, realism, train
from weft.cli.guard import State, guarded


def build(argv: Sequence[str] = ()) -> typer.Typer:
    """The application for this command line. Only the method that it names is imported, to read its options."""
    app = typer.Typer(
        name="weft",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_start)
    for fn in (*commands.ALL, *files.ALL, *deltas.ALL, *realism.ALL):
        text = inspect.cleandoc(fn.__doc__ or "")
        app.command(fn.__name__.rstrip("_"), help=text, short_help=text.splitlines()[0])(guarded(fn))
    asked = next((a for a in argv if not a.startswith("-")), "")
    app.command("train", help=train.HELP)(train.command(argv) if asked == "train" else _stub)
    for entry in entries():
        if entry.kind in ("rewrite", "transport", "branch", "cut", "recipe", "merge", "probe"):
            _add(app, entry, entry.name == asked)
    return app


def _add(app: typer.Typer, entry: Entry, whole: bool) -> None:
    """A method's command: with its options where it is the one that runs, else its name and help only."""
    fn = methods.command(entry.name) if whole else _stub
    text = inspect.cleandoc(fn.__doc__ or "") if whole else entry.help
    app.command(entry.name, help=text, short_help=f"{entry.verb}: {entry.help}")(fn)


def _stub() -> None:
    """Stands for a method that this command line does not run."""


def _version(on: bool) -> None:
    if on:
        typer.echo(f"weft {__version__}")
        raise typer.Exit


def _start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Adapt and compress pretrained models: every weight is an expression, every method a small rewrite."""
    State.debug = debug
