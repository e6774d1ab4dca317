"""Adapters from strangers: each fault is refused with all that is wrong, and neither model nor folder changes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weft.engine.run import Step, apply
from weft.error import ConflictError, FormatError, NumericError, OptionError, PathError, ShapeError, WeftError
from weft.expr import LowRank, terms_of
from weft.model import expressions, fingerprint, places
from weft.store import load
from weft.store.adapter import attach
from weft.store.peft import export_peft, fingerprint_of_base

from .edits import plain

Table, Tensors = dict[str, Any], dict[str, Tensor]
Edit = Callable[[Table, Tensors], Any]
HANG = "([a-z_.0-9]+)+!"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass
class Case:
    """A base, a model of it, and an adapter's folder."""

    base: Path
    model: nn.Module
    folder: Path

    def write(self, edit: Edit = lambda c, t: None) -> Path:
        """The adapter, edited: q_proj and v_proj of both layers at rank 2."""
        rng = torch.Generator().manual_seed(3)
        content: Tensors = {}
        for path in (f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"):
            m, n = expressions(self.model)[f"{path}.weight"].shape
            content[f"base_model.model.{path}.lora_A.weight"] = torch.randn(2, n, generator=rng)
            content[f"base_model.model.{path}.lora_B.weight"] = torch.randn(m, 2, generator=rng)
        table: Table = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(self.base),
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj"],
        }
        edit(table, content)
        self.folder.mkdir(exist_ok=True)
        (self.folder / "adapter_config.json").write_text(json.dumps(table))
        save_file(content, self.folder / "adapter_model.safetensors", {"format": "pt"})
        return self.folder

    def refused(self, kind: type[WeftError], *words: str, **options: Any) -> WeftError:
        """The error, with five fields and these words; model and folder are as they were."""
        before, weights = state(self.folder), fingerprint(self.model)
        with pytest.raises(WeftError) as e:
            attach(self.model, self.folder, **options)
        assert type(e.value) is kind, e.value
        fields = {k: getattr(e.value, k) for k in ("what", "where", "got", "want", "fix")}
        assert all(str(v) for v in fields.values()), fields
        assert all(f"  {k}" in str(e.value) for k in ("where", "got", "want", "fix"))
        assert all(w in str(e.value) for w in words), e.value
        assert state(self.folder) == before and fingerprint(self.model) == weights
        return e.value


def state(folder: Path) -> dict[str, str]:
    """Every file's hash."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def case(tiny: Any, tmp_path: Path) -> Iterator[Case]:
    """A tiny Llama."""
    plain(tiny, tmp_path / "base")
    yield Case(tmp_path / "base", load(tmp_path / "base"), tmp_path / "adapter")


def config(**changed: Any) -> Edit:
    """Settings of another value."""
    return lambda c, t: c.update(changed)


def without(*keys: str) -> Edit:
    """Tensors left out."""
    return lambda c, t: [t.pop(k) for k in keys]


def holds(key: str, value: Tensor) -> Edit:
    """A tensor of this value."""
    return lambda c, t: t.update({key: value})


def both(*edits: Edit) -> Edit:
    """One edit after the other."""
    return lambda c, t: [e(c, t) for e in edits]


def renamed(old: str, new: str) -> Edit:
    """Tensors under another name."""
    return lambda c, t: [t.update({k.replace(old, new): t.pop(k)}) for k in list(t) if old in k]


def swapped(one: str, other: str) -> Edit:
    """Two tensors under each other's name."""
    return lambda c, t: t.update({one: t[other], other: t[one]})


def spoiled(key: str, *values: float) -> Edit:
    """A tensor whose first values are these."""
    return lambda c, t: t[key].view(-1)[: len(values)].copy_(torch.tensor(values))


