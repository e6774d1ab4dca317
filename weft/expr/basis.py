"""Weights as a few coefficients of a basis that is generated from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from weft.error import OptionError, ShapeError
from weft.expr.base import Expr, Promises
from weft.expr.derived import Derived
from weft.expr.generated import hadamard
from weft.expr.nodes import Dense
from weft.expr.spectra import cosine, fourier

_WORK = 1 << 22
"""Generated entries at a time."""
_KEPT = 1 << 24
"""Generated entries that are kept for the next product; a basis that needs more is generated in each."""
DRAWN = (2**32 - 1) // 20
"""Entries that a matrix of kind fourier_mt19937 has fewer than."""
_SHARED: WeakValueDictionary[object, Derived] = WeakValueDictionary()
"""What is kept, by what it follows from: nodes with one basis have it together, and it goes with the last of them."""


class Basis(Expr):
    """Coefficients of a basis that is generated, never stored. value = scale Σ_k c[k] B_k; every B_k has variance 1.

    random: independent uniform entries, from a hash of seed, k and place. cosine: 2 cos(π (i + ½) p / m) cos(π (j + ½) q / n).
    fourier: √2 cos(2π (p i / m + q j / n)). The k frequencies (p, q) are those of smallest hash of seed and place, so they do
    not repeat. fastfood: the entries, row by row, in blocks of w, the power of two that c is filled up to; each is √w H G P H S c,
    with H the orthonormal Walsh-Hadamard transform and, for every block its own, signs S, a permutation P and independent uniform
    gains G of variance 1. The same on every machine.
    """

    c: Float[Tensor, "k"]
    kind: str
    seed: int
    m: int
    n: int
    scale: float = 1.0

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.m, self.n

    def check(self) -> None:
        if self.kind not in _TABLES:
            want = ", ".join(_TABLES)
            raise OptionError("unknown basis", where="Basis.kind", got=self.kind, want=want, fix="choose one of these")
        if not math.isfinite(self.scale):
            got, want = self.scale, "a number"
            raise ShapeError("Basis.scale is not finite", where="Basis.scale", got=got, want=want, fix="check it")
        most = self.m * self.n if self.kind != "random" else 1 << 31
        large = DRAWN if self.kind == "fourier_mt19937" else 1 << 40
        if min(self.m, self.n) < 0 or self.m * self.n >= large or len(self.c) > most:
            got, want = f"{len(self.c)} coefficients of {self.m} x {self.n}", f"at most {most}"
            raise ShapeError("Basis.c does not fit", where="Basis.c", got=got, want=want, fix="use fewer")

    def dense(self) -> Float[Tensor, "m n"]:
        whole = _WHOLE.get(self.kind)
        if whole is None or torch.compiler.is_compiling() or not self.m * self.n:
            return self._rows(slice(None))
        p, q, c = *self.frequencies(), self.c.to(torch.promote_types(self.c.dtype, torch.float32))
        transform, times = whole
        return transform(c, p, q, self.m, self.n) * (times * self.scale)

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        return Dense(self._rows(rows))

    def _rows(self, rows: slice | Int[Tensor, "r"]) -> Float[Tensor, "r n"]:
        c = self.c.to(torch.promote_types(self.c.dtype, torch.float32))
        if self.kind == "random" and len(c) * self.m * self.n > _KEPT:
            at = torch.arange(self.m, device=c.device)[rows]
            value = cast(Tensor, _Random.apply(c, at, self.seed, self.m, self.n))
        elif self.kind == "random":
            (matrices,) = self._tables(c.dtype)
            value = torch.einsum("k,krn->rn", c, matrices[:, rows])
        elif self.kind == "fastfood":
            value = self._fastfood(c, rows)
        else:
            down, across = self._tables(c.dtype)
            value = torch.cat([*(down[:, rows] * c)], 1) @ torch.cat([*across], 1).T
        return value if self.scale == 1 else value * self.scale

    def _fastfood(self, c: Float[Tensor, "k"], rows: slice | Int[Tensor, "r"]) -> Float[Tensor, "r n"]:
        """Of a slice, only the blocks that it needs."""
        signs, order, gains = self._tables(c.dtype)
        width, plain = signs.shape[1], isinstance(rows, slice) and rows.step in (None, 1)
        start, stop, _ = rows.indices(self.m) if isinstance(rows, slice) and plain else (0, self.m, 1)
        blocks = slice(start * self.n // width, -(-max(start, stop) * self.n // width))
        mixed = hadamard(F.pad(c, (0, width - len(c))) * signs[blocks], width)
        made = width**0.5 * hadamard(mixed.gather(1, order[blocks]) * gains[blocks], width).flatten()
        first = start * self.n - blocks.start * width
        value = made[first : first + max(0, stop - start) * self.n].view(-1, self.n)
        return value if plain else value[rows]

    def _tables(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What the basis is generated as, where the coefficients are."""
        if torch.compiler.is_compiling():
            from weft.expr._outside import tables

            return cast("tuple[Tensor, ...]", cast(Any, tables)(self, dtype))
        return self.tables(dtype)

    def tables(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What the basis is generated as; kept, once for all nodes that have it, unless it is very large."""
        device, (kind, m, n, k) = self.c.device, (self.kind, self.m, self.n, len(self.c))
        what = (kind, self.seed, m, n, k, dtype, device)

        def made() -> Derived:
            tables = _TABLES[kind](self.seed, m, n, k)
            return Derived((), tuple(t.to(device, dtype if t.is_floating_point() else t.dtype) for t in tables))

        def shared() -> Derived:
            held = _SHARED[what] = _SHARED.get(what) or made()
            return held

        entries = {"random": k * m * n, "fastfood": 3 * m * n}.get(kind, 2 * k * (m + n))
        return (made() if entries > _KEPT else self.derive(f"tables {dtype} {device}", shared)).value

    def frequencies(self) -> tuple[Int[Tensor, "k"], Int[Tensor, "k"]]:
        """The p and q of a basis of waves."""
        what = (self.kind, self.seed, self.m, self.n, len(self.c), "places", self.c.device)

        def shared() -> Derived:
            at = _PLACES[self.kind](self.seed, self.m, self.n, len(self.c))
            held = _SHARED[what] = _SHARED.get(what) or Derived((), tuple(t.int().to(self.c.device) for t in at))
            return held

        p, q = self.derive(f"places {self.c.device}", shared).value
        return p, q

    def promises(self) -> Promises:
        waves = 2 * len(self.c)
        per = {"cosine": len(self.c), "fourier": waves, "fourier_mt19937": waves}.get(self.kind, min(self.m, self.n))
        return Promises(rank=min(per, self.m, self.n))

    def describe(self) -> str:
        return f"{self.kind} basis({len(self.c)})"


class _Random(torch.autograd.Function):
    """Σ_k c[k] B_k of random matrices, generated a few at a time, again in the backward."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, rows: Tensor, seed: int, m: int, n: int) -> Tensor:
        ctx.of = (c, rows, seed, m, n)
        value = c.new_zeros(len(rows), n)
        for ks, b in _random(rows, seed, m, n, len(c)):
            value += torch.einsum("k,krn->rn", c[ks], b.to(c))
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        c, rows, seed, m, n = ctx.of
        made = torch.empty_like(c)
        for ks, b in _random(rows, seed, m, n, len(c)):
            made[ks] = torch.einsum("rn,krn->k", grads[0].to(c), b.to(c))
        return made, None, None, None, None


def _random(rows: Tensor, seed: int, m: int, n: int, count: int) -> Iterator[tuple[slice, Float[Tensor, "k r n"]]]:
    """Slices of k with these rows of their B_k."""
    place = rows.cpu().numpy().astype(np.uint64)[:, None] * np.uint64(n) + np.arange(n, dtype=np.uint64)
    step = max(1, _WORK // max(1, place.size))
    for first in range(0, count, step):
        ks = np.arange(first, min(first + step, count), dtype=np.uint64)
        yield slice(first, first + len(ks)), _uniform(_hash(seed, ks[:, None, None] * np.uint64(m * n) + place))


def _matrices(seed: int, m: int, n: int, count: int) -> tuple[Float[Tensor, "k m n"]]:
    """Every B_k of kind random."""
    return (torch.cat([torch.zeros(0, m, n), *(b for _, b in _random(torch.arange(m), seed, m, n, count))]),)


def _cosines(seed: int, m: int, n: int, count: int) -> tuple[Float[Tensor, "1 m k"], Float[Tensor, "1 n k"]]:
    """The B_k of kind cosine, as a column and a row each."""
    p, q = _frequencies(seed, m, n, count)
    i, j = (torch.arange(size).double().unsqueeze(1) + 0.5 for size in (m, n))
    return 2 * torch.cos(math.pi / max(1, m) * i * p)[None], torch.cos(math.pi / max(1, n) * j * q)[None]


def _fouriers(seed: int, m: int, n: int, count: int) -> tuple[Float[Tensor, "2 m k"], Float[Tensor, "2 n k"]]:
    """The B_k of kind fourier, as two columns and two rows each: cos(x + y) = cos x cos y - sin x sin y."""
    return _waves(_frequencies(seed, m, n, count), m, n)


def _drawn_fouriers(seed: int, m: int, n: int, count: int) -> tuple[Float[Tensor, "2 m k"], Float[Tensor, "2 n k"]]:
    """The B_k of kind fourier_mt19937."""
    return _waves(_drawn(seed, m, n, count), m, n)


def _drawn(seed: int, m: int, n: int, count: int) -> tuple[Float[Tensor, "k"], Float[Tensor, "k"]]:
    """The first places of a shuffle of an [m n] table, each exchanged with one that a word chooses."""
    words = np.random.RandomState(seed % 2**32).randint(0, 2**32, count, np.uint32)
    moved, chosen = dict[int, int](), list[int]()
    for i, word in enumerate(cast("list[int]", words.tolist())):
        j = i + word % (m * n - i)
        chosen.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    at = torch.tensor(chosen, dtype=torch.int64)
    return (at // max(1, n)).double(), (at % max(1, n)).double()


def _waves(
    at: tuple[Float[Tensor, "k"], Float[Tensor, "k"]], m: int, n: int
) -> tuple[Float[Tensor, "2 m k"], Float[Tensor, "2 n k"]]:
    """The waves of these frequencies (p, q)."""
    p, q = at
    i, j = (torch.arange(size).double().unsqueeze(1) for size in (m, n))
    x, y = 2 * math.pi / max(1, m) * (i * p % max(1, m)), 2 * math.pi / max(1, n) * (j * q % max(1, n))
    return 2**0.5 * torch.stack([x.cos(), -x.sin()]), torch.stack([y.cos(), y.sin()])


def _mixing(seed: int, m: int, n: int, count: int) -> tuple[Tensor, ...]:
    """The signs, permutations and gains of kind fastfood, a row a block."""
    width = 1 << max(0, count - 1).bit_length()
    places = np.arange(-(-m * n // width) * width, dtype=np.uint64).reshape(-1, width)
    word, other = _hash(seed, places), _hash(seed, places + np.uint64(places.size))
    signs = 1 - 2 * (word & np.uint64(1)).astype(np.float32)
    return torch.from_numpy(signs), torch.from_numpy(np.argsort(other, axis=1, kind="stable")), _uniform(word)


def _frequencies(seed: int, m: int, n: int, count: int) -> tuple[Float[Tensor, "k"], Float[Tensor, "k"]]:
    """The places of an [m n] table whose hashes are smallest, in order of hash."""
    words = _hash(seed, np.arange(m * n, dtype=np.uint64))
    chosen = np.argpartition(words, count - 1)[:count] if 0 < count < len(words) else np.arange(len(words))[:count]
    at = torch.from_numpy(chosen[np.argsort(words[chosen], kind="stable")].astype(np.int64))
    return (at // max(1, n)).double(), (at % max(1, n)).double()


def _uniform(word: np.ndarray) -> Tensor:
    """Uniform numbers of mean 0 and variance 1, of the upper 24 bits of each word."""
    unit = (word >> np.uint64(40)).astype(np.float32) * np.float32(2**-24) + np.float32(2**-25)
    return torch.from_numpy((unit - np.float32(0.5)) * np.float32(12**0.5))


def _hash(seed: int, x: np.ndarray) -> np.ndarray:
    """64 well mixed bits of every number (the finalizer of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = (x + np.uint64(seed & (2**64 - 1)) * np.uint64(0xD1342543DE82EF95) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


_TABLES: dict[str, Callable[[int, int, int, int], tuple[Tensor, ...]]] = {
    "random": _matrices,
    "cosine": _cosines,
    "fourier": _fouriers,
    "fourier_mt19937": _drawn_fouriers,
    "fastfood": _mixing,
}
"""What every kind of basis is generated as, from seed, m, n and the number of coefficients."""
_PLACES = {"cosine": _frequencies, "fourier": _frequencies, "fourier_mt19937": _drawn}
"""The places of the waves."""
_WHOLE = {"cosine": (cosine, 2.0), "fourier": (fourier, 2**0.5), "fourier_mt19937": (fourier, 2**0.5)}
"""How a whole matrix of waves is made, and what it is multiplied by."""
