"""Several adapters on one model: which take part, how much, row by row, blended, replaced in place, merged and undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.tiny import build_tiny
from weft.error import ConflictError, OptionError, ShapeError
from weft.expr import Dense, LowRank, Quantized, SparseDelta, terms_of
from weft.expr.gated import Gated
from weft.model import set_expressions

IDS = torch.randint(0, 90, (3, 7), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """What is trainable, as if it had been trained."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g), alpha=0.1)
    return model


def two(base: str = "", **how: Any) -> nn.Module:
    """A model with adapters a, of rank 3, and b, of rank 2 on the attention alone."""
    model = weft.weave(build_tiny("llama", **how))
    if base:
        weft.apply(model, base, at="all-linear")
    weft.apply(model, "lora", name="a", rank=3)
    weft.apply(model, "lora", name="b", rank=2, at="*self_attn*")
    return moved(model)


def only(name: str, base: str = "") -> Tensor:
    """What the model gives that has never had another adapter than this one, with the numbers that it has in `two`."""
    model, plain = two(base), two(base)
    for site, expr in weft.expressions(model).items():
        kept = {r: t for r, t in terms_of(expr).items() if r in ("base", f"adapter:{name}")}
        set_expressions(plain, {site: weft_total(kept)})
    return logits(plain)


def weft_total(terms: dict[str, Any]) -> Any:
    from weft.expr import total

    return total(terms)


@pytest.mark.parametrize("base", ["", "rtn", "nf4"])
def test_those_that_are_active_take_part_alone(base: str) -> None:
    model = two(base)
    both = logits(model)
    for name in ("a", "b"):
        weft.activate(model, name)
        assert torch.equal(logits(model), only(name, base))
        assert [a.strength for a in weft.adapters(model).values()] == [float(name == "a"), float(name == "b")]
    weft.activate(model, [])
    plain = weft.weave(build_tiny("llama"))
    if base:
        weft.apply(plain, base, at="all-linear")
    assert torch.equal(logits(model), logits(plain))
    weft.activate(model, ["a", "b"])
    torch.testing.assert_close(logits(model), both)


def test_a_strength_multiplies() -> None:
    model, plain = two(), two()
    weft.activate(model, {"a": 0.25, "b": -2.0})
    by = {"adapter:a": 0.25, "adapter:b": -2.0}
    for site, expr in weft.expressions(plain).items():
        terms = {r: Dense(t.dense().detach().double() * by.get(r, 1)) for r, t in terms_of(expr).items()}
        set_expressions(plain, {site: Dense(sum(t.dense() for t in terms.values()).float())})
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)


def test_what_is_off_has_no_gradient() -> None:
    model = two()
    weft.activate(model, "b")
    model(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad and p.grad is not None:
            assert bool(p.grad.any()) == ("adapter:b" in name), name
    assert not any(isinstance(e, Gated) and e.g.requires_grad for e in model.modules())


def test_switching_writes_one_number(tmp_path: Path) -> None:
    """All sites hold one gate: expressions stay the same objects, and a compiled model is not compiled again."""
    model = two()
    weft.activate(model, "a")
    held = weft.expressions(model)
    gates = {id(e.g) for e in model.modules() if isinstance(e, Gated)}
    weft.activate(model, "b")
    assert all(weft.expressions(model)[n] is e for n, e in held.items()) and len(gates) == 2
    count = torch._dynamo.utils.counters
    count.clear()
    run = torch.compile(model, backend="eager", fullgraph=False)
    with torch.no_grad():
        run(IDS)
        before = count["stats"]["unique_graphs"]
        weft.activate(model, "a")
        made = run(IDS).logits
    assert count["stats"]["unique_graphs"] == before
    torch.testing.assert_close(made, only("a"))


@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_every_row_may_have_its_own(mode: Any) -> None:
    model = two("nf4")
    weft.mode(model, mode)
    want = []
    for names in ("a", (), {"a": 0.5, "b": 2.0}):
        weft.activate(model, names)
        want.append(logits(model))
    weft.activate(model, "b")
    before = logits(model)
    with weft.per_row(model, ["a", None, {"a": 0.5, "b": 2.0}]):
        made = logits(model)
    for i in range(3):
        torch.testing.assert_close(made[i], want[i][i], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), before)


def test_rows_generate_as_they_would_alone() -> None:
    model = two()
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with weft.per_row(model, ["a", None, "b"]):
        made = model.generate(IDS, **how)
        with pytest.raises(ShapeError, match="cannot be told"):
            model.generate(IDS, **{**how, "num_beams": 2})
        with pytest.raises(ShapeError, match="cannot be told"):
            model(IDS[:2])
    for i, names in enumerate(("a", (), "b")):
        weft.activate(model, names)
        assert torch.equal(made[i], model.generate(IDS[i : i + 1], **how)[0])


