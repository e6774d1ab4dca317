"""Add the leading directions of what tuning changed, made orthogonal between members."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weft.engine import Sources, method
from weft.expr import Expr
from weft.linalg.lowrank import directions
from weft.linalg.votes import summed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", paper="2412.00081", needs={"base"}, signed=True)
def tsv(
    s: Sources,
    *,
    density: Annotated[
        float,
        Field(gt=0, le=1, description="share of a weight's directions that the members have together, each as many"),
    ] = 1.0,
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the merged task vector is added")] = 1.0,
) -> Expr:
    """base + scale · P(U) S P(V)ᵀ, U, S and V side by side the leading singular vectors and values of all w_k (member_k - base).

    P(X) = X (Xᵀ X)^(-1/2), the nearest matrix with orthonormal columns: members no longer write over each other. Each of K members
    has density · min(m, n) / K directions, one at least; members of weight zero do not count. Vectors have the mean Σ_k w_k d_k / K.
    """
    held = [(w, d) for w, d in zip(s.weights, s.deltas(), strict=True) if w]
    if min(s.origin.shape) == 1:
        return s.dense(s.start() + scale / max(1, len(held)) * summed(held))
    keep = max(1, int(density * min(s.origin.shape) / max(1, len(held))))
    parts = [directions(w * d.double(), keep) for w, d in held]
    left, right = (_orthogonal(torch.cat([p[i] for p in parts], 1)) for i in (0, 2))
    return s.dense(s.start() + scale * (left * torch.cat([size for _, size, _ in parts])) @ right.T)


def _orthogonal(x: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    """The nearest matrix with orthonormal columns; of more columns than rows, rows."""
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


@tsv.claim("merges members tuned on different tasks better than adding all they learnt does")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("tsv", {}), baseline=("task_arithmetic", {}), members="tasks")
