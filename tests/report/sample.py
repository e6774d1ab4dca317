"""Reports as `weft fit` would write them, for the tests of the page and the table."""

from __future__ import annotations

import random

from weft.report.schema import (
    Arm,
    Budget,
    Check,
    Curve,
    DataInfo,
    Environment,
    Fallback,
    Interval,
    Metric,
    ModelInfo,
    Objective,
    Original,
    Report,
    Row,
    SiteRow,
    Stage,
    StepRow,
    Uniform,
)

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "<!-- <script>",
    "\"'><svg onload=alert(3)>",
    '<a href="https://evil.example">x</a> %{x} $x$ [red]{{ 7*7 }}',
)
BF16 = 9_420_000
SCORES = {"compress": (1.1931, 1.1970, 1.2402), "compress + tune": (1.1893, 1.1921, 1.2155)}
ARMS: tuple[Arm, ...] = ("fit", "uniform gptq", "uniform rtn")


def interval(mean: float, half: float) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half, detectable=half)


def rows(share: float, worse: float, gap: float, stages: tuple[Stage, ...], seeds: int) -> list[Row]:
    """Three arms at each stage; `gap` scales how far the uniform arms are behind fit."""
    made: list[Row] = []
    for stage in stages:
        for i, arm in enumerate(ARMS):
            mean = SCORES[stage][0] + worse + gap * (SCORES[stage][i] - SCORES[stage][0])
            made.append(
                Row(
                    arm=arm,
                    stage=stage,
                    choice="mixed" if arm == "fit" else f"{arm.split()[1]} bits=4 group={64 if i == 1 else 128}",
                    bytes=int(BF16 * share) - 1200 * i,
                    share=share - 0.0007 * i,
                    scores=[mean + 0.0004 * s for s in range(seeds)],
                    score=interval(mean, 0.006),
                    versus_fit=None if i == 0 else interval(gap * (SCORES[stage][i] - SCORES[stage][0]), 0.0021),
                    adapter_bytes=96_000 if "tune" in stage else 0,
                )
            )
    return made


def sites(rng: random.Random, low: float) -> list[SiteRow]:
    """Seven roles in six blocks, and the embedding outside them."""
    exprs = ("int4[g64]", "int3[g64, asymmetric] + LowRank(16)", "50% zero(int4[g64])", "int8[channel]")
    made = [_site("embed_tokens", None, "embed_tokens", (4096, 256), "int5[g128]", 5.13 * low, rng)]
    for block in range(6):
        for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            bits = low * rng.uniform(2.2, 6.5)
            made.append(_site(f"layers.{block}.{role}", block, role, (256, 256), rng.choice(exprs), bits, rng))
    return made


def _site(
    name: str, block: int | None, role: str, shape: tuple[int, int], expr: str, bits: float, rng: random.Random
) -> SiteRow:
    nbytes = int(bits * shape[0] * shape[1] / 8)
    loss = {"predicted": 10 ** rng.uniform(-5, -2), "error": None if block is None else rng.uniform(0.01, 0.2)}
    return SiteRow(name=name, block=block, role=role, shape=shape, expr=expr, bits=bits, bytes=nbytes, **loss)


def budget(name: str, share: float, worse: float, gap: float, stages: tuple[Stage, ...], seeds: int) -> Budget:
    rng = random.Random(name)
    checks = [Check(label="fit", kind="final", predicted=0.02 * worse + 0.004, measured=0.025 * worse + 0.0055)]
    for i in range(8):
        predicted = 10 ** rng.uniform(-3, -0.5)
        measured = predicted * rng.uniform(0.8, 1.4)
        checks.append(Check(label=f"uniform {i}", kind="uniform", predicted=predicted, measured=measured))

    def losses(start: float) -> list[float]:
        return [start - 0.01 * i + 0.02 * rng.random() for i in range(12)]

    curves = [
        Curve(arm=arm, seed=s, step=list(range(0, 60, 5)), loss=losses(1.3 + 0.04 * a))
        for a, arm in enumerate(ARMS)
        for s in range(seeds)
        if len(stages) > 1
    ]
    return Budget(
        budget=name,
        limit_bytes=int(BF16 * share) + 900,
        out=f"out/{name}",
        rows=rows(share, worse, gap, stages, seeds),
        sites=sites(rng, share / 0.27),
        checks=checks,
        curves=curves,
    )


