"""Bottleneck adapters: the formula at every place of every family, nothing at the start, and the same however they are run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.error import ConflictError, ShapeError
from weft.model import Bottleneck, add_branch, branches, fork, weave
from weft.model.axes import parts
from weft.model.branch import branch_spec, build_branch
from weft.model.families import Attention

from . import zoo

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "bert", "eurobert", "vit", "t5", "mixtral")
ACTS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "none": lambda x: x}


@cache
def plain(name: str) -> nn.Module:
    """A woven model in float64; never changed."""
    return weave(zoo.build(name).double())


def inputs(name: str) -> dict[str, Tensor]:
    """The batch in float64."""
    return {k: v.double() if v.is_floating_point() else v for k, v in zoo.batch(name).items()}


def adapted(name: str, **options: Any) -> nn.Module:
    """A fork with adapters that have been moved from their start."""
    made = fork(plain(name))
    weft.apply(made, "bottleneck", width=3, **options)
    for b in branches(made):
        b.up.data = torch.randn(b.up.shape, generator=torch.Generator().manual_seed(len(b.at))).double()
    return made


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    """What the model gives."""
    return model(**inputs(name)).logits


def oracle(name: str, made: nn.Module, form: str, position: str, scale: float, act: str) -> nn.Module:
    """A model without adapters that adds the formula to what the part's last linear layer gives, from what its first one reads."""
    model = fork(plain(name))
    held, todo = dict(model.named_modules()), list(branches(made))
    for block, part in parts(made):
        attention = isinstance(part, Attention)
        if position not in ("both", "attention" if attention else "ffn"):
            continue
        first, last = (part.q, part.o) if attention else (part.router or part.up, part.down)
        last = last if "*" not in last else "mlp"
        branch, read = todo.pop(0), {}

        def note(_: nn.Module, given: Any, read: dict[str, Tensor] = read) -> None:
            read["x"] = given[0]

        def add(_: nn.Module, __: Any, h: Tensor, b: Any = branch, read: dict[str, Tensor] = read) -> Tensor:
            x = h if form == "sequential" else read["x"].reshape(h.shape)
            return h + scale * ACTS[act](x @ b.down.double().T) @ b.up.double().T

        held[f"{block}.{first.partition('[')[0]}"].register_forward_pre_hook(note)
        held[f"{block}.{last}"].register_forward_hook(add)
    assert not todo
    return model


