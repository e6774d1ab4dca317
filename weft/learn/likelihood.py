"""The likelihood that training lowers, with the logits of some words at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.expr.gated import Gated
from weft.expr.products import arithmetic
from weft.learn.data import IGNORE
from weft.learn.objective import likelihood
from weft.model.woven import WovenLinear
from weft.stats.walker import forward

_WORDS, _LOGITS = 2048, 2**24
"""Words at a time, whose logits lie in a CPU's caches; fewer for many targets, of whom not more logits are made than this."""
_AROUND = "forward", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"
"""What a head has of its own where more than its weight and bias makes logits, or where someone looks at them."""
Likelihood = Callable[[nn.Module, Mapping[str, Tensor], Int[Tensor, "b t"], "int | Tensor | None", float], Tensor]
"""`(model, batch, labels, count, smoothing) -> loss`, as `likelihood` of the model's logits"""


def likelihood_of(model: nn.Module) -> Likelihood:
    """How to take the likelihood of this model's targets: where its head is frozen and comes last, by some words at a time.

    The logits of a large vocabulary, their softmax and gradient would be most of a step's memory, and those of no target are not needed.
    """
    head = head_of(model)
    if head is None:
        return lambda m, batch, labels, count, smoothing: likelihood(forward(m, batch), labels, count, smoothing)

    def by_words(
        m: nn.Module, batch: Mapping[str, Tensor], labels: Tensor, count: int | Tensor | None, smoothing: float
    ) -> Float[Tensor, ""]:
        kept, found = labels[:, 1:] != IGNORE, list[Tensor]()
        targets = labels[:, 1:][kept]

        def first(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            hidden = given[0][:, :-1][kept]
            hidden = head.inputs(hidden) if isinstance(head, WovenLinear) else hidden
            found.append(_Summed.apply(hidden, head, targets, smoothing, torch.is_grad_enabled()))
            return (given[0][:1, :1],)

        with head.register_forward_pre_hook(first):
            forward(m, batch)
        return found[0] / (count if count is not None else max(1, len(targets)))

    return by_words


def head_of(model: nn.Module) -> nn.Linear | None:
    """The frozen linear layer whose output is the model's logits, token by token and with nothing after it; None where there is none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    woven = isinstance(head, WovenLinear)
    if not (woven or type(head) is nn.Linear) or any(p.requires_grad for p in head.parameters()):
        return None
    if any(vars(head).get(around) for around in _AROUND) or _compiled(model, head):
        return None
    if woven and (not head.expr.is_matrix or any(isinstance(e, Gated) for e in head.expr.modules())):
        return None  # what tells the rows of a batch
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    made, was = list[tuple[Any, Any, int]](), model.training
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        with head.register_forward_hook(lambda _, given, out: made.append((given, out, out._version))):
            logits = forward(model.eval(), {"input_ids": ids})
        model.train(was)
    last = [
        out is logits and version == out._version and len(given) == 1 and given[0].shape[:2] == ids.shape
        for given, out, version in made
    ]
    return head if last == [True] else None


def _compiled(model: nn.Module, head: nn.Module) -> bool:
    """Whether the head runs in what is compiled, which sees no hook that comes later."""
    around = (m for m in model.modules() if head in m.modules())
    return any(
        getattr(m, "_compiled_call_impl", None) or hasattr(m.forward, "_torchdynamo_orig_callable") for m in around
    )


class _Summed(torch.autograd.Function):
    """Σ -log p(target) of what a frozen head multiplies [u n], and its gradient, in one pass over the rows W of the head [v n].

    With logits l, r = l[target], o = log Σ exp l of the others, and q = 1 - p(target) = sigmoid(o - r): log(exp o + exp r) - r +
    s (r - mean l) a row, and q (softmax of the others W - W[target]) + s (W[target] - mean W). So a target that is all but certain has
    a gradient as exact as any other. The sums over the others are held relative to the highest so far, and scaled when it rises.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor, smoothing: float, learns: bool
    ) -> Float[Tensor, ""]:
        x, count, mean = hidden.to(arithmetic(hidden)), 0, 0.0
        right = torch.full((len(x), 1), torch.nan, device=x.device)
        high, total = torch.full_like(right, torch.finfo(right.dtype).min), torch.zeros_like(right)
        spread, pull = torch.zeros_like(right), torch.zeros(x.shape, device=x.device)
        for w, bias in _words(head, max(1, min(_WORDS, _LOGITS // max(1, len(x)))), x.dtype):
            logits = F.linear(x, w, bias).float()
            if smoothing:
                spread += logits.sum(1, keepdim=True)
                mean = mean + w.float().sum(0)
            right = _taken(logits, targets.unsqueeze(1) - count, right)
            count += len(w)
            risen = torch.maximum(high, logits.amax(1, keepdim=True))
            fall, p, high = (high - risen).exp_(), logits.sub_(risen).exp_(), risen
            total.mul_(fall).add_(p.sum(1, keepdim=True))
            if learns:
                pull.mul_(fall).add_(p.to(w.dtype) @ w)
        others = high + total.log()
        if learns:
            unsure = torch.sigmoid(others - right)
            pull = pull.mul_(unsure / total.clamp(min=1)) + (smoothing - unsure) * _chosen(head, targets)
            ctx.save_for_backward((pull - smoothing / count * mean).to(hidden.dtype))
        return (torch.logaddexp(others, right) - right + smoothing * (right - spread / count)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0] * grads[0], None, None, None, None


def _taken(logits: Float[Tensor, "u k"], at: Int[Tensor, "u 1"], found: Float[Tensor, "u 1"]) -> Float[Tensor, "u 1"]:
    """The logits at these places, or what was found before where they are not of these words; -inf is left in their stead."""
    here, at = (at >= 0) & (at < logits.shape[1]), at.clamp(0, logits.shape[1] - 1)
    seen = logits.gather(1, at)
    logits.scatter_(1, at, seen.masked_fill(here, -torch.inf))
    return seen.where(here, found)


def _chosen(head: nn.Linear, words: Int[Tensor, "u"]) -> Float[Tensor, "u n"]:
    """A head's rows of these words, in float32."""
    return (head.expr.rows(words) if isinstance(head, WovenLinear) else head.weight[words]).float()


def _words(head: nn.Linear, most: int, dtype: torch.dtype) -> Iterator[tuple[Float[Tensor, "k n"], Tensor | None]]:
    """A head's rows and biases, at most so many at a time."""
    n, start = head.in_features, 0
    parts = (
        (e.dense() for e in head.expr.slices(most * n)) if isinstance(head, WovenLinear) else head.weight.split(most)
    )
    for w in parts:
        bias = None if head.bias is None else head.bias[start : start + len(w)].to(dtype)  # pyright: ignore[reportUnnecessaryComparison]
        yield w.to(dtype), bias
        start += len(w)
