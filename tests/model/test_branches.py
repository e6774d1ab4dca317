"""Branches: virtual tokens are what real ones in their place would be, however the model is called; or they are refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as t
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

import weft
from weft.engine import Trunk, branches
from weft.engine.run import Step
from weft.error import ConflictError, NumericError, OptionError, ShapeError, WeftError
from weft.learn.data import Pair, Text
from weft.learn.train import train
from weft.model import BRANCHES, Branch, Prompt, add_branch, fingerprint, fork, places, trunk, unbranch, weave
from weft.model import branches as on
from weft.stats.objective import pool

from . import zoo

DECODERS = ("llama", "gpt2", "qwen3", "gemma3", "mixtral", "deepseek")
READERS = (*DECODERS, "bamba", "bert")
WINDOWED = ("gemma3", "bamba")
"""Their layers see a window, or keep a state."""
K = 3
"""Virtual tokens; the sliding window of gemma3 here is 4."""


@cache
def plain(name: str) -> nn.Module:
    """A woven model in float64; never changed."""
    return weave(zoo.build(name).double())


def added(name: str, *methods: str, length: int = K) -> nn.Module:
    """A fork with branches, each named as its method; the later ones around the earlier."""
    made = fork(plain(name))
    for method in methods:
        branches.run(made, Step.of(method, length=length, name=method))
    return made


def host(model: nn.Module) -> Any:
    """Its transformer."""
    return model.get_submodule(trunk(model))


def ids(rows: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """Tokens."""
    return torch.randint(3, zoo.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def embedded(model: nn.Module, x: Tensor) -> Tensor:
    """The prompt's vectors, then the embedded tokens."""
    (branch,) = on(model)
    return torch.cat([branch.vectors.expand(len(x), -1, -1), host(model).get_input_embeddings()(x)], 1)


def started(method: str, x: Tensor) -> Tensor:
    """The tokens that a branch begins with, before these."""
    return torch.cat([Trunk(plain("llama")).sampled(K, f"{method} {method}").expand(len(x), -1), x], 1)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor | None = None, **given: Any) -> Tensor:
    """What the model gives."""
    return model(x, **given).logits


@torch.no_grad()
def states(model: nn.Module, x: Tensor | None = None, **given: Any) -> Tensor:
    """What its transformer gives."""
    return host(model)(x, **given).last_hidden_state


def ones(x: Tensor) -> Tensor:
    """A mask for virtual tokens."""
    return x.new_ones(len(x), K)


