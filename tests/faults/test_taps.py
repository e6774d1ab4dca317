"""Taps in a stranger's manifest: what is not one is refused, with the model's other problems, before it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.engine.run import Step, apply
from weft.error import ConflictError, FormatError, NumericError, OptionError, ShapeError, WeftError
from weft.expr import NODES
from weft.model import Rounding, Tap, match, set_taps, taps, weave
from weft.store import load, save, verify
from weft.store.trees import expressions_of

from .edits import Edit, refused, table, tensors, unsealed

EDGE = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def folder(tiny: Any, place: Path) -> Path:
    """A weft folder whose inputs are turned and rounded; those of one site under a scale for good."""
    model = weave(tiny())
    apply(model, [Step.of("online_hadamard"), Step.of("act_quant"), Step.of("rtn")], at="all-linear")
    set_taps(model, {DOWN: Tap(taps(model)[DOWN].turns(), Rounding.static("int8", 2.0))})
    save(model, place)
    return unsealed(place)


def tap(change: Callable[[dict[str, Any]], Any], edge: str = EDGE) -> Edit:
    """Edit one tap of the manifest."""
    return table("weft.json", lambda m: change(m["taps"][edge]))


def rounding(**given: Any) -> Edit:
    """Change what a rounding says."""
    return tap(lambda t: t["round"].update(given))


def turn(**given: Any) -> Edit:
    """Change what a turn says."""
    return tap(lambda t: t["turn"][0].update(given))


def site(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Edit the manifest's sites."""
    return table("weft.json", lambda m: change(m["sites"]))


def signs(t: dict[str, Any]) -> Any:
    return t[f"{EDGE}:tap.turn.0.signs"]


