"""The likelihood by parts is the likelihood of all logits: value, gradients and what is refused it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from model.zoo import CAUSAL, HEADS, MODELS, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import weft
from weft.engine.run import Step, apply
from weft.expr import Hadamard
from weft.learn import likelihood as parts
from weft.learn.data import IGNORE
from weft.learn.likelihood import head_of, likelihood_of
from weft.learn.objective import likelihood
from weft.model import per_row, set_taps, weave
from weft.model.rounding import Rounding
from weft.model.taps import Tap
from weft.stats.walker import forward


def batch(count: int = 3, length: int = 11) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens, and labels of which a third are none."""
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50, (count, length), generator=rng)
    return {"input_ids": ids}, ids.masked_fill(torch.rand(ids.shape, generator=rng) < 0.33, IGNORE)


def full(model: nn.Module) -> nn.Module:
    """All trains but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    model.requires_grad_()
    head.requires_grad_(False)
    return model


def adapted(*chain: Step) -> Callable[[nn.Module], nn.Module]:
    """Makes a woven model: these steps on every weight, then LoRA on the blocks'."""

    def made(model: nn.Module) -> nn.Module:
        woven = weave(model)
        apply(woven, chain, at="*")
        apply(woven, [Step.of("lora", rank=2)], at="all-linear")
        return woven

    return made


def prompted(model: nn.Module) -> nn.Module:
    """Three tokens stand before every row."""
    woven = weave(model)
    weft.apply(woven, "prompt", length=3)
    return woven


def turned(model: nn.Module) -> nn.Module:
    """A head whose inputs are turned and rounded."""
    woven = adapted()(model)
    set_taps(woven, {"lm_head.weight": Tap((Hadamard.of(torch.ones(32)),), Rounding("int8"))})
    return woven


