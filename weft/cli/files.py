"""Commands about files: check a folder, keep the cache small, take an adapter, a recipe or a configuration from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.cli.commands import AsJson, CacheFolder, ModelName, Out, Quiet, Replace, bars, hush, load
from weft.cli.guard import BAD_INPUT, say
from weft.cli.methods import changed
from weft.cli.output import emit
from weft.error import OptionError


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that weft wrote.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int | None:
    """Check every byte of a folder against its manifest."""
    import weft

    problems = weft.verify(folder, progress=bars(quiet))
    if as_json:
        typer.echo(json.dumps(problems, indent=1))
    elif problems or not quiet:
        typer.echo("\n".join(problems) or "whole")
    return BAD_INPUT if problems else None


def cache(
    limit: Annotated[
        str | None, typer.Option(help="Delete what was used longest ago until so much is left: 10GB, 500MB.")
    ] = None,
    clean: Annotated[bool, typer.Option("--clean", help="Delete everything.")] = False,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Show what the cache of intermediate results holds; limit or clean it."""
    from datetime import UTC, datetime
    from itertools import groupby

    from weft.fitting.budget import Size, parse
    from weft.store import cache as store

    place = cache or store.default()
    if clean or limit is not None:
        most = 0 if clean or limit is None else parse(limit, Size(0, 0), "--limit")
        count, freed = store.clean(place, most)
        say(f"deleted {count} results, {freed:,} bytes")
    held = sorted(store.contents(place), key=lambda k: k.kind)
    rows = [
        {
            "kind": kind,
            "results": len(group),
            "bytes": sum(k.bytes for k in group),
            "last used": f"{datetime.fromtimestamp(max(k.used for k in group), UTC):%Y-%m-%d %H:%M} UTC",
        }
        for kind, found in groupby(held, key=lambda k: k.kind)
        for group in [list(found)]
    ]
    emit(rows, as_json=as_json, foot=f"{sum(k.bytes for k in held):,} bytes in {place}")


def attach(
    model: ModelName,
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder.")],
    out: Out,
    name: Annotated[str, typer.Option(help="The adapter's name in the model.")] = "default",
    unverified_base: Annotated[
        bool,
        typer.Option("--unverified-base", help="Take it although it does not say that it was made for this model."),
    ] = False,
    replace: Replace = False,
    quiet: Quiet = False,
) -> None:
    """Put a PEFT adapter onto a model, quantized or not."""
    import weft

    woven = load(model)
    sites = weft.attach(woven, adapter, name=name, unverified_base=unverified_base)
    weft.save(woven, out, replace=replace, progress=bars(quiet))
    if not quiet:
        typer.echo(f"{name}: {len(sites)} sites; saved in {out}")


def adapters(
    model: ModelName,
    on: Annotated[
        list[str] | None,
        typer.Option(
            help="Let this adapter take part, and only those named so; repeatable.", metavar="NAME[=STRENGTH]"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the model with these active.")] = None,
    replace: Replace = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List a model's adapters; with --on and --out, choose which take part and save that."""
    import weft

    if (on is None) != (out is None):
        got, want = ("--on without --out", "both") if out is None else ("--out without --on", "both, or none")
        raise OptionError("nothing to save", where="weft adapters", got=got, want=want, fix="give both, or none")
    chosen = dict(map(_strength, on or ()))
    woven = load(model, quiet)
    if on is not None and out is not None:
        weft.activate(woven, chosen)
        weft.save(woven, out, replace=replace, progress=bars(quiet))
    rows = [
        {
            "adapter": a.name,
            "strength": a.strength,
            "kind": ", ".join(a.kinds),
            "places": len(a.places),
            "bytes": a.bytes,
        }
        for a in weft.adapters(woven).values()
    ]
    emit(rows, as_json=as_json, quiet=quiet, foot=f"saved in {out}" if out is not None else "")


def _strength(text: str) -> tuple[str, float]:
    """NAME or NAME=STRENGTH."""
    name, _, strength = text.partition("=")
    try:
        return name, float(strength or 1)
    except ValueError:
        want, fix = "NAME or NAME=NUMBER", "give a number"
        raise OptionError("this is no strength", where="--on", got=text, want=want, fix=fix) from None


def run(
    recipe: Annotated[Path, typer.Argument(help="A file of steps: YAML or JSON.")],
    model: ModelName,
    data: Annotated[
        str | None,
        typer.Option(help="Calibration data: a file, a folder or a lab task; weft's own texts if not given."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.", min=1)] = 16384,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the result; without it nothing is saved.")] = None,
    replace: Replace = False,
    cache: CacheFolder = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int | None:
    """Apply a recipe, method after method; what it may name are weft's own methods, nothing else."""
    import weft
    from weft.engine.recipe import read
    from weft.store import save

    steps = read(recipe)  # bad recipes show before the model is loaded
    woven = load(model)
    if out is not None:
        weft.may_write(woven, out, replace=replace)
    made = weft.run(woven, steps, data=data, tokens=tokens, seed=seed, cache=cache, progress=bars(quiet))
    if out is not None:
        said = {"recipe": {"file": recipe.name, "fingerprint": steps.fingerprint()}}
        save(woven, out, replace=replace, manifest=said, progress=bars(quiet))
    return changed(made, out, as_json, quiet)


def mergekit(
    config: Annotated[Path, typer.Argument(help="A configuration of mergekit's: YAML or JSON.")],
    out: Annotated[Path, typer.Argument(help="Folder for the result.")],
    seed: Annotated[int, typer.Option(help="Seed of methods that draw.")] = 0,
    replace: Replace = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int | None:
    """Merge as a configuration of mergekit says, or refuse it; the command is mergekit-yaml's."""
    import weft

    hush()
    from weft.api import Changes

    made = weft.merge_config(config, out, replace=replace, seed=seed, progress=bars(quiet))
    for note in made.notes:
        say(f"note: {note}")
    return changed(Changes(made.changes, made.fallbacks), out, as_json, quiet)


def import_(
    model: Annotated[str, typer.Argument(help="A folder or a hub id.", metavar="MODEL", show_default=False)],
    out: Out,
    drop: Annotated[list[str] | None, typer.Option(help="Drop tensors that the model lacks: a glob.")] = None,
    init: Annotated[
        list[str] | None, typer.Option(help="Give fresh values to tensors that the checkpoint lacks: a glob.")
    ] = None,
    zero: Annotated[list[str] | None, typer.Option(help="Set values that are not finite to zero: a glob.")] = None,
    tie: Annotated[
        bool | None, typer.Option("--tie/--untie", help="Of tied weights stored twice: keep the first, or both.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of fresh values.")] = 0,
    replace: Replace = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a checkpoint that weft refuses into one that it takes: pickles converted, what you name mended."""
    import weft

    mends: dict[str, Any] = {"drop": drop or (), "init": init or (), "zero": zero or (), "tie": tie, "seed": seed}
    done = weft.import_(model, out, **mends, replace=replace, progress=bars(quiet))
    rows = [{"tensor": name, "mended": how} for name, how in done]
    emit(rows, as_json=as_json, quiet=quiet, foot=f"{len(rows)} mended; saved in {out}")


ALL = (verify, cache, attach, adapters, run, mergekit, import_)
