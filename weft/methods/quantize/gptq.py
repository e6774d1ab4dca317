"""Round one column at a time and let the columns to the right make up for its error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weft.engine import Beats, Group, method
from weft.expr import Expr, Quantized
from weft.linalg.columns import solve
from weft.linalg.grids import Fitted, minmax, search
from weft.linalg.sparse import compact, expand

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(
    kind="rewrite",
    paper="2210.17323",
    needs={"gram"},
    per="input",
    rowwise=True,
    beats=Beats("rtn", options={"bits": 3}),
)
def gptq(
    g: Group,
    *,
    bits: Annotated[int, Field(ge=2, le=8, description="bits per weight", json_schema_extra={"better": "up"})] = 4,
    group: Annotated[int, Field(ge=0, le=65536, description="columns per scale; 0: the whole row")] = 64,
    symmetric: Annotated[bool, Field(description="no zero point")] = True,
    damp: Annotated[float, Field(gt=0, le=1, description="share of the mean diagonal added to the Gram")] = 0.01,
    search_scale: Annotated[
        bool, Field(description="search each group's scale, weighed by the Gram's diagonal")
    ] = True,
    order: Annotated[bool, Field(description="solve columns by falling activation, store them in place")] = True,
) -> list[Expr]:
    """Second-order rounding: after column j is rounded its error (w_j - q_j) / U_jj times U_j is taken from the columns to its right,

    with (G + λI)^-1 = Uᵀ U. A zero pattern stays: a pruned entry's whole value is error. Departure from the paper: scales are
    searched and fixed before the solve, so that the order of columns costs nothing at run time.
    """
    by = g.order() if order else None
    upper = g.inverse_factor(damp, ordered=order)
    weight = g.second_moment().float()

    def fit(w: Float[Tensor, "m k"], v: Float[Tensor, "#m k"]) -> Fitted:
        name = f"int{bits}"
        return search(w, v, name, group, symmetric) if search_scale else minmax(w, name, group, symmetric)

    masks = [s.now.mask() for s in g]
    if all(m is None for m in masks):
        values = torch.cat([s.now.dense().float() for s in g])
        made = _solve(values, None, upper, by, fit(values, weight[None]), bits)
        starts = [sum(s.now.shape[0] for s in g.sites[:i]) for i in range(len(g.sites))]
        return [made.take(slice(a, a + s.now.shape[0])) for a, s in zip(starts, g, strict=True)]
    out: list[Expr] = []
    for s, mask in zip(g, masks, strict=True):
        w = s.now.dense().float()
        v = weight.expand(w.shape)
        fitted = fit(w if mask is None else compact(w, mask), v[:1] if mask is None else compact(v, mask))
        made = _solve(w, mask, upper, by, fitted, bits)
        out.append(made if mask is None else s.now.rebuild(kept=made))
    return out


def _solve(
    w: Float[Tensor, "m n"], mask: Tensor | None, upper: Tensor, by: Tensor | None, fit: Fitted, bits: int
) -> Quantized:
    """Codes of every kept entry, by the column solver."""
    by = torch.arange(w.shape[1], device=w.device) if by is None else by
    scale, zero = (expand(t, fit.group, w.shape[1], mask).T[by].contiguous() for t in (fit.scales, fit.zero()))
    inverse, top = 1 / scale, 2**bits - 1
    keep = None if mask is None else mask.T[by].float()

    def settle(x: Tensor, j: int, rows: slice) -> Tensor:
        q = (x * inverse[j, rows]).add_(zero[j, rows]).round_().clamp_(0, top).sub_(zero[j, rows]).mul_(scale[j, rows])
        return q if keep is None else q.mul_(keep[j, rows])

    settled = solve(w[:, by], upper, settle).T
    codes = torch.empty(scale.shape, dtype=torch.uint8, device=w.device)
    codes[by] = settled.mul(inverse).add_(zero).round_().clamp_(0, top).to(torch.uint8)
    found = codes.T.contiguous() if mask is None else compact(codes.T, mask)
    return Quantized.encode(found, fit.scales, fit.zeros, grid=fit.name, group=fit.group)


@gptq.claim("loses less than round-to-nearest at 3 bits")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("gptq", {"bits": 3})], baseline=[("rtn", {"bits": 3})])
