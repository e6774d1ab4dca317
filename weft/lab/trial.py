"""One lab model with one seed's texts: what an arm of a claim does to it, and what it then scores, unit by unit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.engine import Bench, cuts, get, transports
from weft.engine.run import Chain, Step, apply, chain_key, group_of, run
from weft.error import NumericError
from weft.expr import Expr
from weft.lab import metrics, tasks
from weft.lab.distance import Distance, padded, windows
from weft.learn.data import Example, Pair, Response, Text
from weft.model import expressions, fork, match, mode, places
from weft.model import fingerprint as model_fingerprint
from weft.stats import Stats, collect, objective
from weft.store.cache import Cache, key
from weft.store.load import load


@dataclass(frozen=True)
class Arm:
    """Scores of one arm on one model and seed: a value and a weight for every unit."""

    values: Float[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]
    seconds: float
    metric: tuple[str, str]
    """Name and unit."""


@dataclass(frozen=True)
class Subject:
    """A lab model and the texts it is tried on."""

    name: str
    model: nn.Module
    tokenizer: Any
    distance_task: str
    tuning_task: str
    calibration: int = 8192
    """Tokens of evidence a seed."""
    units: int = 64
    """Held-out texts of an embedding model a seed; of a language model a quarter as many windows of `length` tokens."""
    length: int = 256

    @classmethod
    def load(cls, name: str, folder: Path, distance_task: str, tuning_task: str) -> Subject:
        """A woven model and its tokenizer from a folder."""
        from transformers import AutoTokenizer

        return cls(name, load(folder), AutoTokenizer.from_pretrained(folder), distance_task, tuning_task)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's values."""
        return model_fingerprint(self.model)

    @property
    def embeds(self) -> bool:
        """Whether it makes embeddings."""
        return objective(self.model).embeds


@dataclass(frozen=True)
class Rates:
    """Learning rates of one lab model's arms, by what they depend on: those that earlier proofs found, and those of this claim."""

    known: Mapping[str, float] = field(default_factory=dict[str, float])
    used: dict[str, float] = field(default_factory=dict[str, float])


