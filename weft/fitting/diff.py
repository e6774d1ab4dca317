"""weft diff: what a tuned model has beside its base, within a byte budget or to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.engine.unlike import refusals
from weft.error import ConflictError, NumericError, OptionError, raise_all
from weft.expr import Dense, Expr
from weft.fitting import budget as budgets
from weft.fitting.data import calibration
from weft.fitting.deltas import Form, families
from weft.lab.models import resolve
from weft.learn.tokenizer import tokenizer
from weft.linalg.allocation import integer
from weft.memory import release
from weft.model import Group, Site, expressions, places, vectors
from weft.progress import Progress, Silent
from weft.stats import Stats, collect
from weft.store import lossless as exact
from weft.store.cache import default
from weft.store.delta import differing, must_lie_apart
from weft.store.load import find, load
from weft.store.patch import write
from weft.store.swap import MANIFEST, may_replace, read_manifest

GAP = 1e-6
"""How near the choice is to the best one: a share of its error, and of the largest error of any candidate."""
AMPLE = 4
"""A weight is tried in forms of at most so many times its part of the budget, by its size among the weights that changed."""


@dataclass(frozen=True)
class Kept:
    """What a delta has of one weight."""

    name: str
    shape: tuple[int, int]
    expression: str
    bytes: int
    left: float
    """||D - D'||² / ||D||² of the difference D and what stands for it."""


@dataclass(frozen=True)
class Diff:
    """What `diff` wrote."""

    bytes: int
    """Of all tensors."""
    share: float
    """Of the base's bytes in bfloat16; of a lossless delta, of the tuned tensors'."""
    error: float = 0.0
    """What was made least: with data, the predicted loss of leaving the tuned model; without, Σ ||D - D'||² / ||W||² over the weights."""
    kept: Sequence[Kept] = ()


