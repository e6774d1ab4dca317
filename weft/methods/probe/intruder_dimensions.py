"""Directions that tuning brought into weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from weft.engine import Findings, method
from weft.error import ConflictError, OptionError, raise_all
from weft.expr import valueless
from weft.model import expressions, match, site
from weft.store import load

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="probe", rows="P168", paper="2410.21228")
def intruder_dimensions(
    model: nn.Module,
    *,
    k: Annotated[int, Field(ge=1, description="singular vectors of a tuned weight, from the largest value")] = 10,
    epsilon: Annotated[float, Field(gt=0, le=1, description="a cosine below it is none of the pretrained ones")] = 0.5,
    at: Annotated[str, Field(description="weights: a glob, or all-linear")] = "all-linear",
    base: Annotated[str | None, Field(description="the pretrained model, where the tuned one does not know it")] = None,
) -> Findings:
    """Count, by weight, those of the top k left singular vectors u of W whose cosine to every pretrained one is small.

    intruders = #{i <= k: max_j |u_i · v_j| < epsilon}, v_j all left singular vectors of the pretrained weight; least is the
    smallest of these maxima, change is ||W - W0||_F / ||W0||_F. Vectors of singular values that are zero do not count.
    """
    found = {n: _numbers(now, was, k, epsilon) for n, now, was in _pairs(model, at, base)}
    if not any(f["change"] for f in found.values()):
        got, want = "the pretrained value everywhere", "a tuned model"
        fix = "give base, the folder of the pretrained model, if this one was saved as an ordinary checkpoint"
        raise OptionError("nothing was tuned", where=at, got=got, want=want, fix=fix)
    total, some = int(sum(f["intruders"] for f in found.values())), sum(f["intruders"] > 0 for f in found.values())
    says = f"{total} intruder dimensions among the top {k} of {len(found)} weights, in {some} of them"
    return Findings(says, found)


def _pairs(model: nn.Module, at: str, base: str | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, value today and pretrained value of each weight. Errors: ConflictError for weights without a value, or another base."""
    names, now = match(model, at), expressions(model)
    raise_all(valueless({n: now[n] for n in names}))
    first = expressions(load(base)) if base is not None else {}
    for name in names:
        s = site(model, name)
        value = s.now.dense().detach().float()
        if base is None:
            yield name, value, s.original
            continue
        if name not in first or first[name].shape != s.now.shape:
            got = f"{list(first[name].shape)}" if name in first else "no such weight"
            want, fix = f"{list(s.now.shape)}", "give the model that this one was tuned from"
            raise ConflictError("the base is another model", where=f"{base}: {name}", got=got, want=want, fix=fix)
        yield name, value if s.tap is None else s.tap.back(value), first[name].dense().detach().float()


def _numbers(now: Float[Tensor, "m n"], was: Float[Tensor, "m n"], k: int, epsilon: float) -> dict[str, float]:
    """What is told of one weight."""
    change = float((now - was).norm() / was.norm().clamp(min=1e-30))
    nearest = (_directions(now)[:, :k].T @ _directions(was)).abs().amax(1) if bool(was.any()) else torch.zeros(0)
    least = float(nearest.min()) if len(nearest) else 1.0
    return {"intruders": int((nearest < epsilon).sum()), "least": least, "change": change}


def _directions(w: Float[Tensor, "m n"]) -> Float[Tensor, "m r"]:
    """The left singular vectors of singular values above rounding, the largest first."""
    u, s, _ = torch.linalg.svd(w, full_matrices=False)
    return u[:, s > s[:1] * max(w.shape) * torch.finfo(w.dtype).eps]


@intruder_dimensions.claim("LoRA of rank 1 makes more of them than full fine-tuning that gains as much")
def claim(lab: Lab) -> Claim:
    look = ("intruder_dimensions", {})
    return lab.probe(ours=[("lora", {"rank": 1})], baseline=[("full", {})], probe=look, number="intruders")
