"""Round one column at a time and push its error onto the columns not yet rounded."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.engine import Beats, Group, method
from weft.expr import Expr, Quantized, spread
from weft.linalg.columns import inverse_factor, solve
from weft.linalg.grids import minmax, search


@method(kind="rewrite", paper="2210.17323", needs={"gram"}, per="input", rowwise=True, beats=Beats("rtn", options={"bits": 3}))
def gptq(
    g: Group,
    *,
    bits: Annotated[int, Field(ge=2, le=8, description="bits per weight", json_schema_extra={"better": "up"})] = 4,
    group: Annotated[int, Field(ge=0, le=65536, description="columns per scale; 0: the whole row")] = 64,
    symmetric: Annotated[bool, Field(description="no zero point")] = True,
    damp: Annotated[float, Field(gt=0, le=1, description="share of the mean diagonal added to the Gram")] = 0.01,
    search_scale: Annotated[bool, Field(description="search each group's scale by the Gram's diagonal")] = True,
    order: Annotated[bool, Field(description="solve columns by falling activation, store them in place")] = True,
) -> list[Expr]:
    """Second-order rounding (GPTQ): min tr((W - Q) G (W - Q)^T), one column after the other."""
    name = f"int{bits}"
    gram = g.gram()
    key = ("columns", damp, order)
    if key not in g.cache:
        by = gram.diagonal().argsort(descending=True, stable=True) if order else torch.arange(len(gram))
        upper, used = inverse_factor(gram[by][:, by], damp, f"{g.name}.gram")
        g.cache[key], g.cache[(*key, "by")] = upper, by
        if used != damp:
            g.fallback(f"damping raised to {used:g}")
    upper, by = g.cache[key], g.cache[(*key, "by")]
    w = torch.cat([s.now.dense().float() for s in g])
    fit = search(w, g.second_moment(), name, group, symmetric) if search_scale else minmax(w, name, group, symmetric)
    scale, zero = (spread(t, group, w.shape[1]).T[by].contiguous() for t in (fit.scales, fit.zero()))
    inverse, top = 1 / scale, 2**bits - 1
    codes = torch.empty(scale.shape, dtype=torch.uint8)

    def settle(x: Tensor, j: int, rows: slice) -> Tensor:
        q = (x * inverse[j, rows]).add_(zero[j, rows]).round_().clamp_(0, top)
        codes[j, rows] = q.to(torch.uint8)
        return q.sub_(zero[j, rows]).mul_(scale[j, rows])

    solve(w[:, by], upper, settle)
    back = torch.empty_like(codes)
    back[by] = codes
    made = Quantized.encode(back.T.contiguous(), fit.scales, fit.zeros, grid=name, group=group)
    sizes = [0, *torch.tensor([s.now.shape[0] for s in g]).cumsum(0).tolist()]
    return [made.take(slice(a, b)) for a, b in zip(sizes, sizes[1:], strict=False)]
