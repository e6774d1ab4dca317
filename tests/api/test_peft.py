"""PEFT's types of adapters, out and in, against the real package: same outputs, and the same tensors to the bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model.zoo import batch, build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from weft.error import ConflictError, FormatError, WeftError
from weft.expr import SparseDelta, terms_of
from weft.model import branches, first_vectors
from weft.store.peft import KINDS

peft = pytest.importorskip("peft")
NEAR = 2e-5
"""Both compute in float32, but sum in another order: some hundred roundings of 6e-8 of the largest output."""
Model = Callable[[str], tuple[nn.Module, Path]]


def plain(family: str) -> nn.Module:
    """A random model; `encoder` is a BERT without a head."""
    if family != "encoder":
        return build(family)
    torch.manual_seed(0)
    return transformers.BertModel(build("bert").config).eval()


@pytest.fixture
def base(tmp_path: Path, words: Any) -> Model:
    """A plain model of a family, with biases that are not zero, and its folder."""

    def make(family: str) -> tuple[nn.Module, Path]:
        folder = tmp_path / family
        if not folder.exists():
            model, rng = plain(family), torch.Generator().manual_seed(7)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.endswith("bias"):
                        p.add_(0.1 * torch.randn(p.shape, generator=rng))
            model.save_pretrained(folder)
            words.save_pretrained(folder)
        return type(plain(family)).from_pretrained(folder).eval(), folder

    return make


def shaken(model: nn.Module, seed: int = 3, by: float = 0.05) -> nn.Module:
    """What trains, as if it had been trained."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=rng))
    return model


def out(model: nn.Module, family: str, skip: int = 0) -> Tensor:
    """The output for two texts; of PEFT's without its virtual tokens."""
    with torch.no_grad():
        made = model.eval()(**batch("bert" if family == "encoder" else family))
    return (made.logits if "logits" in made else made.last_hidden_state)[:, skip:]


def same(a: Tensor, b: Tensor) -> None:
    """Equal but for roundings."""
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=NEAR * float(b.abs().max()))


def theirs(plain: nn.Module, folder: Path) -> nn.Module:
    """PEFT's model of a folder; what it does not find, or did not expect, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(plain, folder)


def files(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


def equal(a: Path, b: Path) -> None:
    """The same tensors under the same names, to the bit."""
    one, two = files(a)[0], files(b)[0]
    assert set(one) == set(two)
    assert [n for n in one if one[n].dtype != two[n].dtype or not torch.equal(one[n], two[n])] == []


MINE: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lora": ("LORA", {"rank": 3, "alpha": 5.0, "scaling": "rank"}, ["llama", "gpt2", "bert", "qwen3"]),
    "lora pissa": ("LORA", {"rank": 2, "init": "pissa"}, ["llama", "gpt2"]),
    "lora dora": ("LORA", {"rank": 3, "alpha": 5.0, "magnitude": True}, ["llama", "gpt2", "bert"]),
    "lora all": ("LORA", {"rank": 3, "alpha": 0.3, "init": "pissa", "magnitude": True}, ["llama"]),
    "ia3": ("IA3", {}, ["llama", "qwen3"]),
    "vera": ("VERA", {"rank": 5}, ["llama", "gpt2", "bert"]),
    "fourierft": ("FOURIERFT", {"count": 30, "alpha": 3.0}, ["llama", "gpt2", "bert"]),
    "loha": ("LOHA", {"rank": 2}, ["llama", "bert"]),
    "lokr": ("LOKR", {"factor": 8}, ["llama", "bert"]),
    "lokr low": ("LOKR", {"factor": 2, "rank": 3}, ["llama", "bert"]),
    "oft": ("OFT", {"block": 8}, ["llama", "bert"]),
    "layernorm": ("LN_TUNING", {}, ["llama", "gpt2", "bert", "qwen3"]),
    "sparse": ("SHIRA", {"rank": 2}, ["llama", "bert"]),
    "sparse largest": ("SHIRA", {"rank": 1, "by": "largest"}, ["llama"]),
    "prompt": ("PROMPT_TUNING", {"length": 3}, ["llama", "gpt2", "encoder"]),
    "prefix": ("PREFIX_TUNING", {"length": 3}, ["llama", "gpt2", "qwen3"]),
    "cpt": ("CPT", {"length": 3, "radius": 0.2}, ["llama", "gpt2"]),
}
"""What is written: the method, PEFT's type, options, and on which families."""


