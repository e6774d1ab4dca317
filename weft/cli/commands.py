"""The core commands. Each imports what it needs when it runs; what they do is in `weft.api`."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from weft.cli.guard import FALLBACKS, say
from weft.cli.output import emit
from weft.error import OptionError
from weft.memory import importing
from weft.progress import Bars, Progress, Silent

if TYPE_CHECKING:
    from torch import nn

    from weft.report.schema import Report

ModelName = Annotated[
    str,
    typer.Argument(
        help="A folder, a hub id, or a lab model: ref-lm, minilm, ref-vit ...", metavar="MODEL", show_default=False
    ),
]
Out = Annotated[Path, typer.Option(help="Folder for the result.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace a result that is there.")]
CacheFolder = Annotated[Path | None, typer.Option(help="Where intermediate results are kept ($WEFT_CACHE).")]
Mode = Annotated[
    str, typer.Option(help="memory: weights stay packed. speed: a dense copy of each.", metavar="memory|speed")
]
DATA = "A file, a folder or a lab task: python, cpp, docstrings; or answers: arithmetic, sorting, dates, edits, naming, origin, wordings."
DataName = Annotated[str | None, typer.Option(help=DATA)]


def bars(quiet: bool) -> Progress:
    """Progress on standard error, unless quiet."""
    return Silent() if quiet else Bars()


def hush() -> None:
    """Import torch, and turn transformers' own messages off, now or for when it is imported."""
    with importing():
        import_module("torch")
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if (known := sys.modules.get("transformers")) is not None:
        known.utils.logging.set_verbosity_error()
        known.utils.logging.disable_progress_bar()


def load(model: str, quiet: bool = False) -> nn.Module:
    """The model, with transformers' own messages off."""
    import weft

    hush()
    return weft.load(model, progress=bars(quiet))