@pytest.mark.parametrize("position", ["ffn", "attention", "both"])
@pytest.mark.parametrize("form", ["parallel", "sequential"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_formula(name: str, form: str, position: str) -> None:
    """h + s f(x Dᵀ) Uᵀ before the sum with the stream, x what the part reads or h itself; one adapter a part, in order."""
    made = adapted(name, form=form, position=position, scale=0.7, act="gelu")
    got = logits(made, name)
    torch.testing.assert_close(got, logits(oracle(name, made, form, position, 0.7, "gelu"), name), rtol=1e-9, atol=1e-9)
    assert float((got - logits(plain(name), name)).abs().max()) > 1e-4


@pytest.mark.parametrize("act", list(ACTS))
def test_its_functions(act: str) -> None:
    """Each is the one of its name; `none` is a product of two matrices."""
    made = adapted("llama", act=act, scale=2.0)
    want = logits(oracle("llama", made, "parallel", "ffn", 2.0, act), "llama")
    torch.testing.assert_close(logits(made, "llama"), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["parallel", "sequential"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_begins_as_nothing(name: str, form: str) -> None:
    """Every bit of the output is as it was."""
    made = fork(plain(name))
    weft.apply(made, "bottleneck", form=form, position="both")
    assert torch.equal(logits(made, name), logits(plain(name), name))


@pytest.mark.parametrize("form", ["parallel", "sequential"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_generation_goes_on_from_its_cache(name: str, form: str) -> None:
    """The same tokens with a cache and without."""
    made, x = adapted(name, form=form, position="both"), zoo.batch("llama")["input_ids"]
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(made.generate(x, **how), made.generate(x, use_cache=False, **how))


@pytest.mark.parametrize("form", ["parallel", "sequential"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_checkpointing_gives_the_same_gradients(name: str, form: str) -> None:
    """Blocks that are computed again compute their adapters again."""
    grads: list[list[Tensor]] = []
    for checkpointing in (False, True):
        made = adapted(name, form=form, position="both").train()
        for m in made.modules():
            m.__dict__["p"] = 0.0 if isinstance(m, nn.Dropout) else m.__dict__.get("p")
        if checkpointing:
            made.gradient_checkpointing_enable()
        made(**zoo.batch(name)).logits.square().mean().backward()
        grads.append([p.grad for b in branches(made) for p in b.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-12)
        assert bool(one.any())


def test_it_computes_in_the_models_dtype(tmp_path: Any) -> None:
    """Kept in float32, used in bfloat16; a folder gives it back at every host."""
    model = weave(zoo.build("bert").bfloat16())
    weft.apply(model, "bottleneck", position="both", form="sequential")
    assert logits(model, "bert").dtype == torch.bfloat16
    assert {p.dtype for b in branches(model) for p in b.parameters()} == {torch.float32}
    weft.save(model, tmp_path / "out")
    back = weft.load(tmp_path / "out")
    assert [b.key for b in branches(back)] == [b.key for b in branches(model)] and len(branches(back)) == 4
    held = zip(branches(back), branches(model), strict=True)
    assert all(torch.equal(a.down, b.down) and torch.equal(a.up, b.up) for a, b in held)


@pytest.mark.parametrize("name", ["whisper", "resnet", "bamba", "mamba2"])
def test_families_without_a_table_are_refused(name: str) -> None:
    """By their names; nothing is changed."""
    model = weave(zoo.build(name))
    with pytest.raises(ConflictError, match="nothing is known of this family"):
        weft.apply(model, "bottleneck")
    assert not branches(model)


def test_all_are_put_or_none() -> None:
    """A name that is taken at one place leaves the others free; a place and a width of another model are refused."""
    model = fork(plain("llama"))
    weft.apply(model, "bottleneck", position="attention")
    with pytest.raises(ConflictError, match="of that name"):
        weft.apply(model, "bottleneck", position="both")
    assert len(branches(model)) == 2
    made = {"scale": 1.0, "act": "relu", "form": "parallel"}
    fits = {"down": torch.ones(2, 32), "up": torch.ones(32, 2)}
    for at, given, error in [
        ("model.norm", {**fits, **made}, ConflictError),
        ("model.layers.0.mlp", {"down": torch.ones(2, 31), "up": torch.ones(31, 2), **made}, ShapeError),
        ("model.layers.0.mlp", {**fits, **made, "act": "tan"}, ConflictError),
        ("model.layers.0.mlp", {**fits, **made, "form": "both"}, ConflictError),
    ]:
        with pytest.raises(error):
            add_branch(model, Bottleneck(at=at, **given))
    assert len(branches(model)) == 2


def split(**options: Any) -> nn.Module:
    """A fork with adapters of width 6 in parts, moved from their start."""
    made = fork(plain("llama"))
    weft.apply(made, "bottleneck", width=6, **options)
    for b in branches(made):
        b.up.data = torch.randn(b.up.shape, generator=torch.Generator().manual_seed(len(b.at))).double()
    return made


def drawn(made: nn.Module, step: int, seed: int = 0) -> list[slice]:
    """The features of every adapter that take part in a step."""
    weft.begin_step(made.train(), step, seed)
    return [b._part() for b in branches(made)]


def test_a_step_trains_one_part_which_counts_for_all() -> None:
    """The formula with every third feature, times three; all of them outside training; other parts have no gradient."""
    made = split(splits=3, act="gelu")
    for step in range(4):
        parts = drawn(made, step)
        want = fork(made)
        for b, part in zip(branches(want), parts, strict=True):
            b.splits, b.scale = 1, 3 * b.scale
            for t in (b.down, b.up.T):
                rest = torch.ones(6, dtype=torch.bool)
                rest[part] = False
                t.data[rest] = 0
        assert torch.equal(torch.tensor([p.step for p in parts]), torch.tensor([3, 3]))
        torch.testing.assert_close(logits(made, "llama"), logits(want.eval(), "llama"), rtol=1e-9, atol=1e-9)
        made.zero_grad()
        made(**inputs("llama")).logits.square().mean().backward()
        for b, part in zip(branches(made), parts, strict=True):
            for grad in (b.down.grad, b.up.grad.T):
                assert [bool(row.any()) for row in grad] == [i in range(6)[part] for i in range(6)]
    whole = split(splits=1, act="gelu")
    assert torch.equal(logits(made.eval(), "llama"), logits(whole.eval(), "llama"))


def test_the_parts_are_drawn_by_seed_and_step_alone() -> None:
    """Each part as often as others, adapters apart; the same again; and a training step that is not told is refused."""
    made = split(splits=3)
    steps = [drawn(made, step) for step in range(300)]
    assert steps == [drawn(made, step) for step in range(300)] != [drawn(made, step, 1) for step in range(300)]
    for of in zip(*steps, strict=True):
        assert all(70 <= [p.start for p in of].count(k) <= 130 for k in range(3))
    assert any(a != b for a, b in steps)
    with pytest.raises(ConflictError, match="trains by parts"):
        logits(made.eval().train(), "llama")


def test_parts_are_kept_and_an_older_folder_has_one(tmp_path: Any) -> None:
    """They are in the folder; more than features are declared; a folder without the word is of a weft that had no parts."""
    model = weave(zoo.build("llama"))
    assert len(weft.apply(model, "bottleneck", width=2, splits=5).fallbacks) == 1
    weft.save(model, tmp_path / "out")
    assert {b.splits for b in branches(weft.load(tmp_path / "out"))} == {2}
    said = branch_spec(branches(model)[0])
    del said["splits"]
    assert build_branch(said, lambda field: getattr(branches(model)[0], field)).splits == 1
    with pytest.raises(ShapeError, match="too many parts"):
        add_branch(model, build_branch({**said, "name": "two", "splits": 3}, lambda f: getattr(branches(model)[0], f)))