def test_rows_that_cannot_be_told_are_refused() -> None:
    model = weft.weave(build_tiny("llama"))
    weft.apply(model, "lora", magnitude=True)
    with pytest.raises(ConflictError, match="around the weight"), weft.per_row(model, ["default"]):
        pass
    with pytest.raises(ConflictError, match="on or off"):
        weft.activate(model, {"default": 0.5})
    weft.activate(model, "default")
    model = two()
    weft.apply(model, "prompt", name="p")
    with pytest.raises(ConflictError, match="knows no branches"), weft.per_row(model, ["a", "a", "a"]):
        pass
    with pytest.raises(OptionError, match="no such adapter"):
        weft.activate(model, "c")
    with pytest.raises(OptionError, match="not finite"):
        weft.activate(model, {"a": float("nan")})
    with pytest.raises(ConflictError, match="on or off"):
        weft.activate(model, {"p": 0.5})


def test_branches_are_adapters_too(tmp_path: Path) -> None:
    model = two()
    want = logits(model)
    weft.apply(model, "prefix", name="p", length=4)
    moved(model)
    with_all = logits(model)
    weft.activate(model, ["a", "b"])
    off = logits(model)
    assert weft.adapters(model)["p"].strength == 0 and not torch.equal(off, with_all)
    weft.save(model, tmp_path / "m")
    again = weft.load(tmp_path / "m")
    assert torch.equal(logits(again), off) and weft.adapters(again)["p"].strength == 0
    weft.activate(again, ["a", "b", "p"])
    assert torch.equal(logits(again), with_all)
    assert weft.delete_adapter(again, "p") == ["model:p"] and list(weft.adapters(again)) == ["a", "b"]
    assert not torch.equal(want, off)  # `moved` moved a and b once more


def test_strengths_and_sharing_are_saved(tmp_path: Path) -> None:
    model = two("nf4")
    weft.activate(model, {"a": 0.5})
    weft.save(model, tmp_path / "m")
    again = weft.load(tmp_path / "m")
    assert torch.equal(logits(again), logits(model))
    assert {n: a.strength for n, a in weft.adapters(again).items()} == {"a": 0.5, "b": 0.0}
    assert len({id(e.g) for e in again.modules() if isinstance(e, Gated)}) == 2
    other = weft.fork(again)
    weft.activate(other, "b")
    assert weft.adapters(again)["a"].strength == 0.5


def test_deleting_leaves_what_was_there() -> None:
    model = two("rtn")
    weft.activate(model, "b")
    want = logits(model)
    weft.delete_adapter(model, "a")
    assert torch.equal(logits(model), want) and list(weft.adapters(model)) == ["b"]
    weft.rename_adapter(model, "b", "c")
    assert torch.equal(logits(model), want) and list(weft.adapters(model)) == ["c"]
    weft.delete_adapter(model, "c")
    assert all(isinstance(e, Dense | Quantized) for e in weft.expressions(model).values())


def test_a_start_goes_with_its_adapter() -> None:
    model = weft.weave(build_tiny("llama"))
    base = logits(model)
    weft.apply(model, "lora", name="p", rank=3, init="pissa")
    moved(model)
    want = logits(model)
    weft.rename_adapter(model, "p", "q")
    weft.activate(model, [])
    torch.testing.assert_close(logits(model), base)
    weft.activate(model, "q")
    torch.testing.assert_close(logits(model), want)
    weft.delete_adapter(model, "q")
    assert torch.equal(logits(model), base)


def test_a_linear_blend_is_the_sum() -> None:
    """Of low-rank terms one of both ranks; of sparse and other ones what they are; never a matrix."""
    model = two("nf4")
    site = "model.layers.0.self_attn.q_proj.weight"
    now = weft.expressions(model)[site]
    values = torch.zeros(now.shape).index_put((torch.tensor([0, 3]), torch.tensor([1, 2])), torch.tensor([2.0, -1.0]))
    sparse = SparseDelta.of(values, values != 0)
    set_expressions(model, {site: weft_total({**terms_of(now), "adapter:s": sparse})})
    weft.activate(model, {"a": 0.5, "b": -1.0, "s": 2.0})
    want = logits(model)
    assert len(weft.blend_adapters(model, {"a": 0.5, "b": -1.0, "s": 2.0}, "mix")) == 14
    weft.activate(model, "mix")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    terms = terms_of(weft.expressions(model)["model.layers.0.self_attn.k_proj.weight"])
    low = terms["adapter:mix"].kept if isinstance(terms["adapter:mix"], Gated) else terms["adapter:mix"]
    assert isinstance(low, LowRank) and low.a.shape[0] == 5 and isinstance(terms["base"], Quantized)
    weft.blend_adapters(model, {"a": 1.0}, "same")
    weft.activate(model, "same")
    torch.testing.assert_close(logits(model), only("a", "nf4"))