def diff(
    base: str | Path,
    tuned: str | Path | nn.Module,
    out: str | Path,
    *,
    budget: str | None = None,
    lossless: bool = False,
    data: str | None = None,
    tokens: int = 16384,
    seed: int = 0,
    replace: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Write what a tuned model has beside the plain checkpoint `base`: `weft.patch` and `weft.restore` put it back.

    budget: bytes of the delta's tensors: `2%` of the base's bfloat16 bytes, `50MB` or `0.3bpw`. Every weight's difference becomes
    what makes the sum of errors least within them: nothing, low-rank factors, sparse entries, signs, a grid, or factors and signs; norms
    and biases are kept in bfloat16. With `data`, an error is the predicted loss on inputs that the tuned model has there; without, the
    squared error relative to the weight's size. lossless: instead, differences to the bit of the tensors of two plain checkpoints.
    Errors: OptionError unless one of budget and lossless is given; ConflictError for a base that is no plain checkpoint and a budget
    that is too small; ConflictError and ShapeError, all at once, for models that are not of one kind; NumericError; those of loading
    and writing.
    """
    _one(budget, lossless, data, tuned)
    bars, place = progress or Silent(), Path(out)
    may_replace(place.resolve(), replace)
    old = find(resolve(base, progress))
    if budget is None:
        size, whole = exact.write(old, find(resolve(str(tuned), progress)), place, replace=replace, progress=bars)
        return Diff(size, size / max(1, whole))
    _must_be_plain(old)
    must_lie_apart(place, old)
    first = load(old, progress=progress)
    after = tuned if isinstance(tuned, nn.Module) else load(resolve(tuned, progress), progress=progress)
    source = after.__dict__.get("_weft_source")
    must_lie_apart(place, *([source] if source is not None else []))
    raise_all(refusals({"base": first, "tuned": after}, "compared"))
    limit, stats = budgets.parse(budget, budgets.size(first), "budget"), None
    if data is not None:
        texts = calibration(after, data, tokenizer(after), tokens=tokens, seed=seed)
        stats = collect(after, texts, (cache or default()) / "evidence", seed=seed, progress=progress)
    work = _Work(first, after, stats)
    loose = work.loose()
    room = limit - sum(e.nbytes() for e in loose.values())
    if room < 0:
        got, want = f"{limit} bytes", f"at least {limit - room}, which norms and biases take"
        raise ConflictError("no choice fits the budget", where="budget", got=got, want=want, fix="raise the budget")
    added = {**work.choose(room, bars), **loose}
    files = differing(old, source, config=False) if source is not None else {}
    size = write(first, added, place, about={"budget": limit}, files=files, replace=replace, progress=bars)
    return Diff(size, budgets.share(size, budgets.size(first)), work.error, work.kept)


@dataclass
class _Work:
    """A base, what was tuned from it and, of that, the evidence."""

    base: nn.Module
    tuned: nn.Module
    stats: Stats | None
    error: float = 0.0
    kept: list[Kept] = field(default_factory=list[Kept])

    def __post_init__(self) -> None:
        self.was, self.now, self.at = expressions(self.base), expressions(self.tuned), places(self.base)

    def loose(self) -> dict[str, Expr]:
        """What changed in vectors, as rows."""
        was, now = vectors(self.base), vectors(self.tuned)
        gaps = {n: _gap(now[n].detach().reshape(1, -1), p.detach().reshape(1, -1), n) for n, p in was.items()}
        return {n: Dense(gap.to(torch.bfloat16)) for n, gap in gaps.items() if gap.any()}

    def choose(self, room: int, bars: Progress) -> dict[str, Expr]:
        """What each weight's difference becomes within so many bytes."""
        sizes = {n: math.prod(e.shape) for n, e in self.was.items() if self._site(n).original.any()}
        tables: list[tuple[list[int], list[float]]] = []
        with bars.bar("forms", len(sizes)) as step:
            for name, size in sizes.items():
                tables.append(self._tried(name, min(room, AMPLE * room * size // sum(sizes.values()))))
                release()
                step(1)
        made: dict[str, Expr] = {}
        for name, (_, error), at in zip(sizes, tables, _best(tables, room), strict=True):
            self.error += error[at]
            if at:
                made[name] = self._kept(name, at - 1)
        return made

    def _tried(self, name: str, most: int) -> tuple[list[int], list[float]]:
        """Bytes and error of nothing, then of every form; those of more than `most` bytes are not available."""
        site = self._site(name)
        miss = self._miss(site)
        cost, error = [0], [miss(Dense(torch.zeros(site.now.shape)))]
        for family in self._families(site):
            expr: Expr | None = site.now
            for form in family:
                expr = made if expr is not None and (made := form()).nbytes() <= most else None
                cost.append(expr.nbytes() if expr is not None else 0)
                error.append(miss(expr) if expr is not None else math.inf)
        return cost, error

    def _kept(self, name: str, at: int) -> Expr:
        """A weight's difference in the form of this number."""
        site = self._site(name)
        expr = list(chain.from_iterable(self._families(site)))[at]()
        left = _square(expr.dense() - site.original) / _square(site.original)
        self.kept.append(Kept(name, expr.shape, expr.describe(), expr.nbytes(), left))
        return expr

    def _site(self, name: str) -> Site:
        """What tuning changed in a weight, as a site whose first value it is."""
        gap = _gap(self.now[name].dense().detach(), self.was[name].dense().detach(), name)
        seen = self.stats.evidence([name])[name] if self.stats is not None else ()
        return Site(name, self.at[name].kind, Dense(gap), lambda: gap, seen)

    def _families(self, site: Site) -> list[list[Form]]:
        return families(site.original, Group((site,)) if site.evidence else None)

    def _miss(self, site: Site) -> Callable[[Expr], float]:
        """The error of what stands for a difference."""
        if self.stats is not None:
            return site.cost
        gap, w = site.original, self.was[site.name].dense().detach().cpu().float()
        whole = max(_square(w), _square(w + gap))
        return lambda expr: _square(expr.dense().float() - gap) / whole


def _best(tables: Sequence[tuple[list[int], list[float]]], room: int) -> list[int]:
    """One candidate a weight, of least error within so many bytes."""
    if not tables:
        return []
    most = max(len(cost) for cost, _ in tables)
    cost = torch.tensor([[*c, *[0] * (most - len(c))] for c, _ in tables])
    error = torch.tensor([[*e, *[math.inf] * (most - len(e))] for _, e in tables], dtype=torch.float64)
    return integer(cost, error, room, gap=GAP, where="budget").tolist()


def _gap(now: Float[Tensor, "m n"], was: Float[Tensor, "m n"], name: str) -> Float[Tensor, "m n"]:
    """What changed, in float32. Errors: NumericError."""
    gap = now.cpu().float() - was.cpu().float()
    if not bool(torch.isfinite(gap).all()):
        want, fix = "finite values", "look for NaN in the tuned model"
        raise NumericError("a difference is not finite", where=name, got="NaN or infinity", want=want, fix=fix)
    return gap


def _square(t: Tensor) -> float:
    return float(t.double().square().sum())


def _must_be_plain(folder: Path) -> None:
    """Errors: ConflictError for a base that is no plain checkpoint: its own values have no seal that a delta could name."""
    if (folder / MANIFEST).is_file() and read_manifest(folder).get("kind") != "plain":
        got, want = "a weft folder", "a plain checkpoint"
        fix = "take what it was made from, or write one: weft export MODEL --to hf --out OUT"
        raise ConflictError("a delta has a plain base", where=str(folder), got=got, want=want, fix=fix)


def _one(budget: str | None, lossless: bool, data: str | None, tuned: object) -> None:
    """Errors: OptionError for a call that is not clear."""
    both = f"budget {budget}, lossless {lossless}"
    wrong = [
        ((budget is None) != lossless, "how large a delta may be is not clear", both),
        (lossless and data is not None, "a lossless delta reads no data", f"data {data}"),
        (lossless and isinstance(tuned, nn.Module), "a lossless delta is of files", "a model in memory"),
    ]
    want, fix = "a budget, or lossless and two folders", "weft diff BASE TUNED --budget 2%, or --lossless"
    raise_all([OptionError(what, where="diff", got=got, want=want, fix=fix) for bad, what, got in wrong if bad])
