"""report.json: all that the page and the tables show. Version 1."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Arm = Literal["fit", "uniform rtn", "uniform gptq"]
Stage = Literal["compress", "compress + tune"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelInfo(_Strict):
    """The model that was given."""

    name: str
    family: str
    parameters: int
    bf16_bytes: int
    fingerprint: str


class DataInfo(_Strict):
    """What was calibrated, chosen, tuned and tested on."""

    name: str
    kind: Literal["lm", "response", "retrieval", "distance"]
    calibration_tokens: int
    select_tokens: int
    train_examples: int
    test_documents: int


class Metric(_Strict):
    """What the score is."""

    name: str
    unit: str
    lower_is_better: Literal[True] = True


class Objective(_Strict):
    """What candidates are predicted and chosen by."""

    name: str
    unit: str


class Environment(_Strict):
    """Versions and machine."""

    python: str
    torch: str
    transformers: str
    weft: str
    platform: str
    threads: int


class Original(_Strict):
    """The model before compression."""

    score: float
    bytes: int
    tuned_score: float | None
    """After the same tuning; None without tuning."""


class Interval(_Strict):
    """A mean with its 95 % bootstrap interval over seeds and documents; `detectable` is half its width."""

    mean: float
    low: float
    high: float
    detectable: float


class Row(_Strict):
    """One arm at one stage."""

    arm: Arm
    stage: Stage
    choice: str
    bytes: int
    share: float
    """Of the bfloat16 bytes."""
    scores: list[float]
    """One a seed."""
    score: Interval
    versus_fit: Interval | None
    """This arm's score minus fit's, on the same documents: above zero, fit is ahead. None for fit itself."""
    adapter_bytes: int


class SiteRow(_Strict):
    """What one weight became."""

    name: str
    block: int | None
    role: str
    shape: tuple[int, int]
    expr: str
    bits: float
    """Stored bits a weight, scales and all."""
    bytes: int
    predicted: float
    """Predicted loss, in the objective's unit."""
    error: float | None
    """Relative output error."""


class Check(_Strict):
    """A predicted and a measured loss of one whole-model choice."""

    label: str
    kind: Literal["uniform", "final"]
    predicted: float
    measured: float


class Curve(_Strict):
    """One tuning run."""

    arm: Arm
    seed: int
    step: list[int]
    loss: list[float]


class Budget(_Strict):
    """All that was done for one budget."""

    budget: str
    limit_bytes: int
    out: str | None
    rows: list[Row]
    sites: list[SiteRow]
    checks: list[Check]
    curves: list[Curve]


class Uniform(_Strict):
    """One uniform choice of the Pareto plot."""

    method: Literal["rtn", "gptq"]
    bits: int
    group: int
    symmetric: bool
    bytes: int
    share: float
    predicted: float


class StepRow(_Strict):
    """One step: its time, the process's peak memory so far, and whether the cache had it."""

    name: str
    seconds: float
    peak_bytes: int
    cache: Literal["hit", "miss", "part"]
    detail: str


class Fallback(_Strict):
    """What a method could not do, and did instead."""

    where: str
    what: str


class Report(_Strict):
    """One run of `weft fit`."""

    format: Literal[1] = 1
    weft: str
    command: str
    model: ModelInfo
    data: DataInfo
    metric: Metric
    objective: Objective
    environment: Environment
    seeds: list[int]
    original: Original
    budgets: list[Budget] = Field(min_length=1)
    uniform: list[Uniform]
    steps: list[StepRow]
    fallbacks: list[Fallback]
    next: list[str]
    """What to do next, as commands or short advice."""
