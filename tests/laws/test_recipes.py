"""Laws of every method of kind recipe: what it plans is there, the same each time, and all that trains; and what each one plans."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from model import zoo
from tiny import WORDS, build_tiny, tokenizer
from torch import nn

import weft
from weft.engine import Outline, get, names, optimizers, outline
from weft.engine.recipe import parse
from weft.engine.run import Step
from weft.error import ConflictError, OptionError, WeftError
from weft.expr import Dense
from weft.learn.data import Text
from weft.learn.trainer import trainable
from weft.model import expressions, fingerprint, fork, set_expressions, vectors, weave
from weft.model.sites import set_vectors

from .cases import options, rng

RECIPES = [name for name in names() if get(name).kind == "recipe"]
LAYERS = 6
TEXT = [Text(f"the {a} sat on the {b} mat .") for a in ("cat", "dog") for b in ("old", "red")]


def tuned() -> nn.Module:
    """A model of six blocks whose norms and, less, feed-forward weights were changed since it was pretrained."""
    model = weave(build_tiny("llama", layers=LAYERS))
    made = {}
    for name, expr in expressions(model).items():
        size = 0.01 if "mlp" in name else 0.001
        w = expr.dense().detach()
        made[name] = Dense(w + size * torch.randn(w.shape, generator=rng(name)))
    set_expressions(model, made)
    shifts = {n: 0.1 * torch.randn(p.shape, generator=rng(n)) for n, p in vectors(model).items() if "layers" in n}
    set_vectors(model, {n: Dense((model.get_parameter(n).detach() + by)[None]) for n, by in shifts.items()})
    return model


@functools.cache
def home() -> Path:
    """A folder with a tokenizer, and texts to calibrate on."""
    place = Path(tempfile.mkdtemp())
    tokenizer().save_pretrained(place)
    texts = [
        f"the {a} sat {c} the {b} {d} ."
        for a in WORDS[2:5]
        for b in WORDS[14:17]
        for c in WORDS[8:11]
        for d in WORDS[11:14]
    ]
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return place


def put(model: nn.Module, name: str) -> weft.Changes:
    """Apply a recipe by its defaults, with what its steps may need."""
    model.__dict__["_weft_source"] = str(home())
    return weft.apply(model, name, data=str(home() / "texts.jsonl"), tokens=32, cache=home() / "cache")


def planned(name: str, of: nn.Module | None = None, **given: Any) -> list[tuple[Any, Any]]:
    """The steps for a model, the optimizer last."""
    recipe, moves, _ = outline.plan(tuned() if of is None else of, Step.of(name, **given))
    return [*recipe.steps, *([(moves, None)] if moves else [])]


def it_plans_what_is_there(name: str) -> None:
    """Sites of the model, none twice, at every step that has any; declared methods with checked options; and the model stays."""
    model = tuned()
    mark, known = fingerprint(model), Outline(model).sites
    for step, at in planned(name, model):
        assert step.method in get(name).uses and Step.of(step.method, **dict(step.options)) == step
        assert get(step.method).kind == "optimizer" or (at and len(set(at)) == len(at) and set(at) <= set(known))
    assert fingerprint(model) == mark and not trainable(model)


def it_plans_the_same_again(name: str) -> None:
    """Whatever the global seed, for a fork and for a model of the same shape that is loaded."""
    torch.manual_seed(1)
    one = planned(name)
    torch.manual_seed(2)
    assert planned(name) == one == planned(name, fork(tuned()))


def what_it_plans_trains_and_nothing_else(name: str) -> None:
    """The numbers of the planned sites, each once; weights that a step reaches change by training, and others keep every bit."""
    model = tuned()
    made, sites = put(model, name), {n for _, at in planned(name) for n in at or ()}
    assert {c.name for c in made} == sites
    live = {n.partition(".expr")[0] for n in trainable(model)}
    assert live == {n if n in vectors(model) else n.removesuffix(".weight") for n in sites}
    before = {n: e.dense().detach().clone() for n, e in expressions(model).items()}
    learn(model, made.optimizer)
    for n, e in expressions(model).items():
        assert torch.equal(e.dense(), before[n]) == (n not in sites or not bool(e.dense().any())), n


def learn(model: nn.Module, optimizer: Step | None) -> None:
    from weft.learn.train import train

    moves = optimizers.named(optimizer.method, **dict(optimizer.options)) if optimizer else None
    train(model, TEXT, tokenizer=tokenizer(), optimizer=moves, steps=2, batch=2, length=16)


def options_work_or_are_refused(name: str) -> None:
    """Both ends and the middle of every option plan something or are refused, and somewhere matter; what is outside is refused."""
    schema = get(name).options.model_json_schema()["properties"]
    for option, good, bad in options(get(name)):
        free = schema[option].keys() & {"type", "enum", "pattern"} == {"type"} and schema[option]["type"] == "string"
        plans = []
        for value in good:
            try:
                plans.append(planned(name, **{option: value}))
            except WeftError as e:
                plans.append([str(e.what)])
        assert any(p != planned(name) for p in plans), option
        for value in [v for v in bad if not (free and isinstance(v, str))]:
            with pytest.raises(OptionError, match=option):
                get(name).bind({option: value})
    with pytest.raises(OptionError, match="unheard_of"):
        get(name).bind({"unheard_of": 1})


def it_has_places_of_its_own(name: str) -> None:
    """`at` is refused, a model of several stacks is, and so is a file that names it: what a stranger wrote opens no other folders."""
    with pytest.raises(OptionError, match="goes to no sites"):
        weft.apply(tuned(), name, at="*mlp*")
    with pytest.raises(ConflictError, match="several stacks"):
        planned(name, weave(zoo.build("t5")))
    with pytest.raises(OptionError, match="does not change a model"):
        parse({"weft": 1, "steps": [{name: {}}]}, "recipe.yaml")


LAWS = [
    it_plans_what_is_there,
    it_plans_the_same_again,
    what_it_plans_trains_and_nothing_else,
    options_work_or_are_refused,
    it_has_places_of_its_own,
]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_recipe(law: Callable[[str], None], name: str) -> None:
    """Each law, for each recipe."""
    law(name)


def block(name: str) -> int:
    """The block in a name, -1 outside."""
    return next((int(p) for p in name.split(".") if p.isdigit()), -1)


@pytest.mark.parametrize(("family", "before", "behind"), [
    ("llama", {"model.embed_tokens.weight"}, {"model.norm.weight", "lm_head.weight"}),
    ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight"}, {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
])  # fmt: skip
def test_depths_are_those_of_the_model(family: str, before: set[str], behind: set[str]) -> None:
    """0 before the blocks, the block's number from 1, one more behind; weights and vectors, every one."""
    model = weave(zoo.build(family))
    seen = Outline(model)
    assert {n for n, d in seen.sites.items() if d == 0} == before
    assert {n for n, d in seen.sites.items() if d == seen.blocks + 1} == behind
    assert all(d == block(n) + 1 for n, d in seen.sites.items() if block(n) >= 0)
    assert set(seen.sites) == {*expressions(model), *vectors(model)}