@pytest.mark.parametrize(("case", "family"), [(c, f) for c, (_, _, fs) in MINE.items() for f in fs])
def test_what_weft_writes_peft_reads(case: str, family: str, base: Model, tmp_path: Path) -> None:
    """With the same outputs; weft reads it again with the same outputs, and writes the same file."""
    kind, options, _ = MINE[case]
    bare, folder = base(family)
    model = weft.load(folder)
    before = out(model, family)
    weft.apply(model, case.split()[0], **options)
    want = out(shaken(model), family)
    assert float((want - before).abs().max()) > 1e-2 * float(before.abs().max())
    weft.export(model, tmp_path / "a", to="peft")
    assert files(tmp_path / "a")[1]["peft_type"] == kind
    skip = options["length"] if kind in ("PROMPT_TUNING", "CPT") else 0
    same(out(theirs(bare, tmp_path / "a"), family, skip), want)
    again = weft.load(folder)
    weft.attach(again, tmp_path / "a")
    assert not any(p.requires_grad for p in again.parameters())
    same(out(again, family), want)
    weft.export(again, tmp_path / "b", to="peft")
    equal(tmp_path / "a", tmp_path / "b")


QKVO = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "output.dense"]}
SPLIT = {"llama": ["k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "bert": ["key", "value", "output.dense"]}
FED = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["output.dense"]}
NORMS = {"llama": ["input_layernorm", "norm"], "gpt2": ["ln_1", "ln_f"], "bert": ["LayerNorm"]}
ALL = ["llama", "gpt2", "bert"]
Given = Callable[[str], Any]
THEIRS: dict[str, tuple[Given, list[str]]] = {
    "lora": (lambda f: peft.LoraConfig(r=3, lora_alpha=5, target_modules=QKVO[f]), ALL),
    "lora dora": (lambda f: peft.LoraConfig(r=3, lora_alpha=5, target_modules=QKVO[f], use_dora=True), ALL),
    "lora dora root": (
        lambda f: peft.LoraConfig(r=3, target_modules=QKVO[f], use_dora=True, use_rslora=True, rank_pattern={"k_proj": 2}),
        ["llama"],
    ),
    "ia3": (lambda f: peft.IA3Config(target_modules=SPLIT[f], feedforward_modules=FED[f]), ALL),
    "vera": (lambda f: peft.VeraConfig(r=5, target_modules=QKVO[f]), ALL),
    "fourierft": (lambda f: peft.FourierFTConfig(n_frequency=30, target_modules=QKVO[f]), ALL),
    "fourierft by name": (
        lambda f: peft.FourierFTConfig(
            n_frequency=30, scaling=7.3, random_loc_seed=5, target_modules=QKVO[f], n_frequency_pattern={"k_proj": 9}
        ),
        ["llama"],
    ),
    "loha": (lambda f: peft.LoHaConfig(r=2, alpha=3, target_modules=QKVO[f]), ["llama", "bert"]),
    "loha by name": (
        lambda f: peft.LoHaConfig(
            r=2, alpha=3, target_modules=QKVO[f], rank_pattern={"k_proj": 4}, alpha_pattern={"q_proj": 7}
        ),
        ["llama"],
    ),
    "lokr": (lambda f: peft.LoKrConfig(r=2, alpha=3, target_modules=QKVO[f]), ["llama", "bert"]),
    "lokr whole": (lambda f: peft.LoKrConfig(r=30, alpha=11, target_modules=QKVO[f]), ["llama", "bert"]),
    "lokr factor": (lambda f: peft.LoKrConfig(r=4, alpha=8, decompose_factor=4, target_modules=QKVO[f]), ["llama"]),
    "lokr odd factor": (lambda f: peft.LoKrConfig(r=2, decompose_factor=5, target_modules=QKVO[f]), ["llama"]),
    "lokr both": (lambda f: peft.LoKrConfig(r=2, alpha=3, decompose_both=True, target_modules=QKVO[f]), ["llama"]),
    "oft": (lambda f: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=QKVO[f]), ["llama", "bert"]),
    "oft by number": (
        lambda f: peft.OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=QKVO[f]), ["llama"]
    ),
    "oft nearest": (
        lambda f: peft.OFTConfig(oft_block_size=7, use_cayley_neumann=False, target_modules=QKVO[f]), ["llama"]
    ),
    "layernorm": (lambda f: peft.LNTuningConfig(target_modules=NORMS[f]), ALL),
    "shira": (lambda f: peft.ShiraConfig(r=2, target_modules=QKVO[f]), ["llama", "bert"]),
    "prompt": (lambda f: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), ["llama", "gpt2"]),
    "prompt of an encoder": (
        lambda f: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"), ["encoder"]
    ),
    "prefix": (lambda f: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), ["llama", "gpt2"]),
    "prefix made by a network": (
        lambda f: peft.PrefixTuningConfig(
            num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=5
        ),
        ["gpt2"],
    ),
    "cpt": (lambda f: peft.CPTConfig(cpt_token_ids=[4, 5, 6], task_type="CAUSAL_LM"), ["llama", "gpt2"]),
}  # fmt: skip
"""What is read: PEFT's settings, and on which families."""