WAYS = {
    "full": ("llama", full),
    "tied": ("llama-tied", full),
    "adapters": ("llama", adapted()),
    "a rounded head": ("llama", adapted(Step.of("nf4"))),
    "a head of many parts": (
        "llama",
        adapted(Step.of("magnitude"), Step.of("rtn", bits=3), Step.of("svd_residual", rank=2)),
    ),
    "a head with a tap": ("llama", turned),
    "tokens that stand before": ("llama", prompted),
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven words at a time."""
    monkeypatch.setattr(parts, "_WORDS", 7)


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


class Largest(TorchDispatchMode):
    """Notes the most bytes that an operation made, beside the model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own, self.most = {p.untyped_storage().data_ptr() for p in model.parameters()}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.own:
                self.most = max(self.most, t.untyped_storage().nbytes())
        return out


def test_no_more_logits_than_asked_for(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    """Those of one token, and of so many words for each target."""
    monkeypatch.setattr(parts, "_WORDS", 256)
    model, (inputs, labels) = adapted()(tiny("llama", vocab_size=8192)), batch()
    targets, loss = int((labels[:, 1:] != IGNORE).sum()), likelihood_of(model)
    with Largest(model) as whole:
        likelihood(forward(model, inputs), labels, None).backward()
    with Largest(model) as seen:
        loss(model, inputs, labels, None, 0.0).backward()
    assert whole.most >= 4 * 33 * 8192 and seen.most <= 4 * max(8192, 256 * targets)


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
    free = [p for p in model.parameters() if p.requires_grad]
    want, got = (torch.autograd.grad(x, free) for x in (whole, part))
    assert float(part.detach()) == pytest.approx(float(whole.detach()), rel=1e-4)
    assert all(float((a - b).norm()) <= 2e-2 * float(b.norm()) + 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("sure", [0, 12, 20])
def test_sure_targets_in_bfloat16(sure: float, few: None) -> None:
    """The sum and its gradient are as near to those of float64 as with all logits, however likely the targets are."""
    torch.manual_seed(0)
    head, targets = nn.Linear(256, 1024, bias=False).requires_grad_(False), torch.arange(64)
    nn.init.normal_(head.weight, std=0.08)
    chosen = head.weight[targets]
    hidden = sure * chosen / chosen.square().sum(1, keepdim=True) + torch.randn(64, 256) / 2
    exact, whole, part = (hidden.to(d, copy=True).requires_grad_() for d in (torch.float64, *[torch.float32] * 2))
    want = F.cross_entropy(F.linear(exact, head.weight.double()), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(head(whole).float(), targets, reduction="sum")
        found = parts._Summed.apply(part, head, targets, 0.0, True)
    for loss in (want, plain, found):
        loss.backward()
    found, plain = found.detach(), plain.detach()
    assert float(found) == pytest.approx(float(plain), rel=1e-2, abs=1e-4) and float(found) >= 0
    off, plainly = (float((x.grad - exact.grad).norm()) for x in (part, whole))
    assert off <= 1.1 * plainly


def test_words_that_cannot_be(few: None, tiny: Any) -> None:
    """A bias of minus infinity for the first words, and rows that the head does not count."""
    model, (inputs, labels) = full(tiny("llama")), batch()
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(104).index_fill_(0, torch.arange(20), -torch.inf), requires_grad=False)
    head.weight = nn.Parameter(torch.cat([head.weight, head.weight[:8]]), requires_grad=False)
    labels = labels.masked_fill((labels >= 0) & (labels < 20), 30)
    whole = likelihood(forward(model, inputs), labels, None)
    part = likelihood_of(model)(model, inputs, labels, None, 0.0)
    assert float(part.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
    head.bias = None
    whole = likelihood(forward(model, inputs), labels, None, 0.1)
    part = likelihood_of(model)(model, inputs, labels, None, 0.1)
    assert float(part.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)


def test_numbers_that_are_none_are_seen(few: None, tiny: Any) -> None:
    """NaN and infinite logits, of the target or of another word."""
    for value in (torch.nan, torch.inf):
        for word in (5, 90):
            model, (inputs, _) = full(tiny("llama")), batch()
            model.get_output_embeddings().weight.data[word] = value
            found = likelihood_of(model)(model, inputs, torch.full_like(inputs["input_ids"], 5), None, 0.0)
            assert not torch.isfinite(found)


class Beside(nn.Module):
    """A model whose logits are added to in place, by an adapter that is zero yet."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.adapter = model, model.config, nn.Linear(32, 96, bias=False)
        nn.init.zeros_(self.adapter.weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, **given: Any) -> Any:
        out = self.model(**given, output_hidden_states=True)
        out.logits += self.adapter(out.hidden_states[-1])
        return out


def test_whole_where_more_than_the_weight_makes_logits(tiny: Any) -> None:
    """A forward of its own, adapters in hooks or behind the head that add nothing yet, and heads that are compiled."""
    model = tiny("llama").requires_grad_(False)
    assert head_of(model) is model.lm_head and head_of(Beside(model)) is None
    model.lm_head.forward = lambda x: 2 * F.linear(x, model.lm_head.weight)
    assert head_of(model) is None
    del model.lm_head.forward
    hook = model.lm_head.register_forward_hook(lambda _, given, out: out + Beside(model).adapter(given[0]))
    assert head_of(model) is None
    hook.remove()
    assert head_of(torch.compile(model, backend="eager")) is None
    own = model.forward
    model.forward = torch.compile(own, backend="eager")
    assert head_of(model) is None
    model.forward = own
    model.compile(backend="eager")
    inputs, labels = batch()
    found = likelihood_of(model)(model, inputs, labels, None, 0.0)
    assert float(found) == pytest.approx(float(likelihood(forward(model, inputs), labels, None)), rel=1e-6)


def test_whole_where_parts_would_be_something_else(tiny: Any) -> None:
    """Rows that are told apart, hooks, and heads that train."""
    woven = weave(tiny("llama"))
    apply(woven, [Step.of("lora", rank=2, name="a")], at="lm_head")
    woven.requires_grad_(False)
    assert head_of(woven) is not None
    with per_row(woven, ["a", None]):
        assert head_of(woven) is None
    plain = tiny("llama")
    assert head_of(plain.requires_grad_()) is None
    head = plain.requires_grad_(False).get_output_embeddings()
    assert head_of(plain) is head
    head.register_forward_hook(lambda *given: given[-1] * 2)
    assert head_of(plain) is None


HEADLESS = {"t5", "bart", "whisper", "vit", "clip", "resnet", "flow", "cross", "unet", "unet-text", "dit"}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name: str, few: None) -> None:
    """Its head is known where it is the last thing on the way to the logits of tokens."""
    model = build(name).requires_grad_(False)
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
