"""The side network: its formula, nothing at the start, caches, padding, and what training it keeps."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import weft
from weft.error import ConflictError, ShapeError
from weft.model import branches, fork, trunk, unbranch, weave

from . import zoo

DECODERS = ("llama", "gpt2", "gemma3", "mixtral")
READERS = (*DECODERS, "bert", "eurobert")


@cache
def plain(name: str) -> nn.Module:
    """A woven model in float64; never changed."""
    return weave(zoo.build(name).double())


def beside(name: str, *more: str) -> nn.Module:
    """A fork with a side network that takes part, and other branches around it."""
    made = fork(plain(name))
    weft.apply(made, "qst", width=8, rank=4)
    branches(made)[0].keep.data.fill_(0.3)
    branches(made)[0].mix.data += torch.tensor([0.5, -1.0])
    for other in more:
        weft.apply(made, other, length=3, name=other)
    return made


def ids(rows: int = 2, length: int = 7) -> Tensor:
    """Tokens."""
    return torch.randint(3, zoo.VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, **given: Any) -> Tensor:
    """What the model gives."""
    return model(x, **given).logits


def normed(x: Tensor) -> Tensor:
    """Rows of root mean square one."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def side(b: Any, states: tuple[Tensor, ...]) -> Tensor:
    """The side's last state, token by token and head by head, from its tensors alone."""
    held = {n: p.detach().double() for n, p in b.named_parameters()}
    gelu = nn.functional.gelu
    small = [gelu(normed(h) @ d.T) @ u.T for h, d, u in zip(states, held["squeeze"], held["lift"], strict=True)]
    g, width = small[0], 8 // b.heads
    for i, s in enumerate(small[1:]):
        c = 1 / (1 + (-held["mix"][i]).exp())
        g = c * g + (1 - c) * s
        q, k, v = (normed(g) @ w.T for w in held["reads"][i])
        heads: list[Tensor] = []
        for h in range(b.heads):
            cols = slice(h * width, (h + 1) * width)
            scores = q[..., cols] @ k[..., cols].transpose(-1, -2) / width**0.5
            if b.causal:
                later = torch.ones_like(scores, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, -torch.inf)
            heads.append(scores.softmax(-1) @ v[..., cols])
        g = g + torch.cat(heads, -1) @ held["writes"][i].T
        g = g + gelu(normed(g) @ held["inner"][i].T) @ held["outer"][i].T
    return normed(g) @ held["widen"].T


@pytest.mark.parametrize("name", READERS)
def test_it_is_the_formula(name: str) -> None:
    """keep h + (1 - keep) W g of the hidden states of the plain model; a decoder's side sees no later token."""
    made, x = beside(name), ids()
    (b,) = branches(made)
    with torch.no_grad():
        was = plain(name).get_submodule(trunk(made))(x, output_hidden_states=True)
        got = made.get_submodule(trunk(made))(x)
    want = 0.3 * was.last_hidden_state + 0.7 * side(b, was.hidden_states)
    torch.testing.assert_close(got.last_hidden_state, want, rtol=1e-6, atol=1e-6)
    assert b.causal == (name in DECODERS) and getattr(got, "hidden_states", None) is None
    assert float((got.last_hidden_state - was.last_hidden_state).abs().max()) > 1e-2


@pytest.mark.parametrize("name", READERS)
def test_it_begins_as_nothing(name: str) -> None:
    """Every bit of the output is as it was."""
    made = fork(plain(name))
    weft.apply(made, "qst")
    assert torch.equal(logits(made, ids()), logits(plain(name), ids()))


@pytest.mark.parametrize("more", [(), ("prompt",), ("prefix",), ("prompt", "prefix")])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_goes_on_from_its_cache(name: str, more: tuple[str, ...]) -> None:
    """The same tokens with a cache and without, greedily and by beams, beside virtual tokens and in parts."""
    made, x = beside(name, *more), ids()
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 3):
        with_, without = (made.generate(x, use_cache=c, num_beams=beams, **how) for c in (True, False))
        assert torch.equal(with_, without)
    kept, mask = DynamicCache(config=made.config), torch.ones_like(x)
    cuts = ((0, 4), (4, 5), (5, 7))
    parts = [logits(made, x[:, a:b], attention_mask=mask[:, :b], past_key_values=kept) for a, b in cuts]
    torch.testing.assert_close(torch.cat(parts, 1), logits(made, x), rtol=1e-6, atol=1e-6)


