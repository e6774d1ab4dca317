"""`weft train`: its options are those of training, and of the method that makes something trainable."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.catalog import entries
from weft.cli.commands import DATA, AsJson, CacheFolder, ModelName, Out, Quiet, Replace, bars, load
from weft.cli.guard import guarded, say
from weft.cli.options import parameter, plain
from weft.cli.output import emit

HELP = "Train an adapter on a model as it is, or its own parameters. Interrupted, the same command goes on."
DEFAULT = "lora"


def command(argv: Sequence[str]) -> Callable[..., None]:
    """The command, with the options of the method, the optimizer, the schedule and the objective that this command line names.

    An option that is called as one of training, or as one before it, has its method's name before it: `--prompt-length`.
    """
    from weft.engine import get
    from weft.learn.settings import Training

    fields = Training.model_fields
    shared = inspect.signature(_shared, eval_str=True).parameters
    taken, asked = {*fields, *shared}, [parameter(n, f) for n, f in fields.items()]
    own: dict[str, dict[str, str]] = {}
    for word, default in (("method", DEFAULT), ("optimizer", ""), ("during", ""), ("objective", "")):
        name = _named(argv, word) or default
        held = get(name).options.model_fields if name in {e.name for e in entries()} else {}
        own[word] = {n: f"{name}_{n}" if n in taken else n for n in held}
        taken |= set(own[word].values())
        asked += [parameter(own[word][n], f) for n, f in held.items()]

    def run(**given: Any) -> None:
        of = {word: {n: plain(given.pop(flag)) for n, flag in own[word].items()} for word in own}
        how = {n: plain(given.pop(n)) for n in fields}
        _train(options=of.pop("method"), of=of, how=how, **given)

    whole = [*shared.values(), *asked]
    run.__doc__ = HELP
    run.__signature__ = inspect.Signature(whole)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in whole}
    return guarded(run)


def _named(argv: Sequence[str], word: str) -> str:
    """What a command line gives for `--word`."""
    for i, given in enumerate(argv):
        if given.startswith(f"--{word}="):
            return given.partition("=")[2]
        if given == f"--{word}" and i + 1 < len(argv):
            return argv[i + 1]
    return ""


def _shared(
    *,
    model: ModelName,
    data: Annotated[str, typer.Option(help=DATA, show_default=False)],
    out: Out,
    held_out: Annotated[str | None, typer.Option(help="Data to score on in between; the best step stays.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="What makes it trainable: lora, full, prompt ..., of the verb adapt; lsq; or a recipe: telly ..."
        ),
    ] = DEFAULT,
    optimizer: Annotated[
        str | None, typer.Option(help="What moves it instead of AdamW: muon, lora_plus ..., of the verb tune.")
    ] = None,
    during: Annotated[
        str | None, typer.Option(help="What rewrites the terms while they train: spiel ..., of the verb tune.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="What is lowered in place of the labels' loss: distill ..., of the verb tune.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The model that an objective compares with; the pretrained weights if not given.")
    ] = None,
    at: Annotated[list[str] | None, typer.Option(help="Sites: a glob, or all-linear; repeatable.")] = None,
    replace: Replace = False,
    cache: CacheFolder = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The options that are not of training itself."""


def _train(
    *, model: str, data: str, out: Path, held_out: str | None, method: str, optimizer: str | None, during: str | None,
    objective: str | None, teacher: str | None, at: list[str] | None, replace: bool, cache: Path | None, as_json: bool, quiet: bool,
    options: dict[str, Any], of: dict[str, dict[str, Any]], how: dict[str, Any],
) -> None:  # fmt: skip
    import weft
    from weft.engine import get
    from weft.engine.run import Step
    from weft.learn.data import fingerprint
    from weft.learn.settings import Training
    from weft.model import fingerprint as values
    from weft.score import examples
    from weft.store.cache import default, key

    chosen, settings = Step.of(method, **options).options, Training.of(**how)
    learned = examples(data, "train", settings.seed)  # bad data shows before the model is loaded
    scored = examples(held_out, "test", settings.seed) if held_out else None
    woven = load(model, quiet)
    guide = load(teacher, quiet) if teacher else None
    # by content: files may change where they are
    models, texts = [m and values(m) for m in (woven, guide)], [e and fingerprint(e) for e in (learned, scored)]
    seen: dict[str, Any] = {"data": data, "cache": cache, "progress": bars(quiet)}  # where evidence comes from
    made = weft.apply(woven, method, at=at, seed=settings.seed, **seen, **options)
    for place, what in made.fallbacks:
        say(f"fallback: {place}: {what}")
    weft.may_write(woven, out, replace=replace)
    beside: dict[str, Any] = {"optimizer": optimizer, "during": during, "objective": objective}
    about = key(models, texts, method, chosen, beside, of, at, settings.model_dump())
    work = (cache or default()) / "train" / about
    own = {f"{beside[word]}_{n}": v for word, held in of.items() for n, v in held.items()}
    beside |= {"optimizer": optimizer or made.optimizer, "teacher": guide}
    history = weft.train(woven, learned, held_out=scored, out=work, progress=bars(quiet), **beside, **how, **own)
    if get(method).kind == "relax":
        weft.harden(woven)
    weft.save(woven, out, replace=replace, progress=bars(quiet))
    _, loss = history.losses[-1] if history.losses else (0, None)
    row = {"steps": len(history.losses), "loss": loss, "tokens": history.tokens, "seconds": history.seconds}
    if history.held_out:
        row |= {"held_out": dict(history.held_out)[history.best or 0], "best": history.best}
    emit([{**row, "peak_bytes": history.peak_bytes, "out": str(out)}], as_json=as_json, quiet=quiet)