def test_a_sound_adapter_attaches(case: Case) -> None:
    """What the faults below are made from has none; its terms are frozen, and scaled by alpha / r."""
    sites = attach(case.model, case.write())
    assert sites == [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qv"]
    held = load_file(case.folder / "adapter_model.safetensors")
    term = terms_of(expressions(case.model)[sites[0]])["adapter:default"]
    assert isinstance(term, LowRank) and not term.b.requires_grad and not term.a.requires_grad
    assert torch.equal(term.a, held[f"{Q0}.lora_A.weight"]) and torch.equal(term.b, held[f"{Q0}.lora_B.weight"])
    assert term.scale == 2


class Evil:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.open, (str(self.mark), os.O_CREAT | os.O_WRONLY)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter.pth"])
def test_f05_a_pickled_adapter_is_never_opened(name: str, case: Case, tmp_path: Path) -> None:
    """In a folder, by itself, and under a false name."""
    case.write()
    mark = tmp_path / "ran"
    (case.folder / "adapter_model.safetensors").unlink()
    (case.folder / name).write_bytes(pickle.dumps(Evil(mark)))
    case.refused(FormatError, "pickle", name, "adapter_model.safetensors")
    alone = Case(case.base, case.model, case.folder / name)
    alone.refused(FormatError, "pickle")
    (case.folder / name).rename(case.folder / "adapter_model.safetensors")
    case.refused(FormatError, "adapter_model.safetensors")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "weft.json"])
def test_f04_links_out_of_the_folder_are_not_followed(name: str, case: Case, tmp_path: Path) -> None:
    """Neither for the tensors nor for the settings nor for the manifest."""
    (exported(case) / name).rename(tmp_path / "elsewhere")
    (case.folder / name).symlink_to(tmp_path / "elsewhere")
    case.refused(FormatError, name, "link")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_named(name: str, case: Case) -> None:
    """A folder without either is no adapter's."""
    (case.write() / name).unlink()
    case.refused(PathError, name)


@pytest.mark.parametrize("pattern", [HANG, ".*", "nothing_of_this_model", "q_proj", "all-linear"])
def test_f24_a_pattern_of_targets_is_not_run(pattern: str, case: Case) -> None:
    """One that would hang, one that means all and one that means nothing: the tensors alone decide."""
    assert len(attach(case.model, case.write(config(target_modules=pattern)))) == 4


@pytest.mark.parametrize(
    "pattern", [HANG, "(a+)+$", "^model.layers.0", "q_proj|v_proj", "[qv]_proj", "", "a\nb", "a\\.b"]
)
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rank_pattern", lambda p: {p: 2}),
        ("alpha_pattern", lambda p: {p: 4.0}),
        ("exclude_modules", lambda p: p or "("),
        ("layers_pattern", lambda p: [p]),
    ],
)
def test_f24_patterns_that_decide_values_are_refused(
    setting: str, value: Callable[[str], Any], pattern: str, case: Case
) -> None:
    """Only names are compared."""
    case.write(config(**{setting: value(pattern)}))
    case.refused(ConflictError, setting, "never run")


def test_f24_a_pattern_in_a_list_of_targets_is_a_name(case: Case) -> None:
    """PEFT compares list entries as names too; this one is of no module."""
    case.write(config(target_modules=["q_proj", "v_proj", HANG]))
    case.refused(FormatError, "target_modules", HANG)