def test_virtual_tokens_may_be_put_on_first() -> None:
    """Then the side sees the text alone, and goes on from its cache too."""
    made = fork(plain("llama"))
    for step in ("prompt", "prefix"):
        weft.apply(made, step, length=3, name=step)
    weft.apply(made, "qst", width=8)
    branches(made)[-1].keep.data.fill_(0.3)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(made.generate(ids(), **how), made.generate(ids(), use_cache=False, **how))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_padding_changes_nothing(name: str, left: bool) -> None:
    """A padded text gives what it gives alone, in a batch."""
    made, x = beside(name), ids()
    mask, cut = torch.ones_like(x), slice(3, None) if left else slice(None, 4)
    mask[1] = 0
    mask[1, cut] = 1
    positions = {} if name == "bert" and not left else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    got = logits(made, x, attention_mask=mask, **positions)
    torch.testing.assert_close(got[1, cut], logits(made, x[1:, cut])[0], rtol=1e-6, atol=1e-6)
    assert bool(got.isfinite().all())


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a training step's forward keeps for its backward, besides parameters and their copies."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = nn.functional.cross_entropy(model(x, use_cache=False).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    held = sum(seen.values())
    loss.backward()
    return held


def test_training_keeps_less_than_lora() -> None:
    """Beside 4-bit weights, less than half of what LoRA of rank 1 keeps; nothing of the model's inside, whatever its depth costs."""
    config = {**zoo.CAUSAL, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    torch.manual_seed(0)
    model = weave(zoo.t.LlamaForCausalLM(zoo.t.LlamaConfig(**config)).train())
    weft.apply(model, "nf4", group=16)
    sides, lora = fork(model), fork(model)
    weft.apply(sides, "qst", width=4, rank=2)
    weft.apply(lora, "lora", rank=1)
    x = ids(4, 64)
    assert 2 * kept(sides, x) < kept(lora, x)
    assert all(p.grad is None for n, p in sides.named_parameters() if "weft_branches" not in n)


def test_no_gradient_enters_the_model() -> None:
    """Nothing inside is part of a graph, under checkpointing too; what else trains there still has its gradient."""
    made, graph = beside("llama").train(), list[bool]()
    made.model.layers[1].mlp.register_forward_hook(lambda m, i, o: graph.append(o.requires_grad))
    made.gradient_checkpointing_enable()
    made(ids(), use_cache=False).logits.square().mean().backward()
    assert graph == [False] and bool(branches(made)[0].squeeze.grad.any())
    made.gradient_checkpointing_disable()
    weft.apply(made, "lora", rank=1, at="*.q_proj")
    made(ids()).logits.square().mean().backward()
    assert graph == [False, True]
    assert all(bool(p.grad.any()) for n, p in made.named_parameters() if p.requires_grad and n.endswith("b"))


def test_what_else_comes_out() -> None:
    """Hidden states where they are asked for, the last one mixed; a pooled output of what is mixed; a tuple is refused."""
    made, x = beside("llama"), ids()
    with torch.no_grad():
        out = made.model(x, output_hidden_states=True)
        was = plain("llama").model(x, output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states[:-1], was.hidden_states[:-1], strict=True))
    with pytest.raises(ConflictError, match="states of blocks"):
        made.model(x, return_dict=False)


def test_a_pooled_output_is_that_of_the_mix(tiny: Any) -> None:
    """Of a model without a head."""
    model = weave(tiny("bert").double())
    weft.apply(model, "qst", width=8)
    branches(model)[0].keep.data.fill_(0.3)
    with torch.no_grad():
        out = model(ids())
        assert torch.equal(out.pooler_output, model.pooler(out.last_hidden_state))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"attention_mask": torch.ones(2, 1, 7, 7, dtype=torch.bool)}, "this mask"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}, "packed"),
        ({"past_key_values": StaticCache(zoo.build("llama").config, max_cache_len=20)}, "into this cache"),
        ({"output_hidden_states": 1}, "by number"),
    ],
)
def test_calls_that_cannot_be_right_are_refused(given: dict[str, Any], reason: str) -> None:
    """With the reason."""
    with pytest.raises(ConflictError, match=reason):
        beside("llama").model(ids(), **given)


def test_a_cache_of_other_text_is_refused() -> None:
    """One that was filled without the side."""
    filled = DynamicCache(config=plain("llama").config)
    logits(plain("llama"), ids(), past_key_values=filled)
    with pytest.raises(ConflictError, match="without this branch"):
        logits(beside("llama"), ids(), past_key_values=filled)


@pytest.mark.parametrize("name", ["t5", "mamba2", "vit", "resnet", "clip", "whisper"])
def test_models_without_a_place_are_refused(name: str) -> None:
    """By what they are; nothing is changed. One of another depth is refused on its way in."""
    model = weave(zoo.build(name))
    with pytest.raises(ConflictError, match="takes no side network"):
        weft.apply(model, "qst")
    made = beside("llama")
    (b,) = branches(made)
    unbranch(made)
    other = weave(zoo.t.LlamaForCausalLM(zoo.t.LlamaConfig(**{**zoo.CAUSAL, "num_hidden_layers": 3})))
    with pytest.raises(ShapeError, match="does not fit"):
        weft.model.add_branch(other, b)