def of_peft(config: Any, family: str, base: Model, to: Path) -> Tensor:
    """An adapter that PEFT made, moved and saved; its own output when it is loaded again."""
    model = peft.get_peft_model(base(family)[0], config)
    shaken(model, by=0.2 if config.peft_type == "FOURIERFT" else 0.05)
    if config.peft_type == "CPT":
        out(model, family)  # which is when PEFT brings its numbers into the ball
    model.save_pretrained(to)
    skip = 3 if config.peft_type in ("PROMPT_TUNING", "CPT") else 0
    return out(theirs(base(family)[0], to), family, skip)


@pytest.mark.parametrize(("case", "family"), [(c, f) for c, (_, fs) in THEIRS.items() for f in fs])
def test_what_peft_writes_weft_reads(case: str, family: str, base: Model, tmp_path: Path) -> None:
    """With the same outputs; what weft writes of it has PEFT's tensors, and PEFT's outputs when PEFT reads it."""
    want = of_peft(THEIRS[case][0](family), family, base, tmp_path / "a")
    bare, folder = base(family)
    model = weft.load(folder)
    before = out(model, family)
    weft.attach(model, tmp_path / "a")
    same(out(model, family), want)
    assert float((want - before).abs().max()) > 1e-3 * float(before.abs().max())
    weft.export(model, tmp_path / "b", to="peft")
    equal(tmp_path / "a", tmp_path / "b")
    read = theirs(bare, tmp_path / "b")
    skip = 3 if files(tmp_path / "b")[1]["peft_type"] in ("PROMPT_TUNING", "CPT") else 0
    same(out(read, family, skip), want)


@pytest.mark.parametrize("case", ["lora", "ia3", "vera", "loha", "lokr", "oft", "shira", "prompt", "layernorm"])
def test_what_is_attached_is_saved_and_merged(case: str, base: Model, tmp_path: Path) -> None:
    """A model with another tool's adapter is a model like any other."""
    want = of_peft(THEIRS[case][0]("llama"), "llama", base, tmp_path / "a")
    model = weft.load(base("llama")[1])
    weft.attach(model, tmp_path / "a")
    weft.save(model, tmp_path / "saved")
    same(out(weft.load(tmp_path / "saved", dtype=torch.float32), "llama"), want)
    if case != "prompt":
        weft.merge(model, to="dense")
        same(out(model, "llama"), want)


@pytest.mark.parametrize("case", ["lora", "lora dora", "vera"])
def test_minilm_goes_both_ways(case: str, minilm: Path, tmp_path: Path) -> None:
    """The real encoder, as its own library loads it."""
    texts = {"input_ids": torch.arange(2000, 2024).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}

    def states(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(**texts).last_hidden_state

    bare = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32)
    made = shaken(peft.get_peft_model(bare, THEIRS[case][0]("bert")))
    made.save_pretrained(tmp_path / "a")
    want = states(made)
    model = weft.load(minilm)
    weft.attach(model, tmp_path / "a", unverified_base=True)
    same(states(model), want)
    weft.export(model, tmp_path / "b", to="peft")
    equal(tmp_path / "a", tmp_path / "b")
    again = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32)
    same(states(theirs(again, tmp_path / "b")), want)


