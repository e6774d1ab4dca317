"""weft in Python: load a model, rewrite its weights, train, measure, merge, save and export it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from weft import store
from weft.catalog import Entry, entries
from weft.engine import Findings, cuts, get, outline, transports
from weft.engine import branches as branching
from weft.engine import merge as merging
from weft.engine import run as engine
from weft.engine.merge import Merges
from weft.engine.merge import To as Target
from weft.engine.recipe import KINDS, Recipe, read
from weft.engine.run import Changes, Step
from weft.error import OptionError, whole
from weft.lab import models
from weft.model import DeviceMap, branches, expressions, stack_of, taps
from weft.progress import Progress, Silent
from weft.stats import Batch
from weft.store import patch as deltas
from weft.store.cache import Cache, default

To = Literal["hf", "peft", "vllm", "compressed-tensors"]


@dataclass(frozen=True)
class Row:
    """One weight as `show` lists it; `bits` are stored bits per weight, scales and all; `input` is the tap on what it reads.

    A branch has no shape.
    """

    name: str
    shape: tuple[int, ...]
    expression: str
    bytes: int
    bits: float
    input: str = ""


def load(
    model: str | Path,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    device_map: DeviceMap | None = None,
) -> nn.Module:
    """A woven model from a folder, a hub id or a lab model's name (`ref-lm`, `minilm`, `ref-vit`, ...), computed in `dtype` (float32).

    `device_map`: `auto`, one device, or devices by module path; without it the CPU.
    Errors: PathError; FormatError with every problem found; NumericError for weights that are not finite; ChangedError for
    tensors that are not what weft wrote; ResourceError for a lab model not installed.
    """
    return store.load(models.resolve(model, progress), dtype=dtype, device_map=device_map, progress=progress)


def save(
    model: nn.Module, out: str | Path, tokenizer: Any = None, replace: bool = False, progress: Progress | None = None
) -> None:
    """Write a model folder, whole or not at all: an ordinary checkpoint if every weight is plain.

    Errors: ConflictError if `out` exists and is not to be replaced; NumericError; ResourceError; PathError.
    """
    store.save(model, out, tokenizer=tokenizer, replace=replace, progress=progress)


def may_write(model: nn.Module, out: str | Path, replace: bool = False) -> None:
    """Refuse before hours of work what `save` would refuse after them. Errors: ConflictError, ResourceError."""
    store.may_write(model, out, replace=replace, nbytes=store.nbytes(model))


def attach(
    model: nn.Module,
    adapter: str | Path,
    *,
    name: str = "default",
    unverified_base: bool = False,
    replace: bool = False,
) -> list[str]:
    """Put a PEFT folder onto a model, in place; returns the sites, vectors and branches that have it.

    What adds to weights is a term `adapter:NAME`, virtual tokens are a branch NAME, IA3 and OFT factors of it; LN tuning has no name.
    `replace`: write a LoRA's numbers into the terms that the model has under this name, so that a compiled model stays compiled;
    their rank must suffice. Errors: FormatError, ShapeError, NumericError with every problem at once, and ConflictError for
    an adapter of another base or a name that is taken; the model is unchanged then.
    """
    from weft.store import adapter as adapters
    from weft.store.hotswap import hotswap

    into = hotswap if replace else adapters.attach
    return into(model, adapter, name=name, unverified_base=unverified_base)


def patch(model: nn.Module, delta: str | Path, *, name: str = "delta", replace: bool = False) -> list[str]:
    """Put a delta onto a model of its base, in place and frozen, as the adapter `name`; returns its weights and branches.

    What it adds to weights are terms `adapter:NAME`, to norms and biases branches `Shift`: `weft.activate` switches between several.
    The base may be quantized, pruned or tuned since. `replace`: an adapter of this name goes first, where there is one.
    Errors, the model being as it was: ChangedError for another base; ConflictError for a lossless delta, a turned input and a name
    that is taken; FormatError, NumericError with every problem.
    """
    return deltas.patch(model, delta, name=name, replace=replace)


def restore(
    base: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    dense: bool = False,
    name: str = "delta",
    replace: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the folder of the model that a delta and its base make, with the files that tuning changed, such as a chat template.

    A lossless delta gives an ordinary checkpoint with the tuned tensors, to the bit. Another gives the base with terms `adapter:NAME`
    or, `dense`, an ordinary checkpoint; norms and biases have their values. Configuration: the base's, but of a lossless one its own.
    Errors: those of `patch`, `load` and `save`.
    """
    place = models.resolve(base, progress)
    deltas.restore(place, delta, out, dense=dense, name=name, replace=replace, progress=progress)


