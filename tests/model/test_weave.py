"""Weave and unweave: the model computes what it computed, and gives its weights back."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from weft.engine.run import Step, apply
from weft.error import ConflictError, OptionError, ShapeError
from weft.expr import Dense
from weft.model import (
    expressions,
    fingerprint,
    fork,
    is_woven,
    match,
    output_sites,
    places,
    plain_tensors,
    set_expressions,
    unweave,
    weave,
)
from weft.store import load


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything in the state dict."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_weave_keeps_the_output_bit_exact(family: str, tiny: Any, batches: Any, run: Any) -> None:
    """Weaving changes no bit of the output."""
    model, batch = tiny(family), batches(1)[0]
    before = run(model, batch)
    assert torch.equal(run(weave(model), batch), before)


def test_weave_keeps_every_hidden_state(tiny: Any, batches: Any) -> None:
    """BERT: all hidden states are equal, not only the last."""
    model, batch = tiny("bert"), batches(1)[0]
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True).hidden_states
        after = weave(model)(**batch, output_hidden_states=True).hidden_states
    assert len(before) == 3 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_weave_keeps_minilm_exact(minilm: Any) -> None:
    """A real BERT: every hidden state equals the plain model's."""
    from transformers import AutoModel

    plain, woven = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval(), load(minilm)
    batch = {
        "input_ids": torch.tensor([[101, 2023, 2003, 102], [101, 2748, 102, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    with torch.no_grad():
        a, b = (
            plain(**batch, output_hidden_states=True).hidden_states,
            woven(**batch, output_hidden_states=True).hidden_states,
        )
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_classes_stay(family: str, tiny: Any) -> None:
    """The model keeps its class; woven modules are still what they were."""
    model = tiny(family)
    kinds = {n: type(m) for n, m in model.named_modules()}
    weave(model)
    assert type(model).__name__ == kinds[""].__name__
    assert all(isinstance(m, kinds[n]) for n, m in model.named_modules() if n in kinds)


def test_weave_twice_is_refused(tiny: Any) -> None:
    """A woven model cannot be woven, a plain one not unwoven."""
    with pytest.raises(ConflictError):
        weave(weave(tiny()))
    with pytest.raises(ConflictError):
        unweave(tiny())


def test_everything_is_frozen(family: str, tiny: Any) -> None:
    """Nothing trains until a method says so."""
    assert not any(p.requires_grad for p in weave(tiny(family)).parameters())


def test_unweave_is_exact(family: str, tiny: Any, batches: Any, run: Any) -> None:
    """Unweaving gives the same state dict, classes, ties and output."""
    model, batch = tiny(family), batches(1)[0]
    before, out, kinds = values(model), run(model, batch), [type(m) for m in model.modules()]
    unweave(weave(model))
    assert not is_woven(model) and kinds == [type(m) for m in model.modules()]
    assert same(values(model), before) and torch.equal(run(model, batch), out)
    if family == "llama-tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("original", [False, True])
def test_unweave_after_a_rewrite(family: str, original: bool, tiny: Any) -> None:
    """Today's values, or the first ones."""
    model = tiny(family)
    first = values(model)
    apply(weave(model), [Step.of("rtn", bits=3)])
    today = {n: e.dense().clone() for n, e in expressions(model).items()}
    unweave(model, original=original)
    held = values(model)
    assert same(held, first) is original
    assert original or all(torch.equal(held[n], t) for n, t in today.items())


def test_unwoven_reference_model_runs(ref_lm: Any) -> None:
    """A model that was loaded and unwoven computes what the woven one did, though its file is in bfloat16."""
    model = load(ref_lm)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        woven = model(ids).logits
        plain = unweave(model)(ids).logits
    assert torch.equal(woven, plain)


def test_tied_head_is_one_expression(tiny: Any) -> None:
    """A tied weight is one site of two modules, and a rewrite reaches both."""
    model = weave(tiny("llama-tied"))
    assert "lm_head.weight" not in expressions(model)
    assert places(model)["model.embed_tokens.weight"].modules == ("model.embed_tokens", "lm_head")
    apply(model, [Step.of("rtn", bits=4)], at="embed_tokens")
    assert model.lm_head.expr is model.model.embed_tokens.expr
    assert output_sites(model) == {"model.embed_tokens.weight"}


def test_sites_are_every_matrix_once(family: str, tiny: Any) -> None:
    """Sites and plain tensors together are the model's distinct parameters."""
    model = tiny(family)
    count = Counter(id(p) for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    weave(model)
    plain = {id(t): t for t in plain_tensors(model).values() if isinstance(t, nn.Parameter)}
    assert max(count.values()) == 1
    assert (
        sum(e.shape[0] * e.shape[1] for e in expressions(model).values()) + sum(t.numel() for t in plain.values())
        == total
    )


def test_set_expressions_refuses(tiny: Any) -> None:
    """Unknown sites and other shapes are errors, and nothing changes."""
    model = weave(tiny())
    name, expr = next(iter(expressions(model).items()))
    with pytest.raises(OptionError):
        set_expressions(model, {"nowhere": expr})
    with pytest.raises(ShapeError):
        set_expressions(model, {name: Dense(torch.zeros(2, 2))})
    assert expressions(model)[name] is expr


def test_set_expressions_is_all_or_nothing(tiny: Any) -> None:
    """One bad entry leaves every site as it was."""
    model = weave(tiny())
    first, *_, last = expressions(model)
    before = expressions(model)
    with pytest.raises(ShapeError):
        set_expressions(model, {first: Dense(torch.zeros(before[first].shape)), last: Dense(torch.zeros(2, 2))})
    assert expressions(model) == before


@pytest.mark.parametrize(
    ("at", "count"),
    [
        ("*", 16),
        ("all-linear", 14),
        ("q_proj", 2),
        ("mlp.*", 6),
        ("*.mlp.*", 6),
        ("layers.0.*", 7),
        ("model.layers.1.mlp.up_proj", 1),
        ("model.layers.1.mlp.up_proj.weight", 1),
        (["q_proj", "k_proj", "q_proj"], 4),
        ("lm_head", 1),
        ("[qk]_proj", 4),
        (("all-linear", "lm_head"), 15),
    ],
)
def test_match(at: Any, count: int, tiny: Any) -> None:
    """Globs fit full names, names without `.weight` and trailing parts; each site comes once, in model order."""
    model = weave(tiny())
    found = match(model, at)
    assert len(found) == count and found == [n for n in places(model) if n in set(found)]


@pytest.mark.parametrize("at", ["nothing", ["q_proj", "proj"], "layers.9.*", "Q_PROJ", ""])
def test_a_pattern_that_fits_nothing_is_an_error(at: Any, tiny: Any) -> None:
    """Also when another pattern fits; case counts."""
    with pytest.raises(OptionError) as e:
        match(weave(tiny()), at)
    assert e.value.got == (at if isinstance(at, str) else at[-1])


@pytest.mark.parametrize(
    ("family_", "head"), [("llama", "lm_head.weight"), ("llama-tied", "model.embed_tokens.weight")]
)
def test_all_linear_leaves_the_head(family_: str, head: str, tiny: Any) -> None:
    """Neither a head nor what it is tied to is in `all-linear`."""
    found = match(weave(tiny(family_)), "all-linear")
    assert head not in found and all("proj" in n for n in found)


def test_fingerprint_sees_every_value(family: str, tiny: Any) -> None:
    """One changed entry of any matrix or plain tensor changes it; changing it back gives the first again."""
    model = weave(tiny(family))
    seen, first = set(), fingerprint(model)
    items = {**plain_tensors(model), **{n: e.w for n, e in expressions(model).items()}}
    floats = {id(t): t for t in items.values() if t.is_floating_point()}
    for t in floats.values():
        flat = t.data.reshape(-1)
        old = flat[-1].clone()
        flat[-1] += 1
        seen.add(fingerprint(model))
        flat[-1] = old
    assert len(seen) == len(floats) and first not in seen and fingerprint(model) == first


def test_fingerprint_does_not_see_order(tiny: Any) -> None:
    """The same rewrites in another order, or in a fork, have one fingerprint."""
    a, b = weave(tiny()), weave(tiny())
    for at in ("q_proj", "up_proj"):
        apply(a, [Step.of("rtn")], at=at)
    for at in ("up_proj", "q_proj"):
        apply(b, [Step.of("rtn")], at=at)
    assert fingerprint(a) == fingerprint(b) == fingerprint(fork(a)) == fingerprint(copy.deepcopy(b))
    apply(b, [Step.of("rtn", bits=5)], at="layers.1.*.k_proj")
    assert fingerprint(a) != fingerprint(b)


def test_deepcopy_is_independent(family: str, tiny: Any, batches: Any, run: Any) -> None:
    """A deep copy computes the same, stays tied, and changing it changes nothing else."""
    model, batch = weave(tiny(family)), batches(1)[0]
    before, mark = run(model, batch), fingerprint(model)
    other = copy.deepcopy(model)
    assert torch.equal(run(other, batch), before)
    apply(other, [Step.of("rtn", bits=2)])
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.tie_weights()
    assert fingerprint(model) == mark and torch.equal(run(model, batch), before)
    if family == "llama-tied":
        assert other.lm_head.expr is other.model.embed_tokens.expr


def test_cast_equals_the_plain_models(family: str, tiny: Any, batches: Any, run: Any) -> None:
    """`.to(bfloat16)` before or after weaving is the same model."""
    batch = batches(1)[0]
    want = run(tiny(family).to(torch.bfloat16), batch)
    found = run(weave(tiny(family)).to(torch.bfloat16), batch)
    assert found.dtype == torch.bfloat16 and torch.equal(found, want)


@pytest.mark.parametrize("method", ["rtn", "nf4", "magnitude"])
def test_cast_cannot_damage_codes(method: str, tiny: Any, batches: Any, run: Any) -> None:
    """Packed codes survive a cast there and back; the output follows the dtype."""
    model, batch = weave(tiny("llama-tied")), batches(1)[0]
    apply(model, [Step.of(method)])
    before = {n: e.dense().to(torch.bfloat16) for n, e in expressions(model).items()}
    model.to(torch.bfloat16)
    assert run(model, batch).dtype == torch.bfloat16
    assert all(torch.equal(e.dense().to(torch.bfloat16), before[n]) for n, e in expressions(model).items())
