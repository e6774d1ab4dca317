"""weft fit: the best model within a byte budget, beside the best uniform ones, with a report that shows why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from weft.error import OptionError
from weft.fitting import budget as budgets
from weft.fitting import result
from weft.fitting.candidates import chains
from weft.fitting.settings import ARMS, Settings
from weft.fitting.work import Build, Run, Work
from weft.lab.metrics import Scores
from weft.lab.models import resolve
from weft.model import expressions
from weft.progress import Progress, Silent
from weft.report.schema import Report
from weft.store import save
from weft.store.cache import Cache, default
from weft.store.files import write_text
from weft.store.swap import may_replace, room


@dataclass(frozen=True)
class Arm:
    """One arm at one stage and seed, scored."""

    build: Build
    nbytes: int
    scores: Scores
    rank: int = 0
    """Of its adapter; 0 without."""
    losses: tuple[tuple[int, float], ...] = ()


def fit(
    model: str | Path,
    out: str | Path | None = None,
    *,
    budget: str | Sequence[str] = (),
    data: str | None = None,
    max_loss: str | None = None,
    settings: Settings | None = None,
    cache: Path | None = None,
    replace: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """The best model within each budget, saved to `out` (several budgets: folders in it), and the report of how it came about.

    model: a lab model, a folder or a hub id. budget: bytes of all tensors of the result: `27%` of the bfloat16 bytes, `350MB`,
    `3.2bpw`; several share the work. max_loss: instead of a budget, the smallest model whose score is at most that much worse
    (`1%`). data: a lab task, a file or a folder; without it weft's own texts calibrate, the distance to the original is the
    score, and nothing is tuned. Killed anywhere and started again, it goes on where it was and ends with the same bytes.
    Errors: ConflictError with what would fit; OptionError; those of loading and of the data.
    """
    settings, limits = settings or Settings(), [budget] if isinstance(budget, str) else list(budget)
    if bool(limits) == bool(max_loss):
        raise OptionError(
            "fit needs a budget or a loss",
            where="fit",
            got=f"budget {limits}, max_loss {max_loss}",
            want="one of them",
            fix="--budget 27%, or --max-loss 1%",
        )
    for b in limits or [""]:
        if out is not None:
            may_replace(_place(out, b, len(limits)), replace)
    work = Work(resolve(model), data, settings, Cache(cache or default()), progress or Silent())
    wanted = {b: budgets.parse(b, work.size) for b in limits}
    if max_loss:
        wanted = _smallest(work, max_loss)
    if out is not None:
        room(Path(out), sum(wanted.values()))
    found = {label: _arms(work, limit) for label, limit in sorted(wanted.items(), key=lambda b: b[1])}
    final = {label: _final(work, stages) for label, stages in found.items()}
    places = {label: _place(out, label, len(wanted)) if out is not None else None for label in found}
    rows = [
        result.budget(work, label, wanted[label], places[label], stages, final[label])
        for label, stages in found.items()
    ]
    rank = max(arm.rank for stages in found.values() for seeds in stages.values() for arm in seeds[0].values())
    report = result.report(work, str(model), rows, rank, command)
    if out is not None:
        pages = result.files(report)
        for label, last in final.items():
            about = {"budget": label, "limit": wanted[label], "choice": last.build.label, "rank": last.rank}
            beside = pages if len(final) == 1 else {}
            place = _place(out, label, len(wanted))
            made = _model(work, last)[0]
            save(made, place, replace=replace, manifest={"fit": about}, files=beside, progress=progress)
        if len(final) > 1:
            for name, text in pages.items():
                write_text(Path(out) / name, text)
    return report


def plan(
    model: str | Path,
    *,
    budget: str | Sequence[str] = (),
    data: str | None = None,
    max_loss: str | None = None,
    settings: Settings | None = None,
    cache: Path | None = None,
) -> list[str]:
    """What `fit` with these arguments would do, a line each; nothing is computed."""
    s = settings or Settings()
    work = Work(resolve(model), data, s, Cache(cache or default()), Silent())
    count = len(chains(s.bits, s.groups))
    size, sites = work.size, len(expressions(work.plain))
    lines = [
        f"model: {model}, {type(work.plain).__name__}, {size.parameters:,} parameters in {sites} sites, "
        f"{size.bf16_bytes:,} bytes in bfloat16",
        f"seeds: {s.seeds}; each: evidence from {s.tokens:,} tokens, then {count} candidates a site ({count * sites:,} in all)",
        f"choice: {s.search}, by {work.goal.name} ({work.goal.unit}) on {s.select_tokens:,} other tokens",
    ]
    if max_loss:
        lines.append(f"budget: the smallest whose score is at most {max_loss} worse, by bisection")
    for b in [budget] if isinstance(budget, str) else budget:
        limit = budgets.parse(b, size)
        rank = work.rank(limit) if data else 0
        lines.append(f"budget {b}: {limit:,} bytes; {', '.join(ARMS)}, built behind their own errors")
        if rank:
            lines.append(
                f"  then an adapter of rank {rank} ({work.adapter_bytes(rank):,} bytes) is tuned {s.tune_steps} steps"
            )
    return lines


def _place(out: str | Path, label: str, count: int) -> Path:
    """The folder of one of `count` budgets."""
    return Path(out) if count == 1 else Path(out) / label.strip().replace("%", "pct")


Stages = dict[str, list[dict[str, Arm]]]
"""Arms by name, for every stage and seed."""


def _arms(work: Work, limit: int) -> Stages:
    """Every arm at every stage and seed within one budget."""
    seeds = range(work.settings.seeds)
    made = {"compress": [_compressed(work, work.run(seed), limit) for seed in seeds]}
    rank = work.rank(limit) if work.data else 0
    if rank and limit - work.adapter_bytes(rank) >= work.least(work.run(0)):
        made["compress + tune"] = [_tuned(work, work.run(seed), limit, rank) for seed in seeds]
    return made


def _compressed(work: Work, run: Run, limit: int) -> dict[str, Arm]:
    """The arms without an adapter."""
    return {
        arm: Arm(b, b.nbytes, work.score(run, work.model(run, b.chains), work.about(run, b.chains)))
        for arm, b in work.arms(run, limit).items()
    }


def _tuned(work: Work, run: Run, limit: int, rank: int) -> dict[str, Arm]:
    """The arms with an adapter of the same rank, tuned in the same way; fit is the best of them on the data that choices are made by."""
    made: dict[str, Arm] = {}
    chosen: dict[str, float] = {}
    for arm, build in work.arms(run, limit - work.adapter_bytes(rank)).items():
        model, losses, name = work.tune(run, build, rank)
        chosen[arm] = mean(work.score(run, model, name, "select"))
        made[arm] = Arm(
            build, build.nbytes + work.adapter_bytes(rank), work.score(run, model, name), rank, tuple(losses)
        )
    return {**made, "fit": made[min(chosen, key=lambda a: chosen[a])]}


def mean(scores: Scores) -> float:
    """The score of all documents together."""
    return float(np.average(scores[0], weights=scores[1]))


def _model(work: Work, arm: Arm) -> tuple[nn.Module, str]:
    """The first seed's model of an arm, and its address."""
    run = work.run(0)
    if arm.rank:
        model, _, name = work.tune(run, arm.build, arm.rank)
        return model, name
    return work.model(run, arm.build.chains), work.about(run, arm.build.chains)


