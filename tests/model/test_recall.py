"""Generated adapters: their formula, what a segment sees, padding, two of them, and what is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import weft
from weft.error import ConflictError, OptionError, ShapeError
from weft.linalg.orthogonal import orthogonal
from weft.model import branches, fork, unbranch, weave

from . import zoo

MODELS = ("llama", "gpt2", "mixtral")
WINDOW = 4


@cache
def plain(name: str) -> nn.Module:
    """A woven model in float64; never changed."""
    return weave(zoo.build(name).double())


def beside(name: str, **how: Any) -> nn.Module:
    """A fork with generated adapters that act."""
    made = fork(plain(name))
    weft.apply(made, "generative", **{"rank": 5, "window": WINDOW, **how})
    for b in branches(made):
        b.double().get_parameter("up").data.copy_(
            0.3 * torch.randn(b.up.shape, generator=seeded(1), dtype=torch.float64)
        )
    return made


def seeded(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def ids(rows: int = 2, length: int = 11) -> Tensor:
    """Tokens."""
    return torch.randint(3, zoo.VOCAB, (rows, length), generator=seeded(1))


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, **given: Any) -> Tensor:
    """What the model gives."""
    return model(input_ids=x, **given).logits


def polar(s: Tensor) -> Tensor:
    """Five steps of the iteration on singular values, by a decomposition."""
    u, d, v = torch.linalg.svd(s / s.norm().clamp(min=1e-12))
    for _ in range(5):
        d = 3.4445 * d - 4.7750 * d**3 + 2.0315 * d**5
    return u @ torch.diag(d) @ v


def one_by_one(name: str, b: Any, text: Tensor) -> Tensor:
    """The logits of one text, segment after segment, each a call of the plain model alone, from the branch's tensors."""
    model: Any = fork(plain(name))
    hosts = [model.get_submodule(f"{b.at}.{p}") for p in b.parts.split()]
    sums = [torch.zeros(5, 5, dtype=torch.float64) for _ in hosts]
    made: list[Tensor] = []
    for part in text.split(WINDOW):
        read: list[Tensor] = []

        def see(_: Any, args: Any, given: Any, read: list[Tensor] = read) -> None:
            read.append((args or tuple(given.values()))[0][0])

        seen = [m.register_forward_pre_hook(see, with_kwargs=True) for m in hosts]
        logits(model, part[None])
        added = []
        for hook in seen:
            hook.remove()
        for i, m in enumerate(hosts):

            def more(_: Any, args: Any, given: Any, out: Any, i: int = i) -> Any:
                x = (args or tuple(given.values()))[0]
                extra = b.scale * (x @ b.down[i].T @ polar(sums[i]).T @ b.up[i].T)
                return (out[0] + extra, *out[1:]) if isinstance(out, tuple) else out + extra

            added.append(m.register_forward_hook(more, with_kwargs=True))
        made.append(logits(model, part[None])[0])
        for hook in added:
            hook.remove()
        for i, x in enumerate(read):
            unit = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
            sums[i] = sums[i] + sum(torch.outer(b.keys[i] @ t, b.values[i] @ t) for t in unit)
    return torch.cat(made)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("position", ["ffn", "attention", "both"])