# -------------------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("name", READERS)
def test_a_prompt_is_its_vectors_before_the_input(name: str) -> None:
    """Bit for bit what the plain model gives for them, of every kind of model, with and without padding on the right."""
    model, x = added(name, "prompt"), ids()
    wide = embedded(model, x)
    assert torch.equal(states(model, x), states(plain(name), inputs_embeds=wide)[:, K:])
    assert torch.equal(states(model, inputs_embeds=wide[:, K:]), states(model, x))
    torch.testing.assert_close(logits(model, x), logits(plain(name), inputs_embeds=wide)[:, K:], rtol=1e-9, atol=1e-9)
    mask = torch.ones_like(x)
    mask[1, 4:] = 0
    want = states(plain(name), inputs_embeds=wide, attention_mask=torch.cat([ones(mask), mask], 1))[:, K:]
    got = states(model, x, attention_mask=mask)
    assert torch.equal(got, want)
    torch.testing.assert_close(got[1, :4], states(model, x[1:, :4])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_it_begins_as_real_text(method: str, name: str) -> None:
    """As yet untrained, the model gives what it gives for the text behind the tokens that were drawn; of a prefix by its keys."""
    x = ids()
    got = logits(added(name, method), x)
    torch.testing.assert_close(got, logits(plain(name), started(method, x))[:, K:], rtol=1e-5, atol=1e-6)
    assert float((got - logits(plain(name), x)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "method"), [*((n, m) for n in DECODERS for m in ("prompt", "prefix")), ("bamba", "prompt")]
)
def test_padding_on_the_left_changes_nothing(method: str, name: str) -> None:
    """With positions that count the text, a padded text gives what it gives alone; where padding takes room, it is refused."""
    model, x = added(name, method), ids()
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if name in WINDOWED:
        with pytest.raises(ConflictError, match="window of tokens"):
            logits(model, x, attention_mask=mask, position_ids=positions)
        return
    got = logits(model, x, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(got[1, 3:], logits(model, x[1:, 3:])[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[0], logits(model, x[:1])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*DECODERS, "bamba"])
@pytest.mark.parametrize("methods", [("prompt",), ("prefix",), ("prompt", "prefix"), ("prefix", "prompt")])
def test_generation_goes_on_from_its_cache(methods: tuple[str, ...], name: str) -> None:
    """Greedily, with a cache, without one and by beams of one: the tokens that whole forward passes choose; padded ones too."""
    if name == "bamba" and "prefix" in methods:
        return  # refused, see below
    model, seq = added(name, *methods), ids()
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for _ in range(5):
        seq = torch.cat([seq, logits(model, seq)[:, -1:].argmax(-1)], 1)
    x = ids()
    assert torch.equal(model.generate(x, **how), seq) and torch.equal(model.generate(x, use_cache=False, **how), seq)
    assert model.generate(x, **{**how, "num_beams": 2}).shape == seq.shape
    if name not in WINDOWED:
        left = torch.cat([torch.zeros(2, 2, dtype=torch.long), x], 1)
        made = model.generate(left, attention_mask=(torch.arange(9) > 1).long().expand(2, -1), **how)
        assert torch.equal(made[:, 2:], seq)


@pytest.mark.parametrize("order", [("prompt", "prefix"), ("prefix", "prompt")])
def test_two_kinds_together_are_text_behind_text(order: tuple[str, str]) -> None:
    """Prefix, prompt, text: in either order, with a cache in parts, with positions or without."""
    model, x = added("llama", *order), ids()
    whole = logits(model, x)
    torch.testing.assert_close(logits(model, x, position_ids=torch.arange(7)[None]), whole, rtol=1e-9, atol=1e-9)
    mask, cache = torch.ones_like(x), DynamicCache(config=model.config)
    parts = [
        logits(model, x[:, a:b], attention_mask=mask[:, :b], past_key_values=cache) for a, b in ((0, 4), (4, 5), (5, 7))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 2 * K + 7
    only = added("llama", "prompt")
    real = torch.cat([Trunk(plain("llama")).sampled(K, "prefix prefix").expand(2, -1), x], 1)
    table = host(only).get_input_embeddings()
    wide = torch.cat([table(real[:, :K]), on(only)[0].vectors.expand(2, -1, -1), table(x)], 1)
    near = {"rtol": 5e-3, "atol": 5e-3}  # the prompt's keys stand behind the prefix: the same text, in this order
    torch.testing.assert_close(whole, logits(plain("llama"), inputs_embeds=wide)[:, 2 * K :], **near)


def test_what_comes_out_has_the_inputs_length() -> None:
    """Hidden states, attentions (of the text, to all) and the loss are those of the text; a tuple is refused."""
    model, x = added("llama", "prompt"), ids()
    host(model).set_attn_implementation("eager")
    with torch.no_grad():
        out = model(x, labels=x, output_hidden_states=True, output_attentions=True)
    assert {h.shape for h in out.hidden_states} == {(2, 7, 32)} and {a.shape for a in out.attentions} == {
        (2, 4, 7, 7 + K)
    }
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones_like(out.attentions[0][..., 0]))
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-5, atol=1e-6)
    assert model(x, return_dict=False)[0].shape == (2, 7, zoo.VOCAB)
    with pytest.raises(ConflictError, match="no names"):
        host(model)(x, return_dict=False)


def test_encoders_pool_the_text_alone(tiny: Any) -> None:
    """The mean is over the text's positions; a pooled output is that of the text's first token; types may be given."""
    model, x = weave(tiny("bert").double()), ids()
    weft.apply(model, "prompt", length=K)
    wide = embedded(model, x)
    mask = torch.ones_like(x)
    mask[1, 5:] = 0
    with torch.no_grad():
        out = model(x, attention_mask=mask, token_type_ids=torch.zeros_like(x))
        unbranch(bare := fork(model))
        want = bare(inputs_embeds=wide, attention_mask=torch.cat([ones(mask), mask], 1)).last_hidden_state[:, K:]
    assert torch.equal(out.last_hidden_state, want) and torch.equal(out.pooler_output, bare.pooler(want))
    assert torch.equal(pool(out.last_hidden_state, mask.bool())[1], want[1, :5].mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_it_computes_in_the_models_dtype(method: str, dtype: torch.dtype) -> None:
    """Kept in float32, used in the model's, with and without a cache."""
    model = weave(zoo.build("llama").to(dtype))
    weft.apply(model, method, length=K)
    assert logits(model, ids()).dtype == dtype and {p.dtype for p in on(model)[0].parameters()} == {torch.float32}
    assert model.generate(ids(), max_new_tokens=3, pad_token_id=0, eos_token_id=None).shape == (2, 10)


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"attention_mask": torch.ones(2, 1, 7, 7, dtype=torch.bool)}, "do not go with these"),
        ({"attention_mask": torch.ones(2, 9, dtype=torch.long)}, "does not fit the text"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}, "packed"),
        ({"position_ids": torch.arange(7).expand(3, 2, 7)}, "do not go with these"),
        ({"past_key_values": t.StaticCache(zoo.build("llama").config, max_cache_len=20)}, "into this cache"),
        ({"pixel_values": torch.ones(2, 3)}, "do not go with these"),
        ({"token_type_ids": torch.zeros(2, 7, dtype=torch.long)}, "no type"),
    ],
)
def test_calls_that_cannot_be_right_are_refused(method: str, given: dict[str, Any], reason: str) -> None:
    """With the reason, before anything is computed."""
    model = added("llama", method)
    with pytest.raises(ConflictError, match=reason):
        host(model)(ids(), **given)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_caches_of_other_text_are_refused(method: str) -> None:
    """One that was filled without the branch, and one whose mask is not that of its text."""
    model, x = added("llama", method), ids()
    cache = DynamicCache(config=model.config)
    logits(plain("llama"), x, past_key_values=cache)
    with pytest.raises(ConflictError, match="without this branch"):
        logits(model, x, past_key_values=cache)
    mine = DynamicCache(config=model.config)
    logits(model, x, past_key_values=mine)
    for given in ({"attention_mask": torch.ones(2, 8 + K)}, {"position_ids": torch.tensor([[7 + K]])}):
        with pytest.raises(ConflictError):
            logits(model, x[:, :1], past_key_values=mine, **given)
    assert mine.get_seq_length() == 7 + K  # as it was
    torch.testing.assert_close(
        logits(model, x[:, :1], past_key_values=mine), logits(model, torch.cat([x, x[:, :1]], 1))[:, -1:]
    )
    with pytest.raises(ConflictError):  # transformers counts the virtual tokens as text that it has seen
        model.generate(torch.cat([x, x], 1), past_key_values=mine, max_new_tokens=2, pad_token_id=0)
    mine.crop(-9)
    with pytest.raises(ConflictError, match="or cut"):
        logits(model, x, past_key_values=mine)