def apply(
    model: nn.Module,
    method: str,
    *,
    at: str | Sequence[str] | None = None,
    data: str | None = None,
    tokens: int = 16384,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Changes:
    """Rewrite the sites that `at` matches by one method, in place, or change the coordinates of the axes that it matches, or add a branch,
    or take whole blocks out, or do what a recipe says.

    `at` is a glob, several, or `all-linear`; by default low-rank adapters and taps go to `all-linear`, every other rewrite to all
    sites that it is for, a transport to all of its axes. Branches, cuts and recipes have places of their own, and take no `at`.
    A method that needs evidence collects it from `data` (a file, a lab task's name, or None: texts of weft's own) and
    keeps it in `cache`. Errors: OptionError for an unknown method or option, for a method of another kind,
    and for a pattern that matches nothing; ConflictError for data of the wrong kind; NumericError naming the site.
    """
    whole(0, seed=seed)
    chosen = get(method)
    if chosen.kind not in (*KINDS, "relax", "recipe"):
        got, fix = f"a {chosen.kind} method", "weft methods shows kinds"
        want = "a rewrite, a transport, a branch, a cut or a recipe"
        raise OptionError("this method does not change a model", where=method, got=got, want=want, fix=fix)
    step, bars = Step.of(method, **options), progress or Silent()
    if chosen.kind in ("branch", "cut", "recipe") and at is not None:
        want, fix = "nothing: its place is its own", "leave it out"
        raise OptionError(f"a {chosen.kind} goes to no sites", where=f"{method}: at", got=at, want=want, fix=fix)
    if chosen.kind == "recipe":
        steps, moves, notes = outline.plan(model, step)
        done = run(model, steps, data=data, tokens=tokens, seed=seed, cache=cache, progress=progress)
        return Changes(done, [*notes, *done.fallbacks], moves)
    if chosen.kind == "branch":
        found = _texts(model, data, tokens, seed) if chosen.needs else ()
        return Changes(*branching.run(model, step, seed=seed, batches=found))
    if chosen.kind == "cut":
        stack_of(model)  # what has no stack shows before any data is read
        found, kept = _texts(model, data, tokens, seed), Cache(cache or default())
        return Changes(*cuts.run(model, step, found, cache=kept, progress=bars))
    if chosen.kind == "transport":
        count = transports.reach(model, method, at)
        stats = _evidence(model, data, tokens, seed, cache, bars) if chosen.needs else None
        with bars.bar(method, count) as done:
            return Changes(*transports.run(model, step, at=at, stats=stats, seed=seed, done=done))
    sites = engine.reach(model, method, at)
    stats = _evidence(model, data, tokens, seed, cache, bars) if step.needs else None
    with bars.bar(method, len(sites)) as done:
        return Changes(*engine.apply(model, (step,), at=sites, stats=stats, seed=seed, step=done))


def run(
    model: nn.Module,
    recipe: Recipe | str | Path,
    *,
    data: str | None = None,
    tokens: int = 16384,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Changes:
    """Apply a recipe's steps in order, in place; each that needs evidence collects that of the model as it is by then.

    Errors: FormatError and OptionError with every problem of the recipe, before the first step; those of `apply`.
    """
    steps = recipe if isinstance(recipe, Recipe) else read(Path(recipe))
    made = Changes()
    for step, at in steps.steps:
        how: dict[str, Any] = {"data": data, "tokens": tokens, "seed": seed, "cache": cache, "progress": progress}
        done = apply(model, step.method, at=at, **how, **dict(step.options))
        made.extend(done)
        made.fallbacks += done.fallbacks
    return made


def probe(
    model: nn.Module,
    method: str,
    *,
    data: str | Sequence[Batch] | None = None,
    tokens: int = 16384,
    seed: int = 0,
    **options: Any,
) -> Findings:
    """What a probe finds out about a model, by site; the model stays as it is.

    One that needs data reads `tokens` tokens of `data` (a file, a folder, a lab task's name, or None: texts of weft's own), or batches
    of a model's inputs as they are given.
    Errors: OptionError for an unknown method or option, a method that is no probe, and data for one that reads none; those of the method.
    """
    chosen = get(method)
    if chosen.kind != "probe":
        got, want, fix = f"a {chosen.kind} method", "a probe", "weft methods shows kinds"
        raise OptionError("this method probes nothing", where=method, got=got, want=want, fix=fix)
    chosen.bind(options)  # bad options show before data is read
    if "data" in chosen.needs:
        return chosen(model, _texts(model, data, tokens, seed), **options)
    if data is not None:
        got, want, fix = "data", f"none: {method} looks at weights alone", "leave it out"
        raise OptionError("this probe reads no data", where="data", got=got, want=want, fix=fix)
    return chosen(model, **options)


def _evidence(
    model: nn.Module, data: str | None, tokens: int, seed: int, cache: Path | None, progress: Progress
) -> Any:
    """Evidence of today's model from its calibration texts."""
    from weft.stats import collect

    found = _texts(model, data, tokens, seed)
    return collect(model, found, (cache or default()) / "evidence", seed=seed, progress=progress)


def _texts(model: nn.Module, data: str | Sequence[Batch] | None, tokens: int, seed: int) -> Sequence[Batch]:
    """Batches as they are given, or calibration batches of these texts, or of weft's own."""
    from weft.fitting.data import inputs_of

    return inputs_of(model, data, tokens=tokens, seed=seed)


def merge(model: nn.Module, *, to: Target, at: str | Sequence[str] = "*") -> Merges:
    """Fold all terms of every weight into one, in place: a plain matrix in the checkpoint's dtype (`dense`) or in bfloat16, or one
    rounding onto the base's own grid (`grid`). Another grid: merge to dense, then apply any quantizer.

    The result says of each site what the rounding lost and which promises no longer hold; its `undo` brings the terms back,
    to the bit, and as long as it is kept they take their memory.
    Errors: ConflictError naming every site whose base has no grid, before anything changes.
    """
    return merging.merge(model, to=to, at=at)


def export(
    model: nn.Module,
    out: str | Path,
    *,
    to: To = "hf",
    base: str | Path | None = None,
    adapter: str | None = None,
    replace: bool = False,
) -> list[str]:
    """Write the model for other tools; returns what had to be written otherwise than it was.

    hf: an ordinary checkpoint of today's values in the checkpoint's dtype. peft: the adapter as a folder of PEFT's type for it;
    `base` is where a base other than the pretrained weights goes, and `adapter` names one to be written alone. vllm: a LoRA
    folder that keeps to what vLLM loads. compressed-tensors: int4 and int8 weights, packed, and int8 weights that read int8 tokens.
    Errors: OptionError; ConflictError naming what the format cannot hold, or if a folder exists.
    """
    for name, given in (("base", base), ("adapter", adapter)):
        if given is not None and to not in ("peft", "vllm"):
            what, got = "this is only for PEFT adapters", f"{name} with to={to}"
            raise OptionError(what, where=name, got=got, want=f"no {name}", fix="leave it out")
    if to == "hf":
        store.save(model, out, replace=replace, dense=True)
    elif to in ("peft", "vllm"):
        from weft.store.peft import export_peft

        export_peft(model, out, base=base, adapter=adapter, replace=replace, serving=to == "vllm")
    elif to == "compressed-tensors":
        from weft.store.compressed import export_compressed

        return export_compressed(model, out, replace=replace)
    else:
        raise OptionError(
            "unknown export format",
            where="to",
            got=to,
            want="hf, peft, vllm or compressed-tensors",
            fix="choose one of these",
        )
    return []


def verify(folder: str | Path, progress: Progress | None = None) -> list[str]:
    """Every way in which a folder differs from its manifest; empty if it is whole. Errors: PathError if it has none."""
    return store.verify(Path(folder), progress)


def show(model: nn.Module) -> list[Row]:
    """Every weight: its name, shape, expression, bytes and bits per weight, and what its input goes through first; then every branch."""
    on = {name: tap.describe() for name, tap in taps(model).items()}
    rows = [
        Row(n, e.shape, e.describe(), e.nbytes(), e.bits_per_weight(), on.get(n, ""))
        for n, e in expressions(model).items()
    ]
    return rows + [Row(b.key, (), b.describe(), b.nbytes(), 8 * b.nbytes() / b.numbers) for b in branches(model)]


def methods() -> list[Entry]:
    """Every method: name, verb, kind, one line of help, paper."""
    return list(entries())
