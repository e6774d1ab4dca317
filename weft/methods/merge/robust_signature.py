"""Patch a model with what training on corrupted data changed."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from weft.engine import Sources, method
from weft.expr import Dense, Expr, fork, terms_of, total
from weft.linalg.grids import minmax, nearest

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P192", paper="2302.12480", needs={"base"}, signed=True, adds=True)
def robust_signature(
    s: Sources,
    *,
    stored: Annotated[
        Literal["float", "int8", "int4", "int2"], Field(description="what a signature is stored as")
    ] = "float",
) -> Expr:
    """base + Σ_k w_k τ_k, τ_k = R_k - c_k C_k with c_k = ⟨R_k, C_k⟩ / ⟨C_k, C_k⟩, of each weight.

    Member R_k was trained on corrupted data, C_k, its own base, alike on clean data: the base, or one for each behind what is patched
    (base=[patched, clean, ...]). `at` names the shallow blocks, where the paper finds signatures.
    Of a weight each is a term adapter:signature-K beside the base, which can be weighed (`weft.activate`), taken off to the bit
    (`weft.delete_adapter`) or subtracted (weight -1); norms and biases are changed themselves.
    """
    made: dict[str, Expr] = {r: fork(t) for r, t in terms_of(s.origin).items()}
    free = (role for i in count(1) if (role := f"adapter:signature-{i}") not in made)
    for w, robust, clean in zip(s.weights, s.values(), s.starts(), strict=True):
        size = float(clean.double().square().sum())
        share = float((robust.double() * clean.double()).sum()) / size if size else 0.0
        signature = (w * (robust - share * clean)).to(s.dtype)
        if stored == "float":
            made[next(free)] = Dense(signature)
        else:
            fit = minmax(signature.float(), stored, 64, True)
            made[next(free)] = fit.encode(nearest(signature, fit))
    return total(made)


@robust_signature.claim(
    "of another task's member, patched in the shallow half of its blocks alone, noisy prompts gain at least 80 % of what the whole "
    "difference of a noisy and a clean member gives them"
)
def claim(lab: Lab) -> Claim:
    whole = ("task_arithmetic", {"scale": 1.0})
    return lab.patch(ours=("robust_signature", {}), baseline=whole, blocks=0.5, share=0.8)