def test_it_is_the_formula(name: str, position: str) -> None:
    """Against a reading of each text alone, a segment after the other, to the rounding of float32 sums."""
    made = beside(name, position=position, scale=0.7)
    (b,) = branches(made)
    assert len(b.parts.split()) == (4 if position == "both" else 2)
    x = ids()
    want = torch.stack([one_by_one(name, b, text) for text in x])
    torch.testing.assert_close(logits(made, x), want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(want[:, WINDOW:], logits(plain(name), x)[:, WINDOW:], atol=1e-2)


def test_at_the_start_segments_stand_alone() -> None:
    """Nothing is added, whatever was read; texts that fit the window are read as ever, to the bit."""
    made = fork(plain("llama"))
    weft.apply(made, "generative", window=WINDOW)
    x = ids(length=2 * WINDOW)
    alone = logits(plain("llama"), x.view(-1, WINDOW)).view(2, 2 * WINDOW, -1)
    torch.testing.assert_close(logits(made, x), alone)
    assert torch.equal(logits(made, x[:, :WINDOW]), logits(plain("llama"), x[:, :WINDOW]))


def test_a_segment_sees_earlier_ones_alone() -> None:
    """Another token changes what comes behind it, nothing before, and other texts not at all; behind the window by what it generated."""
    made, x = beside("llama"), ids()
    for at in range(x.shape[1]):
        other = x.clone()
        other[0, at] = (x[0, at] + 1) % zoo.VOCAB
        gap = (logits(made, other) - logits(made, x)).abs().amax(-1)
        assert not gap[1].any() and not gap[0, :at].any() and bool((gap[0, at:] > 0).all())


def test_padding_behind_a_text_changes_nothing() -> None:
    """However much of it; before a text it is refused."""
    made, x = beside("llama"), ids(1, 7)
    for spare in (1, 2, 9):
        wide = torch.cat([x, torch.full((1, spare), 5)], 1)
        mask = torch.tensor([[1] * 7 + [0] * spare])
        torch.testing.assert_close(
            logits(made, wide, attention_mask=mask)[:, :7], logits(made, x), rtol=1e-5, atol=1e-6
        )
        with pytest.raises(ConflictError, match="padding before it"):
            logits(made, wide.flip(1), attention_mask=mask.flip(1))


def test_two_read_one_text() -> None:
    """What both add, in the same segments; one that is off adds nothing; another window is refused."""
    made = beside("llama")
    one = logits(made, ids())
    weft.apply(made, "generative", rank=3, window=WINDOW, name="two")
    torch.testing.assert_close(logits(made, ids()), one)
    two = branches(made)[1].double()
    two.get_parameter("up").data.fill_(0.1)
    assert not torch.allclose(logits(made, ids()), one, atol=1e-3)
    weft.activate(made, "default")
    torch.testing.assert_close(logits(made, ids()), one)
    unbranch(made, "two")
    weft.apply(made, "generative", window=WINDOW + 1, name="three")
    with pytest.raises(ConflictError, match=r"windows of \[4, 5\]"):
        logits(made, ids())


def test_it_generates_without_a_cache() -> None:
    """The likeliest token each time of what stands there, over the end of a segment."""
    made, x = beside("llama"), ids(1, 6)
    torch.testing.assert_close(logits(made, x, position_ids=torch.arange(6)[None]), logits(made, x))
    written: Any = made
    got = written.generate(x, max_new_tokens=7, do_sample=False, use_cache=False, eos_token_id=None, pad_token_id=1)
    for _ in range(7):
        x = torch.cat([x, logits(made, x)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, x)


def test_what_is_no_text_of_segments_is_refused() -> None:
    """Caches, positions, other masks, states, recomputed blocks; encoders whose parts add the stream; another model's."""
    made, x = beside("llama"), ids()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"past_key_values": DynamicCache()}, "without a cache"),
        ({"position_ids": torch.arange(11)[None] % 6}, "positions of their own"),
        ({"attention_mask": torch.ones(2, 1, 11, 11)}, "this mask"),
        ({"output_hidden_states": True}, "the last state alone"),
    ]
    for given, said in refused:
        with pytest.raises(ConflictError, match=said):
            logits(made, x, **given)
    made.gradient_checkpointing_enable()
    with pytest.raises(ConflictError, match="not computed again"):
        logits(made.train(), x)
    with pytest.raises(ConflictError, match="takes no generated adapters"):
        weft.apply(fork(plain("bert")), "generative")
    with pytest.raises(OptionError, match="window"):
        weft.apply(fork(plain("llama")), "generative", window=0)
    (b,) = branches(beside("llama"))
    with pytest.raises(ShapeError, match="do not fit"):
        weft.model.add_branch(fork(plain("gpt2")), type(b)(at="transformer", **{n: getattr(b, n) for n in FIELDS}))


FIELDS = ("keys", "values", "down", "up", "scale", "window", "parts")


def test_orthogonal_is_near_the_orthogonal_part() -> None:
    """Of tall, wide and stacked matrices; zero, and its gradient, stay finite."""
    for size in ((5, 5), (7, 3), (3, 7), (2, 6, 4)):
        x = torch.randn(size, generator=seeded(2), dtype=torch.float64)
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        assert float((u.mT @ orthogonal(x) @ v.mT - torch.eye(min(size[-2:]))).abs().max()) < 0.35
    zero = torch.zeros(4, 4, requires_grad=True)
    orthogonal(zero, 1e-12).sum().backward()
    assert zero.grad is not None and bool(zero.grad.isfinite().all()) and not orthogonal(zero).any()
