"""Merges that measure more than one weight: by formulas over all numbers in scope, once, in whatever order, streamed too."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_tiny
from torch import Tensor, nn

import weft
from weft.engine.run import Step
from weft.error import OptionError
from weft.methods.merge import slerp as slerp_file
from weft.methods.merge import ties as ties_file
from weft.model import expressions, plain_tensors

SCOPES = ["weight", "layer", "model"]
Held = dict[str, Tensor]


def family(count: int) -> list[nn.Module]:
    """A base and members near it; how near differs from weight to weight."""
    made: list[nn.Module] = []
    for i in range(count + 1):
        model, g = build_tiny("llama", layers=2), torch.Generator().manual_seed(i)
        for k, p in enumerate(model.parameters()):
            p.data += (0.01 + 0.03 * (k % 3)) * torch.randn(p.shape, generator=g) if i else 0
        made.append(weft.weave(model))
    return made


def values(model: nn.Module) -> Held:
    """Everything, in float64."""
    held = {n: e.dense() for n, e in expressions(model).items()} | plain_tensors(model)
    return {n: t.detach().double() for n, t in held.items()}


def groups(held: Held, scope: str) -> list[list[str]]:
    """The names that are measured together."""
    if scope == "model":
        return [list(held)]
    layers = [[n for n in held if n.startswith(f"model.layers.{i}.")] for i in range(2)]
    alone = [[n] for n in held if scope == "weight" or not n.startswith("model.layers.")]
    return alone if scope == "weight" else layers + alone


def flat(held: Held, names: list[str]) -> Tensor:
    return torch.cat([held[n].flatten() for n in names])


def whole(base: Held, members: list[Held], scope: str, merge: Any) -> Held:
    """A merge of plain vectors, group by group."""
    made: Held = {}
    for names in groups(base, scope):
        value = merge(flat(base, names), [flat(m, names) for m in members])
        made |= {
            n: part.view(base[n].shape)
            for n, part in zip(names, value.split([base[n].numel() for n in names]), strict=True)
        }
    return made


def arc(_: Tensor, members: list[Tensor]) -> Tensor:
    x, y = members
    angle = torch.arccos(x @ y / (x.norm() * y.norm()))
    return (torch.sin(0.25 * angle) * x + torch.sin(0.75 * angle) * y) / torch.sin(angle)


def elected(base: Tensor, members: list[Tensor]) -> Tensor:
    kept = []
    for m in members:
        d = m.float() - base.float()
        d = d.double()
        least = d.abs().topk(max(1, round(0.3 * d.numel()))).values[-1]
        kept.append(torch.where(d.abs() >= least, d, 0.0))
    d = torch.stack(kept)
    agree = (d.sign() == d.sum(0).sign()) & (d != 0)
    return base + torch.where(agree, d, 0.0).sum(0) / agree.sum(0).clamp(min=1)


def stock(base: Tensor, members: list[Tensor]) -> Tensor:
    d = [m - base for m in members]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.combinations(d, 2)]
    c, k = max(0.0, sum(cosines) / len(cosines)), len(d)
    return base + k * c / (1 + (k - 1) * c) * sum(d) / k


CASES: dict[str, tuple[int, dict[str, Any], Any]] = {
    "slerp": (2, {"weights": [1.0, 3.0]}, arc),
    "ties": (3, {"density": 0.3}, elected),
    "model_stock": (3, {}, stock),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", CASES)
def test_all_in_scope_is_one_vector(method: str, scope: Any) -> None:
    """The formula over the numbers of a weight, a layer or the model in one row; members in any order; scopes differ."""
    count, how, merge = CASES[method]
    base, *members = family(count)
    given = {**how, **({} if method == "slerp" else {"base": base})}
    made = values(weft.combine(members, method, scope=scope, **given))
    want = whole(values(base), [values(m) for m in members], scope, merge)
    assert made.keys() == want.keys()
    for name, t in made.items():
        torch.testing.assert_close(t, want[name], rtol=2e-5, atol=2e-6, msg=name)
    turned = {**given, **({"weights": [3.0, 1.0]} if "weights" in given else {})}
    again = values(weft.combine(members[::-1], method, scope=scope, **turned))
    if method != "slerp":
        assert all(torch.equal(t, made[n]) for n, t in again.items())
    if scope != "weight":
        alone = values(weft.combine(members, method, **given))
        assert any(not torch.allclose(t, made[n], atol=1e-6) for n, t in alone.items())


@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_it_is_measured_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model, not for every weight of it."""
    count, how, _ = CASES[method]
    base, *members = family(count)
    asked: list[int] = []
    file, name = (slerp_file, "_products") if method == "slerp" else (ties_file, "_bounds")
    measure = getattr(file, name)
    monkeypatch.setattr(file, name, lambda *a: asked.append(1) or measure(*a))
    weft.combine(members, method, scope="model", **how, **({} if method == "slerp" else {"base": base}))
    assert len(asked) == (1 if method == "slerp" else count)


def test_weights_with_options_of_their_own_share_no_measures() -> None:
    """Each chooses by its own share of all in scope."""
    base, *members = family(3)
    head, near = "lm_head.weight", {n: Step.of("ties", density=d, scope="model") for n, d in ((0, 0.3), (1, 0.8))}
    made = weft.merging.combined(
        members, "ties", base=base, scope="model", per=lambda n: (near[n == head], [1.0, 1.0, 1.0])
    ).model
    few, many = (weft.combine(members, "ties", base=base, scope="model", density=d) for d in (0.3, 0.8))
    for name, e in expressions(made).items():
        assert torch.equal(e.dense(), expressions(many if name == head else few)[name].dense())


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_streamed_it_is_the_same(scope: str, tmp_path: Path) -> None:
    """Byte for byte; and what is measured counts for what a weight was made from."""
    base, *members = family(3)
    for i, m in enumerate((base, *members)):
        weft.save(m, tmp_path / f"m{i}")
    loaded = [weft.load(tmp_path / f"m{i}") for i in range(4)]
    how: dict[str, Any] = {"base": loaded[0], "scope": scope, "rescale": "size", "density": 0.3}
    weft.save(weft.combine(loaded[1:], "ties", **how), tmp_path / "whole")
    weft.combine_to(tmp_path / "out", loaded[:0:-1], "ties", **how)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "out"))
    assert one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())
    plan = weft.merging.planned(loaded[1:], "ties", **how).plan
    name = "model.layers.0.mlp.up_proj.weight"
    value = plan.later(name, lambda _: None)
    assert value is not None and value.about is not None
    before = value.about()
    other = next(n for n in expressions(loaded[1]) if n.startswith("model.layers.0.") and n != name)
    expr = expressions(loaded[1])[other]
    with torch.no_grad():
        next(expr.parameters()).add_(1.0)
    value = weft.merging.planned(loaded[1:], "ties", **how).plan.later(name, lambda _: None)
    assert value is not None and value.about is not None and value.about() != before


def test_other_merges_have_no_scope() -> None:
    base, *members = family(2)
    with pytest.raises(OptionError, match="scope"):
        weft.combine(members, "soup", scope="model")
    with pytest.raises(OptionError, match="scope"):
        weft.combine(members, "ties", base=base, scope="block")