def test_blends_by_a_merge() -> None:
    """TIES of two adapters, against the formula; cut to a rank, the best of that rank."""
    model = two()
    site = "model.layers.1.self_attn.v_proj.weight"
    terms = terms_of(weft.expressions(model)[site])
    deltas = torch.stack([terms[f"adapter:{n}"].dense().detach() for n in "ab"])
    weft.blend_adapters(model, {"a": 1.0, "b": 1.0}, "t", "ties", density=1.0)
    sign = torch.sign(deltas.sum(0))
    same = torch.sign(deltas) == sign
    want = (deltas * same).sum(0) / same.sum(0).clamp(min=1)
    got = terms_of(weft.expressions(model)[site])["adapter:t"].dense()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    weft.blend_adapters(model, {"a": 1.0, "b": 1.0}, "t2", "ties", rank=2, density=1.0)
    small = terms_of(weft.expressions(model)[site])["adapter:t2"]
    u, s, v = torch.linalg.svd(want)
    assert isinstance(small, LowRank)
    torch.testing.assert_close(small.dense(), u[:, :2] * s[:2] @ v[:2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"weights": {"x": 1.0}}, OptionError, "no such adapter"),
        ({"weights": {}}, OptionError, "blend nothing"),
        ({"into": "a"}, ConflictError, "has this name"),
        ({"into": "no name"}, OptionError, "this name"),
        ({"method": "rtn"}, OptionError, "merges nothing"),
        ({"rank": 3}, OptionError, "no options"),
    ],
)
def test_blends_that_cannot_be_are_refused(given: dict[str, Any], error: type[Exception], text: str) -> None:
    model = two()
    with pytest.raises(error, match=text):
        weft.blend_adapters(model, **{"weights": {"a": 1.0}, "into": "mix", **given})
    assert list(weft.adapters(model)) == ["a", "b"]


@pytest.mark.parametrize("to", ["dense", "bf16", "grid"])
def test_a_merge_is_undone_to_the_bit(to: Any) -> None:
    model = two("rtn")
    want, before = logits(model), weft.expressions(model)
    made = weft.merge(model, to=to)
    assert not any("adapter" in e.describe() for e in weft.expressions(model).values())
    if to == "bf16":
        assert all(
            e.w.dtype == torch.bfloat16 for n, e in weft.expressions(model).items() if n in {s.name for s in made}
        )
    made.undo()
    assert torch.equal(logits(model), want)
    assert all(weft.expressions(model)[n] is e for n, e in before.items())
    made = weft.merge(model, to=to)
    weft.apply(model, "rtn", at="*q_proj*")
    with pytest.raises(ConflictError, match="cannot be undone"):
        made.undo()


def test_an_adapter_is_replaced_in_place(folder: Callable[..., Path], tmp_path: Path) -> None:
    """Numbers are written, nothing else changes; a smaller rank fits, a larger one is refused and changes nothing."""
    place = folder(dtype=torch.float32)
    for name, how in {
        "r2": {"rank": 2, "alpha": 3.0},
        "r5": {"rank": 5},
        "attn": {"rank": 4, "at": "*self_attn*"},
    }.items():
        model = weft.load(place)
        weft.apply(model, "lora", **how)
        weft.export(moved(model, seed=len(name)), tmp_path / name, to="peft")
    model = weft.load(place)
    weft.attach(model, tmp_path / "attn", name="x")
    weft.apply(model, "lora", rank=4, name="slot")
    held = weft.expressions(model)
    for name in ("r2", "attn"):
        want = weft.load(place)
        weft.attach(want, tmp_path / name)
        weft.attach(model, tmp_path / name, name="slot", replace=True)
        weft.activate(model, {"slot": 1.0})
        torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)
        weft.activate(model, ["x", "slot"])
    assert held.keys() == weft.expressions(model).keys()
    before = logits(model)
    with pytest.raises(ConflictError, match="rank 5"):
        weft.attach(model, tmp_path / "r5", name="slot", replace=True)
    with pytest.raises(OptionError, match="no such adapter to replace"):
        weft.attach(model, tmp_path / "r2", name="new", replace=True)
    assert torch.equal(logits(model), before)


def test_one_adapter_is_exported_alone(folder: Callable[..., Path], tmp_path: Path) -> None:
    place = folder(dtype=torch.float32)
    model = weft.load(place)
    weft.apply(model, "lora", name="a", rank=3)
    weft.apply(model, "lora", name="b", rank=2)
    moved(model)
    weft.activate(model, {"b": 0.5})
    half = logits(model)
    weft.export(model, tmp_path / "all", to="peft")
    weft.export(model, tmp_path / "b", to="peft", adapter="b")
    weft.activate(model, "b")
    for name, want in {"all": half, "b": logits(model)}.items():
        again = weft.load(place)
        weft.attach(again, tmp_path / name)
        torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConflictError, match="of the name c"):
        weft.export(model, tmp_path / "c", to="peft", adapter="c")