def test_every_type_is_tried() -> None:
    """Out and in."""
    assert {kind for kind, _, _ in MINE.values()} == set(KINDS)
    assert {str(make(fs[0]).peft_type.value) for make, fs in THEIRS.values()} == set(KINDS)


# ------------------------------------------------------------------------------------------------------------ experts

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
MIXES: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": STACKS},
    "in another order": {"target_parameters": STACKS[::-1]},
    "down alone": {"target_parameters": STACKS[1:]},
    "up alone": {"target_parameters": STACKS[:1]},
    "with attention": {"target_modules": ["q_proj", "v_proj"], "target_parameters": STACKS},
    "ranks by name": {"target_parameters": STACKS, "rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"gate_up_proj": 1}},
}  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("case", MIXES)
def test_stacked_experts_of_peft(case: str, family: str, base: Model, tmp_path: Path) -> None:
    """Every expert has its own factors, gate and up one A; the way back gives the same tensors."""
    given = {"target_modules": [], "r": 2, "lora_alpha": 5, **MIXES[case]}
    want = of_peft(peft.LoraConfig(**given), family, base, tmp_path / "a")
    bare, folder = base(family)
    model = weft.load(folder)
    weft.attach(model, tmp_path / "a")
    same(out(model, family), want)
    weft.export(model, tmp_path / "b", to="peft")
    equal(tmp_path / "a", tmp_path / "b")
    same(out(theirs(bare, tmp_path / "b"), family), want)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize(
    "at", ["all-linear", "*.experts.*", "*.experts.1.*", ["*.experts.*.w2", "*.experts.*.down_proj"]]
)
def test_stacked_experts_of_weft(at: Any, family: str, base: Model, tmp_path: Path) -> None:
    """Gate and up with an A each stand block by block; experts without an adapter have zeros."""
    bare, folder = base(family)
    model = weft.load(folder)
    if isinstance(at, list):
        at = at[:1] if family == "mixtral" else at[1:]
    weft.apply(model, "lora", rank=2, alpha=3.0, at=at)
    want = out(shaken(model), family)
    weft.export(model, tmp_path / "a", to="peft")
    same(out(theirs(bare, tmp_path / "a"), family), want)
    again = weft.load(folder)
    weft.attach(again, tmp_path / "a")
    same(out(again, family), want)
    weft.export(again, tmp_path / "b", to="peft")
    equal(tmp_path / "a", tmp_path / "b")


def test_experts_have_no_magnitudes(base: Model, tmp_path: Path) -> None:
    model = weft.load(base("mixtral")[1])
    weft.apply(model, "lora", rank=2, magnitude=True)
    with pytest.raises(ConflictError, match="experts"):
        weft.export(model, tmp_path / "a", to="peft")


def test_a_stack_that_the_model_has_not_is_refused(base: Model, tmp_path: Path) -> None:
    of_peft(peft.LoraConfig(r=2, target_modules=[], target_parameters=STACKS), "mixtral", base, tmp_path / "a")
    tensors, config = files(tmp_path / "a")
    config["target_parameters"] = ["experts.up", *STACKS]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    tensors.pop("base_model.model.model.layers.1.mlp.experts.lora_A.weight")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(WeftError, match=r"experts\.up") as e:
        weft.attach(weft.load(base("mixtral")[1]), tmp_path / "a")
    assert "layers.1.mlp.experts.lora_A" in str(e.value)


# ------------------------------------------------------------------------------------------------- what is otherwise


def test_slices_of_veras_pair_are_one_tensor(base: Model, tmp_path: Path) -> None:
    """Layers of one size hold the same, on disk too."""
    of_peft(THEIRS["vera"][0]("llama"), "llama", base, tmp_path / "a")
    model = weft.load(base("llama")[1])
    weft.attach(model, tmp_path / "a")
    pairs = [list(terms_of(e)["adapter:default"].kids()) for n, e in weft.expressions(model).items() if "q_proj" in n]
    assert len(pairs) == 2 and pairs[0][1].w.data_ptr() == pairs[1][1].w.data_ptr()


