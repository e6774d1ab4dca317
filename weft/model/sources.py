"""Sources: one weight of several models, as a merge sees it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from weft.error import NumericError, OptionError
from weft.expr import Dense, Expr, LowRank, Signs, SparseDelta, fork, identity, spec, tensors, terms_of, total
from weft.expr.gated import settled
from weft.expr.mixed import added_low_rank

SLICE = 1 << 20
"""Entries of a slice: what a merge does with it fits into a processor's cache."""
Part = tuple[float, Expr]
Factors = tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]
T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """A weight of every member, with its weight in the merge, and of the base. What is no matrix is one row.

    Members come in an order that depends on their values alone.
    """

    name: str
    members: tuple[Expr, ...]
    weights: tuple[float, ...]
    dtype: torch.dtype
    """What a dense result is stored in."""
    base: Expr | None = None
    seed: int = 0
    labels: tuple[str, ...] = ()
    """What errors call the members."""
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Declared fallbacks: (where, what)."""
    grams: tuple[Float[Tensor, "n n"] | None, ...] = ()
    """E[x xᵀ] of what the weight reads in every member, on its data; None where nothing went through. Of linear layers alone."""
    own: tuple[Expr, ...] = ()
    """What each member was tuned from, where that is not the base for all."""
    fishers: tuple[Float[Tensor, "m n"], ...] = ()
    """The diagonal of every member's Fisher information, on its data."""
    order: tuple[int, ...] = ()
    """The place that each member had in the call; none where they stand as they were given."""
    marks: tuple[str, ...] = ()
    """What tells every member's values from others, by which they were put in order."""
    _drawing: dict[str, torch.Generator] | None = None
    """Generators that slices draw from in turn."""

    @property
    def shape(self) -> tuple[int, int]:
        """[m n]."""
        return self.members[0].shape

    def shares(self) -> list[float]:
        """The weights, divided by their sum."""
        whole = math.fsum(self.weights)
        return [w / whole for w in self.weights]

    def each(self, option: T | tuple[T, ...]) -> list[T]:
        """An option of every member: its own, where there is one a member, or the one of all."""
        if not isinstance(option, tuple):
            return [option] * len(self.members)
        held = cast("tuple[T, ...]", option)
        return [held[i] for i in self.order or range(len(held))]

    def values(self) -> Iterator[Float[Tensor, "m n"]]:
        """The members' values in float32, one at a time. Errors: NumericError naming the weight and the member."""
        return (self._value(e, label) for e, label in zip(self.members, self._labels(), strict=True))

    def mean(self) -> Float[Tensor, "m n"]:
        """The weighted mean of the members, in float64. Errors: NumericError."""
        first, *others = zip(self.shares(), self.values(), strict=True)
        value = first[1].double()
        return value + sum((c * (v.double() - value) for c, v in others), torch.zeros_like(value))

    def start(self) -> Float[Tensor, "m n"]:
        """The base's value in float32. Errors: NumericError; OptionError without a base."""
        return self._value(self.origin, "base")

    def deltas(self) -> Iterator[Float[Tensor, "m n"]]:
        """The task vectors, member - base (or what it was tuned from), one at a time. Errors: NumericError; OptionError without a base."""
        return (value - start for value, start in zip(self.values(), self.starts(), strict=True))

    def starts(self) -> Iterator[Float[Tensor, "m n"]]:
        """What each member was tuned from, one at a time: its own base, or the base. Errors: NumericError; OptionError without a base."""
        start = self.start()
        if not self.own:
            return repeat(start, len(self.members))
        return (self._value(e, f"the base of {label}") for e, label in zip(self.own, self._labels(), strict=True))

    def deltas_of(self, k: int) -> Iterator[Float[Tensor, "s n"]]:
        """The task vector of the member at this place, in slices of rows. Errors: NumericError; OptionError without a base."""
        one = slice(k, k + 1)
        alone = replace(
            self,
            members=self.members[one],
            weights=self.weights[one],
            own=self.own[one],
            labels=tuple(self._labels()[one]),
        )
        return (next(part.deltas()) for part in alone.slices())

    def growth(self, k: int, left: Callable[[Sources, Float[Tensor, "s n"]], Float[Tensor, "s n"]]) -> float:
        """Σ|d_k| / Σ|what is left of d_k|, in slices of rows; one where nothing is left. Errors: as `deltas_of`."""
        whole = size = 0.0
        for part, d in zip(self.slices(), self.deltas_of(k), strict=True):
            whole += float(d.abs().sum(dtype=torch.float64))
            size += float(left(part, d).abs().sum(dtype=torch.float64))
        return whole / size if size else 1.0

    @property
    def origin(self) -> Expr:
        """The base. Errors: OptionError where there is none."""
        if self.base is None:
            want, fix = "the model that the members were tuned from", "give base"
            raise OptionError("this merge needs a base", where=self.name, got="no base", want=want, fix=fix)
        return self.base

    def dense(self, value: Float[Tensor, "m n"]) -> Dense:
        """A result as a plain matrix."""
        return Dense(value.to(self.dtype))

    def linear(self, shares: Sequence[float], origin: Expr) -> Expr:
        """origin + Σ_i share_i (member_i - origin), summed in float32, a slice of rows at a time.

        Where all that take part are the same terms but for low-rank or sparse ones, the result is too: the same terms, and one low-rank
        and one sparse term, both exact. `origin` is the base or a member.
        """
        return self._whole(_multiples(shares, self.members, origin))

    def added(self, shares: Sequence[float]) -> Expr:
        """base + Σ_i share_i (member_i - base), or minus what that member was tuned from; as `linear`."""
        if not self.own:
            return self.linear(shares, self.origin)
        apart = [(-c, e) for c, e in zip(shares, self.own, strict=True) if c]
        return self._whole(
            [(c, e) for c, e in zip(shares, self.members, strict=True) if c] + [*apart, (1.0, self.origin)]
        )

    def _whole(self, parts: Sequence[Part]) -> Expr:
        """The sum of multiples that add up to one: by terms where that can be, else slice by slice around the last."""
        whole = total(terms) if (terms := _by_terms(parts)) is not None else None
        if whole is not None and not (isinstance(whole, Dense) and whole.w.dtype != self.dtype):
            return whole
        labels, exprs = [self._label(e) for _, e in parts], [e for _, e in parts]
        value, at = torch.empty(self.shape, dtype=self.dtype), 0
        for slices in zip(*(e.slices(SLICE) for e in exprs), strict=True):
            *others, start = (self._value(e, label) for e, label in zip(slices, labels, strict=True))
            made = start.clone()
            for (c, _), other in zip(parts, others, strict=False):
                made += c * (other - start)
            value[at : (at := at + len(made))] = made
        return Dense(value)

    def low_rank(self) -> tuple[dict[str, Expr], list[Factors]] | None:
        """What the base and all members share, and what each member has beside it as factors [m r] and [r n] in float64.

        None where it is not low-rank, `adapter:merged` is taken, or members have bases of their own.
        """
        if self.own:
            return None
        same, (own, *rest) = _apart([self.origin, *self.members])
        terms = [t for held in rest for t in held.values()]
        if own or "adapter:merged" in same or not all(isinstance(t, LowRank) for t in terms):
            return None
        return {r: fork(t) for r, t in same.items()}, [_factors(held, self.origin.shape) for held in rest]

    def slices(self) -> Iterator[Sources]:
        """The same in slices of rows of at most `SLICE` entries, without what data says. What is drawn goes on from slice to slice."""
        exprs, drawing = (*self.members, *self.own, *([self.base] if self.base is not None else [])), {}
        count, own = len(self.members), len(self.own)
        for parts in zip(*(e.slices(SLICE) for e in exprs), strict=True):
            yield replace(
                self,
                members=parts[:count],
                own=parts[count : count + own],
                base=parts[-1] if self.base is not None else None,
                grams=(),
                fishers=(),
                _drawing=drawing,
            )

    def by_slices(self, make: Callable[[Sources], Float[Tensor, "k n"]]) -> Dense:
        """A result as a plain matrix, made of slices of rows one after another."""
        value, at = torch.empty(self.shape, dtype=self.dtype), 0
        for part in self.slices():
            value[at : (at := at + part.shape[0])] = make(part)
        return Dense(value)

    def rng(self, salt: str) -> torch.Generator:
        """A generator that depends on the seed, the weight's name and `salt` only; in slices, where the one before left it."""
        if self._drawing is not None:
            return self._drawing.setdefault(salt, replace(self, _drawing=None).rng(salt))
        word = hashlib.blake2b(f"{self.seed}/{self.name}/{salt}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(word, "little"))

    def fallback(self, what: str) -> None:
        """Declare that the merge could not do what it says here, and what it did instead."""
        self.notes.append((self.name, what))

    def _labels(self) -> Sequence[str]:
        return self.labels or [f"member {i + 1}" for i in range(len(self.members))]

    def _label(self, e: Expr) -> str:
        return next(
            (n for n, m in zip(self._labels(), self.members, strict=True) if m is e), "a base" if self.own else "base"
        )

    def _value(self, e: Expr, label: str) -> Tensor:
        value = e.dense().detach()
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        sound = bool(torch.isfinite(value.sum()))  # of finite values too, if it does not overflow
        if not sound and (bad := value.numel() - int(torch.isfinite(value).sum())):
            got = f"{bad} of {value.numel()} entries NaN or infinite"
            fix = "leave that model, or this weight, out"
            raise NumericError(
                "a weight is not finite", where=f"{self.name} of {label}", got=got, want="finite values", fix=fix
            )
        return value


def _multiples(shares: Sequence[float], members: Sequence[Expr], origin: Expr) -> list[Part]:
    """What sums to origin + Σ_i share_i (member_i - origin): multiples that add up to one, without those of zero; the origin last."""
    made = [(c, e) for c, e in zip(shares, members, strict=True) if c and e is not origin]
    rest = 1 - math.fsum(c for c, _ in made)
    return [*made, (rest, origin)] if abs(rest) > 1e-12 else made


def _by_terms(parts: Sequence[Part]) -> dict[str, Expr] | None:
    """The sum of these multiples, which add up to one, by its terms: those that all hold alike, and a low-rank and a sparse one.

    None where their bases differ, or another term does.
    """
    same, others = _apart([e for _, e in parts])
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


def _apart(exprs: Sequence[Expr]) -> tuple[dict[str, Expr], list[dict[str, Expr]]]:
    """The terms that all of these hold alike, and what each has besides, by role."""
    held = [{r: settled(t) for r, t in terms_of(e).items()} for e in exprs]
    first, *others = held
    same = {r: t for r, t in first.items() if all(r in h and alike(h[r], t) for h in others)}
    return same, [{r: t for r, t in h.items() if r not in same} for h in held]


def _factors(terms: Mapping[str, Expr], shape: tuple[int, int]) -> Factors:
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
    return spec(a) == spec(b) and all(
        identity(t) == identity(two[k])
        or (t.dtype == two[k].dtype and t.shape == two[k].shape and torch.equal(t, two[k]))
        for k, t in one.items()
    )