@pytest.mark.parametrize(("freeze", "first"), [(0.0, 0), (0.5, 3), (0.6, 4), (1.0, 6)])
def test_telly_freezes_the_lower_blocks(freeze: float, first: int) -> None:
    """And what stands before them."""
    ((step, at),) = planned("telly", freeze=freeze)
    assert step.method == "full"
    assert set(at) == {
        n for n in Outline(tuned()).sites if block(n) >= first or n in ("model.norm.weight", "lm_head.weight")
    }


def test_stability_starts_upper_blocks_anew() -> None:
    """The upper two anew, the lower half frozen, the rest as it is; embeddings train only where nothing is frozen."""
    (fresh, new), (full, rest), (moves, _) = planned("stability", freeze=0.5, fresh=2, decay=0.8)
    assert (fresh.method, full.method, moves.method) == ("fresh", "full", "layerwise")
    assert (
        {block(n) for n in new} == {4, 5}
        and {block(n) for n in rest} == {3, -1}
        and "model.embed_tokens.weight" not in rest
    )
    assert dict(moves.options) == {"decay": 0.8}
    assert "model.embed_tokens.weight" in planned("stability")[0][1]
    model = tuned()
    was = {n: e.dense().detach().clone() for n, e in expressions(model).items()}
    assert weft.apply(model, "stability", fresh=7).fallbacks
    model = tuned()
    weft.apply(model, "stability", fresh=1)
    for n, e in expressions(model).items():
        now = e.dense().detach()
        assert torch.equal(now, was[n]) == (block(n) != 5)
        assert float(now.square().mean()) == pytest.approx(float(was[n].square().mean()), rel=0.2)
    assert all(bool((p == 1).all()) for n, p in vectors(model).items() if "layers.5." in n)


