"""The likelihood by parts is the likelihood of all logits: value, gradients and what is refused it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from model.zoo import CAUSAL, HEADS, MODELS, build
from torch import Tensor, nn

import weft
from weft.engine.run import Step, apply
from weft.learn import likelihood as parts
from weft.learn.data import IGNORE
from weft.learn.likelihood import head_of, likelihood_of
from weft.learn.objective import likelihood
from weft.model import per_row, weave
from weft.stats.walker import forward


def batch(count: int = 3, length: int = 11) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens, and labels of which a third are none."""
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50, (count, length), generator=rng)
    return {"input_ids": ids}, ids.masked_fill(torch.rand(ids.shape, generator=rng) < 0.33, IGNORE)


def full(model: nn.Module) -> nn.Module:
    return model.requires_grad_()


def adapted(*chain: Step, at: str = "all-linear") -> Callable[[nn.Module], nn.Module]:
    """Makes a woven model with these steps."""

    def made(model: nn.Module) -> nn.Module:
        woven = weave(model)
        apply(woven, chain, at=at)
        return woven

    return made


def prompted(model: nn.Module) -> nn.Module:
    """Three tokens stand before every row."""
    woven = weave(model)
    weft.apply(woven, "prompt", length=3)
    return woven


WAYS = {
    "full": ("llama", full),
    "tied": ("llama-tied", full),
    "adapters": ("llama", adapted(Step.of("lora", rank=2))),
    "a rounded head with an adapter": ("llama", adapted(Step.of("nf4"), Step.of("lora", rank=2, init="pissa"), at="*")),
    "tokens that stand before": ("llama", prompted),
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four targets at a time."""
    monkeypatch.setattr(parts, "_LOGITS", 0)
    monkeypatch.setattr(parts, "_ROWS", 4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("count", "smoothing"), [(None, 0.0), (40, 0.1)])
def test_it_is_the_likelihood_of_all_logits(
    way: str, count: int | None, smoothing: float, few: None, tiny: Any
) -> None:
    """To rounding, with the gradients of every tensor that trains."""
    family, made = WAYS[way]
    model = made(tiny(family))
    inputs, labels = batch()
    assert head_of(model) is not None
    free = {n: p for n, p in model.named_parameters() if p.requires_grad}
    whole = likelihood(forward(model, inputs), labels, count, smoothing)
    want = torch.autograd.grad(whole, tuple(free.values()), materialize_grads=True)
    part = likelihood_of(model)(model, inputs, labels, count, smoothing)
    got = torch.autograd.grad(part, tuple(free.values()), materialize_grads=True)
    assert float(part.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
    for name, a, b in zip(free, got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7), name


def test_no_more_logits_than_asked_for(few: None, tiny: Any) -> None:
    """The head sees one token a row, and then targets alone, four at a time."""
    model, (inputs, labels) = full(tiny("llama")), batch()
    head, seen = model.get_output_embeddings(), list[int]()  # type: ignore[operator]
    loss, forward_ = likelihood_of(model), head.forward
    head.forward = lambda x: (seen.append(x[..., 0].numel()), forward_(x))[1]
    loss(model, inputs, labels, None, 0.0)
    targets = int((labels[:, 1:] != IGNORE).sum())
    assert max(seen) <= 4 and sum(seen) == targets + 3


def test_without_gradients_and_without_targets(few: None, tiny: Any) -> None:
    """Scores are the same; of no target it is 0, and so are gradients."""
    model, (inputs, labels) = full(tiny("llama")), batch()
    with torch.no_grad():
        found = likelihood_of(model)(model, inputs, labels, None, 0.0)
        assert float(found) == pytest.approx(float(likelihood(forward(model, inputs), labels, None)), rel=1e-6)
    nothing = likelihood_of(model)(model, inputs, torch.full_like(labels, IGNORE), None, 0.0)
    nothing.backward()
    assert float(nothing.detach()) == 0 and not any(
        bool(p.grad.any()) for p in model.parameters() if p.grad is not None
    )


def test_autocast(few: None, tiny: Any) -> None:
    """In bfloat16 the head multiplies as the model would."""
    model, (inputs, labels) = full(tiny("llama")), batch()
    with torch.autocast("cpu", torch.bfloat16):
        whole = likelihood(forward(model, inputs), labels, None)
        part = likelihood_of(model)(model, inputs, labels, None, 0.0)
    want, got = (torch.autograd.grad(x, tuple(model.parameters())) for x in (whole, part))
    assert float(part.detach()) == pytest.approx(float(whole.detach()), rel=1e-4)
    assert all(float((a - b).norm()) <= 2e-2 * float(b.norm()) + 1e-6 for a, b in zip(got, want, strict=True))


def test_whole_where_parts_would_be_something_else(tiny: Any) -> None:
    """Rows that are told apart, and gradients that someone looks at."""
    woven = weave(tiny("llama"))
    apply(woven, [Step.of("lora", rank=2, name="a")], at="lm_head")
    assert head_of(woven) is not None
    with per_row(woven, ["a", None]):
        assert head_of(woven) is None
    with torch.no_grad():
        inputs, labels = batch()
        seen = likelihood_of(woven, watched=True)(woven, inputs, labels, None, 0.0)
    assert float(seen) == float(likelihood(forward(woven, inputs), labels, None))


HEADLESS = {"t5", "whisper", "vit", "clip", "resnet", "flow", "cross", "unet", "unet-text", "dit"}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name: str, few: None) -> None:
    """Its head is known where it is the last thing on the way to the logits of tokens."""
    model = build(name)
    assert (head_of(model) is None) == (name in HEADLESS)
    if name not in HEADLESS:
        inputs, labels = batch()
        model.train()
        torch.manual_seed(0)
        whole = likelihood(forward(model, inputs), labels, None)
        torch.manual_seed(0)
        part = likelihood_of(model)(model, inputs, labels, None, 0.0)
        assert model.training and float(part.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)


@pytest.mark.parametrize("kind", ["Gemma2", "Granite", "Cohere"])
def test_logits_that_go_through_more_are_made_whole(kind: str) -> None:
    """A cap or a factor after the head."""
    given = {**(HEADS if kind == "Gemma2" else CAUSAL), **({"logits_scaling": 2.0} if kind == "Granite" else {})}
    config = getattr(transformers, f"{kind}Config")(**given, pad_token_id=0)
    model, (inputs, labels) = getattr(transformers, f"{kind}ForCausalLM")(config), batch()
    assert head_of(model) is None
    found = likelihood_of(model)(model.eval(), inputs, labels, None, 0.0)
    assert torch.equal(found, likelihood(forward(model, inputs), labels, None))
