"""Changes of coordinates along an axis: scale, permute, select, rotate; on tensors and on expressions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.error import ConflictError, NumericError, ShapeError, WeftError
from weft.expr import CHUNK, Dense, Diagonal, Expr, Permutation, between
from weft.model.axis import Axis, Part


@dataclass(frozen=True)
class Transform(ABC):
    """x' = T x along an axis. What writes the axis gets T, what reads it the inverse of T."""

    kind: ClassVar[str]

    def size(self, size: int) -> int:
        """The axis's size afterwards."""
        return size

    def describe(self) -> str:
        """One line for people."""
        return self.kind

    def on(self, t: Tensor, part: Part, blocks: int, size: int, *, reads: bool) -> Tensor:
        """The tensor in the new coordinates, in its dtype; computed in float64 where the device has it, a matrix in slices."""
        across = 1 - part.dim
        step = max(1, CHUNK // max(1, t.shape[part.dim]))
        if t.dim() == 2 and t.shape[across] > step:
            parts = [self.on(piece, part, blocks, size, reads=reads) for piece in t.split(step, across)]
            return torch.cat(parts, across)
        wide = torch.float64 if t.device.type != "mps" else torch.float32
        moved = t.movedim(part.dim, 0)
        span = size * part.copies * part.unit
        before, held, after = moved.split([part.start, span, len(moved) - part.start - span])
        view = held.to(wide).view(blocks, part.copies, size // blocks, part.unit, *moved.shape[1:]) + part.offset
        made = (self._on(view, reads) - part.offset).flatten(0, 3).to(t.dtype)
        return torch.cat([before, made, after]).movedim(0, part.dim).contiguous()

    @abstractmethod
    def _on(self, x: Tensor, reads: bool) -> Tensor:
        """A stretch [blocks copies within unit ...] in the new coordinates."""

    @abstractmethod
    def problem(self, axis: Axis) -> WeftError | None:
        """Why these numbers are no transform of this axis."""

    def _unlike(self, axis: Axis, got: object, want: object) -> WeftError:
        return ShapeError(
            f"this {self.kind} is of another axis", where=axis.name, got=got, want=want, fix="make it for this axis"
        )


@dataclass(frozen=True)
class Scale(Transform):
    """x' = by · x."""

    kind = "scale"
    by: Float[Tensor, "n"]

    def describe(self) -> str:
        return f"scaled by {float(self.by.min()):.3g} to {float(self.by.max()):.3g}"

    def problem(self, axis: Axis) -> WeftError | None:
        if self.by.shape != (axis.size,):
            return self._unlike(axis, list(self.by.shape), [axis.size])
        least = float(self.by.min()) if axis.kind == "feed" and not axis.riders else float(self.by.abs().min())
        if not least > 0 or not bool(torch.isfinite(self.by).all()):
            want = "finite numbers, not 0" + (
                ", none below it: an activation function is no other line there" if axis.kind == "feed" else ""
            )
            return NumericError(
                "a scale has no inverse here",
                where=axis.name,
                got=f"{float(self.by.min()):g}",
                want=want,
                fix="clamp it",
            )
        halves = self.by.view(axis.blocks, -1).chunk(2, 1)
        if axis.pairs and not torch.equal(*halves):
            got, want = "two scales in a pair", "one scale for i and i + half"
            return ConflictError(
                "position rotates pairs of features", where=axis.name, got=got, want=want, fix="take one of both"
            )
        return None

    def _on(self, x: Tensor, reads: bool) -> Tensor:
        by = self.by.to(x).view(x.shape[0], 1, -1, *[1] * (x.dim() - 3))
        return x / by if reads else x * by


@dataclass(frozen=True)
class Permute(Transform):
    """x'[i] = x[order[i]]; of an axis in blocks, an order within each."""

    kind = "permute"
    order: Int[Tensor, "n"]

    def problem(self, axis: Axis) -> WeftError | None:
        within = torch.arange(axis.size).view(axis.blocks, -1)
        if self.order.shape == (axis.size,) and torch.equal(
            self.order.cpu().long().view(within.shape).sort(1)[0], within
        ):
            return None
        blocks = f", in {axis.blocks} blocks" if axis.blocks > 1 else ""
        return self._unlike(
            axis, f"{len(self.order.unique())} of {len(self.order)} indices", f"{axis.size} in order, each once{blocks}"
        )

    def _on(self, x: Tensor, reads: bool) -> Tensor:
        within = x.shape[2]
        order = self.order.to(x.device).view(len(x), -1)
        order = order - within * torch.arange(len(x), device=x.device).unsqueeze(1)
        return torch.stack([block.index_select(1, at) for block, at in zip(x, order, strict=True)])


@dataclass(frozen=True)
class Select(Permute):
    """x' = x[order]: the others are gone, which changes what the model computes."""

    kind = "select"

    def size(self, size: int) -> int:
        return len(self.order)

    def problem(self, axis: Axis) -> WeftError | None:
        ids = self.order.tolist()
        good = len(set(ids)) == len(ids) > 0 and min(ids) >= 0 and max(ids) < axis.size
        return None if good else self._unlike(axis, f"{len(ids)} indices", f"some of {axis.size}, each once")


@dataclass(frozen=True)
class Rotate(Transform):
    """x' = q x, orthogonal; of an axis in blocks, one matrix a block."""

    kind = "rotate"
    q: Float[Tensor, "b d d"]

    def problem(self, axis: Axis) -> WeftError | None:
        d = axis.size // axis.blocks
        if self.q.shape != (axis.blocks, d, d):
            return self._unlike(axis, list(self.q.shape), [axis.blocks, d, d])
        q = self.q.double().cpu()
        if not (gap := float((q @ q.mT - torch.eye(d, dtype=q.dtype)).abs().max())) < 1e-4:
            return NumericError(
                "a rotation is not orthogonal",
                where=axis.name,
                got=f"q qᵀ is {gap:.1g} off",
                want="the identity",
                fix="take its QR factor",
            )
        if axis.centred and float((q.sum(-1) - 1).abs().max()) > 1e-4:
            got, want = "rows that do not sum to 1", "a rotation that keeps the vector of ones: norms subtract the mean"
            return ConflictError(
                "a rotation moves the mean", where=axis.name, got=got, want=want, fix="weft.model.rotation(axis)"
            )
        return None

    def _on(self, x: Tensor, reads: bool) -> Tensor:
        """The inverse is the transpose, so columns turn as rows do."""
        return torch.einsum("bij,bcj...->bci...", self.q.to(x), x)


def carried(expr: Expr, by: Transform, part: Part, blocks: int, size: int, *, reads: bool) -> Expr:
    """The expression in the new coordinates: dense and low-rank terms change their values, others get a side."""

    def on(t: Tensor, at: Part = part) -> Tensor:
        return by.on(t, at, blocks, size, reads=reads)

    def beside(e: Expr) -> Expr:
        length, device = e.shape[part.dim], next((t.device for t in (*e.parameters(), *e.buffers())), None)
        flat = replace(part, dim=0)
        if isinstance(by, Permute):
            order = on(torch.arange(length, device=device), flat)
            if part.dim == 0:
                return e.take(order)
            side: Expr = Permutation(order.argsort().int())
        elif isinstance(by, Scale):
            side = Diagonal(on(torch.ones(length, device=device), flat))
        else:
            whole = on(torch.eye(length, device=device), flat)
            side = Dense(whole if part.dim == 0 else whole.T.contiguous())
        return between((side,), e, ()) if part.dim == 0 else between((), e, (side,))

    return expr.mapped(part.dim, on, beside)


def selectable(expr: Expr) -> bool:
    """Whether some of its columns can be taken: no term keeps codes of them."""
    coded: list[Expr] = []

    def beside(e: Expr) -> Expr:
        coded.append(e)
        return e

    expr.mapped(1, lambda t: t, beside)
    return not coded
