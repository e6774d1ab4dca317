"""Commands about deltas: what a tuned model has beside its base, and the model again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.commands import AsJson, CacheFolder, ModelName, Quiet, Replace, bars
from weft.cli.output import emit


def diff(
    base: Annotated[
        str, typer.Argument(help="A plain checkpoint: a folder, a hub id or a lab model.", show_default=False)
    ],
    tuned: Annotated[str, typer.Argument(help="The model that was tuned from it.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the delta.", show_default=False)],
    budget: Annotated[
        str | None, typer.Option(help="Bytes of the delta: 2% of the base in bfloat16, 50MB or 0.3bpw.")
    ] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Instead, every tensor to the bit.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="What the tuned model is for: a file, a folder or a lab task. Errors are weighed by its inputs."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of data.", min=1)] = 16384,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    replace: Replace = False,
    cache: CacheFolder = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Store a tuned model as what it has beside its base, within a byte budget or to the bit."""
    import weft

    made = weft.diff(
        base, tuned, out, budget=budget, lossless=lossless, data=data, tokens=tokens, seed=seed, replace=replace, cache=cache,
        progress=bars(quiet),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(made), indent=1))
        return
    of = "the tuned tensors" if lossless else "the base in bfloat16"
    foot = f"{made.bytes:,} bytes, {made.share:.2%} of {of}; saved in {out}"
    if lossless and not quiet:
        typer.echo(foot)
    else:
        emit([asdict(k) for k in made.kept], as_json=False, quiet=quiet, foot=foot)


def patch(
    model: ModelName,
    delta: Annotated[str, typer.Argument(help="A folder that weft diff wrote, or a hub id.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model.", show_default=False)],
    dense: Annotated[bool, typer.Option("--dense", help="A plain checkpoint, not terms beside the base.")] = False,
    name: Annotated[str, typer.Option(help="What the terms are called as an adapter.")] = "delta",
    replace: Replace = False,
    quiet: Quiet = False,
) -> None:
    """Make the tuned model again from its base and a delta."""
    import weft

    weft.restore(model, delta, out, dense=dense, name=name, replace=replace, progress=bars(quiet))
    if not quiet:
        typer.echo(f"saved in {out}")


ALL = (diff, patch)
