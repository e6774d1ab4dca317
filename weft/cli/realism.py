"""The realism cards of the lab's models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.commands import AsJson, Quiet, bars
from weft.cli.output import emit


def realism(
    models: Annotated[
        list[str] | None, typer.Argument(help="Lab models to show, and write nothing.", metavar="[MODEL]...")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the cards of all are kept.")] = Path("proofs"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure how like real ones the lab's models are where methods differ; makes those that are not there, in minutes each."""
    from weft.lab import prove
    from weft.lab.specimens import specimens

    made = prove.realism(specimens(models, bars(quiet)), folder=None if models else folder)
    if as_json:
        typer.echo(json.dumps(made, indent=1))
        return
    rows = [
        {"model": n, "like real ones": c["pass"], "not": "; ".join(k for k, v in c["checks"].items() if not v["pass"])}
        for n, c in made.items()
    ]
    emit(rows, as_json=False, quiet=quiet)


ALL = (realism,)
