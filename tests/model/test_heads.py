"""Edits of heads' outputs: the formula, the penalty, and the choice of heads by trained scales."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.error import ConflictError, ShapeError
from weft.model import Heads, add_branch, branches, fork, unbranch, weave
from weft.model.heads import head_hosts

from . import zoo

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "bert", "eurobert", "vit", "t5", "mixtral")


@cache
def plain(name: str) -> nn.Module:
    """A woven model in float64; never changed."""
    return weave(zoo.build(name).double())


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    """What the model gives."""
    batch = {k: v.double() if v.is_floating_point() else v for k, v in zoo.batch(name).items()}
    return model(**batch).logits


@pytest.mark.parametrize("stage", ["offsets", "scales"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_formula(name: str, stage: str) -> None:
    """z + v, or z (1 + v), feature by feature, of what the plain model's mixing layer reads."""
    made, oracle = fork(plain(name)), fork(plain(name))
    weft.apply(made, "lofit", stage=stage, share=0.4)
    held = dict(oracle.named_modules())
    for b in branches(made):
        b.vectors.data = torch.randn(b.vectors.shape, generator=torch.Generator().manual_seed(len(b.at))).double()

        def edit(_: nn.Module, given: tuple[Tensor, ...], b: Any = b) -> tuple[Tensor, ...]:
            z, size = given[0].clone(), b.vectors.shape[1]
            for row, head in enumerate(int(n) for n in b.heads.split()):
                cols = slice(head * size, (head + 1) * size)
                z[..., cols] = (
                    z[..., cols] + b.vectors[row] if stage == "offsets" else z[..., cols] * (1 + b.vectors[row])
                )
            return (z, *given[1:])

        held[b.at].register_forward_pre_hook(edit)
    got = logits(made, name)
    torch.testing.assert_close(got, logits(oracle, name), rtol=1e-9, atol=1e-9)
    assert float((got - logits(plain(name), name)).abs().max()) > 1e-5
    chosen, whole = sum(len(b.vectors) for b in branches(made)), sum(n for n, _ in head_hosts(made).values())
    assert chosen == (whole if stage == "scales" else max(1, round(0.4 * whole)))


@pytest.mark.parametrize("stage", ["offsets", "scales"])
def test_it_begins_as_nearly_nothing(stage: str) -> None:
    """Vectors begin a thousandth in size."""
    made = fork(plain("llama"))
    weft.apply(made, "lofit", stage=stage, share=1.0)
    near, was = logits(made, "llama"), logits(plain("llama"), "llama")
    assert 0 < float((near - was).abs().max()) < 2e-2 * float(was.abs().max())


def test_the_penalty_is_that_of_the_loss() -> None:
    """Gradients of scales are those of loss + 5e-4 |a|; offsets have none."""
    grads: list[list[Tensor]] = []
    for penalty in (5e-4, 0.0):
        made = fork(plain("llama"))
        weft.apply(made, "lofit", stage="scales")
        for b in branches(made):
            assert b.penalty == 5e-4
            b.penalty = penalty
        loss = made(**zoo.batch("llama")).logits.square().mean()
        by_hand = 0 if penalty else 5e-4 * sum(b.vectors.abs().sum() for b in branches(made))
        (loss + by_hand).backward()
        grads.append([b.vectors.grad for b in branches(made)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)
    weft.apply(made, "lofit", name="offsets")
    assert {b.penalty for b in branches(made) if b.name == "offsets"} == {0.0}


def test_offsets_go_where_scales_are_longest() -> None:
    """Across layers; what is drawn without scales is declared, and another draw for another seed."""
    made = fork(plain("llama"))
    weft.apply(made, "lofit", stage="scales", name="scales")
    low, high = branches(made)
    low.vectors.data[:] = 0.1
    high.vectors.data[:] = 0.2
    low.vectors.data[2] = -3
    high.vectors.data[1] = 0.3
    assert not weft.apply(made, "lofit", share=3 / 8).fallbacks
    assert unbranch(made, "scales") == [low.key, high.key]
    assert {b.at: b.heads for b in branches(made)} == {low.at: "2", high.at: "0 1"}
    drawn: set[tuple[tuple[str, str], ...]] = set()
    for seed in range(4):
        other = fork(plain("llama"))
        assert "drawn" in str(weft.apply(other, "lofit", share=0.5, seed=seed).fallbacks)
        drawn.add(tuple((b.at, b.heads) for b in branches(other)))
    assert len(drawn) > 1


def test_generation_goes_on_from_its_cache() -> None:
    """The same tokens with a cache and without."""
    made, x = fork(plain("llama")), zoo.batch("llama")["input_ids"]
    weft.apply(made, "lofit", share=1.0)
    for b in branches(made):
        b.vectors.data += 1
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(made.generate(x, **how), made.generate(x, use_cache=False, **how))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"at": "model.layers.0.mlp.down_proj"}, ConflictError),
        ({"edit": "turn"}, ConflictError),
        ({"heads": "0 4"}, ShapeError),
        ({"heads": "0 -1"}, ShapeError),
        ({"heads": "1 1"}, ShapeError),
        ({"heads": "0 one"}, ShapeError),
        ({"heads": "0"}, ShapeError),
        ({"vectors": torch.ones(2, 9)}, ShapeError),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], error: type[Exception]) -> None:
    """Other places, edits, heads and sizes; and families without a table."""
    good: dict[str, Any] = {
        "at": "model.layers.0.self_attn.o_proj", "heads": "0 1", "edit": "offset", "vectors": torch.ones(2, 8), "penalty": 0.0
    }  # fmt: skip
    model = fork(plain("llama"))
    with pytest.raises(error):
        add_branch(model, Heads(**{**good, **given}))
    add_branch(model, Heads(**good))
    with pytest.raises(ConflictError, match="nothing is known of this family"):
        weft.apply(weave(zoo.build("bamba")), "lofit")