@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [
        ("t5", "prompt", "an encoder and a decoder"), ("t5", "prefix", "an encoder and a decoder"), ("whisper", "prompt", "an encoder and"),
        ("bert", "prefix", "no decoder"), ("bamba", "prefix", "LinearAttention"), ("mamba2", "prompt", "no cache of keys"),
        ("vit", "prompt", "input_ids"), ("resnet", "prefix", "input_ids"), ("clip", "prompt", "inputs_embeds"),
    ],
)  # fmt: skip
def test_models_without_a_place_are_refused(name: str, method: str, reason: str) -> None:
    """With the reason, and nothing is changed."""
    model = weave(zoo.build(name))
    mark = fingerprint(model)
    with pytest.raises(ConflictError) as e:
        weft.apply(model, method)
    assert reason in str(e.value.got) and fingerprint(model) == mark and not on(model)


def test_lengths_that_do_not_fit_are_refused() -> None:
    """A prompt that leaves no room for text; a prefix that is longer than a layer's window."""
    with pytest.raises(ShapeError, match="does not fit"):
        added("gpt2", "prompt", length=32)
    with pytest.raises(ConflictError, match="no such prefix"):
        added("gemma3", "prefix", length=4)


def test_a_prefix_is_not_trained_under_checkpointing() -> None:
    """A checkpointed layer is given no cache; without, and in evaluation, it runs."""
    model = added("llama", "prefix")
    want = logits(model, ids())
    model.gradient_checkpointing_enable()
    assert torch.equal(logits(model, ids()), want)
    with pytest.raises(ConflictError, match="cannot be trained"):
        model.train()(ids())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_prompt_is_trained_under_checkpointing(name: str) -> None:
    """The same gradients as without."""
    grads: list[Tensor] = []
    for checkpointing in (False, True):
        model = added(name, "prompt").train()
        for m in model.modules():
            m.__dict__["p"] = 0.0 if isinstance(m, nn.Dropout) else m.__dict__.get("p")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids(), use_cache=False).logits.square().mean().backward() if name != "bert" else model(
            ids()
        ).logits.square().mean().backward()
        grads.append(on(model)[0].vectors.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-9)
    assert bool(grads[0].any())