def test_cofitune_tunes_one_kind_of_part() -> None:
    """In the range, at least one block; masked by default, which needs evidence."""
    for part, ends in (
        ("ffn", {"gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ):
        ((step, at),) = planned("cofitune", part=part, mask=False)
        assert step.method == "full" and {n.split(".")[-2] for n in at} == ends and {block(n) for n in at} == {2}
    for above, upto, want in ((0.0, 1.0, set(range(6))), (1.0, 0.0, {5}), (0.5, 0.8, {3, 4})):
        ((step, at),) = planned("cofitune", above=above, upto=upto)
        assert step.method == "soft" and step.needs == {"gram"} and {block(n) for n in at} == want


def test_fpf_takes_the_kinds_that_moved_most() -> None:
    """Norms first, as they moved most a number, of all blocks together; then more as the share grows; and the unmoved is refused."""
    ((_, few),) = planned("fpf", share=1e-9)
    assert len(few) == LAYERS and len({n.split(".", 3)[-1] for n in few}) == 1 and "norm" in few[0]
    ((_, more),) = planned("fpf", share=0.02)
    assert set(few) < set(more) == {n for n in vectors(tuned()) if "layers" in n}
    ((_, most),) = planned("fpf", share=1.0)
    assert set(most) == set(Outline(tuned()).sites)
    with pytest.raises(OptionError, match="moved anything"):
        planned("fpf", weave(build_tiny("llama")))


def test_fpf_compares_the_models_of_tasks(tmp_path: Path) -> None:
    """From the pretrained one to the first folder and from that to the next; a model of another shape is refused."""
    base = weave(build_tiny("llama", layers=LAYERS))
    weft.save(tuned(), tmp_path / "one")
    assert planned("fpf", base, after=str(tmp_path / "one"), share=0.02) == planned("fpf", share=0.02)
    other = tuned()
    w = expressions(other)["lm_head.weight"].dense().detach()
    set_expressions(other, {"lm_head.weight": Dense(w + torch.randn(w.shape, generator=rng("head")))})
    weft.save(other, tmp_path / "two")
    ((_, at),) = planned("fpf", base, after=f"{tmp_path / 'one'},{tmp_path / 'two'}", share=1e-9)
    assert at == ("lm_head.weight",)
    weft.save(weave(build_tiny("llama", layers=LAYERS, hidden_size=16)), tmp_path / "small")
    with pytest.raises(ConflictError, match="another model"):
        planned("fpf", base, after=str(tmp_path / "small"))


def test_layerwise_has_a_rate_for_each_block() -> None:
    """decay^k, k blocks below the output; what is before the blocks is one lower still, what is behind them as the last one."""
    model = tuned()
    weft.apply(model, "full")
    made = optimizers.named("layerwise", decay=0.5)(trainable(model), 0.01)
    rates = {id(p): g["lr"] for g in made.param_groups for p in g["params"]}
    for n, p in trainable(model).items():
        below = LAYERS if "embed" in n else 0 if block(n) < 0 else LAYERS - 1 - block(n)
        assert rates[id(p)] == pytest.approx(0.01 * 0.5**below), n
    plain = optimizers.named("layerwise")({"a": nn.Parameter(torch.ones(1))}, 0.01)
    assert [g["lr"] for g in plain.param_groups] == [0.01]


def test_a_recipe_with_nothing_to_do_is_refused() -> None:
    """As is one whose step is not declared, and a method of another kind."""
    with pytest.raises(OptionError, match="makes no recipe"):
        planned("rtn")
    with mock.patch.object(get("telly"), "uses", ()), pytest.raises(OptionError, match="not declared"):
        planned("telly")
    bert = weave(build_tiny("bert"))
    with pytest.raises(OptionError, match="nothing to do"):
        outline.plan(without_pooler(bert), Step.of("telly", freeze=1.0))


def without_pooler(model: nn.Module) -> nn.Module:
    """The model with nothing behind its blocks."""
    model.pooler = None  # type: ignore[assignment]
    return model
