"""weft fit: the best model within a byte budget, beside the best uniform ones, with a report that shows why."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

import weft
from weft.engine import get
from weft.engine.run import Chain, Step, apply, chain_key, code_version, propagate
from weft.expr import spec, tensors
from weft.fit import budget as budgets
from weft.store.cache import Cache, key
from weft.fit.candidates import Table, chains, describe, table, uniform_chains
from weft.fit.data import Data, batches, resolve, score
from weft.lab.distance import Distance
from weft.fit.search import Bench, Choice, Measured, Search, role
from weft.lab.bootstrap import seeds as over_seeds
from weft.learn.train import train
from weft.model import expressions, fingerprint, fork, set_expressions, site
from weft.model.blocks import block_of
from weft.stats import Stats, collect, objective
from weft.store import load, nbytes, save

ARMS = ("fit", "uniform rtn", "uniform gptq")
STAGES = ("compress", "compress + tune")


@dataclass(frozen=True)
class Settings:
    """How much work fit does."""

    seeds: int = 3
    tokens: int = 16384
    """Calibration tokens."""
    select_tokens: int = 8192
    """Tokens that choices are measured on."""
    length: int = 256
    rank: int = 4
    """Rank of the adapter that is tuned on every linear layer."""
    tune_steps: int = 60
    tune_batch: int = 8


@dataclass
class Build:
    """One arm's model at one budget, stage and seed."""

    arm: str
    choice: str
    chains: dict[str, Chain]
    nbytes: int
    measured: float
    predicted: float


@dataclass
class Run:
    """One `weft fit`: what all budgets and arms share for one seed."""

    seed: int
    model: nn.Module
    tokenizer: Any
    data: Data
    stats: Stats
    table: Table
    distance: Distance
    test: Distance | None
    calibration: list[Mapping[str, torch.Tensor]]
    search: Search
    bench: Bench
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


