"""Sources: one weight of several models, as a merge sees it."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weft.error import NumericError, OptionError
from weft.expr import Dense, Expr, LowRank, fork, total
from weft.model.parts import Factors, Part, Take, apart, by_terms, common, factors, laid, leaving_one, multiples, wide

SLICE = 1 << 19
"""Entries of a slice: what a merge does with it fits into a processor's cache."""
T = TypeVar("T")


Scope = Literal["weight", "layer", "model"]
"""What a merge looks at to decide: each weight alone, all of its layer (of what is in none, each alone), or all that is merged."""


@dataclass(frozen=True)
class Together:
    """Weights that a merge measures together: all of a layer, or of a model."""

    open: Callable[[], Iterator[Sources]]
    """Every one of them, its members in the same order."""
    entries: int
    found: dict[str, Any] = field(default_factory=dict[str, Any])
    """What was measured."""


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
    """What tells every member's values from others, by which they were put in order; none where an order was given."""
    widen: Callable[[Scope], Sources] | None = None
    """The same, measured together with others; none where there are no others."""
    together: Together | None = None
    take: Take | None = None
    """What a plain result goes to as it is made."""
    _drawing: dict[str, np.random.PCG64DXSM] | None = None
    """Generators that slices draw from in turn."""
    _room: dict[int, Tensor] | None = None
    """Memory that slices use in turn."""

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

    def copies(self) -> Iterator[Float[Tensor, "m n"]]:
        """The same to write to, in memory that the next slice uses again. Errors: NumericError."""
        room = self._room if self._room is not None else {}
        for i, (e, label) in enumerate(zip(self.members, self._labels(), strict=True)):
            value = e.dense().detach()
            if i not in room:
                room[i] = torch.empty(self.shape, dtype=torch.promote_types(value.dtype, torch.float32))
            yield self._sound(room[i][: self.shape[0]].copy_(value), label)

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
        """The task vector of the member at this place, in slices of rows, of all that is measured together.

        Errors: NumericError; OptionError without a base.
        """
        return (d for _, d in self._slices_of(k))

    def _slices_of(self, k: int) -> Iterator[tuple[Sources, Float[Tensor, "s n"]]]:
        """Each slice of all that is measured together, with the member at this place alone, and its task vector."""
        return ((part, next(part.deltas())) for whole in self._measured() for part in whole._alone(k).slices())

    def _alone(self, k: int) -> Sources:
        """The same with one member."""
        one = slice(k, k + 1)
        return replace(
            self,
            members=self.members[one],
            weights=self.weights[one],
            own=self.own[one],
            labels=tuple(self._labels()[one]),
        )

    def growth(self, k: int, left: Callable[[Sources, Float[Tensor, "s n"]], Float[Tensor, "s n"]]) -> float:
        """Σ|d_k| / Σ|what is left of d_k| over all that is measured together; one where nothing is left. Errors: as `deltas_of`."""
        whole = size = 0.0
        for part, d in self._slices_of(k):
            whole += float(d.abs().sum(dtype=torch.float64))
            size += float(left(part, d).abs().sum(dtype=torch.float64))
        return whole / size if size else 1.0

    def over(self, scope: Scope) -> Sources:
        """The same, measured together with the weights in scope."""
        return self if scope == "weight" or self.widen is None else replace(self.widen(scope), take=self.take)

    @property
    def entries(self) -> int:
        """How many entries are measured together."""
        return self.together.entries if self.together else self.shape[0] * self.shape[1]

    def across(self) -> Iterator[Sources]:
        """All that is measured together, in slices of rows: this weight, or its layer, or the model."""
        return (part for whole in self._measured() for part in whole.slices())

    def once(self, what: str, measure: Callable[[], T]) -> T:
        """What is measured of all of it, once for all its weights."""
        if self.together is None:
            return measure()
        found = self.together.found
        if what not in found:
            found[what] = measure()
        return found[what]

    def _measured(self) -> Iterator[Sources]:
        return self.together.open() if self.together else iter([self])

    @property
    def origin(self) -> Expr:
        """The base. Errors: OptionError where there is none."""
        if self.base is None:
            want, fix = "the model that the members were tuned from", "give base"
            raise OptionError("this merge needs a base", where=self.name, got="no base", want=want, fix=fix)
        return self.base

    def dense(self, value: Float[Tensor, "m n"]) -> Dense:
        """A result as a plain matrix."""
        return self._laid(value.split(max(1, SLICE // self.shape[1])))

    def _laid(self, rows: Iterable[Tensor], light: bool = False) -> Dense:
        with leaving_one() if light and self.take else nullcontext():
            return Dense(laid(rows, self.shape, self.dtype, self.take))

    def linear(self, shares: Sequence[float], origin: Expr) -> Expr:
        """origin + Σ_i share_i (member_i - origin), summed in float32, a slice of rows at a time.

        Where all that take part are the same terms but for low-rank or sparse ones, the result is too: the same terms, and one low-rank
        and one sparse term, both exact. `origin` is the base or a member.
        """
        return self._whole(multiples(shares, self.members, origin))

    def added(self, shares: Sequence[float]) -> Expr:
        """base + Σ_i share_i (member_i - base), or minus what that member was tuned from; as `linear`."""
        if not self.own:
            return self.linear(shares, self.origin)
        apart = [(-c, e) for c, e in zip(shares, self.own, strict=True) if c]
        return self._whole(
            [(c, e) for c, e in zip(shares, self.members, strict=True) if c] + [*apart, (1.0, self.origin)]
        )

    def _whole(self, parts: Sequence[Part]) -> Expr:
        """The sum of multiples that add up to one: by terms where that can be, else slice by slice as a running mean.

        Positive ones first, so that what they add up to is positive all along.
        """
        whole = total(terms) if (terms := by_terms(parts)) is not None else None
        if whole is not None and not (isinstance(whole, Dense) and whole.w.dtype != self.dtype):
            return whole
        return self._laid(self._running(sorted(parts, key=lambda part: -part[0])), light=True)

    def _running(self, parts: Sequence[Part]) -> Iterator[Float[Tensor, "k n"]]:
        """Their running mean, in slices of rows; each is there until the next one."""
        sums, held = [*itertools.accumulate(c for c, _ in parts)], torch.empty(0)
        for slices in zip(*(e.slices(SLICE) for _, e in parts), strict=True):
            values = [e.dense().detach() for e in slices]
            held = held if len(held) else torch.empty(2, *values[0].shape, dtype=common(values))
            made, other = held[:, : len(values[0])]
            made.copy_(values[0])
            for (c, _), add_up, v in zip(parts[1:], sums[1:], values[1:], strict=True):
                made.lerp_(other.copy_(v), c / add_up)
            if not bool(torch.isfinite(made.sum())):
                for (_, e), part in zip(parts, slices, strict=True):
                    self._value(part, self._label(e))
            yield made

    def low_rank(self) -> tuple[dict[str, Expr], list[Factors]] | None:
        """What the base and all members share, and what each member has beside it as factors [m r] and [r n] in float64.

        None where it is not low-rank, `adapter:merged` is taken, or members have bases of their own.
        """
        if self.own:
            return None
        same, (own, *rest) = apart([self.origin, *self.members])
        terms = [t for held in rest for t in held.values()]
        if own or "adapter:merged" in same or not all(isinstance(t, LowRank) for t in terms):
            return None
        return {r: fork(t) for r, t in same.items()}, [factors(held, self.origin.shape) for held in rest]

    def slices(self) -> Iterator[Sources]:
        """The same in slices of rows of at most `SLICE` entries, without what data says. What is drawn goes on from slice to slice."""
        exprs, drawing, room = (*self.members, *self.own, *([self.base] if self.base is not None else [])), {}, {}
        count, own = len(self.members), len(self.own)
        for parts in zip(*(e.slices(SLICE) for e in exprs), strict=True):
            yield replace(
                self,
                members=parts[:count],
                own=parts[count : count + own],
                base=parts[-1] if self.base is not None else None,
                grams=(),
                fishers=(),
                take=None,
                _drawing=drawing,
                _room=room,
            )

    def by_slices(self, make: Callable[[Sources], Float[Tensor, "k n"]], *, light: bool = False) -> Dense:
        """A result as a plain matrix, made of slices of rows one after another.

        `light`: `make` goes over its numbers a few times, and so waits for memory; a core is left to what writes the result.
        """
        return self._laid((make(part) for part in self.slices()), light)

    def draws(self, salt: str) -> Float[Tensor, "m n"]:
        """Numbers from [0, 1), alike probable, that depend on the seed, the weight's name and `salt` only, whatever the slices.

        Each is 32 bits of a generator whose words are the same in all versions of numpy; of a row of odd length the last ones go unused.
        """
        drawing = self._drawing if self._drawing is not None else {}
        if salt not in drawing:
            word = hashlib.blake2b(f"{self.seed}/{self.name}/{salt}".encode(), digest_size=16).digest()
            drawing[salt] = np.random.PCG64DXSM(int.from_bytes(word, "little"))
        rows, n = self.shape
        words = drawing[salt].random_raw((rows, (n + 1) // 2)).view(np.int32)[:, :n]
        return torch.from_numpy(words).float().mul_(2**-32).add_(0.5).clamp_(max=1 - 2**-24)

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
        return self._sound(wide(e), label)

    def _sound(self, value: Tensor, label: str) -> Tensor:
        sound = bool(torch.isfinite(value.sum()))  # of finite values too, if it does not overflow
        if not sound and (bad := value.numel() - int(torch.isfinite(value).sum())):
            got = f"{bad} of {value.numel()} entries NaN or infinite"
            fix = "leave that model, or this weight, out"
            raise NumericError(
                "a weight is not finite", where=f"{self.name} of {label}", got=got, want="finite values", fix=fix
            )
        return value