TENSORS: dict[str, tuple[Edit, type[WeftError], tuple[str, ...]]] = {
    "half a pair": (without(f"{Q0}.lora_B.weight"), FormatError, (f"{Q0}.lora_B.weight", "missing")),
    "two of four": (
        without(*(f"base_model.model.model.layers.1.self_attn.{p}_proj.lora_{h}.weight" for p in "qv" for h in "AB")),
        FormatError,
        ("2 of 4", "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"),
    ),
    "a target without any": (
        config(target_modules=["q_proj", "v_proj", "up_proj"]),
        FormatError,
        ("4 of 6", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"),
    ),
    "a target of no module": (config(target_modules=["q_proj", "v_proj", "query"]), FormatError, ("query",)),
    "more than the targets": (config(target_modules=["q_proj"]), FormatError, ("layers.1.self_attn.v_proj",)),
    "more than the layers": (config(layers_to_transform=[0]), FormatError, ("layers.1.self_attn.q_proj",)),
    "an excluded one": (config(exclude_modules=["v_proj"]), FormatError, ("layers.0.self_attn.v_proj",)),
    "a module of another model": (
        renamed("self_attn.q_proj", "attention.q_proj"),
        FormatError,
        ("model.layers.0.attention.q_proj", "near: model.layers.0.self_attn.q_proj"),
    ),
    "another prefix": (
        renamed("base_model.model.model", "base_model.model"),
        FormatError,
        ("layers.0.self_attn.q_proj",),
    ),
    "no prefix": (renamed("base_model.model.", ""), FormatError, ("model.layers.0.self_attn.q_proj.lora_A.weight",)),
    "an adapter's name inside": (
        renamed("lora_A.weight", "lora_A.default.weight"),
        FormatError,
        (".lora_A.default.weight",),
    ),
    "a magnitude": (holds(f"{Q0}.lora_magnitude_vector", torch.ones(32)), FormatError, ("lora_magnitude_vector",)),
    "a bias": (holds(f"{Q0}.lora_B.bias", torch.ones(32)), FormatError, ("lora_B.bias",)),
    "a saved module": (holds("base_model.model.lm_head.weight", torch.ones(96, 32)), FormatError, ("lm_head.weight",)),
    "a layer's own weight": (
        holds(f"{Q0}.base_layer.weight", torch.ones(32, 32)),
        FormatError,
        (f"{Q0}.base_layer.weight",),
    ),
    "an embedding's": (
        holds("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(2, 96)),
        FormatError,
        ("lora_embedding_A",),
    ),
    "a pair on an embedding": (
        both(
            holds("base_model.model.model.embed_tokens.lora_A.weight", torch.ones(2, 32)),
            holds("base_model.model.model.embed_tokens.lora_B.weight", torch.ones(96, 2)),
        ),
        ConflictError,
        ("model.embed_tokens", "Embedding"),
    ),
    "nothing": (lambda c, t: t.clear(), FormatError, ("0 tensors",)),
    "another rank": (config(r=3), ShapeError, ("rank 3", "[3, 32]", "float32 [2, 32]")),
    "a rank of one module": (
        config(rank_pattern={"layers.1.self_attn.v_proj": 4}),
        ShapeError,
        ("layers.1.self_attn.v_proj",),
    ),
    "no rank": (
        both(holds(f"{Q0}.lora_A.weight", torch.ones(0, 32)), holds(f"{Q0}.lora_B.weight", torch.ones(32, 0))),
        ShapeError,
        ("[0, 32]", "[32, 0]"),
    ),
    "other columns": (holds(f"{Q0}.lora_A.weight", torch.ones(2, 31)), ShapeError, ("[2, 31]", "[2, 32]")),
    "swapped": (swapped(f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"), ShapeError, ("[32, 2]", "[2, 32]")),
    "a vector": (holds(f"{Q0}.lora_B.weight", torch.ones(64)), ShapeError, ("[64]", "[32, 2]")),
    "integers": (holds(f"{Q0}.lora_A.weight", torch.ones(2, 32, dtype=torch.int32)), ShapeError, ("int32",)),
    "eight-bit floats": (
        holds(f"{Q0}.lora_A.weight", torch.ones(2, 32).to(torch.float8_e4m3fn)),
        ShapeError,
        ("float8",),
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_f25_tensors_that_do_not_fit_the_model_are_refused(fault: str, case: Case) -> None:
    """Missing, extra, renamed and ill-shaped ones, by name."""
    edit, kind, words = TENSORS[fault]
    case.write(edit)
    case.refused(kind, *words)


def test_f25_all_problems_come_together(case: Case) -> None:
    """Of base, settings and tensors alike."""
    other = renamed("layers.1", "layers.7")
    case.write(both(without(f"{Q0}.lora_B.weight"), other, config(lora_bias=True, base_model_name_or_path="other")))
    error = case.refused(
        ConflictError, "other", "lora_bias", f"{Q0}.lora_B.weight", "layers.7", "layers.1.self_attn.q_proj"
    )
    assert error.what.startswith("7 problems")


def test_f25_a_thousand_problems_stay_readable(case: Case) -> None:
    """The first of a kind, and how many more."""
    case.write(lambda c, t: t.update({f"x.{i}": torch.ones(1) for i in range(1000)}))
    error = case.refused(FormatError, "x.1", "980 more")
    assert len(str(error).splitlines()) < 200


def test_f25_many_names_take_no_time(case: Case) -> None:
    """Names are looked up, not tried one after the other."""
    names = [f"m{i}" for i in range(99_000)]
    case.write(config(target_modules=[*names, "q_proj", "v_proj"], rank_pattern=dict.fromkeys([*names, "q_proj"], 2)))
    error = case.refused(FormatError, "m0", "98980 more")
    assert error.what.startswith("21 problems")


def test_f25_a_tied_head_takes_no_adapter(tiny: Any, tmp_path: Path) -> None:
    """The sum would change the embedding too."""
    tiny("llama-tied").save_pretrained(tmp_path / "base")
    case = Case(tmp_path / "base", load(tmp_path / "base"), tmp_path / "adapter")
    head = {f"base_model.model.lm_head.lora_{h}.weight": torch.ones(s) for h, s in (("A", (2, 32)), ("B", (96, 2)))}
    case.write(lambda c, t: (t.update(head), c["target_modules"].append("lm_head")))
    case.refused(ConflictError, "lm_head", "shared with model.embed_tokens")


SETTINGS: dict[str, tuple[Edit, type[WeftError], tuple[str, ...]]] = {
    "no kind": (lambda c, t: c.pop("peft_type"), FormatError, ("peft_type", "LORA")),
    "a kind that is no word": (config(peft_type=["LORA"]), FormatError, ("peft_type", "a list")),
    "another kind": (config(peft_type="NOPE"), ConflictError, ("NOPE", "LORA")),
    "no rank": (lambda c, t: c.pop("r"), FormatError, ("r=nothing",)),
    "rank zero": (config(r=0), FormatError, ("r=0", "greater than or equal to 1")),
    "rank below zero": (config(r=-1), FormatError, ("r=-1",)),
    "rank in words": (config(r="8"), FormatError, ("r='8'",)),
    "rank true": (config(r=True), FormatError, ("r=True",)),
    "a fraction of rank": (config(r=2.5), FormatError, ("r=2.5",)),
    "no alpha": (lambda c, t: c.pop("lora_alpha"), FormatError, ("lora_alpha=nothing",)),
    "alpha in words": (config(lora_alpha="16"), FormatError, ("lora_alpha='16'",)),
    "a vast alpha": (config(lora_alpha=10**400), FormatError, ("lora_alpha",)),
    "alpha and rank": (config(lora_alpha=None, r=None), FormatError, ("r=None", "lora_alpha=None")),
    "ranks are a list": (config(rank_pattern=[2]), FormatError, ("rank_pattern",)),
    "a rank by name of zero": (config(rank_pattern={"q_proj": 0}), FormatError, ("rank_pattern.q_proj=0",)),
    "an alpha by name in words": (config(alpha_pattern={"q_proj": "x"}), FormatError, ("alpha_pattern.q_proj",)),
    "targets are numbers": (config(target_modules=[1, 2]), FormatError, ("target_modules",)),
    "targets are a table": (config(target_modules={"q_proj": 1}), FormatError, ("target_modules", "a dict")),
    "targets without end": (config(target_modules=["q_proj"] * 100_001), FormatError, ("target_modules", "100000")),
    "ranks without end": (
        config(rank_pattern={f"m{i}": 1 for i in range(100_001)}),
        FormatError,
        ("rank_pattern", "100000"),
    ),
    "layers in words": (config(layers_to_transform=["0"]), FormatError, ("layers_to_transform",)),
    "a base that is a number": (config(base_model_name_or_path=7), FormatError, ("base_model_name_or_path=7",)),
    "stabilised in words": (config(use_rslora="yes"), FormatError, ("use_rslora='yes'",)),
    "dora without magnitudes": (config(use_dora=True), FormatError, (f"{Q0}.lora_magnitude_vector", "missing")),
    "dora in words": (config(use_dora="yes"), FormatError, ("use_dora='yes'",)),
    "dora is zero": (config(use_dora=0), FormatError, ("use_dora=0",)),
    "transposed": (config(fan_in_fan_out=True), ConflictError, ("fan_in_fan_out",)),
    "biases": (config(bias="all"), ConflictError, ("bias", "'all'")),
    "a bias of its own": (config(lora_bias=True), ConflictError, ("lora_bias",)),
    "layers repeated": (config(layer_replication=[[0, 2], [0, 2]]), ConflictError, ("layer_replication",)),
    "modules saved": (config(modules_to_save=["lm_head"]), ConflictError, ("modules_to_save",)),
    "tokens trained": (config(trainable_token_indices=[1]), ConflictError, ("trainable_token_indices",)),
    "parameters": (config(target_parameters=["experts.up"]), ConflictError, ("target_parameters",)),
    "a base changed at the start": (config(init_lora_weights="pissa_niter_4"), ConflictError, ("pissa_niter_4",)),
    "a setting of tomorrow": (config(use_whatever={"a": 1}), ConflictError, ("use_whatever",)),
}


@pytest.mark.parametrize("fault", SETTINGS)
def test_f25_settings_that_are_not_understood_are_refused(fault: str, case: Case) -> None:
    """Ill-typed ones, and those under which the value is another."""
    edit, kind, words = SETTINGS[fault]
    case.write(edit)
    case.refused(kind, *words)


@pytest.mark.parametrize("text", ["[]", "{", '{"r": 1, "r": 2}', '{"r": NaN}', '{"lora_alpha": 1e999}', "[" * 100_000])
def test_settings_that_are_no_table_are_refused(text: str, case: Case) -> None:
    """JSON of unique keys and finite numbers."""
    (case.write() / "adapter_config.json").write_text(text)
    case.refused(FormatError, "adapter_config.json")


@pytest.mark.parametrize("named", ["org/other", "", None, "\0", "x" * 5000, "..", "."])
def test_f26_an_adapter_of_another_base_is_refused(named: str | None, case: Case) -> None:
    """Unless the user answers for it."""
    case.write(config(base_model_name_or_path=named))
    case.refused(ConflictError, "base_model_name_or_path", "unverified_base=True", "--unverified-base")
    assert len(attach(case.model, case.folder, unverified_base=True)) == 4


@pytest.mark.parametrize("named", ["org/base", "base", "/somewhere/base/", "C:\\models\\base"])
def test_f26_a_base_elsewhere_of_the_same_name_is_taken(named: str, case: Case) -> None:
    """Its path on the machine where the adapter was trained, or its hub id."""
    assert len(attach(case.model, case.write(config(base_model_name_or_path=named)))) == 4


def test_f26_another_folder_here_of_the_same_name_is_refused(case: Case, tmp_path: Path) -> None:
    """It is at hand, and it is not the model's."""
    (tmp_path / "other" / "base").mkdir(parents=True)
    case.write(config(base_model_name_or_path=str(tmp_path / "other" / "base")))
    case.refused(ConflictError, "other/base", "unverified_base")
    case.write(config(base_model_name_or_path=str(tmp_path / "other" / ".." / "base")))
    assert len(attach(case.model, case.folder)) == 4


def test_f26_a_snapshot_of_the_hub_goes_by_its_id(tiny: Any, tmp_path: Path) -> None:
    """The last part of its path is a commit."""
    place = tmp_path / "hub" / "models--org--tiny-llama" / "snapshots" / "0123abcd"
    tiny().save_pretrained(place)
    case = Case(place, load(place), tmp_path / "adapter")
    case.write(config(base_model_name_or_path="org/0123abcd"))
    case.refused(ConflictError, "0123abcd")
    case.write(config(base_model_name_or_path="org/tiny-llama"))
    assert len(attach(case.model, case.folder)) == 4


def exported(case: Case) -> Path:
    """An adapter that weft wrote for the case's base."""
    model = load(case.base)
    apply(model, [Step.of("lora", rank=2)], at="all-linear")
    export_peft(model, case.folder)
    return case.folder


def test_f26_weights_that_differ_from_the_adapters_are_refused(case: Case, tiny: Any) -> None:
    """By fingerprint, whatever the names say and whatever the user says."""
    exported(case)
    tiny(seed=1).save_pretrained(case.base)
    case.model = load(case.base)
    mark = json.loads((case.folder / "weft.json").read_text())["base_fingerprint"]
    assert len(mark) == 32 and mark != fingerprint_of_base(case.model)
    case.refused(ConflictError, "other weights", mark)
    case.refused(ConflictError, "other weights", mark, unverified_base=True)


def test_f26_the_same_weights_elsewhere_are_taken(case: Case, tiny: Any, tmp_path: Path) -> None:
    """A fingerprint outweighs names."""
    exported(case)
    tiny().save_pretrained(tmp_path / "copied")
    assert len(attach(load(tmp_path / "copied"), case.folder)) == 14


def test_f26_a_base_that_is_not_at_hand_cannot_be_compared(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then too the user must answer for it."""
    exported(case)

    def absent() -> Tensor:
        raise PathError("the weights are away", where="x", got="nothing", want="a folder", fix="put it back")

    for place in places(case.model).values():
        monkeypatch.setattr(place.original, "read", absent)
    case.refused(ConflictError, "the weights are away", "unverified_base=True")
    assert attach(case.model, case.folder, unverified_base=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to(torch.bfloat16),
        lambda t: t.reshape(t.shape[1], t.shape[0]),
        lambda t: t.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(9.0)),
        lambda t: t.index_put((torch.tensor(-1), torch.tensor(-1)), torch.tensor(9.0)),
    ],
    ids=["dtype", "shape", "first value", "last value"],
)
def test_f26_a_fingerprint_tells_weights_apart(
    change: Callable[[Tensor], Tensor], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By dtype, shape and values of every weight; twice the same for the same."""
    was = fingerprint_of_base(case.model)
    assert was == fingerprint_of_base(load(case.base)) and len(was) == 32
    place = places(case.model)["model.layers.1.mlp.up_proj.weight"]
    value = change(place.original())
    monkeypatch.setattr(place.original, "read", lambda: value)
    assert fingerprint_of_base(case.model) != was


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_f13_a_file_that_differs_from_its_manifest_is_refused(name: str, case: Case) -> None:
    """One flipped bit of a value, one changed letter."""
    path = exported(case) / name
    content = bytearray(path.read_bytes())
    content[content.index(b"CAUSAL") if name.endswith("json") else -1] ^= 1
    path.write_bytes(content)
    case.refused(FormatError, "differs from the manifest", name)


@pytest.mark.parametrize("edit", [{"files": {}}, {"base_fingerprint": 7}], ids=str)
def test_f13_a_manifest_that_says_too_little_is_refused(edit: Table, case: Case) -> None:
    """No hashes, or a fingerprint that is none."""
    path = exported(case) / "weft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    case.refused(FormatError, next(iter(edit)) if "files" not in edit else "manifest")


def test_f13_other_files_beside_the_adapter_do_not_matter(case: Case) -> None:
    """They are never opened."""
    (exported(case) / "README.md").write_text("about this adapter")
    assert attach(case.model, case.folder)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("values", [(NAN,), (INF, -INF), (1e30, -1e30, 3e38)], ids=str)
def test_f27_values_that_no_weight_has_are_refused(values: tuple[float, ...], half: str, case: Case) -> None:
    """With the site and their number."""
    case.write(spoiled(f"{Q0}.lora_{half}.weight", *values))
    case.refused(NumericError, "model.layers.0.self_attn.q_proj", f"{len(values)} of 64 values")


def test_f27_a_product_beyond_the_weights_dtype_is_refused(tiny: Any, tmp_path: Path) -> None:
    """Each factor is finite, and in float32 the sum would be."""
    tiny(dtype=torch.float16).save_pretrained(tmp_path / "base")
    case = Case(tmp_path / "base", load(tmp_path / "base"), tmp_path / "adapter")
    case.write(both(spoiled(f"{Q0}.lora_A.weight", 300.0), spoiled(f"{Q0}.lora_B.weight", 300.0)))
    case.refused(NumericError, "model.layers.0.self_attn.q_proj.weight", "1 of 1024 values")


def test_f27_a_scale_that_overflows_is_refused(case: Case) -> None:
    """The tensors themselves are finite."""
    case.write(both(config(lora_alpha=9e29), spoiled(f"{Q0}.lora_B.weight", 1e29)))
    case.refused(NumericError, "model.layers.0.self_attn.q_proj.weight")


def test_a_name_that_is_taken_is_refused(case: Case) -> None:
    """At any site; another name is fine."""
    case.write()
    apply(case.model, [Step.of("lora", rank=1)], at="*up_proj")
    case.refused(ConflictError, "adapter:default", "up_proj")
    assert len(attach(case.model, case.folder, name="second")) == 4
    case.refused(ConflictError, "adapter:second", name="second")


@pytest.mark.parametrize("name", ["", "a.b", "a b", "../x", "a:b", "ü", "a\n"])
def test_a_name_that_is_none_is_refused(name: str, case: Case) -> None:
    """Letters, digits, _ and -."""
    case.write()
    case.refused(OptionError, "name", name=name)


def test_a_plain_model_is_refused(case: Case, tiny: Any) -> None:
    """There is nothing to add a term to."""
    case.write()
    with pytest.raises(ConflictError, match="not woven"):
        attach(tiny(), case.folder)
