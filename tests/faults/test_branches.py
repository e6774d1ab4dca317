"""Branches in a stranger's manifest: what is not one, or not the model's, is refused before it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft.error import ConflictError, FormatError, NumericError, OptionError, ShapeError, WeftError
from weft.model import branches, weave
from weft.store import load, save, verify
from weft.store.trees import branches_of

from .edits import Edit, refused, table, tensors, unsealed

PROMPT, KEYS = "model:branch.default.vectors", "model:branch.two.keys"


def folder(tiny: Any, place: Path) -> Path:
    """A weft folder of plain weights with a prompt, and a prefix around it."""
    model = weave(tiny())
    weft.apply(model, "prompt", length=3)
    weft.apply(model, "prefix", length=2, name="two")
    save(model, place)
    return unsealed(place)


def entry(change: Callable[[dict[str, Any]], Any], which: int = 0) -> Edit:
    """Edit one branch of the manifest."""
    return table("weft.json", lambda m: change(m["branches"][which]))


def listed(change: Callable[[list[Any]], Any]) -> Edit:
    """Edit the list of branches."""
    return table("weft.json", lambda m: change(m["branches"]))


def held(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Replace a branch's tensor."""
    return tensors(lambda t: t.update({name: change(t[name]).contiguous()}), "weft")


def broken(t: torch.Tensor) -> torch.Tensor:
    t.view(-1)[1] = torch.nan
    return t


FAULTS: dict[str, tuple[Edit, type[WeftError]]] = {
    "no branches": (table("weft.json", lambda m: m.pop("branches")), FormatError),
    "branches are a table": (table("weft.json", lambda m: m.update(branches={"model": 1})), FormatError),
    "branches are nothing": (table("weft.json", lambda m: m.update(branches=None)), FormatError),
    "a branch is a word": (listed(lambda b: b.append("Prompt")), FormatError),
    "a branch is empty": (listed(lambda b: b.append({})), FormatError),
    "a branch is missing": (listed(lambda b: b.pop()), FormatError),
    "a branch is there twice": (listed(lambda b: b.append(dict(b[0]))), FormatError),
    "an unknown branch": (entry(lambda b: b.update(branch="Adapter")), FormatError),
    "a branch is code": (entry(lambda b: b.update(branch="os.system")), FormatError),
    "a branch is a list": (entry(lambda b: b.update(branch=["Prompt"])), FormatError),
    "a branch of another kind": (entry(lambda b: b.update(branch="Prefix")), FormatError),
    "a branch without a name": (entry(lambda b: b.pop("name")), FormatError),
    "a name is a number": (entry(lambda b: b.update(name=3)), FormatError),
    "a name is another": (entry(lambda b: b.update(name="three")), FormatError),
    "a name with a dot": (entry(lambda b: b.update(name="default.vectors")), FormatError),
    "a place is a list": (entry(lambda b: b.update(at=["model"])), FormatError),
    "another place": (entry(lambda b: b.update(at="model.layers.0")), FormatError),
    "a field more": (entry(lambda b: b.update(eval="1")), FormatError),
    "a deeper place, its tensors too": (
        lambda f: (entry(lambda b: b.update(at="model.layers.0"))(f), renamed("model.layers.0:branch.default.vectors")(f)), ConflictError),
    "no such place, its tensors too": (
        lambda f: (entry(lambda b: b.update(at="nowhere"))(f), renamed("nowhere:branch.default.vectors")(f)), OptionError),
    "no vectors": (tensors(lambda t: t.pop(PROMPT), "weft"), FormatError),
    "a tensor too many": (tensors(lambda t: t.update({"model:branch.default.more": torch.ones(2)}), "weft"), FormatError),
    "a tensor of no branch": (tensors(lambda t: t.update({"model:branch.three.keys": torch.ones(2)}), "weft"), FormatError),
    "vectors of another width": (held(PROMPT, lambda t: t[:, 1:]), ShapeError),
    "vectors of no token": (held(PROMPT, lambda t: t[:0]), ShapeError),
    "too many vectors": (held(PROMPT, lambda t: t.repeat(30, 1)), ShapeError),
    "one row of vectors": (held(PROMPT, lambda t: t[0]), ShapeError),
    "vectors are whole numbers": (held(PROMPT, lambda t: t.to(torch.int32)), ShapeError),
    "a vector of NaN": (held(PROMPT, broken), NumericError),
    "keys of fewer layers": (held(KEYS, lambda t: t[:1]), ShapeError),
    "keys of other heads": (held(KEYS, lambda t: t.repeat(1, 2, 1, 1)), ShapeError),
    "keys of another size": (held(KEYS, lambda t: t[..., 1:]), ShapeError),
    "keys of more tokens than values": (held(KEYS, lambda t: t.repeat(1, 1, 2, 1)), ShapeError),
    "an infinite key": (held(KEYS, lambda t: t / 0), NumericError),
}  # fmt: skip


def renamed(name: str) -> Edit:
    """Give the prompt's vectors another name."""
    return tensors(lambda t: t.update({name: t.pop(PROMPT)}), "weft")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_branch_is_refused(fault: str, tiny: Any, tmp_path: Path) -> None:
    """The right error, with what, where, got, want and fix."""
    place = folder(tiny, tmp_path / "model")
    edit, kind = FAULTS[fault]
    edit(place)
    refused(lambda: load(place), kind, tmp_path)


def test_the_folder_itself_is_sound(tiny: Any, tmp_path: Path) -> None:
    """What the faults begin with is loaded, in order."""
    model = load(folder(tiny, tmp_path / "model"))
    assert [b.name for b in branches(model)] == ["default", "two"] and verify(tmp_path / "model") == []


def test_a_changed_vector_is_noticed(tiny: Any, tmp_path: Path) -> None:
    """By its sum, as a weight's is."""
    model = weave(tiny())
    weft.apply(model, "prompt")
    save(model, tmp_path / "model")
    held(PROMPT, lambda t: t + 1)(tmp_path / "model")
    assert PROMPT in str(refused(lambda: load(tmp_path / "model"), WeftError, tmp_path))


def test_a_reader_that_knows_no_branches_finds_too_many_tensors(tiny: Any, tmp_path: Path) -> None:
    """So a model is never taken for the one without; a model without has no such key."""
    place = folder(tiny, tmp_path / "model")
    said = json.loads((place / "weft.json").read_text())
    assert [b["branch"] for b in said.pop("branches")] == ["Prompt", "Prefix"]
    (place / "weft.json").write_text(json.dumps(said))
    assert PROMPT in str(refused(lambda: load(place), FormatError, tmp_path))
    model = weave(tiny())
    weft.apply(model, "rtn")
    save(model, tmp_path / "out")
    assert "branches" not in json.loads((tmp_path / "out" / "weft.json").read_text())


def test_all_problems_of_branches_come_together() -> None:
    """Two faulty branches are told of at once, each by its place and name."""
    said = [{"branch": "Prompt", "at": "model", "name": n} for n in ("one", "two")]
    _, _, problems = branches_of({"branches": said}, {"model:branch.two.vectors": torch.ones(3)}, "x")
    assert len(problems) == 2 and "branch.one" in str(problems[0]) and "branch.two" in str(problems[1])