def test_a_side_scales_the_bias_as_peft_does(base: Model, tmp_path: Path) -> None:
    """The bias has another value then, and the first one again when the model is made plain as it was."""
    of_peft(THEIRS["ia3"][0]("gpt2"), "gpt2", base, tmp_path / "a")
    model = weft.load(base("gpt2")[1])
    changed = weft.attach(model, tmp_path / "a")
    name = "transformer.h.0.attn.c_attn.bias"
    assert name in changed and name in first_vectors(model) and "transformer.h.0.mlp.c_proj.bias" not in changed
    first = weft.unweave(model, original=True)
    assert torch.equal(first.get_parameter(name), base("gpt2")[0].get_parameter(name))


def test_a_bias_that_is_not_scaled_is_refused(base: Model, tmp_path: Path) -> None:
    """weft's own IA3 leaves biases alone."""
    model = weft.load(base("gpt2")[1])
    weft.apply(model, "ia3")
    weft.export(model, tmp_path / "ones", to="peft")
    with pytest.raises(ConflictError, match=r"c_attn\.bias"):
        weft.export(shaken(model), tmp_path / "a", to="peft")


def test_entries_are_filled_up_with_zeros(base: Model, tmp_path: Path) -> None:
    """To r (m + n), where no rank gives their number."""
    bare, folder = base("llama")
    model = weft.load(folder)
    weft.apply(model, "sparse", rank=1, at="*.q_proj")
    weft.apply(model, "sparse", rank=2, at="*.down_proj")
    want = out(shaken(model), "llama")
    weft.export(model, tmp_path / "a", to="peft")
    assert files(tmp_path / "a")[1]["r"] == 2
    same(out(theirs(bare, tmp_path / "a"), "llama"), want)
    weft.apply(big := weft.load(folder), "sparse", rank=16, at="*.q_proj")
    with pytest.raises(ConflictError, match="entries"):
        terms = {n: e for n, e in weft.expressions(big).items() if "q_proj" in n}
        assert all(isinstance(terms_of(e)["adapter:default"], SparseDelta) for e in terms.values())
        weft.apply(big, "sparse", rank=2, at="*.k_proj")
        weft.export(shaken(big), tmp_path / "b", to="peft")