class Fit:
    """The steps of `weft fit`, each cached by content."""

    def __init__(self, model: str, name: str, data: str | None, settings: Settings, cache: Cache, progress: Any) -> None:
        self.source, self.name, self.data, self.settings, self.cache, self.progress = model, name, data, settings, cache, progress
        self.plain = load(model)
        self.goal = objective(self.plain)
        self.size = budgets.size(self.plain)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(load_folder(self.plain))
        self.print = fingerprint(self.plain)
        self.steps: list[dict[str, Any]] = []
        self.runs: dict[int, Run] = {}

    @contextmanager
    def step(self, name: str, detail: str = "") -> Iterator[None]:
        """Record a step's time, peak memory and whether its results came from the cache."""
        start, hits = time.monotonic(), self.cache.hits
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = self.cache.hits > hits and time.monotonic() - start < 1
        self.steps.append(
            {"name": name, "seconds": round(time.monotonic() - start, 2), "peak_bytes": peak, "cache": "hit" if found else "miss", "detail": detail}
        )

    def run(self, seed: int) -> Run:
        """Evidence, candidates and what choices are measured on, for one seed; made once."""
        if seed in self.runs:
            return self.runs[seed]
        s = self.settings
        data = resolve(self.data, embeds=self.goal.embeds, seed=seed)
        cut = {"embeds": self.goal.embeds, "length": s.length}
        calibration = batches(data.calibration, self.tokenizer, tokens=s.tokens, **cut)
        with self.step("evidence", f"seed {seed}, {s.tokens} tokens"):
            stats = collect(self.plain, calibration, self.cache.folder / "evidence", seed=seed, progress=self.progress)
        with self.step("candidates", f"seed {seed}, {len(chains())} candidates a site"):
            made = table(self.plain, chains(), stats, self.cache, seed=seed, progress=self.progress)
        select = batches(data.select, self.tokenizer, tokens=s.select_tokens, **cut)
        distance = Distance(self.plain, select, self.goal, self.cache, key(self.print, data.fingerprint(), "select", s.select_tokens))
        test = None
        if data.kind == "distance":
            held = batches(data.test, self.tokenizer, tokens=s.select_tokens * 2, **cut)
            test = Distance(self.plain, held, self.goal, self.cache, key(self.print, data.fingerprint(), "test", s.select_tokens))
        bench = Bench(fork(self.plain), made, stats, distance, seed)
        about = (stats.folder.name, key(data.fingerprint(), s.select_tokens), code_version(), [chain_key(c) for c in made.chains])
        search = Search(made, self._fixed(), lambda c: self.cache.json("measured", key(about, c), lambda: bench(c)))
        self.runs[seed] = Run(seed, self.plain, self.tokenizer, data, stats, made, distance, test, calibration, search, bench)
        return self.runs[seed]

    def _fixed(self) -> int:
        """Bytes of what is never compressed: norms and biases."""
        return nbytes(self.plain) - sum(e.nbytes() for e in expressions(self.plain).values())

    def adapter_bytes(self) -> int:
        """Bytes of the adapters that tuning adds, as they are saved."""
        names = [n for n in expressions(self.plain) if site(self.plain, n).kind == "linear"]
        return sum(2 * self.settings.rank * sum(expressions(self.plain)[n].shape) for n in names)

    def builds(self, run: Run, limit: int) -> tuple[dict[str, Build], list[Measured]]:
        """The three arms within the limit, built behind their own errors and measured on the data that choices are made by."""
        search = run.search
        with self.step("choose", f"seed {run.seed}, {limit} bytes"):
            measured = [search.uniform(uniform_chains(m), limit) for m in ("rtn", "gptq")]
            first = search.mixed(limit)
            if not search.factor:
                self._correct(run, first)
            measured += [search.measure("mixed, predicted", first), search.measure("mixed, corrected", search.mixed(limit))]
        mixed = min(measured[2:], key=lambda m: m.measured)
        arms = {"uniform rtn": measured[0], "uniform gptq": measured[1], "fit": mixed}
        made = {arm: self._build(run, arm, m) for arm, m in arms.items()}
        best = min(made.values(), key=lambda b: b.measured)
        made["fit"] = Build("fit", best.choice, best.chains, best.nbytes, best.measured, best.predicted)
        return made, measured

    def _correct(self, run: Run, choice: Choice) -> None:
        about = key("roles", run.stats.folder.name, run.data.fingerprint(), code_version(), choice, self.settings.select_tokens)

        def measure() -> dict[str, float]:
            run.search.correct(choice, run.bench.alone)
            return run.search.factor

        run.search.factor = dict(self.cache.json("measured", about, measure))

    def _build(self, run: Run, arm: str, m: Measured) -> Build:
        chosen = {s: run.table.chains[c] for s, c in zip(run.table.sites, m.choice, strict=True)}
        model = self.model(run, chosen)
        name = key("built", self._about(run, chosen), self.settings.select_tokens)
        after = self.cache.json("measured", name, lambda: run.distance(model))
        label = "mixed" if arm == "fit" and len(set(m.choice)) > 1 else run.search.label(m.choice)
        return Build(arm, label, chosen, nbytes(model), after, m.predicted)

    def _about(self, run: Run, chosen: Mapping[str, Chain]) -> str:
        return key(run.stats.folder.name, run.seed, code_version(), {s: chain_key(c) for s, c in chosen.items()})

    def model(self, run: Run, chosen: Mapping[str, Chain]) -> nn.Module:
        """The model with every site rewritten by its chain, block by block behind its own errors."""
        model = fork(self.plain)
        journal = self.cache.path("built", self._about(run, chosen))
        with self.step("build", f"seed {run.seed}"):
            if all(not get(s.method).needs for c in chosen.values() for s in c):
                run.notes += apply(model, next(iter(chosen.values())), stats=run.stats, seed=run.seed)[1]
            else:
                run.notes += propagate(model, chosen, run.stats, run.calibration, seed=run.seed, journal=journal, progress=self.progress)
        return model

    def tune(self, run: Run, build: Build) -> tuple[nn.Module, list[tuple[int, float]]]:
        """The build with a low-rank adapter on every linear layer, tuned on the data; adapters are kept in bfloat16."""
        model = self.model(run, build.chains)
        s = self.settings
        apply(model, (Step.of("lora", rank=s.rank),), at="all-linear" if not self.goal.embeds else linear_sites(model), seed=run.seed)
        name = key("tuned", self._about(run, build.chains), run.data.fingerprint(), s.rank, s.tune_steps, s.tune_batch, s.length, get("lora").fingerprint())
        losses: list[tuple[int, float]] = []

        def learn() -> dict[str, torch.Tensor]:
            original = self.plain if run.data.kind == "distance" else None
            made = train(
                model, run.data.train, tokenizer=self.tokenizer, steps=s.tune_steps, batch=s.tune_batch, length=s.length, seed=run.seed, original=original, progress=self.progress
            )
            losses.extend(made.losses)
            held = {f"{n}:{p}": t.detach().to(torch.bfloat16) for n, e in expressions(model).items() for p, t in tensors(e).items() if t.requires_grad}
            return {**held, "losses": torch.tensor(made.losses, dtype=torch.float64).view(-1, 2)}

        with self.step("tune", f"{build.arm}, seed {run.seed}, {s.tune_steps} steps"):
            held = self.cache.tensors("tuned", name, learn)
        _adopt(model, held)
        return model, [(int(a), float(b)) for a, b in held["losses"].tolist()]

    def score(self, run: Run, model: nn.Module, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores and weights by test document."""
        about = key("score", name, run.data.fingerprint(), self.settings.select_tokens, code_version())

        def measure() -> dict[str, torch.Tensor]:
            value, weight = score(model, self.tokenizer, run.data, run.test)
            return {"value": torch.tensor(value), "weight": torch.tensor(weight)}

        held = self.cache.tensors("scores", about, measure)
        return held["value"].numpy(), held["weight"].numpy()


def linear_sites(model: nn.Module) -> list[str]:
    """Every Linear."""
    return [n for n in expressions(model) if site(model, n).kind == "linear"]


def load_folder(model: nn.Module) -> Path:
    """The folder that a model was loaded from."""
    return Path(model.__dict__["_weft_source"])


def _adopt(model: nn.Module, held: Mapping[str, torch.Tensor]) -> None:
    """Replace trained tensors by their kept values."""
    with torch.no_grad():
        for name, expr in expressions(model).items():
            for path, t in tensors(expr).items():
                if f"{name}:{path}" in held:
                    t.data = held[f"{name}:{path}"].clone()
    model.requires_grad_(False)


__all__ = ["ARMS", "STAGES", "Callable", "Fit", "Sequence", "Settings", "block_of", "describe", "over_seeds", "platform", "role", "save", "set_expressions", "spec", "weft"]
