"""Blocks taken out leave the plain model that is made of the others, whatever it is then put through; or the reason is told."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import weft
from weft.engine import branches
from weft.engine.run import Step, apply
from weft.error import ConflictError, OptionError, WeftError
from weft.model import cut, expressions, fingerprint, fork, places, site, unweave, weave
from weft.stats import without
from weft.store import load, save

from . import zoo

LAYERS = 5
KEPT = (0, 2, 3)
GONE = (1, 4)
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "bert", "eurobert", "vit", "mixtral", "qwen3-moe", "deepseek", "mamba2")
every = pytest.mark.parametrize("name", FAMILIES)


def deeper(config: Any, kept: Sequence[int] = range(LAYERS)) -> Any:
    """A zoo configuration with five blocks, the types of the two in turn; of these some."""
    made = copy.deepcopy(config)
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(held := vars(made).get(key), list):
            setattr(made, key, [held[i % 2] for i in kept])
    made.num_hidden_layers, made._experts_implementation = len(kept), "eager"  # others know no float64
    return made


def plain(name: str) -> Any:
    """A model of five blocks in float64 whose norms and biases are not the trivial ones, the same every time."""
    small: Any = zoo.build(name)
    made = type(small)(deeper(small.config)).double().eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.parameters():
            size = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            p.copy_((p if p.dim() == 1 else 0) + size * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return made


def woven(name: str) -> Any:
    return weave(plain(name))


def oracle(name: str, kept: Sequence[int] = KEPT) -> Any:
    """A new model of transformers with fewer blocks, given the weights of those of the large one."""
    whole = plain(name)
    made = type(whole)(deeper(zoo.build(name).config, kept)).double().eval()
    (stack,) = {n for n, m in whole.named_modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS}
    names = {f"{stack}.{i}.": f"{stack}.{j}." for j, i in enumerate(kept)}
    held = {k: v for k, v in whole.state_dict().items() if not k.startswith(f"{stack}.")}
    for old, new in names.items():
        held |= {new + k.removeprefix(old): v for k, v in whole.state_dict().items() if k.startswith(old)}
    made.load_state_dict(held)
    return made


def logits(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in zoo.batch(name).items()}
        return zoo.output(model, inputs)


def same(a: Tensor, b: Tensor, by: float = 0.0) -> None:
    """To the last bit, or to so much of the largest value."""
    assert float((a - b).abs().max()) <= by * float(b.abs().max())


@every
def test_it_is_the_plain_model_of_the_other_blocks(name: str) -> None:
    """The output, its names, the configuration; another than that of all blocks; the same with its cache; plain again."""
    model, small = woven(name), oracle(name)
    cut(model, GONE)
    same(logits(model, name), logits(small, name))
    assert float((logits(model, name) - logits(plain(name), name)).abs().max()) > 1e-3
    assert model.config.to_dict() == small.config.to_dict()
    assert list(places(model)) == list(places(weave(oracle(name))))
    if name in zoo.GENERATE:
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        made = model.generate(**zoo.batch(name), **options)
        assert torch.equal(made, small.generate(**zoo.batch(name), **options))
    assert unweave(model).state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize("name", ("llama", "gemma3", "gpt2", "bert", "deepseek"))
def test_it_is_saved_and_read_by_all(name: str, tmp_path: Path) -> None:
    """As an ordinary checkpoint, by transformers and by weft; also what transformers saves of it; a fork stays what it was."""
    model, small = woven(name), oracle(name)
    other, was = fork(model), fingerprint(model)
    cut(model, GONE)
    assert fingerprint(other) == was and other.config.num_hidden_layers == LAYERS
    save(model, tmp_path / "ours")
    way: dict[str, Any] = {"experts_implementation": "eager"} if "experts" in str(small) else {}
    back = type(small).from_pretrained(tmp_path / "ours", dtype=torch.float64, **way).eval()
    same(logits(back, name), logits(small, name), 1e-6)  # it makes its tables in another order of casts
    same(logits(load(tmp_path / "ours", dtype=torch.float64), name), logits(small, name))
    unweave(model).save_pretrained(tmp_path / "theirs")
    same(logits(load(tmp_path / "theirs", dtype=torch.float64), name), logits(small, name))


@pytest.mark.parametrize("name", ("llama", "bert", "qwen3-moe"))
def test_compressed_models_and_adapters_go_along(name: str, tmp_path: Path) -> None:
    """To the bit what the other blocks were: rounded, with a trained adapter; saved, merged and exported; first values kept."""
    plain(name).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", dtype=torch.float64)
    apply(model, [Step.of("rtn", group=8), Step.of("lora", rank=2)], at="all-linear")
    rng = torch.Generator().manual_seed(4)
    for n, p in model.named_parameters():
        if n.endswith("adapter:default.b"):
            p.data = 0.1 * torch.randn(p.shape, generator=rng)
    stack = weft.model.stack_of(model)[0]
    want = {n: e.dense().detach() for n, e in expressions(model).items()}
    live = sum(p.requires_grad for n, p in model.named_parameters() if n.startswith(f"{stack}.0."))
    cut(model, GONE)
    for new, e in expressions(model).items():
        i, _, rest = new.removeprefix(f"{stack}.").partition(".")
        old = f"{stack}.{KEPT[int(i)]}.{rest}" if new.startswith(f"{stack}.") else new
        assert torch.equal(e.dense(), want[old])
    assert live and sum(p.requires_grad for n, p in model.named_parameters() if n.startswith(stack)) == live * len(KEPT)
    save(model, tmp_path / "out")
    back = load(tmp_path / "out", dtype=torch.float64)
    assert fingerprint(back) == fingerprint(model) and torch.equal(logits(back, name), logits(model, name))
    first = f"{stack}.1." + next(n for n in expressions(model) if n.startswith(f"{stack}.1.")).split(".1.", 1)[1]
    with pytest.raises(WeftError, match="pretrained weights are not at hand"):
        site(back, first).source()
    before = logits(model, name)
    weft.export(model, tmp_path / "plain")
    assert type(oracle(name)).from_pretrained(tmp_path / "plain").config.num_hidden_layers == len(KEPT)
    weft.merge(model, to="dense", at="all-linear")
    assert float((logits(model, name) - before).abs().max()) < 1e-5 * float(before.abs().max())
    model.config._experts_implementation = "eager"
    same(logits(unweave(model, original=True), name), logits(oracle(name), name))


def test_changed_vectors_know_their_first_values() -> None:
    """Norms and biases that a method changed go with their blocks."""
    model = woven("bert")
    weft.apply(model, "bitfit")
    for p in model.parameters():
        if p.requires_grad:
            p.data += 1
    cut(model, GONE)
    first = unweave(model, original=True).state_dict()
    assert all(torch.equal(v, first[k]) for k, v in oracle("bert").state_dict().items())


def test_windows_stay_with_their_blocks() -> None:
    """Of a configuration that says from which block on attention has a window, also for readers that know no types of layers."""
    given: dict[str, Any] = {**zoo.CAUSAL, "num_hidden_layers": LAYERS, "use_sliding_window": True, "sliding_window": 3}
    model = weave(t.Qwen2ForCausalLM(t.Qwen2Config(**given, max_window_layers=2)).eval())
    cut(model, [1, 4])
    config: Any = model.config
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    told = {**given, "num_hidden_layers": 3, "max_window_layers": config.max_window_layers}
    assert config.max_window_layers == 1 and t.Qwen2Config(**told).layer_types == config.layer_types


def test_parts_that_count_the_blocks_follow() -> None:
    """Outside the stack, as its encoder has it in DistilBERT; to the bit the new model of the other blocks."""
    given: dict[str, Any] = {"vocab_size": 96, "dim": 32, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 32}
    model: Any = weave(t.DistilBertForMaskedLM(t.DistilBertConfig(**given, n_layers=4)).eval())
    want = without(model, zoo.batch("bert"), [2])
    cut(model, [2])
    assert model.distilbert.transformer.n_layers == 3
    same(logits(model, "bert"), want)
    small = t.DistilBertForMaskedLM(t.DistilBertConfig(**given, n_layers=3)).eval()
    small.load_state_dict(unweave(model).state_dict())
    same(logits(small, "bert"), want)


def changed(name: str, gone: Sequence[int], match: str, model: nn.Module | None = None) -> WeftError:
    """The refusal, after which the model and its configuration are what they were."""
    held: Any = weave(zoo.build(name)) if model is None else model
    was, said, state = fingerprint(held), str(held.config), torch.random.get_rng_state()
    with pytest.raises(ConflictError, match=match) as told:
        cut(held, gone)
    assert fingerprint(held) == was and str(held.config) == said and torch.equal(torch.random.get_rng_state(), state)
    return told.value


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("t5", "an encoder and a decoder"), ("whisper", "an encoder and a decoder"), ("clip", "num_hidden_layers None"),
        ("resnet", "num_hidden_layers None"), ("bamba", "attn_layer_indices"), ("dit", "num_hidden_layers None"),
    ],
)  # fmt: skip
def test_models_that_are_no_one_stack_are_refused(name: str, match: str) -> None:
    changed(name, [0], match)


def test_what_would_be_another_is_refused_by_name() -> None:
    """A dense first block among experts, the last block of a type, attention scaled by the block's number, a shared table."""
    changed("deepseek", [0], r"model\.layers\.0\.mlp")
    changed("gemma3", [1], r"rotary_emb")
    config = t.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True)
    changed("gpt2", [0], r"h\.1\.attn\.scaling", weave(t.GPT2LMHeadModel(config)))
    albert = t.AlbertConfig(vocab_size=96, embedding_size=32, **zoo.SIZE)
    changed("albert", [0], "num_hidden_layers 2", weave(t.AlbertModel(albert)))
    twice = plain("llama")
    twice.model.layers[1] = twice.model.layers[0]
    changed("llama", [0], "used more than once", weave(twice))
    tied = plain("llama")
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    changed("llama", [2], r"mlp\.up_proj", weave(tied))
    split = plain("llama")
    split.model.config = copy.deepcopy(split.config)
    changed("llama", [0], "configuration of their own", weave(split))


def test_branches_and_wrong_numbers_are_refused() -> None:
    model = woven("llama")
    for gone in ([LAYERS], [-1], range(LAYERS)):
        with pytest.raises(OptionError, match="cannot be taken out"):
            cut(model, cast(Any, gone))
    was = fingerprint(model)
    cut(model, [])
    assert fingerprint(model) == was
    branches.run(model, Step.of("prompt", length=2))
    changed("llama", [0], "knows no branches", model)
