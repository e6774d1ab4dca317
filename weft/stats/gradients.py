"""One backward pass: second moments of the gradient at every site's output, which make errors of different sites comparable."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.error import ConflictError, NumericError
from weft.model import places
from weft.model.blocks import blocks
from weft.stats.objective import Objective
from weft.stats.sums import OutputSums, wide
from weft.stats.walker import Batch, forward, forwards, not_finite


def gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, OutputSums], int]:
    """Sums over all batches of each module's squared output gradients, and the number of units they are sums over.

    Keys are module paths. The loss is `objective.probe`. Blocks are checkpointed, one sequence at a time goes through,
    so memory is bounded by one sequence's hidden states, its logits and one block's activations.
    Errors: NumericError at the first sequence whose output is not finite, naming where that begins; ConflictError where no gradient is
    other than zero, as of one image compared with one caption.
    """
    sums: dict[str, OutputSums] = {path: OutputSums() for place in places(model).values() for path in place.modules}
    units, rng = 0, torch.Generator().manual_seed(seed)

    with torch.enable_grad(), lean(model), _heard(model, sums):
        for b, batch in enumerate(batches):
            for i in range(len(next(iter(batch.values())))):
                one = trim({k: v[i : i + 1] for k, v in batch.items()})
                vectors = objective.vectors(forward(model, one), one)
                if not bool(torch.isfinite(vectors).all()):
                    problem = _source(model, one, b, i) or not_finite(type(model).__name__, b, vectors, i)
                    raise problem
                objective.probe(vectors, rng).backward()
                units += len(vectors)
            if progress:
                progress(1)
    if units and not any(bool(s.squares.any()) for s in sums.values() if s.squares is not None):
        raise ConflictError(
            "a model's output tells nothing of its weights",
            where=type(model).__name__,
            got="gradients of zero at every weight, one sample at a time",
            want="an output that depends on one sample alone",
            fix="use methods that need no data, or work on a part of the model, such as one tower",
        )
    return sums, units


def lean(model: nn.Module) -> AbstractContextManager[None]:
    """While open, each block's activations are made again in the backward pass instead of being kept."""

    def light(plain: Callable[..., Any]) -> Callable[..., Any]:
        return partial(checkpoint, plain, use_reentrant=False)

    return forwards(blocks(model)[1], light)


def trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the padding at the end of a single sequence."""
    if "attention_mask" not in batch:
        return batch
    length = int(batch["attention_mask"].sum())
    if not bool(batch["attention_mask"][0, :length].all()):
        return batch
    return {k: v if k.startswith("decoder_") else v[:, :length] for k, v in batch.items()}


def _source(model: nn.Module, one: Batch, batch: int, sample: int) -> NumericError | None:
    """The first weight, as the model computes, that reads or gives what is not finite, as an error; None if there is none."""
    found: list[NumericError] = []

    def hook(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            for x in (args[0], out):
                if not found and not bool(torch.isfinite(x).all()):
                    found.append(not_finite(name, batch, x, sample))

        return see

    sites = [(name, path) for name, place in places(model).items() for path in place.modules]
    hooks = [model.get_submodule(path).register_forward_hook(hook(name)) for name, path in sites]
    try:
        with torch.no_grad():
            forward(model, one)
    finally:
        for h in hooks:
            h.remove()
    return found[0] if found else None


@contextmanager
def _heard(model: nn.Module, sums: dict[str, OutputSums]) -> Generator[None]:
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in sums}
    tables: dict[str, Any] = {path: m for path, m in modules.items() if isinstance(m, nn.Embedding)}
    for path, m in tables.items():
        m.lookup = _lookup(m, sums[path])
    hooks = [m.register_forward_hook(_hear(sums[path])) for path, m in modules.items() if path not in tables]
    try:
        yield
    finally:
        for m in tables.values():
            del m.lookup
        for h in hooks:
            h.remove()


def _lookup(module: nn.Embedding, sums: OutputSums) -> Callable[[Tensor, Tensor], Tensor]:
    """Counts the rows that are looked up, and sums the Gram of the gradient at what was looked up."""

    def gram(g: Tensor) -> None:
        flat = g.flatten(0, -2).float()
        made = wide(flat.T @ flat)
        sums.gram = made if sums.gram is None else sums.gram + made

    def see(ids: Tensor, rows: Tensor) -> Tensor:
        out = rows if rows.requires_grad else rows.detach().requires_grad_()
        counts = wide(torch.bincount(ids.flatten(), minlength=module.num_embeddings))
        sums.counts = counts if sums.counts is None else sums.counts + counts
        out.register_hook(gram)
        return out

    return see


def _hear(sums: OutputSums) -> Callable[..., Any]:
    """Sums the squared gradient at each output; also where what was read, such as pixels, needs none."""

    def hook(module: Any, _: tuple[Tensor, ...], out: Tensor) -> Tensor:
        heard = out if out.requires_grad else out.detach().requires_grad_()
        heard.register_hook(partial(squares, module.features))
        return heard

    def squares(features: int, g: Tensor) -> None:
        made = wide(g.movedim(features, -1).flatten(0, -2).float().square().sum(0))
        sums.squares = made if sums.squares is None else sums.squares + made

    return hook
