"""Sums of multiples of expressions: by their terms where they have the same ones, else by their values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from weft.expr import Expr, LowRank, Signs, SparseDelta, fork, identity, spec, tensors, terms_of
from weft.expr.gated import settled
from weft.expr.mixed import added_low_rank

Part = tuple[float, Expr]
"""A multiple of an expression."""
Factors = tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]
Take = Callable[[Tensor], None]
"""Takes a tensor's slices of rows, one after another, which nothing writes to from then on."""


def wide(e: Expr) -> Tensor:
    """A value in float32, or in float64 where it is."""
    value = e.dense().detach()
    return value.to(torch.promote_types(value.dtype, torch.float32))


@contextmanager
def leaving_one() -> Generator[None]:
    """While open, tensors are computed with one thread less, where there are several: a core is left to other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def laid(rows: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype, take: Take | None = None) -> Tensor:
    """Slices of rows below one another, in this dtype. With `take` they go there as they come, and the result has no values (meta)."""
    value, at = torch.empty(shape, dtype=dtype, device="meta" if take else None), 0
    for part in rows:
        if take:
            take(part.to(dtype, copy=True))
        else:
            value[at : (at := at + len(part))] = part
    return value


def common(values: Sequence[Tensor]) -> torch.dtype:
    """The widest of their dtypes, at least float32."""
    return functools.reduce(torch.promote_types, (v.dtype for v in values), torch.float32)


def multiples(shares: Sequence[float], members: Sequence[Expr], origin: Expr) -> list[Part]:
    """What sums to origin + Σ_i share_i (member_i - origin): multiples that add up to one, without those of zero; the origin last."""
    made = [(c, e) for c, e in zip(shares, members, strict=True) if c and e is not origin]
    rest = 1 - math.fsum(c for c, _ in made)
    return [*made, (rest, origin)] if abs(rest) > 1e-12 else made


def by_terms(parts: Sequence[Part]) -> dict[str, Expr] | None:
    """The sum of these multiples, which add up to one, by its terms: those that all hold alike, and a low-rank and a sparse one.

    None where their bases differ, or another term does.
    """
    same, others = apart([e for _, e in parts])
    rest = [(c, t) for (c, _), held in zip(parts, others, strict=True) for t in held.values()]
    low = [(c, t) for c, t in rest if isinstance(t, LowRank)]
    sparse = [(c, t) for c, t in rest if isinstance(t, SparseDelta | Signs)]
    made: dict[str, Expr] = {}
    if low:
        made["adapter:merged"] = added_low_rank(low)
    if sparse:
        made["adapter:merged-sparse"] = added_sparse(sparse)
    if "base" not in same or len(low) + len(sparse) < len(rest) or made.keys() & same.keys():
        return None
    return {r: fork(t) for r, t in same.items()} | made


def apart(exprs: Sequence[Expr]) -> tuple[dict[str, Expr], list[dict[str, Expr]]]:
    """The terms that all of these hold alike, and what each has besides, by role."""
    held = [{r: settled(t) for r, t in terms_of(e).items()} for e in exprs]
    first, *others = held
    same = {r: t for r, t in first.items() if all(r in h and alike(h[r], t) for h in others)}
    return same, [{r: t for r, t in h.items() if r not in same} for h in held]


def factors(terms: Mapping[str, Expr], shape: tuple[int, int]) -> Factors:
    """The sum of these low-rank terms as one product; of none, of rank zero."""
    if not terms:
        return torch.zeros(shape[0], 0, dtype=torch.float64), torch.zeros(0, shape[1], dtype=torch.float64)
    whole = added_low_rank([(1.0, t) for t in terms.values() if isinstance(t, LowRank)])
    return whole.b.double(), whole.a.double()


def added_sparse(parts: Sequence[tuple[float, SparseDelta | Signs]]) -> SparseDelta:
    """Σ c delta at every place where one of them has an entry."""
    value, mask = torch.zeros(()), torch.zeros((), dtype=torch.bool)
    for c, t in parts:
        value, mask = value + c * t.dense().detach(), mask | t.mask()
    return SparseDelta.of(value, mask)


def alike(a: Expr, b: Expr) -> bool:
    """Whether two expressions are the same tree over the same numbers."""
    if a is b:
        return True
    one, two = tensors(a), tensors(b)
    return spec(a) == spec(b) and all(identity(t) == identity(two[k]) or _equal(t, two[k]) for k, t in one.items())


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same; of those that differ, most do in the first row."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return (a.dim() == 0 or torch.equal(a[:1], b[:1])) and torch.equal(a, b)