class Trial:
    """One lab model, one seed. Another seed: other texts to calibrate and to measure on, another order to tune in."""

    def __init__(self, subject: Subject, seed: int, store: Cache, code: str, rates: Rates | None = None) -> None:
        self.subject, self.seed, self.store, self.code, self.rates = subject, seed, store, code, rates or Rates()
        self.goal = objective(subject.model)

    @classmethod
    def seeds(cls, subject: Subject, count: int, store: Cache, code: str, rates: Rates) -> list[Trial]:
        """So many seeds, which share their learning rates."""
        return [cls(subject, seed, store, code, rates) for seed in range(count)]

    @cached_property
    def first(self) -> Trial:
        """The same with the first seed."""
        return self if self.seed == 0 else Trial(self.subject, 0, self.store, self.code, self.rates)

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """Calibration batches."""
        s = self.subject
        cut = padded if s.embeds else windows
        held = texts(task_of(s.distance_task, self.seed).calibration)
        return cut(held, s.tokenizer, length=s.length, tokens=s.calibration)

    @cached_property
    def held_out(self) -> list[dict[str, Tensor]]:
        """Batches to measure distances on: other texts for another seed, as long as there are some."""
        s = self.subject
        held = texts(task_of(s.distance_task, 0).test)
        if s.embeds:
            mine = np.roll(np.arange(len(held)), -self.seed * s.units)[: s.units]
            return padded([held[i] for i in mine], s.tokenizer, length=s.length, tokens=1 << 60)
        rows = torch.cat([b["input_ids"] for b in windows(held, s.tokenizer, length=s.length, tokens=1 << 60)])
        count = max(1, s.units // 4)
        return [{"input_ids": r} for r in rows.roll(-self.seed * count, 0)[:count].split(8)]

    @cached_property
    def stats(self) -> Stats:
        """Evidence from the calibration batches."""
        return self._evidence(self.subject.model)

    @cached_property
    def sites(self) -> list[str]:
        """Every Linear but the output head and those that no output depends on."""
        names = match(self.subject.model, "all-linear")
        held = self.stats.evidence(names)
        return [n for n in names if any(float(e.weight.sum()) > 0 for e in held[n])]

    @cached_property
    def data(self) -> str:
        """Hash of the token ids that distances and evidence depend on."""
        word = hashlib.blake2b(digest_size=16)
        for batch in (*self.batches, *self.held_out):
            ids = batch["input_ids"].contiguous()
            word.update(str(list(ids.shape)).encode() + ids.numpy().tobytes())
        return word.hexdigest()

    @cached_property
    def distance(self) -> Distance:
        """Distance to the original on the held-out batches."""
        name = key("lab", self.subject.fingerprint, self.data, self.code)
        return Distance(self.subject.model, self.held_out, self.goal, self.store, name)

    def rewritten(self, chain: Chain, at: Sequence[str] = ("*",)) -> Arm:
        """Distances after every site that matches was rewritten by this chain, from dense evidence."""

        def chosen() -> dict[Chain, list[str]]:
            return {chain: [n for n in self.sites if any(fnmatchcase(n, pattern) for pattern in at)]}

        return self._distances([chain_key(chain), *at], chosen)

    def allocated(self, search: Step, share: float, among: Among) -> Arm:
        """Distances after every site became the candidate that the search chose within `share` of the bytes."""
        chains, size = AMONG[among].chains(), AMONG[among].size

        def chosen() -> dict[Chain, list[str]]:
            cost, error = self.table(among)
            budget = int(share * sum(size(e) for n, e in expressions(self.subject.model).items() if n in self.sites))
            method = get(search.method)
            given = (self.bench(chains, error.isfinite()),) if method.needs else ()
            made: dict[Chain, list[str]] = {}
            for name, c in zip(
                self.sites, method(cost, error, budget, *given, **dict(search.options)).tolist(), strict=True
            ):
                made.setdefault(chains[c], []).append(name)
            return made

        return self._distances([chain_key((search,)), share, [chain_key(c) for c in chains]], chosen)

    def bench(self, chains: Sequence[Chain], usable: Tensor) -> Bench:
        """Where a search measures what it needs, on the calibration texts."""
        name = key("bench", self.subject.fingerprint, self.data, self.code)
        near = Distance(self.subject.model, self.batches, self.goal, self.store, name)
        mode(model := fork(self.subject.model), "speed")
        return Bench(
            model, self.sites, chains, usable, self.stats, self.batches, self.goal,
            lambda model, share, draw: near.part(share, draw)(model), cache=self.store, about=name, seed=self.seed,
        )  # fmt: skip

    def table(self, among: Among) -> tuple[Tensor, Tensor]:
        """Bytes and predicted loss [s c] of every site as every candidate; infinite loss where its groups do not fit."""
        chains = AMONG[among].chains()

        def solve() -> dict[str, Any]:
            rows = [_options(self.subject.model, n, chains, self.stats, self.seed) for n in self.sites]
            return {"cost": [[c for c, _ in r] for r in rows], "error": [[e for _, e in r] for r in rows]}

        name = key("table", self.subject.fingerprint, self.code, self.data, self.seed, [chain_key(c) for c in chains])
        held = self.store.json("lab-tables", name, solve)
        error = [[torch.inf if e is None else e for e in row] for row in held["error"]]
        return torch.tensor(held["cost"]), torch.tensor(error)

    def rate(self, chain: Chain, about: Sequence[Any], search: Callable[[Trial], float]) -> float:
        """The learning rate of a chain, for every seed: what an earlier proof found, else what `search` finds on the first one.

        `about`: what it depends on besides the model and the chain's methods.
        """
        mark = key("rate", self.subject.fingerprint, chain_key(chain), *about)
        name = f"{' then '.join(s.describe() for s in chain)} [{mark[:12]}]"
        if (value := self.rates.known.get(name)) is None:
            held = self.store.json("lab-rates", key(mark, self.code), lambda: {"rate": search(self.first)})
            value = float(held["rate"])
        self.rates.used[name] = value
        return value

    def _distances(self, what: Any, chosen: Callable[[], Mapping[Chain, Sequence[str]]]) -> Arm:
        """Distances after these chains rewrote these sites of a fork."""

        def make() -> metrics.Scores:
            model = fork(self.subject.model)
            for chain, names in chosen().items():
                self._apply(model, chain, names)
            return self.distance.documents(model)

        return self.arm("distance", [self.data, what], make, (self.goal.name, self.goal.unit))

    def _apply(self, model: nn.Module, chain: Chain, names: Sequence[str]) -> None:
        """Run a chain; behind a change of coordinates, and where blocks are gone, evidence is collected anew."""
        stats: Stats | None = self.stats
        for kind, steps in groupby(chain, lambda s: get(s.method).kind):
            for part in ((s,) for s in steps) if kind in ("transport", "cut") else (tuple(steps),):
                if kind == "cut":
                    cuts.run(model, part[0], self.batches, cache=self.store)
                    stats = None
                    continue
                stats = stats or self._evidence(model)
                if kind == "transport":
                    transports.run(model, part[0], stats=stats, seed=self.seed)
                    stats = None
                else:
                    left = [n for n in names if n in places(model)]
                    apply(model, part, at=left, stats=stats, seed=self.seed)

    def _evidence(self, model: nn.Module) -> Stats:
        return collect(model, self.batches, self.store.path("lab-evidence", self.code), seed=self.seed)

    def _prepare(self) -> tuple[list[str], Distance]:
        """Collect what all arms share, so that none of them is charged for it."""
        return self.sites, self.distance

    def arm(self, kind: str, what: Any, make: Callable[[], metrics.Scores], metric: tuple[str, str]) -> Arm:
        """The scores from the cache or made now, with the seconds that took. Errors: NumericError."""

        def timed() -> dict[str, Any]:
            if kind == "distance":
                self._prepare()
            start = time.monotonic()
            values, weights = make()
            if not np.isfinite(values).all():
                raise NumericError(
                    "a score is not finite",
                    where=f"{self.subject.name}, seed {self.seed}",
                    got=f"{what}",
                    want="finite scores",
                    fix="mend the method that made them",
                )
            return {"values": values.tolist(), "weights": weights.tolist(), "seconds": time.monotonic() - start}

        name = key(kind, self.subject.fingerprint, self.seed, self.code, what)
        held = self.store.json("lab", name, timed)
        return Arm(np.array(held["values"]), np.array(held["weights"]), held["seconds"], metric)


@dataclass(frozen=True)
class Candidates:
    """What a search chooses from, and the bytes that a share of the budget is a share of."""

    chains: Callable[[], list[Chain]]
    size: Callable[[Expr], int]


def roundings() -> list[Chain]:
    """2 to 8 bits in groups of several sizes, with a zero point up to 4 bits."""
    return [(Step.of("rtn", bits=b, group=g, symmetric=b > 4),) for b in range(2, 9) for g in (0, 128, 64, 32)]


def sparsities() -> list[Chain]:
    """Wanda with nothing pruned, and at every fiftieth from 40 % to 98 %."""
    return [(Step.of("wanda", sparsity=s / 50),) for s in (0, *range(20, 50))]


Among = Literal["roundings", "sparsities"]
AMONG: dict[Among, Candidates] = {
    "roundings": Candidates(roundings, lambda e: 2 * e.shape[0] * e.shape[1]),
    "sparsities": Candidates(sparsities, Expr.nbytes),
}
"""Roundings share the bytes of bfloat16; sparse weights, whose entries stay as they are stored, those of the model."""


def texts(examples: Sequence[Example]) -> list[str]:
    """The texts of examples; both of a pair."""
    made: list[str] = []
    for e in examples:
        made += [e.query, e.positive] if isinstance(e, Pair) else [e.text] if isinstance(e, Text) else []
    return made


def _options(
    model: nn.Module, name: str, chains: Sequence[Chain], stats: Stats, seed: int
) -> list[tuple[int, float | None]]:
    """Bytes and predicted loss of a site as each of these; None where the groups are as wide as the row."""
    group = group_of(model, [name], stats, seed=seed)
    made: list[tuple[int, float | None]] = []
    for chain in chains:
        if int(dict(chain[0].options).get("group", 0)) >= group.now.shape[1]:
            made.append((0, None))
        else:
            (new,) = run(group, chain)
            made.append((new.nbytes(), group.site.cost(new)))
    return made


@cache
def task_of(name: str, seed: int, pairs: bool = False) -> tasks.Task:
    """The task, read once; with `pairs`, prompts and responses are pairs that an embedding model has to match."""
    held = tasks.task(name, seed=seed)
    if not pairs or held.kind != "response":
        return held
    parts = {p: [_pair(e) for e in getattr(held, p)] for p in ("calibration", "train", "select", "test")}
    return replace(held, kind="retrieval", **parts)


def _pair(e: Example) -> Example:
    return Pair(e.prompt, e.response, e.name) if isinstance(e, Response) else e
