"""The steps that `weft fit` is made of, each cached by content: evidence, candidates, choice, building, tuning, scoring."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.engine import Bench, get
from weft.engine.propagate import propagate
from weft.engine.run import Chain, Step, apply, chain_key, code_version
from weft.expr import tensors
from weft.fitting import budget as budgets
from weft.fitting.candidates import Table, chains, table, uniform_chains
from weft.fitting.data import Data, batches, resolve, score
from weft.fitting.search import Choice, Search, known
from weft.fitting.settings import ADAPTER_SHARE, ARMS, RANKS, Settings
from weft.lab.distance import Distance
from weft.lab.metrics import Scores
from weft.learn.data import Example, Pair, Text
from weft.learn.suits import suits
from weft.learn.tokenizer import tokenizer
from weft.learn.train import train
from weft.memory import release
from weft.model import expressions, fingerprint, fork, match
from weft.progress import Progress
from weft.stats import Stats, collect, objective
from weft.store import load, nbytes
from weft.store.cache import Cache, key


@dataclass(frozen=True)
class Build:
    """One arm's compressed model: what each site becomes, and how far that is from the original."""

    arm: str
    label: str
    chains: dict[str, Chain]
    nbytes: int
    predicted: float
    measured: float


@dataclass
class Run:
    """What all budgets and arms share for one seed."""

    seed: int
    data: Data
    stats: Stats
    calibration: list[dict[str, Tensor]]
    distance: Distance
    test: Distance
    """On the test data, where the score is the distance."""
    search: Search
    notes: dict[tuple[str, str], None] = field(default_factory=dict[tuple[str, str], None])

    @property
    def table(self) -> Table:
        """The candidates of every site."""
        return self.search.table