# ------------------------------------------------------------------------------------------------------------ the machinery


class Gate(Branch):
    """Adds a matrix of what a linear layer reads to what it gives."""

    w: Float[Tensor, "m n"]
    scale: float

    def check(self, model: nn.Module) -> None:
        if tuple(self.w.shape) != tuple(model.get_submodule(self.at).weight.shape):
            raise ShapeError(
                "a gate does not fit", where=self.key, got=list(self.w.shape), want="m n", fix="make it fit"
            )

    def forward(self, host: nn.Module, call: Any, given: dict[str, Any]) -> Tensor:
        return call(given) + self.scale * given["input"] @ self.w.to(given["input"].dtype).T


def gate(at: str, shape: tuple[int, int], name: str = "default") -> Gate:
    """A random one."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(len(at)), dtype=torch.float64).float()
    return Gate(at=at, name=name, w=w, scale=0.5)


def test_a_branch_stands_anywhere(tmp_path: Any) -> None:
    """Beside two layers deep in a model: the output is that of the sum of weights; saved with its plain values, taken off by name."""
    model = weave(zoo.build("llama"))
    deep = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    for at in deep:
        add_branch(model, gate(at, (48, 32)))
    add_branch(model, gate(deep[0], (48, 32), "two"))
    oracle = zoo.build("llama")
    with torch.no_grad():
        for b in on(model):
            oracle.get_submodule(b.at).weight += b.scale * b.w
    torch.testing.assert_close(logits(model, ids()), logits(oracle, ids()), rtol=1e-5, atol=1e-6)
    weft.save(model, tmp_path / "out")
    back = weft.load(tmp_path / "out")
    assert torch.equal(logits(back, ids()), logits(model, ids())) and fingerprint(back) == fingerprint(model)
    assert unbranch(back, "two") == [f"{deep[0]}:two"] and [b.at for b in on(back)] == deep
    assert unbranch(back, "default") == [f"{at}:default" for at in deep]
    assert torch.equal(logits(back, ids()), logits(weave(zoo.build("llama")), ids()))
    del BRANCHES["Gate"]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Prompt(at="model", name="a.b", vectors=torch.ones(2, 32)), OptionError),
        (lambda: Prompt(at="model", name="", vectors=torch.ones(2, 32)), OptionError),
        (lambda: Prompt(at=3, vectors=torch.ones(2, 32)), OptionError),
        (lambda: Prompt(at="model", vectors=torch.ones(2, 32), more=1), OptionError),
        (lambda: Prompt(at="model"), OptionError),
        (lambda: Prompt(at="model", vectors=torch.ones(32)), ShapeError),
        (lambda: Prompt(at="model", vectors=torch.ones(2, 32, dtype=torch.long)), ShapeError),
        (lambda: Prompt(at="model", vectors=torch.ones(2, 31)), ShapeError),
        (lambda: Prompt(at="model", vectors=torch.ones(0, 32)), ShapeError),
        (lambda: Prompt(at="model", vectors=torch.full((2, 32), float("nan"))), NumericError),
        (lambda: Prompt(at="nowhere", vectors=torch.ones(2, 32)), OptionError),
        (lambda: Prompt(at="", vectors=torch.ones(2, 32)), ConflictError),
        (lambda: Prompt(at="model.layers.0", vectors=torch.ones(2, 32)), ConflictError),
    ],
)
def test_what_is_no_branch_is_refused(make: Any, error: type[WeftError]) -> None:
    """By its constructor, or where it is put; the model is as it was."""
    model = fork(plain("llama"))
    with pytest.raises(error):
        add_branch(model, make())
    assert not on(model) and fingerprint(model) == fingerprint(plain("llama"))


def test_a_wrapped_host_is_refused() -> None:
    """Another tool's forward would be lost."""
    model = fork(plain("llama"))
    model.model.forward = model.model.forward
    with pytest.raises(ConflictError, match="wrapped"):
        weft.apply(model, "prompt")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt", {"length": 4}),
        ("prefix", {"length": 4}),
        ("bottleneck", {}),
        ("qst", {"width": 16}),
        ("lofit", {"share": 1.0}),
        ("invertible", {}),
    ],
)
def test_training_lowers_the_loss(method: str, options: dict[str, Any], words: Any, tiny: Any) -> None:
    """Through weft.train, with every weight as it was."""
    model = weave(tiny())
    base = fingerprint(model)
    weft.apply(model, method, **options)
    data = [Text(f"the {a} sat on the {b} mat .") for a in ("cat", "dog", "bird") for b in ("old", "red", "blue")]
    losses = [x for _, x in train(model, data, tokenizer=words, steps=20, batch=3, length=32, lr=5e-2).losses]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    unbranch(model)
    assert fingerprint(model) == base


def test_an_encoders_prompt_is_trained_by_contrast(words: Any, tiny: Any) -> None:
    """Pairs, mean-pooled over their text."""
    model = weave(tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    weft.apply(model, "prompt", length=4)
    data = [Pair(f"question {a} {c} ?", f"the {c} {a} sat .") for a in ("cat", "dog", "bird") for c in ("old", "red")]
    losses = [x for _, x in train(model, data, tokenizer=words, steps=20, batch=6, length=32, lr=5e-2).losses]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_it_is_listed_and_counted() -> None:
    """`show` has a row for it, `mode` its bytes; places are still the weights alone."""
    model = weave(zoo.build("llama"))
    before = weft.mode(model).stored
    weft.apply(model, "prompt", length=K)
    row = weft.show(model)[-1]
    assert (row.name, row.expression, row.bytes, row.bits) == ("model:default", "Prompt(3)", 4 * K * 32, 32)
    assert weft.mode(model).stored == before + row.bytes and len(weft.show(model)) == len(places(model)) + 1
