"""Matrices of few numbers: codebooks, sparse deltas, Kronecker products, blocks, generated bases, permutations, Hadamard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int32, UInt8
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import Expr, Promises
from weft.expr.nodes import Dense
from weft.expr.products import FrozenProduct, product, product_transposed
from weft.expr.sparse import Masked
from weft.grid import pack, packed_bytes, unpack


def _wide(t: Tensor) -> Tensor:
    """At least float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class Codebook(Expr):
    """Columns in blocks of d, each the sum of one entry of every book. value[i, j d + c] = Σ_b books[b, code[i, j, b], c]

    A row of `data` holds the codes of its blocks, one a book, in ceil(log2 k) bits; of more than 8 bits first the low bytes,
    then what is above, packed. Scalar (d = 1), vector and additive (several books) codebooks are its cases.
    """

    data: UInt8[Tensor, "m bytes"]
    books: Float[Tensor, "b k d"]
    n: int

    @classmethod
    def of(cls, codes: Int[Tensor, "m j b"], books: Float[Tensor, "b k d"], n: int) -> Codebook:
        """Pack codes [m blocks books] below the books' k entries."""
        flat, bits = codes.flatten(1), _code_bits(books.shape[1])
        low = pack((flat & 255).to(torch.uint8), min(bits, 8))
        return cls(torch.cat([low, pack((flat >> 8).to(torch.uint8), bits - 8)], 1) if bits > 8 else low, books, n)

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return dims["m"], self.n

    def check(self) -> None:
        books, k, d = self.books.shape
        count, bits = books * -(-self.n // max(1, d)), _code_bits(k)
        want = packed_bytes(count, min(bits, 8)) + packed_bytes(count, max(0, bits - 8))
        good = min(books, k, d) > 0 and self.n >= 0 and bits <= 16 and self.data.shape[1] == want
        if not good or (self.data.device.type != "meta" and self.data.numel() and int(self.codes().max()) >= k):
            raise ShapeError(
                "Codebook.data does not fit Codebook.books",
                where="Codebook.data",
                got=f"{self.data.shape[1]} bytes a row, or a code of no entry",
                want=f"{want} bytes for {count} codes below {k}, at most 65536",
                fix="build it with Codebook.of",
            )

    def codes(self) -> Int[Tensor, "m j b"]:
        """The codes [m blocks books]."""
        books, k, d = self.books.shape
        count, bits = books * -(-self.n // d), _code_bits(k)
        at = packed_bytes(count, min(bits, 8))
        flat = unpack(self.data[:, :at], min(bits, 8), count).int()
        if bits > 8:
            flat = flat | unpack(self.data[:, at:], bits - 8, count).int() << 8
        return flat.view(len(flat), -1, books)

    def dense(self) -> Float[Tensor, "m n"]:
        codes = self.codes()
        value = sum(F.embedding(codes[..., b], _wide(book)) for b, book in enumerate(self.books))
        return torch.as_tensor(value).flatten(1)[:, : self.n]

    def promises(self) -> Promises:
        books, k, d = self.books.shape
        return Promises(levels=k if books == d == 1 else None)

    def describe(self) -> str:
        books, k, d = self.books.shape
        return f"codebook[{books} of {k} x {d}]" if books > 1 else f"codebook[{k} x {d}]"


def _code_bits(k: int) -> int:
    return max(1, (k - 1).bit_length())


CROWDED = 2
"""Inputs, times the share of the entries that are there, above which a product of a SparseDelta is faster dense."""


class SparseDelta(Expr):
    """A few entries; the rest is zero. Row i holds the next counts[i] of `values`, at these `columns`, ascending."""

    counts: Int32[Tensor, "m"]
    columns: Int32[Tensor, "k"]
    values: Float[Tensor, "k"]
    n: int

    @classmethod
    def of(cls, value: Float[Tensor, "m n"], mask: Bool[Tensor, "m n"]) -> SparseDelta:
        """The entries of `value` where `mask`."""
        return cls(mask.sum(1).int(), mask.nonzero()[:, 1].int(), value[mask], mask.shape[1])

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return dims["m"], self.n

    def check(self) -> None:
        if self.counts.device.type == "meta":
            return
        total = int(self.counts.sum()) if not bool((self.counts < 0).any()) else -1
        good = total == len(self.columns) and not bool(((self.columns < 0) | (self.columns >= self.n)).any())
        at = self.entries() if good else None
        if at is None or not bool((at.diff() > 0).all()):
            raise ShapeError(
                "SparseDelta.columns does not fit SparseDelta.counts",
                where="SparseDelta.columns",
                got=f"{len(self.columns)} columns, counts of {total}",
                want=f"as many as the counts say, below {self.n}, ascending in each row",
                fix="build it with SparseDelta.of",
            )

    def _at(self) -> Int[Tensor, "k"]:
        """The row of every entry."""
        rows = torch.arange(len(self.counts), device=self.counts.device)
        return rows.repeat_interleave(self.counts, output_size=len(self.columns))

    def entries(self) -> Int[Tensor, "k"]:
        """The place of every value in the matrix, row by row: ascending."""
        return self._at() * self.n + self.columns

    def dense(self) -> Float[Tensor, "m n"]:
        value = _wide(self.values)
        return value.new_zeros(self.shape).index_put((self._at(), self.columns.long()), value)

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        if x.numel() * len(self.columns) > CROWDED * self.n * self.shape[0] * self.n:
            return super().forward(x)
        inner = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
        wide = torch.promote_types(x.dtype, torch.float32)
        starts = (self.counts.cumsum(0) - self.counts).int()
        y = F.embedding_bag(  # row i sums the inputs at its columns, each times its value
            self.columns, inner.T.to(wide), starts, mode="sum", per_sample_weights=self.values.to(wide)
        )
        return y.T.reshape(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def _plain_product(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        return super()._plain_product(x) if torch.compiler.is_compiling() else _Spread.apply(x, self.values, self)

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        ends = self.counts.cumsum(0)
        starts = ends - self.counts
        if isinstance(rows, slice) and rows.step in (None, 1):
            counts = self.counts[rows]
            first = int(starts[rows][0]) if len(counts) else 0
            kept = slice(first, first + int(counts.sum()))
            return SparseDelta(counts, self.columns[kept], self.values[kept], self.n)
        counts, first = self.counts[rows], starts[rows]
        inner = torch.arange(int(counts.sum()), device=counts.device)
        inner = inner - (counts.cumsum(0) - counts).repeat_interleave(counts) + first.repeat_interleave(counts)
        return SparseDelta(counts, self.columns[inner], self.values[inner], self.n)

    @classmethod
    def join(cls, parts: Sequence[Expr]) -> Expr:
        held = [p for p in parts if isinstance(p, cls)]
        whole = (torch.cat([getattr(p, f).detach() for p in held]) for f in ("counts", "columns", "values"))
        return cls(*whole, held[0].n)

    def promises(self) -> Promises:
        return Promises(zeros=True)

    def mask(self) -> Bool[Tensor, "m n"]:
        value = torch.zeros(self.shape, dtype=torch.bool, device=self.counts.device)
        return value.index_put((self._at(), self.columns.long()), torch.ones((), dtype=torch.bool, device=value.device))

    def describe(self) -> str:
        return f"SparseDelta({len(self.values) / max(1, self.shape[0] * self.n):.2%})"


class _Spread(torch.autograd.Function):
    """A dense product with sparse entries that train: the backward makes them dense again instead of keeping that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, term: SparseDelta) -> Tensor:
        ctx.term = term
        ctx.save_for_backward(x, values)
        return product(x, term)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x, values), term = ctx.saved_tensors, ctx.term
        back = product_transposed(grads[0], term) if ctx.needs_input_grad[0] else None
        whole = (grads[0].flatten(0, -2) if x.dim() > 1 else grads[0].unsqueeze(0)).T @ x.reshape(-1, x.shape[-1])
        return back, whole.flatten()[term.entries()].to(values.dtype), None


class Kronecker(Expr):
    """value = scale (a ⊗ b): block (i, j) is scale a[i, j] b."""

    a: Float[Tensor, "p q"]
    b: Float[Tensor, "s t"]
    scale: float = 1.0

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return dims["p"] * dims["s"], dims["q"] * dims["t"]

    def dense(self) -> Float[Tensor, "m n"]:
        return self._scaled(torch.kron(_wide(self.a), _wide(self.b)))

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        blocks = x.unflatten(-1, (self.a.shape[1], self.b.shape[1]))  # [*b q t]
        inner = F.linear(blocks, self.b.to(x.dtype)).transpose(-1, -2)  # [*b s q]
        return self._scaled(F.linear(inner, self.a.to(x.dtype)).transpose(-1, -2).flatten(-2))

    def _scaled(self, value: Tensor) -> Tensor:
        return value if self.scale == 1 else value * self.scale

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        ids = torch.arange(self.shape[0], device=self.a.device)[rows]
        a, b = _wide(self.a)[ids // self.b.shape[0]], _wide(self.b)[ids % self.b.shape[0]]
        return Dense(self._scaled((a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)))

    def promises(self) -> Promises:
        return Promises(rank=min(self.a.shape) * min(self.b.shape))

    def describe(self) -> str:
        return f"{list(self.a.shape)} ⊗ {list(self.b.shape)}"


class Blocks(Expr):
    """Blocks on the diagonal, as a stack [m n/count] of rows: a product in groups. Everything else is zero."""

    kept: Expr
    count: int

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.kept.shape[0], self.kept.shape[1] * self.count

    def check(self) -> None:
        if self.count < 1 or self.kept.shape[0] % self.count:
            got, want = f"{self.kept.shape[0]} rows, {self.count} blocks", "a count that divides the rows"
            raise ShapeError(
                "Blocks.count does not fit", where="Blocks.count", got=got, want=want, fix="choose another"
            )

    def mask(self) -> Bool[Tensor, "m n"]:
        return self._mask(slice(None))

    def _mask(self, rows: slice | Int[Tensor, "k"]) -> Bool[Tensor, "k n"]:
        device = next((t.device for t in self.kept.parameters()), None)
        m, n = self.shape
        block = torch.arange(m, device=device)[rows] // (m // self.count)
        return block.unsqueeze(1) == torch.arange(n, device=device) // self.kept.shape[1]

    def dense(self) -> Float[Tensor, "m n"]:
        parts = self.kept.dense().unflatten(0, (self.count, -1))
        return torch.block_diag(*parts)

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        size, width = self.kept.shape[0] // self.count, self.kept.shape[1]
        parts = (
            FrozenProduct.apply(
                x[..., i * width : (i + 1) * width], self.kept.take(slice(i * size, (i + 1) * size)), True
            )
            if self.frozen() and not torch.compiler.is_compiling()
            else F.linear(x[..., i * width : (i + 1) * width], self.kept.dense()[i * size : (i + 1) * size].to(x.dtype))
            for i in range(self.count)
        )
        return torch.cat(list(parts), -1)

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        bits = pack(self._mask(rows).to(torch.uint8), 1)
        return Masked(self.kept.take(rows), bits, self.shape[1])

    def promises(self) -> Promises:
        return Promises(zeros=True)

    def describe(self) -> str:
        return f"{self.count} blocks of {self.kept.describe()}"
