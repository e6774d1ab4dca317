"""A command from a method's options: `weft gptq MODEL --bits 4 --at '*.mlp.*' --out OUT`."""

from __future__ import annotations

import enum
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli.commands import AsJson, CacheFolder, ModelName, Quiet, Replace, bars, hush, load
from weft.cli.guard import FALLBACKS, guarded, say
from weft.cli.options import as_taken, parameter, plain
from weft.cli.output import emit
from weft.error import OptionError

if TYPE_CHECKING:
    from torch import nn

    from weft.api import Changes
    from weft.engine.coefficients import Tried
    from weft.merging import Outcome


def command(name: str) -> Callable[..., None]:
    """The command of this method; its options are the method's, then those of every method of its kind."""
    from weft.engine import get

    method = get(name)
    own = {n: parameter(n, f) for n, f in method.options.model_fields.items()}
    of_probes = _looked_through if "data" in method.needs else _looked
    act, common = {"probe": (look, of_probes), "merge": (merge, _of_merges)}.get(method.kind, (rewrite, _shared))
    shared = inspect.signature(common, eval_str=True).parameters
    if twice := set(own) & set(shared):
        want, fix = "names of its own", "rename the method's option"
        raise OptionError("an option is there twice", where=name, got=sorted(twice), want=want, fix=fix)

    def run(**given: Any) -> int | None:
        options = {n: as_taken(given.pop(n), f) for n, f in method.options.model_fields.items()}
        return act(name, options, **given)

    first, *rest = shared.values()
    asked = [first, *own.values(), *rest]
    run.__doc__ = method.doc
    run.__signature__ = inspect.Signature(asked)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in asked}
    return guarded(run)


def _shared(
    *,
    model: ModelName,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="Sites: a glob, or all-linear; repeatable. All, if not given (adapters and taps: all-linear)."
        ),
    ] = None,
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
) -> None:
    """The options that every method's command has."""


