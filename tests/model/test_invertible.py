"""The invertible adapter: its formula, its inverse, nothing at the start, and the same however the model is run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import weft
from weft.error import ConflictError, ShapeError
from weft.model import Invertible, add_branch, branches, fork, trunk, weave

from . import zoo

READERS = ("llama", "gpt2", "gemma3", "bert", "eurobert", "mixtral", "bamba")


@cache
def plain(name: str) -> nn.Module:
    """A woven model in float64; never changed."""
    return weave(zoo.build(name).double())


def adapted(name: str) -> nn.Module:
    """A fork with an adapter that has been moved from its start."""
    made = fork(plain(name))
    weft.apply(made, "invertible", width=3)
    up = branches(made)[0].up
    up.data = torch.randn(up.shape, generator=torch.Generator().manual_seed(2)).double()
    return made


def ids(rows: int = 2, length: int = 7) -> Tensor:
    """Tokens."""
    return torch.randint(3, zoo.VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, x: Tensor | None = None, **given: Any) -> Tensor:
    """What the model gives."""
    return model(x, **given).logits


@pytest.mark.parametrize("name", READERS)
def test_it_is_the_formula(name: str) -> None:
    """The plain transformer on y1 = e1 + F(e2), y2 = e2 + G(y1); its states go back through the inverse, solved for by hand."""
    made, x = adapted(name), ids()
    (b,) = branches(made)
    d, u = b.down.detach().double(), b.up.detach().double()
    host, was = made.get_submodule(trunk(made)), plain(name).get_submodule(trunk(made))
    moved = lambda v, i: torch.relu(v @ d[i].T) @ u[i].T  # noqa: E731
    with torch.no_grad():
        e = was.get_input_embeddings()(x)
        half = e.shape[-1] // 2
        y = e.clone()
        y[..., :half] += moved(e[..., half:], 0)
        y[..., half:] += moved(y[..., :half], 1)
        h = was(inputs_embeds=y).last_hidden_state.clone()
        h[..., half:] -= moved(h[..., :half], 1)
        h[..., :half] -= moved(h[..., half:], 0)
        got = host(x, output_hidden_states=True)
    torch.testing.assert_close(got.last_hidden_state, h, rtol=1e-7, atol=1e-7)
    assert torch.equal(got.hidden_states[-1], got.last_hidden_state)
    assert float((logits(made, x) - logits(plain(name), x)).abs().max()) > 1e-2
    torch.testing.assert_close(logits(made, inputs_embeds=e), logits(made, x))


@torch.no_grad()
def test_the_inverse_is_one() -> None:
    """Both ways, of anything, without rows too."""
    (b,) = branches(adapted("llama"))
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(b.returned(b.through(x)), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b.through(b.returned(x)), x, rtol=1e-9, atol=1e-9)
    assert float((b.through(x) - x).abs().mean()) > 0.1 and b.through(x[:0]).shape == (0, 5, 32)


@pytest.mark.parametrize("name", READERS)
def test_it_begins_as_nothing(name: str) -> None:
    """Every bit of the output is as it was."""
    made = fork(plain(name))
    weft.apply(made, "invertible")
    assert torch.equal(logits(made, ids()), logits(plain(name), ids()))


def test_a_model_without_a_head_has_no_inverse(tiny: Any) -> None:
    """Its output is that of the adapted embeddings; a pooled one too."""
    model = weave(tiny("bert").double())
    weft.apply(model, "invertible", width=3)
    (b,) = branches(model)
    b.up.data += 1
    assert not b.back
    with torch.no_grad():
        e = b.through(model.get_input_embeddings()(ids()))
        got = model(ids())
        weft.unbranch(model)
        want = model(inputs_embeds=e)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state) and torch.equal(
        got.pooler_output, want.pooler_output
    )


@pytest.mark.parametrize("more", [(), ("prompt",), ("prefix",), ("qst",)])
def test_generation_goes_on_from_its_cache(more: tuple[str, ...]) -> None:
    """The same tokens with a cache and without, beside other branches; in parts, with a mask."""
    made, x = adapted("llama"), ids()
    for other in more:
        weft.apply(made, other, name=other)
    for b in branches(made):
        if b.name == "qst":
            b.keep.data.fill_(0.5)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(made.generate(x, **how), made.generate(x, use_cache=False, **how))
    kept, mask = DynamicCache(config=made.config), torch.ones_like(x)
    parts = [logits(made, x[:, a:b], attention_mask=mask[:, :b], past_key_values=kept) for a, b in ((0, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(parts, 1), logits(made, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "whisper", "vit", "resnet", "mamba2", "clip"])
def test_models_without_a_place_are_refused(name: str) -> None:
    """By what they are."""
    with pytest.raises(ConflictError, match="takes no invertible adapter"):
        weft.apply(weave(zoo.build(name)), "invertible")


def test_what_does_not_fit_is_refused() -> None:
    """Halves of another width, and an output without names."""
    model = fork(plain("llama"))
    for down, up in ((torch.ones(2, 3, 15), torch.ones(2, 15, 3)), (torch.ones(1, 3, 16), torch.ones(1, 16, 3))):
        with pytest.raises(ShapeError, match="does not fit"):
            add_branch(model, Invertible(at="model", down=down, up=up, back=True))
    with pytest.raises(ConflictError, match="no names"):
        adapted("llama").model(ids(), return_dict=False)