def test_a_cpt_begins_at_its_sum(base: Model, tmp_path: Path) -> None:
    """PEFT keeps no start; the shift is zero, and may go as far as PEFT's."""
    of_peft(THEIRS["cpt"][0]("llama"), "llama", base, tmp_path / "a")
    model = weft.load(base("llama")[1])
    assert weft.attach(model, tmp_path / "a", name="mine") == ["model:mine"]
    (branch,) = branches(model)
    assert not bool(branch.shift.any()) and branch.radius == pytest.approx(0.1 * (32 / 2048) ** 0.5)


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "biases": ("bitfit", {}, "bert", "bias"),
    "no type": ("nola", {"rank": 2, "count": 10}, "llama", "adapter:default|basis"),
    "a network": ("bottleneck", {"width": 2}, "llama", "Bottleneck"),
    "transposed, LoHa": ("loha", {"rank": 2}, "gpt2", "stored"),
    "transposed, LoKr": ("lokr", {}, "gpt2", "stored"),
    "transposed, OFT": ("oft", {"block": 4}, "gpt2", "stored"),
    "transposed, SHiRA": ("sparse", {"rank": 1}, "gpt2", "stored"),
    "sizes of no factor": ("lokr", {"factor": 12}, "llama", "decompose_factor"),
    "a rank above half": ("lokr", {"factor": 8, "rank": 3}, "llama", "half the larger side"),
    "a task without a name": ("prompt", {"length": 2}, "bert", "BertForMaskedLM"),
}
"""What PEFT cannot say: the method, options, family, and words of the reason."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_say_is_refused(case: str, base: Model, tmp_path: Path) -> None:
    """By name, and nothing is written."""
    method, options, family, word = REFUSED[case]
    model = weft.load(base(family)[1])
    weft.apply(model, method, **options)
    with pytest.raises(ConflictError, match=word):
        weft.export(shaken(model), tmp_path / "a", to="peft")
    assert not (tmp_path / "a").exists()


def test_one_folder_holds_one_type(base: Model, tmp_path: Path) -> None:
    """Two adapters of different types go out one by one."""
    bare, folder = base("llama")
    model = weft.load(folder)
    weft.apply(model, "lora", rank=2, name="low")
    weft.apply(model, "loha", rank=2, name="entries")
    shaken(model)
    with pytest.raises(ConflictError, match="entries"):
        weft.export(model, tmp_path / "both", to="peft")
    weft.export(model, tmp_path / "entries", to="peft", adapter="entries")
    weft.activate(model, ["entries"])
    same(out(theirs(bare, tmp_path / "entries"), "llama"), out(model, "llama"))
    weft.apply(other := weft.load(folder), "prompt", length=2)
    weft.apply(other, "lora", rank=2, name="low")
    with pytest.raises(ConflictError, match="branch"):
        weft.export(shaken(other), tmp_path / "mixed", to="peft")


def test_a_strength_is_refused_where_peft_has_none(base: Model, tmp_path: Path) -> None:
    model = weft.load(base("llama")[1])
    weft.apply(model, "loha", rank=2)
    weft.activate(shaken(model), {"default": 0.5})
    with pytest.raises(ConflictError, match=r"0\.5"):
        weft.export(model, tmp_path / "a", to="peft")
    weft.activate(model, "default")
    weft.export(model, tmp_path / "a", to="peft")


UNKNOWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "a series": ("oft", {"use_cayley_neumann": True}, "use_cayley_neumann"),
    "a projection": ("oft", {"coft": True}, "coft"),
    "no blocks": ("oft", {"oft_block_size": 0}, "oft_block_size"),
    "drawn matrices": ("vera", {"save_projection": False}, "save_projection"),
    "a pattern": ("ia3", {"feedforward_modules": "(a+)+"}, "feedforward_modules"),
    "another side": ("ia3", {"feedforward_modules": []}, "ia3_l"),
    "another rank": ("loha", {"r": 3}, "rank 3"),
    "another factor": ("lokr", {"decompose_factor": 2}, "lokr_w"),
    "other frequencies": ("fourierft", {"n_frequency": 31}, "n_frequency 31"),
    "no seed": ("fourierft", {"random_loc_seed": None}, "random_loc_seed"),
    "more norms": ("layernorm", {"target_modules": ["input_layernorm", "norm", "post_attention_layernorm"]}, "incomplete"),
    "other entries": ("shira", {"r": 1}, "shira_weight"),
    "no task": ("prompt", {"task_type": None}, "task_type"),
    "two towers": ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules"),
    "more tokens": ("prefix", {"num_virtual_tokens": 4}, "prompt_embeddings"),
    "other heads": ("prefix", {"num_attention_heads": 4}, "prefix does not fit"),
    "half precision of biases": ("lora", {"bias": "all"}, "bias"),
}  # fmt: skip
"""Settings under which the tensors mean something else."""


@pytest.mark.parametrize("case", UNKNOWN)
def test_settings_that_change_the_value_are_refused(case: str, base: Model, tmp_path: Path) -> None:
    """The model stays as it is."""
    kind, changed, word = UNKNOWN[case]
    of_peft(THEIRS[kind][0]("llama"), "llama", base, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    model = weft.load(base("llama")[1])
    before = out(model, "llama")
    with pytest.raises(WeftError, match=word):
        weft.attach(model, tmp_path / "a")
    assert torch.equal(out(model, "llama"), before) and not branches(model)


@pytest.mark.parametrize(("value", "error"), [(-1, ConflictError), (10**6, ConflictError)])
def test_places_outside_a_weight_are_refused(value: int, error: type[WeftError], base: Model, tmp_path: Path) -> None:
    of_peft(THEIRS["shira"][0]("llama"), "llama", base, tmp_path / "a")
    tensors, _ = files(tmp_path / "a")
    name = next(n for n in tensors if n.endswith("indices"))
    tensors[name][0, 0] = value
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(error, match="shira_indices"):
        weft.attach(weft.load(base("llama")[1]), tmp_path / "a")


@pytest.mark.parametrize("case", ["vera", "layernorm", "prompt", "oft"])
def test_what_is_lost_or_too_much_is_refused(case: str, base: Model, tmp_path: Path) -> None:
    of_peft(THEIRS[case][0]("llama"), "llama", base, tmp_path / "a")
    tensors, _ = files(tmp_path / "a")
    name = sorted(tensors)[-1]
    for edited in (
        {n: t for n, t in tensors.items() if n != name},
        {**tensors, "base_model.model.x.more": torch.ones(1)},
    ):
        save_file(edited, tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(FormatError):
            weft.attach(weft.load(base("llama")[1]), tmp_path / "a")


@pytest.mark.parametrize("case", ["loha", "vera", "shira", "lora dora"])
def test_adapters_go_onto_packed_bases(case: str, base: Model, tmp_path: Path) -> None:
    """The base's codes stay; its own values go out beside the adapter."""
    of_peft(THEIRS[case][0]("llama"), "llama", base, tmp_path / "a")
    model = weft.load(base("llama")[1])
    weft.apply(model, "rtn", bits=4, group=16, at="all-linear")
    weft.attach(model, tmp_path / "a")
    want = out(model, "llama")
    weft.export(model, tmp_path / "b", to="peft", base=tmp_path / "small")
    equal(tmp_path / "a", tmp_path / "b")
    same(out(theirs(type(base("llama")[0]).from_pretrained(tmp_path / "small"), tmp_path / "b"), "llama"), want)