def _looked(*, model: ModelName, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """The options that every probe's command has."""


def _looked_through(
    *,
    model: ModelName,
    data: Annotated[
        str | None,
        typer.Option(help="What the model reads: a file, a folder or a lab task; weft's own texts if not given."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of data.", min=1)] = 16384,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The options that the command of a probe with data has."""


def look(name: str, options: dict[str, Any], *, model: str, as_json: bool, quiet: bool, **how: Any) -> None:
    """Load, probe, print what was found."""
    import weft
    from weft.engine.run import Step

    Step.of(name, **options)  # bad options show before the model is loaded
    found = weft.probe(load(model, quiet), name, **how, **options)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        emit([{"site": n, **at} for n, at in found.sites.items()], as_json=False, quiet=quiet, foot=found.says)


class Align(enum.StrEnum):
    """How other vocabularies are aligned."""

    tokens = "tokens"


class Search(enum.StrEnum):
    """How weights are searched."""

    grid = "grid"
    greedy = "greedy"
    cma = "cma"


def _of_merges(
    *,
    models: Annotated[
        list[str], typer.Argument(help="Folders, hub ids or lab models.", metavar="MODEL...", show_default=False)
    ],
    base: Annotated[
        list[str] | None,
        typer.Option(
            help="The model that they were tuned from; or one for each in order (repeatable), the first to be added to; or what is added "
            "to, then one for each.",
            metavar="MODEL",
        ),
    ] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Weight of a model, in order; repeatable. 1 each.")] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(help="Weights: a glob, or all-linear; repeatable. Others are the base's, or the first model's."),
    ] = None,
    align: Annotated[
        Align | None,
        typer.Option(
            help="Align vocabularies that differ, by token, to the base's, or the first model's; else refused."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="For merges that read data: a file, a folder or a lab task, for all, or one for each model in order "
            "(repeatable); weft's own texts if not given."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of data a model.", min=1)] = 16384,
    search: Annotated[
        Search | None,
        typer.Option(help="Find the weights by --held-out: of two models, from the best model on, or by CMA-ES."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Data that weights are searched by: a file or a lab task.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Merges that grid (11) and cma (64) try.", min=2)] = None,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the result; without it nothing is saved.")] = None,
    replace: Replace = False,
    cache: CacheFolder = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The options that every merge's command has."""


def merge(
    name: str,
    options: dict[str, Any],
    *,
    models: list[str],
    base: list[str] | None,
    weight: list[float] | None,
    at: list[str] | None,
    align: Align | None,
    data: list[str] | None,
    tokens: int,
    search: Search | None,
    held_out: str | None,
    trials: int | None,
    seed: int,
    out: Path | None,
    replace: bool,
    cache: Path | None,
    as_json: bool,
    quiet: bool,
) -> int | None:
    """Load, merge, save, print what became of each site; 3 if the method fell back anywhere."""
    import weft
    from weft.api import Changes
    from weft.engine.coefficients import best
    from weft.engine.run import Step
    from weft.merging import planned

    step = Step.of(name, **options)  # bad options show before the models are loaded
    by_weight = not (out is None or at or align or search or step.needs - {"base"})
    by_weight &= dict(step.options).get("scope", "weight") == "weight"
    held = _loaded([*models, *(base or ())], by_weight, quiet)
    members, bases = held[: len(models)], held[len(models) :]
    if out is not None:
        for held in (*members, *bases):
            weft.may_write(held, out, replace=replace)
    how: dict[str, Any] = {
        "base": _one(bases),
        "weights": weight,
        "at": at or "*",
        "align": plain(align),
        "seed": seed,
        "progress": bars(quiet),
    }
    how |= {"data": _one(data), "tokens": tokens, "cache": cache}
    how |= {"search": plain(search), "held_out": held_out, "trials": trials}
    plan = planned(members, name, **how, **options)
    if plan.tried:
        weight = list(best(plan.tried).weights)
    for t in plan.tried:
        say(f"weights {', '.join(f'{w:.4g}' for w in t.weights)}: {t.score:.6g}, {t.seconds:.1f} s")
    if out is None:
        made: Outcome = plan.run()
    else:
        said = {"models": models, "base": _one(base), "weights": weight, "method": name, "options": dict(step.options)}
        said |= ({"data": data} if data else {}) | ({"align": plain(align)} if align else {})
        said |= _searched(plan.tried, search, held_out)
        made = plan.write(out, replace=replace, manifest={"merged": {**said, "seed": seed}})
    return changed(Changes(made.changes, made.fallbacks), out, as_json, quiet)


def _loaded(names: Sequence[str], by_weight: bool, quiet: bool) -> list[nn.Module]:
    """These models; without their classes, if that can be, where all that is done goes weight by weight."""
    if not by_weight:
        return [load(name, quiet) for name in names]
    from weft.lab.models import resolve
    from weft.store import find
    from weft.store.alike import loaded

    hush()
    return loaded([find(resolve(name, bars(quiet))) for name in names], bars(quiet))


def _searched(tried: Sequence[Tried], search: Search | None, held_out: str | None) -> dict[str, Any]:
    """What the manifest says of a search of weights."""
    if search is None:
        return {}
    return {"search": plain(search), "held_out": held_out, "tried": [[*t.weights, t.score] for t in tried]}


def _one(given: Sequence[Any] | None) -> Any:
    """The one that was given, all of several, or None."""
    return given[0] if given and len(given) == 1 else given or None


def rewrite(
    name: str,
    options: dict[str, Any],
    *,
    model: str,
    out: Path | None,
    replace: bool,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> int | None:
    """Load, apply, save, print what changed; 3 if the method fell back anywhere."""
    import weft
    from weft.engine.run import Step

    Step.of(name, **options)  # bad options show before the model is loaded
    woven = load(model, quiet)
    if out is not None:
        weft.may_write(woven, out, replace=replace)
    made = weft.apply(woven, name, progress=bars(quiet), **how, **options)
    if out is not None:
        weft.save(woven, out, replace=replace, progress=bars(quiet))
    return changed(made, out, as_json, quiet)


def changed(made: Changes, out: Path | None, as_json: bool, quiet: bool) -> int | None:
    """Print what rewrites changed, each site's last state in the sum; 3 if a method fell back anywhere."""
    rows = [{"site": c.name, "before": c.before, "after": c.after, "bytes": c.nbytes, "error": c.error} for c in made]
    last = {c.name: c.nbytes for c in made}
    where = f"saved in {out}" if out is not None else "not saved: give --out"
    emit(rows, as_json=as_json, quiet=quiet, foot=f"{len(last)} sites, {sum(last.values())} bytes; {where}")
    for place, what in made.fallbacks:
        say(f"fallback: {place}: {what}")
    return FALLBACKS if made.fallbacks else None
