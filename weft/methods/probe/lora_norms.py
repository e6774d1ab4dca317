"""How large queries, keys and what adapters add to them are, and how well few directions give attention's gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, sqrt
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from weft.engine import Findings, method
from weft.error import OptionError, raise_all
from weft.expr import terms_of, valueless
from weft.model import expressions, fork, match, name_of
from weft.model.axes import parts
from weft.model.families import Attention
from weft.stats import Batch, forward

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="probe", rows="P101", paper="2406.03136", needs={"data"})
def lora_norms(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    rank: Annotated[int, Field(ge=1, description="directions that attention is brought down to")] = 8,
    scale: Annotated[float, Field(gt=0, description="what queries and keys are multiplied by")] = 1.0,
    at: Annotated[str, Field(description="weights of queries and keys: a glob")] = "*",
) -> Findings:
    """Tell, by weight of queries and keys, the largest |X|, |X Wᵀ| and |X Dᵀ| of its inputs X, W without the adapters and D theirs.

    Below threshold = sqrt(log L), L tokens long, LoRA's gradients have algorithms of nearly linear time, above it none (under SETH).
    error is what is lost where A = softmax(Q Kᵀ / sqrt(d)) is brought down to `rank` directions: ||g(A_r) - g(A)||_F / ||g(A)||_F of
    the gradient g(A) = A ∘ G - A ∘ (A ∘ G) 1 by scores, G = O Vᵀ of random O and V of a head's width; the mean over heads, of the
    first text of each batch, padding with it. As in the paper, positions and masks are aside. Cross-attention is left out.
    """
    chosen, seen, found = set(match(model, at)), cast(Any, fork(model).eval()), dict[str, dict[str, float]]()
    raise_all(valueless({n: e for n, e in expressions(model).items() if n in chosen}))
    pairs = [(f"{b}.{p.q}", f"{b}.{p.k}") for b, p in parts(model) if isinstance(p, Attention) and not p.memory]
    held = _recorded(seen, [_path(n) for pair in pairs for n in pair])
    for batch in batches:
        with torch.no_grad():
            forward(seen, batch)
        for q, k in pairs:
            queries, keys = (_cut(held[_path(n)][1], n) * scale for n in (q, k))
            error = _error(queries, keys, int(seen.config.num_attention_heads), rank) / len(batches)
            for path in dict.fromkeys((_path(q), _path(k))):
                if (name := f"{path}.weight") in chosen:
                    now = {**_sizes(seen, name, held[path][0], scale), "error": error}
                    was = found.setdefault(name, dict.fromkeys(now, 0.0))
                    found[name] = {n: was[n] + v if n == "error" else max(was[n], v) for n, v in now.items()}
    if not found:
        want, fix = "weights of queries or keys", "weft show lists weights"
        raise OptionError("nothing to measure", where="at", got=at, want=want, fix=fix)
    over = sum(max(f["weight"], f["adapter"]) > f["threshold"] for f in found.values())
    mean = sum(f["error"] for f in found.values()) / len(found)
    return Findings(f"{over} of {len(found)} weights are over the threshold; {rank} directions lose {mean:.2%}", found)


def _recorded(model: nn.Module, paths: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What these modules read and give, of the first row of the last batch that the model ran."""
    held: dict[str, tuple[Tensor, Tensor]] = {}

    def noted(path: str) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
        def note(module: Any, args: tuple[Any, ...], out: Tensor) -> None:
            held[path] = module.inputs(args[0])[0].float(), out[0].float()

        return note

    for path in paths:
        model.get_submodule(path).register_forward_hook(noted(path))
    return held


def _sizes(model: nn.Module, name: str, x: Float[Tensor, "t n"], scale: float) -> dict[str, float]:
    """Numbers of one weight."""
    terms, y = terms_of(expressions(model)[name]), x.new_zeros(len(x), 1)
    with torch.no_grad():
        added = [t(x) for r, t in terms.items() if name_of(r) is not None]
        rest = [t(x) for r, t in terms.items() if name_of(r) is None]
    sizes = {k: scale * float(sum(v, y).abs().max()) for k, v in (("weight", rest), ("adapter", added))}
    return {"input": float(x.abs().max()), **sizes, "threshold": sqrt(log(max(2, len(x))))}


def _error(q: Float[Tensor, "t m"], k: Float[Tensor, "s k"], heads: int, rank: int) -> float:
    """What the gradient by scores loses."""
    d = q.shape[1] // heads
    q, k = q.unflatten(1, (heads, d)), k.unflatten(1, (-1, d))
    k = k.repeat_interleave(heads // k.shape[1], 1)
    a = (torch.einsum("thd,shd->hts", q, k) / sqrt(d)).softmax(-1)
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    low = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
    o, w = torch.randn(2, heads, len(q), d, generator=torch.Generator().manual_seed(0)).to(a)
    exact, lost = (_slope(p, o @ w.mT) for p in (a, low))
    return float(((lost - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2)).clamp(min=1e-30)).mean())


def _slope(a: Float[Tensor, "heads t s"], g: Float[Tensor, "heads t s"]) -> Float[Tensor, "heads t s"]:
    return a * g - a * (a * g).sum(-1, keepdim=True)


def _path(name: str) -> str:
    return name.partition("[")[0]


def _cut(y: Float[Tensor, "t m"], name: str) -> Float[Tensor, "t k"]:
    """The features of a name, which may be such as `c_attn[0/3]`."""
    which, _, count = name.partition("[")[2].rstrip("]").partition("/")
    return y.chunk(int(count), 1)[int(which)] if count else y


@lora_norms.claim("few directions lose more of attention's gradients where queries and keys are twice as large")
def claim(lab: Lab) -> Claim:
    chain = [("lora", {"rank": 8})]
    look, half = (("lora_norms", {"scale": s}) for s in (1.0, 0.5))
    return lab.probe(ours=chain, baseline=chain, probe=look, against=half, number="error")
