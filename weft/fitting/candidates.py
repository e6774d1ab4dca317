"""Candidates: what each site could become, with exact bytes and predicted loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from weft.engine import Group, get
from weft.engine.run import Chain, Step, chain_key, code_version, group_of, groups, run
from weft.expr import CHUNK, Expr
from weft.memory import release
from weft.model import Site, expressions
from weft.progress import Progress
from weft.stats import Stats
from weft.store.cache import Cache, key

GROUPS = (0, 128, 64, 32)
BITS = (2, 3, 4, 5, 6, 7, 8)
ROWS = 4096
"""Rows that a candidate of a larger weight is judged by, where rows do not depend on each other."""


def uniform_chains(method: str, bits: Sequence[int] = BITS, widths: Sequence[int] = GROUPS) -> list[Chain]:
    """Every (bits, group) of a quantizer, with a zero point up to 4 bits: the choices of the uniform baselines."""
    return [(Step.of(method, bits=b, group=g, symmetric=b > 4),) for b in bits for g in widths]


def chains(bits: Sequence[int] = BITS, widths: Sequence[int] = GROUPS) -> list[Chain]:
    """What fit chooses from: as it is, both roundings at every (bits, group), NF4, compensated low widths, and sparse weights."""
    low = [(Step.of("gptq", bits=b, group=0, symmetric=False), Step.of("eora", rank=8)) for b in (2, 3, 4)]
    sparse = [(Step.of("sparsegpt", pattern="2:4"), _gptq(b)) for b in (3, 4)]
    half = (Step.of("sparsegpt", sparsity=0.5), _gptq(4))
    return [
        (),
        *uniform_chains("rtn", bits, widths),
        *uniform_chains("gptq", bits, widths),
        *low,
        *sparse,
        half,
        (Step.of("nf4", group=64),),
    ]


def _gptq(bits: int) -> Step:
    return Step.of("gptq", bits=bits, group=64, symmetric=False)


def describe(chain: Chain) -> str:
    """A chain for people."""
    return " then ".join(s.describe() for s in chain) or "as it is"


@dataclass(frozen=True)
class Table:
    """Bytes and predicted loss [s c] of every site as every candidate; infinite where a candidate does not apply."""

    sites: list[str]
    chains: list[Chain]
    nbytes: np.ndarray
    loss: np.ndarray

    def columns(self, wanted: Sequence[Chain]) -> list[int]:
        """The indices of these chains."""
        at = {c: i for i, c in enumerate(self.chains)}
        return [at[c] for c in wanted]


def table(
    model: nn.Module, wanted: Sequence[Chain], stats: Stats, cache: Cache, *, seed: int, progress: Progress
) -> Table:
    """Solve every candidate of every site from dense evidence. One group's results are one cache entry, so a run resumes."""
    sites = list(expressions(model))
    row = {s: i for i, s in enumerate(sites)}
    nbytes = np.zeros((len(sites), len(wanted)), dtype=np.int64)
    loss = np.full((len(sites), len(wanted)), np.inf)
    keys = [chain_key(c) for c in wanted]
    todo = groups(model, sites, stats)
    with progress.bar("candidates", len(todo)) as step:
        for names in todo:
            name = key("candidates", stats.folder.name, names, keys, code_version(), ROWS, seed)
            held = cache.json("candidates", name, lambda names=names: _solve(model, names, wanted, stats, seed))
            for s in names:
                nbytes[row[s]] = held[s]["bytes"]
                loss[row[s]] = [np.inf if v is None else v for v in held[s]["loss"]]
            release()
            step(1)
    return Table(sites, list(wanted), nbytes, loss)


def _solve(
    model: nn.Module, names: tuple[str, ...], wanted: Sequence[Chain], stats: Stats, seed: int
) -> dict[str, Any]:
    whole = group_of(model, names, stats, seed=seed)
    rows = {s.name: s.now.shape[0] for s in whole}
    few = _sampled(whole)
    made: dict[str, Any] = {n: {"bytes": [], "loss": []} for n in names}
    begun: dict[bool, dict[Chain, Group]] = {True: {(): few}, False: {(): whole}}
    for chain in wanted:
        fits = _fits(whole.sites[0].now.shape, chain)
        rowwise = all(get(s.method).rowwise for s in chain)
        exprs = _run(begun[rowwise], chain) if fits else None
        for i, s in enumerate(begun[rowwise][()]):
            made[s.name]["bytes"].append(_bytes(exprs[i], rows[s.name]) if exprs else 0)
            made[s.name]["loss"].append(s.cost(exprs[i]) if exprs else None)
    return made


def _sampled(group: Group) -> Group:
    """The group with `ROWS` rows of each larger site, weighted so that their predicted loss is an unbiased estimate of all rows'.

    Rows are drawn (systematically) with a chance proportional to the mean of 1/m and of their share in weight_i W_i G W_iᵀ.
    """
    if all(s.now.shape[0] <= ROWS for s in group):
        return group
    group.gram()  # of the whole weight, before its sample shares the cache
    return replace(group, sites=tuple(s if s.now.shape[0] <= ROWS else _drawn(s, group.rng("rows")) for s in group))


def _drawn(site: Site, rng: torch.Generator) -> Site:
    m = site.now.shape[0]
    size = torch.zeros(m, dtype=torch.float64)
    for rows in site.now.row_slices():
        part = site.rows(rows)
        for e in part.evidence:
            size[rows] += (((part.original @ e.gram.float()) * part.original).sum(1).clamp(min=0) * e.weight).double()
    chance = 0.5 / m + 0.5 * size / size.sum().clamp(min=1e-300)
    chance = (ROWS * chance / chance.sum()).clamp(max=1)
    at = chance.cumsum(0) + torch.rand(1, generator=rng, dtype=torch.float64)
    picked = torch.nonzero(at.floor() > torch.cat([at[:1] - chance[:1], at[:-1]]).floor()).flatten()
    evidence = tuple(replace(e, weight=e.weight[picked] / chance[picked].to(e.weight.dtype)) for e in site.evidence)
    return replace(site, now=site.now.take(picked), source=lambda: site.source()[picked], evidence=evidence)


def _bytes(expr: Expr, rows: int) -> int:
    """Bytes that the expression takes with this many rows: some tensors grow with them, the others do not."""
    held = expr.shape[0]
    if held == rows:
        return expr.nbytes()
    a_row = expr.take(slice(0, 2)).nbytes() - expr.take(slice(0, 1)).nbytes()
    return expr.nbytes() + (rows - held) * a_row


def _run(begun: dict[Chain, Group], chain: Chain) -> list[Expr]:
    """Run a chain; first steps that several chains share are taken once."""
    before = begun[()]
    for i, step in enumerate(chain, 1):
        if chain[:i] not in begun:
            after = before.put(run(before, (step,)))
            if i < len(chain) or len(chain) == 1:
                begun[chain[:i]] = after
            before = after
        else:
            before = begun[chain[:i]]
    return [s.now for s in before]


def _fits(shape: tuple[int, int], chain: Chain) -> bool:
    """Whether a chain applies: patterns and groups divide the columns; a very large weight takes rowwise methods only."""
    options = {k: v for s in chain for k, v in s.options}
    m, n = shape
    if m * n > CHUNK and not all(get(s.method).rowwise for s in chain):
        return False
    if ":" in str(options.get("pattern", "")) and n % int(str(options["pattern"]).split(":")[1]):
        return False
    return options.get("group", 0) < n and options.get("rank", 0) < min(m, n)