FAULTS: dict[str, tuple[Edit, type[WeftError]]] = {
    "no taps": (table("weft.json", lambda m: m.pop("taps")), FormatError),
    "taps are a list": (table("weft.json", lambda m: m.update(taps=[1])), FormatError),
    "taps are a word": (table("weft.json", lambda m: m.update(taps="int8")), FormatError),
    "taps are nothing": (table("weft.json", lambda m: m.update(taps=None)), FormatError),
    "a tap that nobody reads": (table("weft.json", lambda m: m["taps"].update(x=m["taps"][EDGE])), FormatError),
    "a tap is missing": (table("weft.json", lambda m: m["taps"].pop(EDGE)), FormatError),
    "a tap is a word": (table("weft.json", lambda m: m["taps"].update({EDGE: "int8"})), FormatError),
    "a tap is empty": (table("weft.json", lambda m: m["taps"].update({EDGE: {}})), FormatError),
    "a reader of a list": (site(lambda s: s[EDGE].update(tap=[EDGE])), FormatError),
    "a reader of nothing": (site(lambda s: s[EDGE].pop("tap")), FormatError),
    "a reader without an expression": (site(lambda s: s[EDGE].pop("expr")), FormatError),
    "a tap within a tap": (site(lambda s: s[EDGE].update(expr=dict(s[EDGE]))), FormatError),
    "an embedding with a tap": (
        site(lambda s: s.update({"lm_head.weight": s["lm_head.weight"], "model.embed_tokens.weight": {
            "node": "Tapped", "tap": EDGE, "expr": s["model.embed_tokens.weight"]}})), ConflictError),
    "a tap of another size": (site(lambda s: s[DOWN].update(tap=EDGE)), FormatError),
    "a tap of another edge's size": (
        table("weft.json", lambda m: (m["sites"][DOWN].update(tap=EDGE), m["taps"].pop(DOWN))), FormatError),
    "an unknown key": (tap(lambda t: t.update(code="x")), FormatError),
    "turns are a table": (tap(lambda t: t.update(turn={})), FormatError),
    "a turn is a word": (tap(lambda t: t.update(turn=["Hadamard"])), FormatError),
    "a turn is another node": (tap(lambda t: t["turn"].__setitem__(0, {"node": "Dense"})), WeftError),
    "a turn is code": (turn(node="os.system"), FormatError),
    "a turn of another block": (turn(block=3), ShapeError),
    "a turn of no block": (turn(block=0), ShapeError),
    "a turn of many features": (turn(n=1 << 40), ShapeError),
    "a turn of more features": (turn(n=31, block=1), ShapeError),
    "a rounding is a word": (tap(lambda t: t.update(round="int8")), FormatError),
    "a rounding is nothing": (tap(lambda t: t.update(round=None)), FormatError),
    "an unknown grid": (rounding(grid="int99"), OptionError),
    "a grid is a list": (rounding(grid=["int8"]), ShapeError),
    "an unknown granularity": (rounding(per="row"), OptionError),
    "unknown scales": (rounding(scale="fp64"), OptionError),
    "a group of no size": (rounding(group=-1), ShapeError),
    "a group is true": (rounding(group=True), ShapeError),
    "a group is a word": (rounding(group="all"), ShapeError),
    "groups of a tensor": (rounding(per="tensor", group=4), ShapeError),
    "a rounding with more": (rounding(eval="1"), FormatError),
    "a rounding with less": (tap(lambda t: t["round"].pop("scale")), FormatError),
    "a scale that is not there": (rounding(per="static"), FormatError),
    "a scale that nobody asks for": (tap(lambda t: t["round"].update(per="token"), DOWN), FormatError),
    "no signs": (tensors(lambda t: t.pop(f"{EDGE}:tap.turn.0.signs"), "weft"), FormatError),
    "signs of another size": (
        tensors(lambda t: t.update({f"{EDGE}:tap.turn.0.signs": signs(t)[:-1].clone()}), "weft"), ShapeError),
    "signs are floats": (tensors(lambda t: t.update({f"{EDGE}:tap.turn.0.signs": signs(t).float()}), "weft"), ShapeError),
    "a tensor too many": (tensors(lambda t: t.update({f"{EDGE}:tap.turn.1.signs": signs(t).clone()}), "weft"), FormatError),
    "a tensor of no tap": (tensors(lambda t: t.update({"lm_head.weight:tap.round.data": signs(t).clone()}), "weft"), FormatError),
    "a scale of NaN": (
        tensors(lambda t: t.update({f"{DOWN}:tap.round.data": torch.tensor([192, 127], dtype=torch.uint8)}), "weft"), NumericError),
    "a scale of zero": (
        tensors(lambda t: t.update({f"{DOWN}:tap.round.data": torch.zeros(2, dtype=torch.uint8)}), "weft"), NumericError),
    "a scale below zero": (
        tensors(lambda t: t.update({f"{DOWN}:tap.round.data": torch.tensor([0, 191], dtype=torch.uint8)}), "weft"), NumericError),
    "a scale of three bytes": (
        tensors(lambda t: t.update({f"{DOWN}:tap.round.data": torch.ones(3, dtype=torch.uint8)}), "weft"), ShapeError),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_tap_is_refused(fault: str, tiny: Any, tmp_path: Path) -> None:
    """The right error, with what, where, got, want and fix."""
    place = folder(tiny, tmp_path / "model")
    edit, kind = FAULTS[fault]
    edit(place)
    refused(lambda: load(place), kind, tmp_path)


def test_the_folder_itself_is_sound(tiny: Any, tmp_path: Path) -> None:
    """What the faults begin with is loaded."""
    model = load(folder(tiny, tmp_path / "model"))
    assert len(taps(model)) == 14 and verify(tmp_path / "model") == []


def test_a_reader_that_knows_no_taps_refuses_them_by_name(tiny: Any, tmp_path: Path) -> None:
    """A tapped site is a node of its own kind, so that it cannot be taken for its weight."""
    place = folder(tiny, tmp_path / "model")
    sites = json.loads((place / "weft.json").read_text())["sites"]
    assert "Tapped" not in NODES
    _, _, problems = expressions_of(sites, {}, "model")
    assert sum("Tapped" in str(p) and p.what == "unknown node" for p in problems) == 14


def test_all_problems_of_taps_come_together(tiny: Any, tmp_path: Path) -> None:
    """Two faulty taps are told of at once, each by its edge."""
    place = folder(tiny, tmp_path / "model")
    for edit in (tap(lambda t: t.update(code=1)), tap(lambda t: t.update(turn=7), DOWN)):
        edit(place)
    text = str(refused(lambda: load(place), FormatError, tmp_path))
    assert EDGE in text and DOWN in text


def test_what_a_manifest_leaves_out_is_no_tap(tiny: Any, tmp_path: Path) -> None:
    """A model without taps has no such key, and is what it always was."""
    model = weave(tiny())
    apply(model, [Step.of("rtn")])
    save(model, tmp_path / "out")
    assert "taps" not in json.loads((tmp_path / "out" / "weft.json").read_text())
    assert not taps(load(tmp_path / "out")) and match(model, "all-linear")
