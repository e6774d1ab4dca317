"""Realism card: whether a lab model is like real ones where methods differ, so that a claim tried on it counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weft.lab.claims import Lab
from weft.lab.trial import Trial
from weft.stats import Walker

KURTOSIS = 4.0
"""Block inputs are at least this heavy-tailed in the median block; Gaussian ones have 3."""
OUTLIER = 50.0
"""At some site the largest feature has at least this many times the median feature's second moment."""
RANK = (0.05, 0.5)
"""Effective rank of the median site's inputs, as a share of their width: neither collapsed nor isotropic."""


def card(lab: Lab, model: str) -> dict[str, Any]:
    """What was measured of this lab model, what is asked of it, and whether all of it passes."""
    trial = lab.trials[model][0]
    tails, outlier, rank = kurtosis(trial), outliers(trial), ranks(trial)
    known = lab.only(model).compare(ours=[("gptq", {"bits": 3})], baseline=[("rtn", {"bits": 3})]).findings[0]
    checks = {
        "kurtosis of block inputs, median block": _check(float(np.median(tails)), low=KURTOSIS),
        "largest over median feature second moment, any site": _check(float(outlier.max()), low=OUTLIER),
        "effective rank of inputs over their width, median site": _check(float(np.median(rank)), *RANK),
        "gptq over rtn distance at 3 bits": {
            **_check(known.ours / known.baseline, high=1.0),
            "pass": known.verdict == "reproduced",
        },
    }
    return {"fingerprint": trial.subject.fingerprint, "checks": checks, "pass": all(c["pass"] for c in checks.values())}


def _check(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    good = (low is None or value >= low) and (high is None or value <= high)
    return {"value": float(f"{value:.4g}"), "at_least": low, "at_most": high, "pass": good}


def kurtosis(trial: Trial) -> Float[np.ndarray, " b"]:
    """Kurtosis of each block's input over kept tokens and features."""
    walker = Walker(trial.subject.model, trial.batches, check=False)
    made: list[float] = []
    for i in range(len(walker.blocks)):
        pairs = zip(walker.hidden, walker.keep, strict=True)
        x = torch.cat([h.flatten(0, 1) if keep is None else h[keep] for h, keep in pairs]).double()
        square = (x - x.mean()).square()
        made.append(float(square.square().mean() / square.mean().square().clamp(min=1e-300)))
        walker.step(i)
    return np.array(made)


def outliers(trial: Trial) -> Float[np.ndarray, " s"]:
    """Largest over median second moment of each site's input features."""
    diagonals = [gram.diagonal() for gram in _grams(trial)]
    return np.array([float(d.max() / d.median().clamp(min=1e-30)) for d in diagonals])


def ranks(trial: Trial) -> Float[np.ndarray, " s"]:
    """exp(entropy) of each Gram's normalised eigenvalues, over its width."""
    made: list[float] = []
    for gram in _grams(trial):
        values = torch.linalg.eigvalsh(gram).clamp(min=0)
        share = values / values.sum()
        made.append(float(torch.special.entr(share).sum().exp() / len(share)))
    return np.array(made)


def _grams(trial: Trial) -> list[Tensor]:
    """One Gram an input, in float64."""
    firsts = [n for g in trial.stats.groups if (n := next((s for s in g if s in trial.sites), None)) is not None]
    return [trial.stats.evidence([n])[n][0].gram.double() for n in firsts]
