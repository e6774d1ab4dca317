"""Merge adapters in the small space that holds them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weft.engine import Sources, method
from weft.expr import Expr, LowRank, total
from weft.linalg.lowrank import isotropic
from weft.linalg.votes import elected, summed, trimmed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", paper="2509.17786", needs={"base"})
def core_space(
    s: Sources,
    *,
    then: Annotated[
        Literal["ties", "iso", "add"],
        Field(description="cores are averaged where signs agree; or added, and all directions made alike; or added"),
    ] = "ties",
    density: Annotated[float, Field(gt=0, le=1, description="share of each core that is kept before that")] = 1.0,
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the merged task vector is added")] = 1.0,
) -> Expr:
    """base + scale · U merge(Uᵀ d_1 V, ..., Uᵀ d_K V) Vᵀ, U and V the left and right singular vectors of all d_k = member_k - base.

    Members that are the base and low-rank terms, of any ranks, become the base and one of the sum of the ranks, exactly. Departures from
    the paper: U and V are those of the task vectors side by side (as in KnOTS, arXiv 2410.19735), and so do not depend on how factors
    share their scale; d_k of other members are whole matrices, and the result is one.
    """
    held = s.low_rank()
    if held is None:
        left, right = (torch.eye(size, dtype=torch.float64) for size in s.origin.shape)
        cores = [d.double() for d in s.deltas()]
    else:
        left, right = (
            torch.linalg.qr(torch.cat(side, 1))[0] for side in ([b for b, _ in held[1]], [a.T for _, a in held[1]])
        )
        cores = [(left.T @ b) @ (a @ right) for b, a in held[1]]
    u, v = _axes(sum((c @ c.T for c in cores), torch.zeros(()))), _axes(sum((c.T @ c for c in cores), torch.zeros(())))
    kept = ((w, trimmed(u.T @ c @ v, density)) for w, c in zip(s.weights, cores, strict=True))
    core = elected(kept) if then == "ties" else summed(kept)
    core = scale * (isotropic(core) if then == "iso" else core)
    if held is None:
        return s.dense(s.start() + u @ core @ v.T)
    b, a = (left @ u, core @ (right @ v).T) if u.shape[1] < v.shape[1] else (left @ u @ core, (right @ v).T)
    return total({**held[0], "adapter:merged": LowRank(b.float(), a.float())})


def _axes(gram: Float[Tensor, "p p"]) -> Float[Tensor, "p q"]:
    """Eigenvectors, without those of values that are zero up to rounding."""
    lam, q = torch.linalg.eigh(gram)
    return q[:, -max(1, int((lam > lam[-1] * 1e-13).sum())) :]


@core_space.claim(
    "by signs, merges adapters tuned on different tasks better than merging the whole matrices by signs does"
)
def claim(lab: Lab) -> Claim:
    return lab.merge(
        ours=("core_space", {}), baseline=("ties", {"density": 1.0}), members="tasks", tuned=[("lora", {"rank": 8})]
    )
