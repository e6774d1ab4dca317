"""How much each block of a stack changes the hidden state, and what a model gives without some of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from weft.error import ConflictError, NumericError
from weft.model.blocks import blocks
from weft.progress import Progress, Silent
from weft.stats.walker import Batch, forward

See = Callable[[int, Tensor, Tensor], Tensor]


def influence(
    model: nn.Module, batches: Sequence[Batch], *, progress: Progress | None = None
) -> Float[Tensor, "blocks"]:
    """Every block's influence 1 - E[cos(x, y)], from 0 to 2: x and y a token's hidden state before and behind it, in float64.

    The mean is over all tokens of all batches, padding left out. Errors: NumericError naming a block whose hidden state is not finite;
    ConflictError for blocks that do not hand on the hidden state, once a batch.
    """
    path, stack = blocks(model)
    total, tokens, seen = torch.zeros(len(stack), dtype=torch.float64), 0, list[int]()

    def see(i: int, x: Tensor, y: Tensor) -> Tensor:
        kept = keep if keep is not None else torch.ones(x.shape[:-1], dtype=torch.bool)
        if kept.shape != x.shape[:-1]:
            problem = _refusal(f"{path}.{i}", f"hidden states {list(x.shape)} of tokens {list(kept.shape)}")
            raise problem
        cosine = F.cosine_similarity(x[kept].double(), y[kept].double(), dim=-1)
        if not bool(torch.isfinite(cosine).all()):
            want, fix = "finite values", "look for NaN or huge weights before it; compute in float32"
            raise NumericError("a hidden state is not finite", where=f"{path}.{i}", got="NaN", want=want, fix=fix)
        total[i] += cosine.sum().cpu()
        seen.append(i)
        return y

    with (progress or Silent()).bar("influence", len(batches)) as step, _watched(path, stack, see):
        for batch in batches:
            keep = batch["attention_mask"].bool() if "attention_mask" in batch else None
            seen.clear()
            forward(model, batch)
            if seen != list(range(len(stack))):
                problem = _refusal(path, f"blocks that ran in the order {seen}")
                raise problem
            tokens += int(keep.sum()) if keep is not None else batch["input_ids"].numel()
            step(1)
    return 1 - total / tokens


def without(model: nn.Module, batch: Batch, gone: Collection[int]) -> Tensor:
    """The model's main output where these blocks hand on what they are given. Errors: ConflictError as above."""
    path, stack = blocks(model)
    with _watched(path, stack, lambda i, x, y: x if i in gone else y):
        return forward(model, batch)


@contextmanager
def _watched(path: str, stack: nn.ModuleList, see: See) -> Generator[None]:
    """While open, and without gradients, block i hands on `see(i, x, y)` in place of what it made of x, y."""

    def hook(i: int) -> Any:
        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0] if args else None
            y = out[0] if isinstance(out, tuple) and out else out
            if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape:
                problem = _refusal(f"{path}.{i}", f"{type(x).__name__} in, {type(y).__name__} out")
                raise problem
            made = see(i, x, y)
            return (made, *out[1:]) if isinstance(out, tuple) else made

        return watch

    hooks = [block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(stack)]
    try:
        with torch.no_grad():
            yield
    finally:
        for h in hooks:
            h.remove()


def _refusal(where: str, got: str) -> ConflictError:
    want = "blocks in a row, each given the hidden state and handing it on"
    fix = "prune by channels, heads or weights"
    return ConflictError("the influence of these blocks is not known", where=where, got=got, want=want, fix=fix)
