"""What adapters on compressed bases get silently wrong elsewhere: each case, by what it should give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.tiny import build_tiny
from weft.engine import get, names
from weft.error import ConflictError, OptionError
from weft.expr import terms_of
from weft.model import fingerprint, places

IDS = torch.randint(0, 90, (3, 7), generator=torch.Generator().manual_seed(5))
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("rtn", {"bits": 8, "group": 0}),
    "int4": ("rtn", {"bits": 4, "group": 16, "symmetric": False}),
    "nf4": ("nf4", {"group": 16, "double": True}),
    "2:4": ("magnitude", {"pattern": "2:4"}),
}
NAMED = [
    n for n in names()
    if get(n).verb == "adapt" and get(n).kind == "rewrite" and "name" in get(n).options.model_fields and not get(n).needs
    and n not in ("ia3", "oft")
]  # fmt: skip
"""Adapters that are terms, and can be made without data."""
SMALL = {"rank": 3, "count": 40, "factor": 4, "features": 5, "block": 4}
SITE = "model.layers.0.self_attn.q_proj.weight"


def model(base: str = "", **how: Any) -> nn.Module:
    made = weft.weave(build_tiny("llama", **how))
    if base:
        weft.apply(made, BASES[base][0], at="all-linear", **BASES[base][1])
    return made


def options(method: str) -> dict[str, Any]:
    return {k: v for k, v in SMALL.items() if k in get(method).options.model_fields}


def stirred(of: nn.Module, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in of.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g), alpha=0.05)
    return of


def logits(of: nn.Module) -> Tensor:
    with torch.no_grad():
        return of(IDS).logits


def trainable(of: nn.Module) -> int:
    return sum(p.numel() for p in of.parameters() if p.requires_grad)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", [*NAMED, "oft", "ia3"])
def test_s1_s2_codes_are_never_taken_for_weights(method: str, base: str) -> None:
    """At the start the output is the base's; merged, that of the sum."""
    made = model(base)
    before = logits(made)
    weft.apply(made, method, **options(method))
    torch.testing.assert_close(logits(made), before, rtol=1e-4, atol=1e-5)
    want = logits(stirred(made))
    assert float((want - before).abs().max()) > 1e-3
    weft.merge(made, to="dense")
    torch.testing.assert_close(logits(made), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", [*NAMED, "oft", "ia3"])
def test_s3_an_adapter_is_as_large_as_on_plain_weights(method: str, base: str) -> None:
    """Its sizes are those of the matrix, not of packed bytes; with DoRA too (S4: no option is dropped)."""
    for more in ({}, {"magnitude": True}) if method == "lora" else ({},):
        sizes: list[int] = []
        for where in ("", base):
            made = model(where)
            weft.apply(made, method, **options(method), **more)
            sizes.append(trainable(made))
        assert sizes[0] == sizes[1] > 0 or (method == "sparse" and base == "2:4" and 0 < sizes[1] <= sizes[0])


def test_s4_s5_an_option_that_is_not_known_is_refused() -> None:
    for wrong in ({"use_qalora": True}, {"kasa_config": 1}, {"rank": 4.5}, {"init": "gaussian"}):
        with pytest.raises(OptionError):
            weft.apply(model("int4"), "lora", **wrong)


def test_s6_magnitudes_are_merged_too() -> None:
    made = model("int8")
    weft.apply(made, "lora", rank=3, magnitude=True)
    want = stirred(made, 1)
    value = weft.expressions(want)[SITE].dense().detach()
    told = {c.name: c.error for c in weft.merge(made, to="grid")}
    now = weft.expressions(made)[SITE].dense()
    gap = float((now - value).norm() / value.norm())
    assert gap < 0.01 and told[SITE] == pytest.approx(gap, rel=1e-3)


@pytest.mark.parametrize("method", NAMED)
def test_s7_one_adapter_at_strength_one_is_itself(method: str) -> None:
    """Whatever its kind and its scale."""
    made = model("nf4")
    weft.apply(made, method, name="a", **options(method))
    want = logits(stirred(made))
    weft.blend_adapters(made, {"a": 1.0}, "b")
    weft.activate(made, "b")
    torch.testing.assert_close(logits(made), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [*NAMED, "oft", "ia3", "prefix"])
def test_s8_rows_have_their_own_adapter_or_it_is_refused(method: str) -> None:
    made = model("int4")
    weft.apply(made, method, **options(method))
    want, name = logits(stirred(made)), next(iter(weft.adapters(made)), None)
    if method in ("oft", "ia3", "prefix"):  # a factor of the weight, or a branch
        with pytest.raises((OptionError, ConflictError)), weft.per_row(made, [name, None, None]):
            pass
        return
    weft.activate(made, [])
    off = logits(made)
    with weft.per_row(made, [name, None, name]):
        got = logits(made)
    for i, rows in enumerate((want, off, want)):
        torch.testing.assert_close(got[i], rows[i], rtol=1e-4, atol=1e-5)


def test_s9_two_rotations_merge_to_what_they_were() -> None:
    made = model("int4")
    for seed in (0, 1):
        weft.apply(made, "oft", block=4)
        stirred(made, seed)
    want = logits(made)
    weft.merge(made, to="dense")
    torch.testing.assert_close(logits(made), want, rtol=1e-3, atol=1e-4)


def test_s10_a_tied_head_is_one_weight() -> None:
    """An adapter on it is on both uses, merged or not."""
    made = weft.weave(build_tiny("llama-tied"))
    tied = next(n for n, p in places(made).items() if len(p.modules) > 1)
    weft.apply(made, "lora", at=tied, rank=3)
    want = logits(stirred(made))
    weft.merge(made, to="dense")
    torch.testing.assert_close(logits(made), want, rtol=1e-3, atol=1e-4)
    assert made.get_input_embeddings().expr is made.get_output_embeddings().expr


def test_s12_merging_and_undoing_is_exact_any_number_of_times() -> None:
    made = model("int4")
    weft.apply(made, "lora", rank=3)
    was = fingerprint(stirred(made))
    for to in ("grid", "dense", "bf16") * 7:
        weft.merge(made, to=to).undo()  # type: ignore[arg-type]
    assert fingerprint(made) == was


def test_s13_two_adapters_are_rounded_once() -> None:
    """The sum is rounded, not one after the other: no further off than either order of merging."""
    made = model("int4")
    for i, name in enumerate("ab"):
        weft.apply(made, "lora", rank=3, name=name)
        stirred(made, i)
    value = weft.expressions(made)[SITE].dense().detach()
    terms = terms_of(weft.expressions(made)[SITE])
    weft.merge(made, to="grid")
    once = float((weft.expressions(made)[SITE].dense() - value).norm())
    twice = model("int4")
    for name in "ab":
        now = weft.expressions(twice)[SITE]
        weft.model.set_expressions(twice, {SITE: type(weft.expressions(model())[SITE])(now.dense().detach())})
        merged = weft.expressions(twice)[SITE].dense() + terms[f"adapter:{name}"].dense().detach()
        weft.model.set_expressions(twice, {SITE: type(weft.expressions(model())[SITE])(merged)})
        weft.apply(twice, BASES["int4"][0], at=SITE, **BASES["int4"][1])
    assert once <= float((weft.expressions(twice)[SITE].dense() - value).norm())


def test_s14_zeros_that_a_merge_fills_are_told() -> None:
    made = model("2:4")
    weft.apply(made, "lora", rank=3)
    told = weft.merge(stirred(made), to="dense")
    assert all("zeros" in c.lost for c in told)
    made = model("2:4")
    weft.apply(made, "sparse", rank=3)
    merged = stirred(made)
    weft.merge(merged, to="dense")
    value = weft.expressions(merged)[SITE].dense()
    assert float((value == 0).float().mean()) >= 0.5


def test_s15_an_adapter_that_is_taken_off_leaves_the_base_as_it_was() -> None:
    for init in ("pissa", "olora"):
        made = model("int4")
        was = fingerprint(made)
        weft.apply(made, "lora", rank=3, init=init)
        weft.delete_adapter(stirred(made), "default")
        assert fingerprint(made) == was