class Work:
    """One model and one data set: everything `fit` does, shared by its budgets, arms and seeds."""

    def __init__(self, source: str, data: str | None, settings: Settings, cache: Cache, progress: Progress) -> None:
        known(settings.search)
        self.data, self.settings, self.cache, self.progress = data, settings, cache, progress
        self.plain = load(source)
        self.folder = self.plain.__dict__["_weft_source"]
        self.tokenizer = tokenizer(self.plain)
        self.goal = objective(self.plain)
        self.size = budgets.size(self.plain)
        self.bytes = nbytes(self.plain)
        self.print = fingerprint(self.plain)
        self.steps: list[dict[str, Any]] = []
        self.runs: dict[int, Run] = {}

    @contextmanager
    def step(self, name: str, detail: str) -> Generator[None]:
        """Record a step's time, the peak memory so far, and whether its results were in the cache."""
        start, hits, misses = time.monotonic(), self.cache.hits, self.cache.misses
        yield
        hit, missed = self.cache.hits > hits, self.cache.misses > misses
        self.steps.append(
            {
                "name": name,
                "seconds": round(time.monotonic() - start, 2),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                * (1 if sys.platform == "darwin" else 1024),
                "cache": "part" if hit and missed else "hit" if hit else "miss",
                "detail": detail,
            }
        )

    def run(self, seed: int) -> Run:
        """Evidence, candidates and what choices are measured on, for one seed; made once."""
        if seed in self.runs:
            return self.runs[seed]
        s, data = self.settings, resolve(self.data, embeds=self.goal.embeds, seed=seed)
        if data.kind != "distance":
            suits(self.plain, data.train[0], str(self.data), "tuned")
        calibration = self._batches(data.calibration, s.tokens)
        with self.step("evidence", f"seed {seed}, {s.tokens} tokens"):
            stats = collect(self.plain, calibration, self.cache.folder / "evidence", seed=seed, progress=self.progress)
        wanted = chains(s.bits, s.groups)
        with self.step(
            "candidates", f"seed {seed}, {len(wanted)} candidates for each of {len(expressions(self.plain))} sites"
        ):
            made = table(self.plain, wanted, stats, self.cache, seed=seed, progress=self.progress)
        print_ = key(self.print, data.fingerprint(), s.length)
        distance = Distance(
            self.plain,
            self._batches(data.select, s.select_tokens),
            self.goal,
            self.cache,
            key(print_, "select", s.select_tokens),
        )
        test = distance
        if data.kind == "distance":
            test = Distance(
                self.plain,
                self._batches(data.test, s.test_tokens),
                self.goal,
                self.cache,
                key(print_, "test", s.test_tokens),
            )
        bench = Bench(
            fork(self.plain), made.sites, made.chains, torch.tensor(np.isfinite(made.loss)), stats, calibration, self.goal,
            lambda model, share, draw: distance.part(share, draw)(model), cache=self.cache,
            about=key(print_, s.select_tokens, code_version("lab")), seed=seed,
        )  # fmt: skip
        search = Search(made, self._fixed(), bench)
        self.runs[seed] = Run(seed, data, stats, calibration, distance, test, search)
        return self.runs[seed]

    def _batches(self, examples: Sequence[Example], tokens: int) -> list[dict[str, Tensor]]:
        return batches(examples, self.plain, self.tokenizer, length=self.settings.length, tokens=tokens)

    def _fixed(self) -> int:
        """Bytes of what is never compressed: norms and biases."""
        return self.bytes - sum(e.nbytes() for e in expressions(self.plain).values())

    def rank(self, limit: int) -> int:
        """Rank of the adapter within a budget; 0 where even rank 1 takes more than its share."""
        return next((r for r in RANKS if self.adapter_bytes(r) <= ADAPTER_SHARE * limit), 0)

    def adapter_bytes(self, rank: int) -> int:
        """Bytes of an adapter of that rank on every linear layer, as it is saved (bfloat16)."""
        exprs = expressions(self.plain)
        return sum(2 * rank * sum(exprs[n].shape) for n in match(self.plain, "all-linear"))

    def arms(self, run: Run, limit: int) -> dict[str, Build]:
        """The three arms within the limit. Fit is the best of all that was built, on the data that choices are made by.

        Errors: ConflictError if no uniform choice fits.
        """
        search, s = run.search, self.settings
        with self.step("choose", f"seed {run.seed}, {limit} bytes"):
            uniform = {
                f"uniform {m}": search.uniform(uniform_chains(m, s.bits, s.groups), limit, s.tries)
                for m in ("rtn", "gptq")
            }
        made = {arm: self._build(run, arm, choice) for arm, choice in uniform.items()} | {
            "mixed": self.mixed(run, limit)
        }
        best = min(made.values(), key=lambda b: b.measured)
        return {arm: made.get(arm, replace(best, arm="fit")) for arm in ARMS}

    def mixed(self, run: Run, limit: int) -> Build:
        """The best mixed choice within the limit, built. Errors: ConflictError with the least bytes that would do."""
        search = run.search
        with self.step("choose", f"seed {run.seed}, {limit} bytes, mixed"):
            if not search.factor:
                search.factor = search.factors(search.mixed(limit, "knapsack"))
            choice = search.mixed(limit, self.settings.search)
        return self._build(run, "fit", choice)

    def least(self, run: Run) -> int:
        """Bytes of the smallest model that the candidates reach."""
        made = run.table
        return self._fixed() + int(np.where(np.isfinite(made.loss), made.nbytes, np.iinfo(np.int64).max).min(1).sum())

    def _build(self, run: Run, arm: str, choice: Choice) -> Build:
        chosen = {s: run.table.chains[c] for s, c in zip(run.table.sites, choice, strict=True)}
        model = self.model(run, chosen)
        about = key("distance", self.about(run, chosen), run.data.fingerprint(), self.settings.select_tokens)
        after = self.cache.json("measured", about, lambda: run.distance(model))
        return Build(arm, run.search.label(choice), chosen, nbytes(model), run.search.predicted(choice), after)

    def about(self, run: Run, chosen: Mapping[str, Chain]) -> str:
        """What a built model depends on."""
        return key(run.stats.folder.name, run.seed, code_version(), {s: chain_key(c) for s, c in chosen.items()})

    def model(self, run: Run, chosen: Mapping[str, Chain]) -> nn.Module:
        """The model with every site rewritten by its chain, block by block behind its own errors."""
        journal = self.cache.path("built", self.about(run, chosen))
        if not journal.exists():
            release(models=True)
        model = fork(self.plain)
        with self.step("build", f"seed {run.seed}"):
            notes = propagate(
                model, chosen, run.stats, run.calibration, seed=run.seed, journal=journal, progress=self.progress
            )
        run.notes |= dict.fromkeys(notes)
        return model

    def tune(self, run: Run, build: Build | None, rank: int) -> tuple[nn.Module, list[tuple[int, float]], str]:
        """The build (None: the original) with an adapter on every linear layer, tuned; its losses by step; its address."""
        model = self.model(run, build.chains) if build else fork(self.plain)
        before = self.about(run, build.chains) if build else self.print
        apply(model, (Step.of("lora", rank=rank),), at="all-linear", seed=run.seed)
        s = self.settings
        rate, batch = (s.lr / 5, 2 * s.tune_batch) if self.goal.embeds else (s.lr, s.tune_batch)
        name = key(
            "tuned",
            before,
            run.data.fingerprint(),
            rank,
            s.tune_steps,
            batch,
            s.length,
            rate,
            run.seed,
            get("lora").fingerprint(),
            code_version("learn"),
        )

        def learn() -> dict[str, Tensor]:
            release(models=True)
            work = self.cache.path("tuning", name)
            made = train(
                model, run.data.train, tokenizer=self.tokenizer, steps=s.tune_steps, batch=batch, length=s.length, lr=rate,
                seed=run.seed, out=work, save_every=max(10, s.tune_steps // 4), progress=self.progress,
            )  # fmt: skip
            held = {
                f"{n}:{p}": t.detach().to(torch.bfloat16)
                for n, e in expressions(model).items()
                for p, t in tensors(e).items()
                if t.requires_grad
            }
            return {**held, "losses": torch.tensor(made.losses, dtype=torch.float64).view(-1, 2)}

        with self.step(
            "tune", f"{build.arm if build else 'original'}, seed {run.seed}, {s.tune_steps} steps, rank {rank}"
        ):
            held = self.cache.tensors("tuned", name, learn)
        shutil.rmtree(self.cache.path("tuning", name), ignore_errors=True)
        _adopt(model, held)
        return model, [(int(a), float(b)) for a, b in held["losses"].tolist()], name

    def score(self, run: Run, model: nn.Module, name: str, part: str = "test") -> Scores:
        """Scores and weights by document of the test data, or of the data that choices are made by."""
        s = self.settings
        held, tokens, distance = (
            (run.data.test, s.test_tokens, run.test)
            if part == "test"
            else (run.data.select, s.select_tokens, run.distance)
        )
        examples = _head(held, 4 * tokens)
        about = key("score", name, part, run.data.fingerprint(), tokens, s.length, code_version("lab"))

        def measure() -> dict[str, Tensor]:
            value, weight = score(model, self.tokenizer, run.data, examples, distance)
            return {"value": torch.tensor(value), "weight": torch.tensor(weight)}

        with self.step("score", f"{part}, seed {run.seed}"):
            held = self.cache.tensors("scores", about, measure)
        return held["value"].numpy(), held["weight"].numpy()


def _head(examples: Sequence[Example], nbytes: int) -> list[Example]:
    """The first examples, of about `nbytes` bytes together; all pairs, whose ranks depend on each other."""
    made: list[Example] = []
    used = 0
    for e in examples:
        if used >= nbytes and not isinstance(e, Pair):
            break
        made.append(e)
        used += len(e.text) if isinstance(e, Text) else 400
    return made


def _adopt(model: nn.Module, held: Mapping[str, Tensor]) -> None:
    """Put trained tensors back, frozen."""
    for name, expr in expressions(model).items():
        for path, t in tensors(expr).items():
            if f"{name}:{path}" in held:
                t.data = held[f"{name}:{path}"].clone()
    model.requires_grad_(False)
