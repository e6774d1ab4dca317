"""Merging loses what the grid loses, once; what is on the grid already stays, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft.engine.merge import regrid
from weft.expr import NM, Dense, LowRank, Masked, Quantized, Sum
from weft.linalg.grids import minmax, nearest

from .cases import logits, shake, values

MODELS = Callable[..., Path]
BASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "int3": [("rtn", {"bits": 3, "group": 16})],
    "int4 asymmetric": [("rtn", {"bits": 4, "group": 16, "symmetric": False})],
    "int8 channel": [("rtn", {"bits": 8, "group": 0})],
    "nf4": [("nf4", {"group": 16})],
    "2:4 int4": [("magnitude", {"pattern": "2:4"}), ("rtn", {"bits": 4, "group": 8})],
    "half zero int4": [("magnitude", {"sparsity": 0.5}), ("rtn", {"bits": 4, "group": 8, "symmetric": False})],
}


def build(place: Path, base: str) -> torch.nn.Module:
    model = weft.load(place)
    for name, options in BASES[base]:
        weft.apply(model, name, at="all-linear", **options)
    return model


@pytest.mark.parametrize("base", BASES)
def test_an_untrained_adapter_merges_into_the_same_bytes(folder: MODELS, base: str) -> None:
    model = build(folder(), base)
    before = {n: {k: t.clone() for k, t in e.state_dict().items()} for n, e in weft.expressions(model).items()}
    weft.apply(model, "lora", rank=2)
    changes = weft.merge(model, to="grid")
    after = {n: e.state_dict() for n, e in weft.expressions(model).items()}
    assert {n: e.describe() for n, e in weft.expressions(build(folder(), base)).items()} == {
        n: e.describe() for n, e in weft.expressions(model).items()
    }
    assert all(torch.equal(before[n][k], after[n][k]) for n in before for k in before[n])
    assert all(c.error == 0 and not c.lost for c in changes) and changes


@pytest.mark.parametrize("base", BASES)
def test_merging_keeps_grid_and_zeros_and_errs_no_more_than_one_rounding(folder: MODELS, base: str) -> None:
    model = shake(weft.apply(m := build(folder(), base), "lora", rank=2) and m)
    held = dict(weft.expressions(model))
    changes = {c.name: c for c in weft.merge(model, to="grid")}
    for name, expr in weft.expressions(model).items():
        old = held[name]
        if not isinstance(old, Sum):
            continue
        term, value = old.named()["base"], old.dense().detach()
        assert type(expr) is type(term) and expr.promises() == term.promises()
        mask = term.mask()
        assert mask is None or torch.equal(mask, expr.mask())
        gap = float((expr.dense() - value).norm() / value.norm())
        assert changes[name].error == pytest.approx(gap, rel=1e-4)
        if isinstance(term, Quantized):
            fit = minmax(value, term.grid, term.group, term.symmetric)
            rounded = Quantized.encode(nearest(value, fit), fit.scales, fit.zeros, grid=fit.name, group=fit.group)
            assert gap <= float((rounded.dense() - value).norm() / value.norm()) * (1 + 1e-5)


def test_several_adapters_are_one_rounding(folder: MODELS) -> None:
    model = build(folder(), "int3")
    for name in ("one", "two", "three"):
        weft.apply(model, "lora", rank=2, name=name)
    shake(model)
    want = {n: regrid(e).dense() for n, e in weft.expressions(model).items() if isinstance(e, Sum)}
    weft.merge(model, to="grid")
    got = values(model)
    assert want and all(torch.equal(got[n], w) for n, w in want.items())
    assert weft.merge(model, to="grid") == []


def test_dense_takes_the_checkpoints_dtype_and_says_what_is_lost(folder: MODELS) -> None:
    model = build(folder(dtype=torch.float32), "2:4 int4")
    weft.apply(model, "lora", rank=2)
    before = logits(shake(model))
    changes = weft.merge(model, to="dense")
    assert {c.lost for c in changes} == {("zeros", "2:4 pattern", "17 levels")}
    assert max(c.error for c in changes if c.error is not None) < 1e-6
    assert all(isinstance(weft.expressions(model)[c.name], Dense) for c in changes)
    assert torch.allclose(before, logits(model), atol=1e-4)
    model = build(folder(), "int3")
    weft.apply(model, "lora", rank=2)
    assert {c.after for c in weft.merge(model, to="dense")} == {"bfloat16"}


def test_a_base_without_a_grid_is_refused_by_name_and_nothing_changes(folder: MODELS) -> None:
    model = weft.load(folder())
    weft.apply(model, "rtn", at="*.mlp.*", bits=4, group=16)
    weft.apply(model, "lora", rank=2)
    held = dict(weft.expressions(model))
    with pytest.raises(weft.WeftError, match=r"self_attn\.q_proj") as e:
        weft.merge(model, to="grid")
    assert type(e.value).__name__ == "ConflictError"
    assert all(weft.expressions(model)[n] is x for n, x in held.items())
    assert len(weft.merge(model, to="grid", at="*.mlp.*")) == 6


def test_an_unknown_target_is_refused(folder: MODELS) -> None:
    with pytest.raises(weft.WeftError, match="dense, bf16 or grid"):
        weft.merge(weft.load(folder()), to="int4")  # type: ignore[arg-type]


def test_large_weights_merge_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(12, 32, dtype=torch.bool)
    mask[:, ::2] = True
    fit = minmax(value, "int4", 8, False)
    base = Quantized.encode(nearest(value, fit), fit.scales, fit.zeros, grid="int4", group=8)
    low = LowRank(torch.randn(12, 2), torch.randn(2, 32))
    kept = minmax(value[mask].view(12, 16), "int4", 8, False)
    codes = nearest(value[mask].view(12, 16), kept)
    inner = Quantized.encode(codes, kept.scales, kept.zeros, grid="int4", group=8)
    sums = [Sum({"base": b, "adapter:x": low}) for b in (base, Masked.of(value, mask).rebuild(kept=inner))]
    sums.append(Sum({"base": NM.of(value, mask, 1, 2).rebuild(kept=inner), "adapter:x": low}))
    whole = [regrid(s).dense() for s in sums]
    monkeypatch.setattr("weft.expr.base.CHUNK", 100)
    assert all(torch.equal(regrid(s).dense(), w) for s, w in zip(sums, whole, strict=True))
