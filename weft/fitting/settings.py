"""What is compared within a budget, and how much work `weft fit` does."""

from __future__ import annotations

from dataclasses import dataclass

from weft.fitting.candidates import BITS, GROUPS

ARMS = ("fit", "uniform rtn", "uniform gptq")
RANKS = (16, 8, 4, 2, 1)
ADAPTER_SHARE = 0.05
"""The adapter gets at most this share of the budget: the largest rank that fits."""


@dataclass(frozen=True)
class Settings:
    """How much work fit does."""

    seeds: int = 3
    tokens: int = 8192
    """Calibration tokens."""
    select_tokens: int = 6144
    """Tokens that choices are measured on."""
    test_tokens: int = 49152
    """Tokens that the result is scored on, at about four bytes each."""
    length: int = 256
    bits: tuple[int, ...] = BITS
    groups: tuple[int, ...] = GROUPS
    """Widths and columns per scale of the roundings that are tried; fewer are faster on a large model."""
    search: str = "knapsack"
    """The method that makes the mixed choice."""
    tries: int = 3
    """How many of the best predicted uniform choices are measured."""
    tune_steps: int = 40
    tune_batch: int = 4
    """Examples a step; twice as many pairs, which are each other's wrong answers."""
    lr: float = 5e-3
    """Learning rate for text; pairs take a fifth of it."""

    @classmethod
    def quick(cls) -> Settings:
        """One seed, short tuning: a first look within minutes."""
        return cls(
            seeds=1, tokens=3072, select_tokens=2048, test_tokens=2560, groups=(0, 64), tries=1, tune_steps=8,
            tune_batch=2, lr=1e-2,
        )  # fmt: skip