def _final(work: Work, stages: Stages) -> Arm:
    """Fit's first seed at the stage that is better on the data that choices are made by: what is saved."""
    last = [arms[0]["fit"] for arms in stages.values()]
    return (
        min(last, key=lambda arm: mean(work.score(work.run(0), *_model(work, arm), "select")))
        if len(last) > 1
        else last[0]
    )


def _smallest(work: Work, text: str) -> dict[str, int]:
    """The budget of the smallest model whose score on the choosing data is at most `text` worse than the original's.

    Bisection over what the candidates can reach, each step measured; what is found is then built like any other budget.
    """
    share = budgets.percentage(text, "--max-loss")
    run = work.run(0)
    want = mean(work.score(run, work.plain, work.print, "select"))
    base = 1.0 if run.data.kind == "distance" else want  # a distance of 0.01 is a loss of 1 %
    low, high = work.least(run), work.bytes
    with work.step("search", f"smallest within {text}"):
        for _ in range(12):
            if high - low < 0.005 * work.bytes:
                break
            middle = (low + high) // 2
            build = work.mixed(run, middle)
            got = mean(work.score(run, work.model(run, build.chains), work.about(run, build.chains), "select"))
            low, high = (low, min(middle, build.nbytes)) if got - want <= share * base else (middle, high)
    return {f"{100 * budgets.share(high, work.size):.2f}%": high}
