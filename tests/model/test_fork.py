"""Fork: a second model over the same storage that cannot change the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft.engine.run import Step, apply
from weft.model import expressions, fingerprint, fork, plain_tensors, weave

RANK2 = Step.of("lora", rank=2)


def train(model: Any, batch: dict[str, torch.Tensor], steps: int = 2) -> None:
    """A few steps of plain SGD on what is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("chain", [(), ("rtn",), ("magnitude", "nf4")])
def test_fork_shares_frozen_storage(chain: tuple[str, ...], family: str, tiny: Any, batches: Any, run: Any) -> None:
    """Every frozen tensor is the source's storage; the output is equal."""
    model, batch = weave(tiny(family)), batches(1)[0]
    apply(model, [Step.of(m) for m in chain])
    other = fork(model)
    mine, theirs = (
        dict(model.named_parameters()) | dict(model.named_buffers()),
        dict(other.named_parameters()) | dict(other.named_buffers()),
    )
    assert mine.keys() == theirs.keys()
    inside = {k for k in mine if ".expr." in k or isinstance(mine[k], torch.nn.Parameter)}
    assert all(mine[k].data_ptr() == theirs[k].data_ptr() for k in inside)
    assert torch.equal(run(model, batch), run(other, batch))


def test_training_a_fork_leaves_the_source(tiny: Any, batches: Any, run: Any) -> None:
    """Adapters of a fork are its own, whether made before or after the fork."""
    source, batch = weave(tiny("llama-tied")), batches(1)[0]
    apply(source, [RANK2], at="all-linear")
    mark, before = fingerprint(source), run(source, batch)
    other = fork(source)
    apply(other, [Step.of("lora", rank=3, name="two")], at="q_proj")
    train(other, batch)
    assert fingerprint(source) == mark and torch.equal(run(source, batch), before)
    assert not torch.equal(run(other, batch), before)


def test_training_the_source_leaves_the_fork(tiny: Any, batches: Any) -> None:
    """And the other way round."""
    source, batch = weave(tiny()), batches(1)[0]
    apply(source, [RANK2], at="all-linear")
    other = fork(source)
    mark = fingerprint(other)
    train(source, batch)
    assert fingerprint(other) == mark != fingerprint(source)


def test_rewriting_and_casting_a_fork_leaves_the_source(family: str, tiny: Any, batches: Any, run: Any) -> None:
    """Rewrites, `.to()` and writes to buffers stay in the fork."""
    source, batch = weave(tiny(family)), batches(1)[0]
    mark, before = fingerprint(source), run(source, batch)
    other = fork(source)
    apply(other, [Step.of("rtn", bits=2)])
    other.to(torch.bfloat16)
    for name, buffer in other.named_buffers():
        if ".expr." not in name:
            buffer.zero_()
    assert fingerprint(source) == mark and torch.equal(run(source, batch), before)


def test_fork_keeps_ties_and_originals(tiny: Any) -> None:
    """The tied head stays one expression; pretrained values are the source's, not a copy."""
    from weft.model import site

    source = weave(tiny("llama-tied"))
    apply(source, [Step.of("rtn", bits=3)])
    other = fork(source)
    name = "model.embed_tokens.weight"
    assert other.lm_head.expr is other.model.embed_tokens.expr is not source.lm_head.expr
    assert site(other, name).source().data_ptr() == site(source, name).source().data_ptr()
    assert (
        expressions(other).keys() == expressions(source).keys()
        and plain_tensors(other).keys() == plain_tensors(source).keys()
    )


def test_fork_of_a_plain_model(tiny: Any, batches: Any, run: Any) -> None:
    """A plain model forks too: trainable tensors are copied."""
    model, batch = tiny(), batches(1)[0]
    other = fork(model)
    before = run(model, batch)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(run(model, batch), before)