def uniform() -> list[Uniform]:
    """Every bits and group of both quantizers."""
    made: list[Uniform] = []
    for method, scale in (("rtn", 1.0), ("gptq", 0.45)):
        for bits in range(2, 9):
            for group in (0, 128, 64, 32):
                stored = bits + (0.1 if group == 0 else 24 / group)
                loss = scale * 3.0 * 4.0 ** (2 - bits) * (1.8 if group == 0 else group / 160 + 0.5)
                made.append(
                    Uniform(
                        method=method, bits=bits, group=group, symmetric=bits > 4, bytes=int(BF16 * stored / 16),
                        share=stored / 16, predicted=loss,
                    )
                )  # fmt: skip
    return made


def steps(seeds: int) -> list[StepRow]:
    made: list[StepRow] = []
    for s in range(seeds):
        seed = f"seed {s}"
        made += [
            StepRow(name="evidence", seconds=4.2, peak_bytes=810_000_000, cache="miss", detail=f"{seed}, 16384 tokens"),
            StepRow(name="candidates", seconds=151.0, peak_bytes=990_000_000, cache="part", detail=f"{seed}, 78 each"),
            StepRow(name="build", seconds=0.3, peak_bytes=990_000_000, cache="hit", detail=seed),
        ]
    return made


def report(*, tuned: bool = True, seeds: int = 3, hostile: bool = False) -> Report:
    """Two budgets: fit is ahead at the small one, no difference to GPTQ is detectable at the large one."""
    stages: tuple[Stage, ...] = ("compress", "compress + tune") if tuned else ("compress",)
    made = Report(
        weft="0.1.0",
        command="weft fit ref-lm --budget 27% --budget 40% \\\n  --data corpus.jsonl --seeds 3 --out out",
        model=ModelInfo(name="ref-lm", family="llama", parameters=4_710_000, bf16_bytes=BF16, fingerprint="9f2c" * 16),
        data=DataInfo(
            name="corpus.jsonl",
            kind="lm",
            calibration_tokens=16384,
            select_tokens=8192,
            train_examples=480,
            test_documents=120,
        ),
        metric=Metric(name="cross-entropy", unit="bits/byte"),
        objective=Objective(name="divergence from the original", unit="nats/token"),
        environment=Environment(
            python="3.12.3", torch="2.13.0", transformers="5.1.0", weft="0.1.0", platform="Linux x86_64", threads=2
        ),
        seeds=list(range(seeds)),
        original=Original(score=1.1852, bytes=BF16, tuned_score=1.1821 if tuned else None),
        budgets=[budget("27%", 0.2693, 0.0, 1.0, stages, seeds), budget("40%", 0.3984, -0.005, 0.1, stages, seeds)],
        uniform=uniform(),
        steps=steps(seeds),
        fallbacks=[Fallback(where="layers.3.down_proj", what="gptq: damping raised to 0.1")] if tuned else [],
        next=["weft chat out/27%", "A smaller budget may still do: weft fit ref-lm --budget 22%"],
    )
    return poison(made) if hostile else made


def poison(made: Report) -> Report:
    """The same report with a hostile text in every free string."""
    bad = " ".join(HOSTILE)
    first = made.budgets[0]
    sites = [s.model_copy(update={"name": s.name + bad, "expr": bad, "role": s.role + bad}) for s in first.sites]
    changed = first.model_copy(
        update={
            "budget": bad,
            "out": bad,
            "rows": [r.model_copy(update={"choice": bad}) for r in first.rows],
            "sites": sites,
            "checks": [c.model_copy(update={"label": bad}) for c in first.checks],
        }
    )
    return made.model_copy(
        update={
            "command": f"weft fit {bad}",
            "model": made.model.model_copy(update={"name": bad, "family": bad, "fingerprint": bad}),
            "data": made.data.model_copy(update={"name": bad}),
            "metric": made.metric.model_copy(update={"name": bad, "unit": bad}),
            "objective": made.objective.model_copy(update={"name": bad, "unit": bad}),
            "environment": made.environment.model_copy(update={"platform": bad}),
            "budgets": [changed, *made.budgets[1:]],
            "steps": [s.model_copy(update={"name": bad, "detail": bad}) for s in made.steps],
            "fallbacks": [Fallback(where=bad, what=bad)],
            "next": [bad for _ in made.next],
        }
    )
