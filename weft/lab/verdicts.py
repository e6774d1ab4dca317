"""From numbers of a claim's arms to a verdict: findings on each lab model, intervals, and what they say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from weft.lab.bootstrap import Interval, interval
from weft.lab.trial import Arm, Trial

Verdict = Literal["reproduced", "no detectable difference", "contradicted"]


@dataclass(frozen=True)
class Finding:
    """What one lab model says: mean scores of the arms, and on which side of the claim their paired difference lies."""

    model: str
    fingerprint: str
    metric: str
    unit: str
    units: int
    """Documents, windows or texts a seed."""
    ours: float
    baseline: float
    floor: float | None
    difference: Interval
    """ours - factor x baseline."""
    above_floor: Interval | None
    """ours - floor, where there is one."""
    verdict: Verdict
    seconds: float
    """Work of all seeds and arms, shared ones included."""
    rates: dict[str, float]
    """The learning rate of every chain that was trained."""

    def as_json(self) -> dict[str, Any]:
        """Every number; intervals with the smallest effect that would have shown."""
        made = asdict(self)
        made["difference"] = self.difference.as_json()
        made["above_floor"] = self.above_floor.as_json() if self.above_floor is not None else None
        return made


@dataclass(frozen=True)
class Claim:
    """A claim that was tried: its arms, the findings on every lab model, and the verdict."""

    verdict: Verdict
    rule: str
    """What holds if the claim does."""
    arms: dict[str, str]
    methods: dict[str, str]
    """Every method that took part, and its fingerprint."""
    seeds: int
    findings: tuple[Finding, ...]

    @property
    def models(self) -> list[str]:
        """The lab models it was tried on, the leading one first."""
        return [f.model for f in self.findings]

    @property
    def seconds(self) -> float:
        """Work on all models."""
        return sum(f.seconds for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Everything, keys in a fixed order."""
        return {
            "verdict": self.verdict,
            "rule": self.rule,
            "arms": self.arms,
            "seeds": self.seeds,
            "models": [f.as_json() for f in self.findings],
            "seconds": round(self.seconds, 1),
            "methods": dict(sorted(self.methods.items())),
        }


def finding(trial: Trial, arms: Mapping[str, Sequence[Arm]], factor: float, side: Literal["less", "more"]) -> Finding:
    """Numbers of one model's arms over its seeds."""
    values = {arm: np.stack([a.values for a in seeds]) for arm, seeds in arms.items()}
    weights = np.stack([a.weights for a in arms["ours"]])
    difference = interval(values["ours"] - factor * values["baseline"], weights)
    floor = interval(values["ours"] - values["floor"], weights) if "floor" in values else None
    metric, unit = arms["ours"][0].metric
    return Finding(
        model=trial.subject.name,
        fingerprint=trial.subject.fingerprint,
        metric=metric,
        unit=unit,
        units=weights.shape[1],
        ours=_mean(values["ours"], weights),
        baseline=_mean(values["baseline"], weights),
        floor=_mean(values["floor"], weights) if floor is not None else None,
        difference=difference,
        above_floor=floor,
        verdict=_verdict([difference, floor] if floor is not None else [difference], side),
        seconds=round(sum(a.seconds for seeds in arms.values() for a in seeds), 1),
        rates=dict(sorted(trial.rates.used.items())),
    )


def _verdict(differences: Sequence[Interval], side: Literal["less", "more"]) -> Verdict:
    """Reproduced: every interval on the claim's side of zero. Contradicted: one of them on the other side."""
    spans = [(d.low, d.high) if side == "less" else (-d.high, -d.low) for d in differences]
    if all(high < 0 for _, high in spans):
        return "reproduced"
    return "contradicted" if any(low > 0 for low, _ in spans) else "no detectable difference"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    if "contradicted" in verdicts:
        return "contradicted"
    return "reproduced" if set(verdicts) == {"reproduced"} else "no detectable difference"


def _mean(values: Float[np.ndarray, "s k"], weights: Float[np.ndarray, "s k"]) -> float:
    return float((values * _shares(weights)).sum())


def _shares(weights: Float[np.ndarray, "s k"]) -> Float[np.ndarray, "s k"]:
    """Weights that sum to one."""
    return weights / max(float(weights.sum()), 1e-300)
