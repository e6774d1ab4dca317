"""A few entries of each weight, trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from weft.engine import Group, method
from weft.expr import Expr, SparseDelta, total

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P327 P421", paper="2306.02320")
def sparse(
    g: Group,
    *,
    rank: Annotated[
        int, Field(ge=1, le=4096, description="as many entries as a LoRA of this rank has numbers, at most all")
    ] = 8,
    by: Annotated[
        Literal["random", "largest", "smallest"], Field(description="which entries: drawn, or by their magnitude")
    ] = "random",
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add a term with rank (m + n) trainable entries, zero at the start, at places that stay; it changes nothing until it is trained.

    Of a base with a pattern of zeros only entries that it keeps are chosen, so that the sum has the same pattern. Places are stored.
    random is the APET of the paper, which finds that where the parameters are matters little; smallest are those that SaRA
    (arXiv 2409.06633) begins with, without its later choices and its penalty.
    """
    mask = _places(g, rank * sum(g.now.shape), by, f"sparse {name}")
    term = SparseDelta.of(torch.zeros(g.now.shape), mask)
    return total({"base": g.now, f"adapter:{name}": term.rebuild(values=nn.Parameter(term.values.detach().clone()))})


def _places(g: Group, count: int, by: str, salt: str) -> Bool[Tensor, "m n"]:
    """So many entries of the weight, of those that its pattern keeps."""
    if by == "random":
        score: Float[Tensor, "m n"] = torch.rand(g.now.shape, generator=g.rng(salt))
    else:
        score = g.now.dense().detach().float().abs() * (1 if by == "largest" else -1)
    kept = g.now.mask()
    if kept is not None:
        score = score.masked_fill(~kept, -torch.inf)
    most = min(count, int(kept.sum()) if kept is not None else score.numel())
    if most < count:
        g.fallback(f"{most} entries, which is all of {g.now.describe()}")
    chosen = torch.zeros(score.numel(), dtype=torch.bool)
    chosen[score.flatten().topk(most).indices] = True
    return chosen.view(score.shape)


@sparse.claim("at places that are drawn reaches at least 90 % of what LoRA with as many parameters gains")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("sparse", {"rank": 8})], baseline=[("lora", {"rank": 8})], share=0.9)


@sparse.claim(
    "on a base that is pruned to 50 %, half low rank and half sparse gains more than as many parameters of low rank alone",
    of="dsee",
    paper="2111.00160",
)
def dsee(lab: Lab) -> Claim:
    pruned, low = ("magnitude", {"sparsity": 0.5}), ("lora", {"rank": 4})
    both = [pruned, low, ("sparse", {"rank": 4, "name": "sparse"})]
    return lab.tune(ours=both, baseline=[pruned, ("lora", {"rank": 8})], share=1.0)
