"""The likelihood that training lowers, with the logits of some targets at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.expr.gated import Gated
from weft.learn.data import IGNORE
from weft.learn.objective import likelihood
from weft.model.branch import branches
from weft.model.woven import Woven
from weft.stats.walker import forward

_LOGITS, _ROWS = 2**24, 128
"""As many logits at a time, but not fewer than those of so many targets, for which products with a head are still fast."""
Likelihood = Callable[[nn.Module, Mapping[str, Tensor], Int[Tensor, "b t"], "int | Tensor | None", float], Tensor]
"""`(model, batch, labels, count, smoothing) -> loss`, as `likelihood` of the model's logits"""


def likelihood_of(model: nn.Module, watched: bool = False) -> Likelihood:
    """How to take the likelihood of this model's targets. Where its head comes last, logits are made of targets alone, some at a time.

    The logits of a large vocabulary, their softmax and gradient would be most of a step's memory. With `watched`, someone looks at
    the gradients of trainable weights, each of which has to be whole.
    """
    head = head_of(model)
    if head is None or (watched and any(p.requires_grad for p in head.parameters())):
        return lambda m, batch, labels, count, smoothing: likelihood(forward(m, batch), labels, count, smoothing)

    def by_parts(
        m: nn.Module, batch: Mapping[str, Tensor], labels: Tensor, count: int | Tensor | None, smoothing: float
    ) -> Float[Tensor, ""]:
        kept, found = labels[:, 1:] != IGNORE, list[Tensor]()
        targets = labels[:, 1:][kept]

        def first(layer: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            hidden, free = given[0], [p for p in layer.parameters() if p.requires_grad]
            found.append(_Summed.apply(hidden[:, :-1][kept], layer, targets, smoothing, torch.is_grad_enabled(), *free))
            return (hidden[:, :1],)

        with head.register_forward_pre_hook(first):
            forward(m, batch)
        return found[0] / (count if count is not None else max(1, len(targets)))

    return by_parts


def head_of(model: nn.Module) -> nn.Linear | None:
    """The linear layer whose output is the model's logits, token by token and with nothing after it; None where there is none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    config = getattr(model, "config", None)
    if not isinstance(head, nn.Linear) or branches(head) or getattr(config, "is_encoder_decoder", False):
        return None
    if isinstance(head, Woven) and (not head.expr.is_matrix or any(isinstance(e, Gated) for e in head.expr.modules())):
        return None  # what tells the rows of a batch
    made, was = list[tuple[Any, Any]](), model.training
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), head.register_forward_hook(lambda _, given, out: made.append((given, out))):
        logits = forward(model.eval(), {"input_ids": ids})
    model.train(was)
    whole = [len(given) == 1 and given[0].shape[:2] == ids.shape and out is logits for given, out in made]
    return head if whole == [True] else None


class _Summed(torch.autograd.Function):
    """Σ -log p(target) of hidden states [u d] through a head, whose gradients are taken where the logits are: none are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor, smoothing: float, learns: bool, *free: Tensor
    ) -> Float[Tensor, ""]:
        rows = max(_ROWS, _LOGITS // head.out_features)
        total = torch.zeros((), device=hidden.device)
        sums = [torch.zeros_like(t) for t in (hidden, *free)] if learns else []
        for at in range(0, len(hidden), rows):
            part = slice(at, at + rows)
            with torch.set_grad_enabled(learns):
                x = hidden[part].detach().requires_grad_(learns)
                logits = head.forward(x).float()  # its hooks have run
                loss = F.cross_entropy(logits, targets[part], reduction="sum", label_smoothing=smoothing)
                del logits
            total += loss.detach()
            if learns:
                grads = torch.autograd.grad(loss, (x, *free), materialize_grads=True)
                for whole, g in zip((sums[0][part], *sums[1:]), grads, strict=True):
                    whole += g
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, *free = (g * grads[0].to(g.dtype) for g in ctx.saved_tensors)
        return hidden, None, None, None, None, *free