def fit(
    model: ModelName,
    budget: Annotated[list[str] | None, typer.Option(help="27%, 350MB or 3.2bpw; repeatable, or with commas.")] = None,
    data: DataName = None,
    max_loss: Annotated[
        str | None, typer.Option(help="Instead of a budget: the smallest model at most so much worse, as 1%.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model and its report; without it nothing is saved.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds.", min=1)] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens.", min=1)] = None,
    tune_steps: Annotated[int | None, typer.Option(help="Steps of tuning.", min=1)] = None,
    search: Annotated[str | None, typer.Option(help="Method that makes the mixed choice (weft methods).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, short tuning: a first look.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and do nothing.")] = False,
    replace_: Replace = False,
    cache: CacheFolder = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int | None:
    """Find the best model within a byte budget, beside the best uniform ones, with a report."""
    import weft

    base = weft.Settings.quick() if quick else weft.Settings()
    given = {"seeds": seeds, "tokens": tokens, "tune_steps": tune_steps, "search": search}
    settings = replace(base, **{k: v for k, v in given.items() if v is not None})
    limits = [part.strip() for b in budget or [] for part in b.split(",")]
    what: dict[str, Any] = {"budget": limits, "data": data, "max_loss": max_loss, "settings": settings, "cache": cache}
    if dry_run:
        lines = weft.plan(model, **what)
        typer.echo(json.dumps(lines, indent=1) if as_json else "\n".join(lines))
        return None
    command = shlex.join(["weft", *sys.argv[1:]])
    made = weft.fit(model, out, **what, replace=replace_, command=command, progress=bars(quiet))
    where = f"report: {out / 'report.html'}" if out is not None else "not saved: give --out"
    return _report(made, as_json, quiet, where)


def _report(made: Report, as_json: bool, quiet: bool, where: str) -> int | None:
    from weft.report.table import text

    if as_json:
        typer.echo(made.model_dump_json(indent=1))
    elif not quiet:
        typer.echo(text(made))
        typer.echo(where)
    for f in made.fallbacks:
        say(f"fallback: {f.where}: {f.what}")
    return FALLBACKS if made.fallbacks else None


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `weft fit` wrote.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write report.html anew from report.json, and print its table."""
    from weft.report.page import read, render
    from weft.store.files import write_text
    from weft.store.swap import MANIFEST, amend

    made = read(folder / "report.json")
    if (folder / MANIFEST).exists():
        amend(folder, {"report.html": render(made)})
    else:
        write_text(folder / "report.html", render(made))
    _report(made, as_json, quiet, f"report: {folder / 'report.html'}")


def show(model: ModelName, as_json: AsJson = False) -> None:
    """List the weights of a model or a delta: expression, bytes, bits per weight."""
    import weft
    from weft.store import delta, nbytes
    from weft.store.patch import rows as added

    if delta.is_delta(model):
        held = delta.opened(model)
        foot = f"a delta of {held.manifest['bytes']:,} bytes, base {held.base['path']}"
        emit(added(held), as_json=as_json, foot=foot)
        return
    woven = load(model)
    rows = [asdict(r) for r in weft.show(woven)]
    emit(rows, as_json=as_json, foot=f"{len(rows)} weights, {nbytes(woven)} bytes with norms and biases")


def methods(as_json: AsJson = False) -> None:
    """List every method."""
    from weft.catalog import entries

    emit([asdict(e) for e in entries()], as_json=as_json, foot="weft METHOD --help shows a rewrite's options")


def eval_(
    model: ModelName,
    data: DataName = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of data: tasks of lm-evaluation-harness, with commas.", metavar="NAME[,NAME]"),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="tasks: a folder of task files of your own.")] = None,
    batch: Annotated[int, typer.Option(help="tasks: requests at a time.", min=1)] = 8,
    limit: Annotated[int | None, typer.Option(help="The first documents only.", min=1)] = None,
    mode: Mode = "memory",
    as_json: AsJson = False,
) -> None:
    """Score a model: the mean with its 95 % interval over documents, lower is better; or on tasks of lm-evaluation-harness."""
    import weft
    from weft.score import examples

    one_of(data, tasks, include_path)
    documents = None if data is None else examples(data, "test")  # bad data shows before the model is loaded
    woven = load(model)
    weft.mode(woven, cast(Literal["memory", "speed"], mode))
    if documents is not None:
        rows = [{**weft.evaluate(woven, documents, limit=limit), "task": data}]
    else:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        names = [name.strip() for name in (tasks or "").split(",")]
        made = weft.evaluate_tasks(woven, names, limit=limit, include_path=include_path, batch=batch)
        rows = [asdict(score) for score in made]
    ran = weft.mode(woven)
    emit([{"model": model, **r, "mode": ran.mode, "resident_bytes": ran.total} for r in rows], as_json=as_json)


def one_of(data: str | None, tasks: str | None, include_path: Path | None) -> None:
    """Errors: OptionError unless either data or tasks are given, and a folder of tasks only with tasks."""
    if (data is None) == (tasks is None) or (include_path is not None and tasks is None):
        given = {"--data": data, "--tasks": tasks, "--include-path": include_path}
        got, want = " ".join(n for n, v in given.items() if v is not None) or "neither", "--data D, or --tasks A,B"
        raise OptionError(
            "what to score on is not clear", where="weft eval", got=got, want=want, fix="give one of them"
        )


def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=1)] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is what a user says, in the chat template.")] = False,
    mode: Mode = "memory",
) -> None:
    """Let a language model go on from a prompt, greedily."""
    import weft

    woven = load(model)
    weft.mode(woven, cast(Literal["memory", "speed"], mode))
    typer.echo(weft.generate(woven, prompt, max_new_tokens, chat=chat))
    ran = weft.mode(woven)
    say(f"{ran.mode} mode: {ran.total} resident bytes, {ran.derived} of them derived")


def merge(
    model: ModelName,
    out: Out,
    to: Annotated[
        str, typer.Option(help="dense, bf16, or grid: one rounding onto the base's own grid.", show_default=False)
    ],
    at: Annotated[list[str] | None, typer.Option(help="Sites: a glob; repeatable.")] = None,
    replace_: Replace = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fold each weight's terms into one; says what that loses."""
    import weft

    woven = load(model, quiet)
    weft.may_write(woven, out, replace=replace_)
    made = weft.merge(woven, to=cast(Literal["dense", "bf16", "grid"], to), at=at or "*")
    weft.save(woven, out, replace=replace_, progress=bars(quiet))
    rows = [
        {"site": c.name, "before": c.before, "after": c.after, "bytes": c.nbytes, "error": c.error, "lost": c.lost}
        for c in made
    ]
    emit(rows, as_json=as_json, quiet=quiet, foot=f"{len(rows)} sites merged; saved in {out}")


def export(
    model: ModelName,
    out: Out,
    to: Annotated[str, typer.Option(help="hf, peft, vllm or compressed-tensors.")] = "hf",
    base: Annotated[
        Path | None, typer.Option(help="peft: where a base other than the pretrained weights is written.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="peft: one adapter alone, by its name.")] = None,
    replace_: Replace = False,
) -> int | None:
    """Write a model for other tools."""
    import weft

    how = {"to": cast(Literal["hf", "peft", "vllm", "compressed-tensors"], to), "base": base, "adapter": adapter}
    notes = weft.export(load(model), out, replace=replace_, **cast(Any, how))
    for note in notes:
        say(f"note: {note}")
    return FALLBACKS if notes else None


def prove(
    names: Annotated[list[str] | None, typer.Argument(help="Methods.", metavar="[METHOD]...")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every method.")] = False,
    changed: Annotated[bool, typer.Option("--changed", help="Methods whose proof is missing or out of date.")] = False,
    known: Annotated[
        bool, typer.Option("--known", help="First, what is known of the lab models: answers that guard all others.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="For a first look, these lab models alone; repeatable. Nothing is written then."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where verdicts are kept.")] = Path("proofs"),
    seeds: Annotated[int, typer.Option(help="Seeds.", min=3)] = 3,
    jobs: Annotated[int, typer.Option(help="Processes that share the claims.", min=1)] = 1,
    search: Annotated[
        bool, typer.Option("--search", help="Look for all learning rates again, rather than take those of the proofs.")
    ] = False,
    stale: Annotated[bool, typer.Option("--stale", help="List proofs that are out of date, and do nothing.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int | None:
    """Test what a method's paper claims, on lab models."""
    import weft
    from weft.lab.prove import answer

    if stale:
        rows = [{"method": n, "why": why} for n, why in weft.stale(folder).items()]
        emit(rows, as_json=as_json, quiet=quiet, foot="weft prove --changed" if rows else "")
        return None
    if not (names or all_ or changed or known):
        want, fix = "methods, --all, --changed or --known", "weft methods lists them"
        raise OptionError("nothing to prove", where="prove", got="no method", want=want, fix=fix)
    asked = [e.name for e in weft.methods()] if all_ else [*(names or ()), *(weft.stale(folder) if changed else ())]
    how: dict[str, Any] = {"folder": folder, "seeds": seeds, "jobs": jobs, "search": search, "progress": bars(quiet)}
    made = {f"known: {n}": c for n, c in answer(**how).items()} if known else {}
    made |= weft.prove(asked, models=model, **how) if asked else {}
    if as_json:
        typer.echo(json.dumps({n: c.as_json() for n, c in made.items()}, indent=1))
        return None
    rows = [{"claim": n, "verdict": c.verdict, "rule": c.rule, "seconds": c.seconds} for n, c in made.items()]
    emit(rows, as_json=False, quiet=quiet)
    return None


ALL = (fit, show, methods, eval_, generate, merge, export, report, prove)