@pytest.mark.parametrize("case", ["ia3", "layernorm", "prompt"])
def test_what_is_no_term_leaves_its_base(case: str, base: Model, tmp_path: Path) -> None:
    """The base that is written beside has neither sides, nor other norms, nor branches."""
    of_peft(THEIRS[case][0]("llama"), "llama", base, tmp_path / "a")
    bare, folder = base("llama")
    model = weft.load(folder)
    weft.attach(model, tmp_path / "a")
    weft.export(model, tmp_path / "b", to="peft", base=tmp_path / "plain")
    left = type(bare).from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(left[n], t) for n, t in bare.state_dict().items())


def test_only_a_lora_is_replaced_in_place(base: Model, tmp_path: Path) -> None:
    model = weft.load(base("llama")[1])
    weft.apply(model, "lora", rank=4)
    for case in ("loha", "layernorm", "lora dora"):
        of_peft(THEIRS[case][0]("llama"), "llama", base, tmp_path / case)
        before = out(model, "llama")
        with pytest.raises(ConflictError, match=r"in place|magnitude"):
            weft.attach(model, tmp_path / case, replace=True)
        assert torch.equal(out(model, "llama"), before)


# ------------------------------------------------------------------------------------------------------------- serving


def test_the_serving_form_has_one_rank_and_no_scale(base: Model, tmp_path: Path) -> None:
    """Ranks are filled up with zeros, alpha is the rank, and nothing is said by name; PEFT gives the same outputs."""
    bare, folder = base("llama")
    model = weft.load(folder)
    weft.apply(model, "lora", rank=2, alpha=3.0, scaling="rank", at="*.q_proj")
    weft.apply(model, "lora", rank=5, alpha=0.3, at="*.down_proj")
    want = out(shaken(model), "llama")
    weft.export(model, tmp_path / "a", to="vllm")
    tensors, config = files(tmp_path / "a")
    assert config["r"] == config["lora_alpha"] == 5
    told = {"rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "use_rslora", "target_parameters"}
    assert not told & set(config) and config["bias"] == "none"
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert {t.shape[0 if "lora_A" in n else 1] for n, t in tensors.items()} == {5}
    same(out(theirs(bare, tmp_path / "a"), "llama"), want)
    weft.attach(again := weft.load(folder), tmp_path / "a")
    same(out(again, "llama"), want)
    weft.export(again, tmp_path / "b", to="vllm")
    equal(tmp_path / "a", tmp_path / "b")


SERVED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "another type": ("loha", {"rank": 2}, "llama", "LOHA"),
    "magnitudes": ("lora", {"rank": 2, "magnitude": True}, "llama", "DoRA"),
    "the head": ("lora", {"rank": 2, "at": "lm_head"}, "llama", "outside the blocks"),
    "transposed": ("lora", {"rank": 2, "at": "*.c_attn"}, "gpt2", "transposed"),
    "experts": ("lora", {"rank": 2, "at": "*.experts.*"}, "mixtral", "experts"),
    "a vast rank": ("lora", {"rank": 513, "at": "*.q_proj"}, "llama", "at most 512"),
}


@pytest.mark.parametrize("case", SERVED)
def test_what_is_not_served_is_refused(case: str, base: Model, tmp_path: Path) -> None:
    method, options, family, word = SERVED[case]
    model = weft.load(base(family)[1])
    weft.apply(model, method, **options)
    with pytest.raises(ConflictError, match=word):
        weft.export(model, tmp_path / "a", to="vllm")
    assert not (tmp_path / "a").exists()
