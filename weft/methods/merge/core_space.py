"""Merge adapters in the small space that holds them all."""

from __future__ import annotations

from collections.abc import Sequence
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
    if held is not None and not any(b.shape[1] for b, _ in held[1]):
        return s.linear([0.0] * len(s.members), s.origin)
    pairs = held[1] if held is not None else [(d.double(), None) for d in s.deltas()]
    left = _span([b for b, _ in pairs])
    right = _span([(b if a is None else a).T for b, a in pairs])
    cores = [left.T @ b @ (right if a is None else a @ right) for b, a in pairs]
    u, v = _axes(sum((c @ c.T for c in cores), torch.zeros(()))), _axes(sum((c.T @ c for c in cores), torch.zeros(())))
    kept = ((w, trimmed(u.T @ c @ v, density)) for w, c in zip(s.weights, cores, strict=True))
    core = elected(kept) if then == "ties" else summed(kept)
    core, left, right = scale * (isotropic(core) if then == "iso" else core), left @ u, right @ v
    if held is None:
        return s.dense(s.start() + left @ core @ right.T)
    b, a = (left, core @ right.T) if left.shape[1] < right.shape[1] else (left @ core, right.T)
    return total({**held[0], "adapter:merged": LowRank(b.float(), a.float())})


def _span(parts: Sequence[Float[Tensor, "m r"]]) -> Float[Tensor, "m p"]:
    """Orthonormal columns whose span holds all columns of these: the unit vectors, where there are as many as rows."""
    whole = torch.cat(list(parts), 1)
    return torch.eye(len(whole), dtype=whole.dtype) if len(whole) <= whole.shape[1] else torch.linalg.qr(whole)[0]


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
