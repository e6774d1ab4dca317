"""Learn which way to round, and how far each range reaches, by the signs of gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from weft.engine import Beats, Group, method
from weft.expr import Expr, Quantized
from weft.grid import grid
from weft.linalg.grids import Fitted, grouped, minmax, nearest
from weft.linalg.sparse import compact

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2309.05516", needs={"gram"}, rowwise=True, beats=Beats("rtn", options={"bits": 3}))
def autoround(
    g: Group,
    *,
    bits: Annotated[int, Field(ge=2, le=8, description="bits per weight", json_schema_extra={"better": "up"})] = 4,
    group: Annotated[int, Field(ge=0, le=65536, description="columns per scale; 0: the whole row")] = 64,
    symmetric: Annotated[bool, Field(description="no zero point")] = True,
    iters: Annotated[int, Field(ge=1, le=1000, description="steps of signed gradient descent")] = 200,
    lr: Annotated[float, Field(gt=0, le=1, description="first step size, falling to 0 in a straight line")] = 0.005,
) -> Expr:
    """SignRound: code = round(w / scale + V) + zero, where V in [-1/2, 1/2] and the ends of each range are learned.

    V and the ends move by the signs of their gradients, rounding passed straight through, from round-to-nearest; each row keeps
    its best step. A zero pattern stays. Departure from the paper: the loss is tr(E G Eᵀ) of one layer, over all calibration
    tokens, and not the output of a block on samples of them; so no step is random, and rows do not depend on each other.
    """
    now, gram = g.now, g.gram()
    mask, w = now.mask(), now.dense().float()
    w = w if mask is None else compact(w, mask)
    start = minmax(w, f"int{bits}", group, symmetric)
    made = _Layer(w, mask, (gram / gram.diagonal().mean()).float(), start).descend(iters, lr)
    return made if mask is None else now.rebuild(kept=made)


@dataclass(frozen=True)
class _Layer:
    """What the descent works on: the entries to round, where they stand, the Gram of the inputs, and the grid to start from."""

    w: Float[Tensor, "m k"]
    mask: Bool[Tensor, "m n"] | None
    gram: Float[Tensor, "n n"]
    start: Fitted

    @property
    def top(self) -> int:
        """The last code."""
        return grid(self.start.name).count - 1

    def descend(self, iters: int, lr: float) -> Quantized:
        """The node of each row's best step."""
        x, codes = (grouped(t.float(), self.start.group) for t in (self.w, nearest(self.w, self.start)))
        v, ends = torch.zeros_like(x), torch.ones(2, *self.start.scales.shape)
        best, found = torch.full((len(x), 1), torch.inf), self.start
        for t in range(iters + 1):
            fit = self.placed(ends)
            scale, zero = fit.scales.unsqueeze(-1), fit.zero().unsqueeze(-1)
            wide = x / scale
            aim = (wide + v).add_(zero).round_()
            code = aim.clamp(0, self.top)
            value = code - zero
            error = (value * scale).sub_(x)
            pull = self.pull(error)
            loss = torch.einsum("mgk,mgk->m", pull, error).unsqueeze(1)
            better = loss < best
            best, found = torch.where(better, loss, best), found.mixed(fit, better)
            codes = torch.where(better.unsqueeze(-1), code, codes)
            free, step = (aim == code).float(), lr * (1 - t / iters)
            by_scale = torch.einsum("mgk,mgk->mg", pull, value.addcmul_(wide, free, value=-1))
            by_zero = torch.einsum("mgk,mgk->mg", pull, free - 1) * fit.scales
            ends = ends.sub(self.slope(ends, fit, by_scale, by_zero).sign_(), alpha=step).clamp_(0, 1)
            v.sub_(pull.sign_().mul_(free), alpha=step).clamp_(-0.5, 0.5)
        return found.encode(codes.flatten(1)[:, : self.w.shape[1]].to(torch.uint8))

    def pull(self, error: Float[Tensor, "m g k"]) -> Float[Tensor, "m g k"]:
        """E G, half the gradient of tr(E G Eᵀ), of the entries that are rounded."""
        e = error.flatten(1)[:, : self.w.shape[1]]
        if self.mask is None:
            return grouped(e @ self.gram, self.start.group)
        wide = e.new_zeros(self.mask.shape).masked_scatter(self.mask, e)
        return grouped(compact(wide @ self.gram, self.mask), self.start.group)

    def placed(self, ends: Float[Tensor, "2 m g"]) -> Fitted:
        """The grid over these shares of the start's range below and above zero; of both sides by the second if symmetric."""
        (low, high), scale, zero = ends, self.start.scales, self.start.zero()
        if self.start.zeros is None:
            return self.start.placed(high * scale)
        fit = self.start.placed((low * zero + high * (self.top - zero)) * scale / self.top)
        return replace(fit, zeros=(low * zero * scale / fit.scales).round().clamp(0, self.top).to(torch.uint8))

    def slope(
        self,
        ends: Float[Tensor, "2 m g"],
        fit: Fitted,
        by_scale: Float[Tensor, "m g"],
        by_zero: Float[Tensor, "m g"],
    ) -> Float[Tensor, "2 m g"]:
        """The gradient by both ends, up to a positive factor, from those by the scale and zero point that `placed` makes of them."""
        if self.start.zeros is None:
            return torch.stack([torch.zeros_like(by_scale), by_scale])
        below, above = self.start.zero(), self.top - self.start.zero()
        shift = below * self.start.scales / fit.scales  # zero = low · shift
        by_step = by_scale - by_zero * ends[0] * shift / fit.scales
        return torch.stack([by_step * below + by_zero * self.top * below / fit.scales, by_step * above])


@autoround.claim("loses less than round-to-nearest at 3 bits")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("autoround", {"bits": 3, "iters": 60, "lr": 1 / 60})], baseline=[("rtn", {"bits": 3})])
