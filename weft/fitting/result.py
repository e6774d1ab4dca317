"""What fit found, as report.json says it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weft.engine.run import group_of, groups, relative_error
from weft.fitting import budget as budgets
from weft.fitting.candidates import uniform_chains
from weft.fitting.search import role
from weft.fitting.settings import ARMS
from weft.fitting.work import Build, Run, Work
from weft.lab.bootstrap import interval
from weft.lab.metrics import Scores
from weft.model import expressions
from weft.model.blocks import block_of
from weft.report import schema
from weft.store.cache import key

if TYPE_CHECKING:
    from weft.fitting.fit import Arm


def report(work: Work, name: str, found: Sequence[schema.Budget], rank: int, command: str) -> schema.Report:
    """The whole report; `rank` is that of the largest adapter, 0 if nothing was tuned."""
    run, s = work.run(0), work.settings
    metric, unit = (work.goal.name, work.goal.unit) if run.data.kind == "distance" else run.data.metric
    tuned = _original_tuned(work, run, rank) if rank else None
    return schema.Report(
        weft=version("weft"),
        command=command,
        model=schema.ModelInfo(
            name=name,
            family=type(work.plain).__name__,
            parameters=work.size.parameters,
            bf16_bytes=work.size.bf16_bytes,
            fingerprint=work.print,
        ),
        data=schema.DataInfo(
            name=run.data.name,
            kind=run.data.kind,
            calibration_tokens=sum(b["input_ids"].numel() for b in run.calibration),
            select_tokens=sum(b["input_ids"].numel() for b in run.distance.batches),
            train_examples=len(run.data.train) if rank else 0,
            test_documents=len(work.score(run, work.plain, work.print)[0]),
        ),
        metric=schema.Metric(name=metric, unit=unit),
        objective=schema.Objective(name=work.goal.name, unit=work.goal.unit),
        environment=schema.Environment(
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=version("transformers"),
            weft=version("weft"),
            platform=f"{platform.system()} {platform.machine()}",
            threads=torch.get_num_threads(),
        ),
        seeds=list(range(s.seeds)),
        original=schema.Original(
            score=_mean(work.score(run, work.plain, work.print)), bytes=work.bytes, tuned_score=tuned
        ),
        budgets=list(found),
        uniform=_uniform(work, run),
        steps=[schema.StepRow(**step) for step in work.steps],
        fallbacks=[schema.Fallback(where=w, what=t) for r in work.runs.values() for w, t in r.notes],
        next=_next(work, found),
    )


def budget(
    work: Work, label: str, limit: int, out: Path | None, stages: Mapping[str, Sequence[Mapping[str, Arm]]], final: Arm
) -> schema.Budget:
    """One budget: the rows of the comparison, what each site of the saved model became, predicted against measured, training curves."""
    rows = [_row(work, arm, stage, arms) for stage, arms in stages.items() for arm in ARMS]
    checks = [_check(a.build) for arms in stages.values() for seed in arms for a in seed.values()]
    seen = {(c.label, c.measured): c for c in [*_choices(work), *checks]}
    curves = [
        schema.Curve(arm=arm, seed=seed, step=[n for n, _ in a.losses], loss=[x for _, x in a.losses])
        for arms in stages.values() for seed, made in enumerate(arms) for arm, a in made.items() if a.losses and arm in ARMS
    ]  # fmt: skip
    return schema.Budget(
        budget=label,
        limit_bytes=limit,
        out=out and str(out),
        rows=rows,
        sites=_sites(work, work.run(0), final.build),
        checks=list(seen.values()),
        curves=curves,
    )


def _row(work: Work, arm: Any, stage: Any, seeds: Sequence[Mapping[str, Arm]]) -> schema.Row:
    mine = [made[arm] for made in seeds]
    values, weights = (np.stack([a.scores[i] for a in mine]) for i in (0, 1))
    theirs = np.stack([made["fit"].scores[0] for made in seeds])
    labels = list(dict.fromkeys(a.build.label for a in mine))
    return schema.Row(
        arm=arm,
        stage=stage,
        choice=" / ".join(labels),
        bytes=max(a.nbytes for a in mine),
        share=budgets.share(max(a.nbytes for a in mine), work.size),
        scores=[_mean(a.scores) for a in mine],
        score=_interval(values, weights),
        versus_fit=None if arm == "fit" else _interval(values - theirs, weights),
        adapter_bytes=work.adapter_bytes(mine[0].rank),
    )


def _interval(values: np.ndarray, weights: np.ndarray) -> schema.Interval:
    return schema.Interval(**interval(values, weights).as_json())


def _mean(scores: Scores) -> float:
    return float(np.average(scores[0], weights=scores[1]))


def _check(b: Build) -> schema.Check:
    return schema.Check(label=f"{b.arm}: {b.label}", kind="final", predicted=b.predicted, measured=b.measured)


def _choices(work: Work) -> list[schema.Check]:
    """Choices that were measured from dense evidence, before building."""
    return [
        schema.Check(label=run.search.label(c), kind="uniform", predicted=run.search.predicted(c), measured=m)
        for run in work.runs.values()
        for c, m in run.search.seen.items()
    ]


def _sites(work: Work, run: Run, build: Build) -> list[schema.SiteRow]:
    model = work.model(run, build.chains)
    made, at = expressions(model), {s: i for i, s in enumerate(run.table.sites)}

    def errors() -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for names in groups(work.plain, list(made), run.stats):
            found |= {s.name: relative_error(s, made[s.name]) for s in group_of(work.plain, names, run.stats)}
        return found

    error = work.cache.json("errors", key(work.about(run, build.chains)), errors)
    rows: list[schema.SiteRow] = []
    for name, e in made.items():
        column = run.table.chains.index(build.chains[name])
        loss = run.search.factor.get(role(name), 1.0) * float(run.table.loss[at[name], column])
        rows.append(
            schema.SiteRow(
                name=name,
                block=block_of(work.plain, name),
                role=role(name),
                shape=e.shape,
                expr=e.describe(),
                bits=8 * e.nbytes() / (e.shape[0] * e.shape[1]),
                bytes=e.nbytes(),
                predicted=loss,
                error=error[name],
            )
        )
    return rows


def _uniform(work: Work, run: Run) -> list[schema.Uniform]:
    """Every uniform choice that fits all sites."""
    made: list[schema.Uniform] = []
    for method in ("rtn", "gptq"):
        for chain in uniform_chains(method, work.settings.bits, work.settings.groups):
            choice = (run.table.columns([chain])[0],) * len(run.table.sites)
            options = dict(chain[0].options)
            if np.isfinite(run.search.predicted(choice)):
                made.append(
                    schema.Uniform(
                        method=method,
                        bits=options["bits"],
                        group=options["group"],
                        symmetric=options["symmetric"],
                        bytes=run.search.nbytes(choice),
                        share=budgets.share(run.search.nbytes(choice), work.size),
                        predicted=run.search.predicted(choice),
                    )
                )
    return made


def _original_tuned(work: Work, run: Run, rank: int) -> float:
    """The original's score after the same tuning."""
    model, _, name = work.tune(run, None, rank)
    return _mean(work.score(run, model, name))


def _next(work: Work, found: Sequence[schema.Budget]) -> list[str]:
    """Advice that follows from what was found."""
    saved = next((b.out for b in found if b.out), None)
    if saved is None:
        made = ["give --out to keep the models"]
    else:
        use = f"weft show {saved}" if work.goal.embeds else f"weft generate {saved} 'def '"
        made = [
            use,
            f"weft export {saved} --to hf --out DIR   (a plain checkpoint for other tools)",
            f"weft verify {saved}",
        ]
    if not work.data:
        made.append("give --data to tune an adapter on your own examples and to be scored on them")
    if work.settings.seeds < 3:
        made.append("leave out --quick for three seeds and longer tuning")
    for b in found:
        near = [r for r in b.rows if r.versus_fit and r.versus_fit.low <= 0]
        if near:
            said = f"at {b.budget}, {near[0].arm} is not clearly behind ({near[0].stage})"
            made.append(f"{said}: more tokens to calibrate and choose by may tell them apart (--tokens)")
    return made


def files(made: schema.Report) -> dict[str, str]:
    """report.json and report.html, by name."""
    from weft.report.page import render

    return {
        "report.json": json.dumps(made.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n",
        "report.html": render(made),
    }
