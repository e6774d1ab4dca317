"""Deltas from strangers, and deltas half written: refused with all that is wrong, nothing changed, nothing left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weft
from weft.error import FormatError, WeftError
from weft.model import fingerprint
from weft.store import load

from .edits import Edit, cut, raw, refused, table, tensors

SITE = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, what was tuned from it, and both kinds of delta."""
    place = tmp_path_factory.mktemp("deltas")
    tiny(seed=0).save_pretrained(place / "base")
    tiny(seed=1).save_pretrained(place / "tuned")
    weft.diff(place / "base", place / "tuned", place / "terms", budget="20%")
    weft.diff(place / "base", place / "tuned", place / "bits", lossless=True)
    return place


def copied(folder: Path, to: Path, edit: Edit) -> Path:
    """A delta, edited."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    edit(to)
    return to


def unsummed(edit: Edit) -> Edit:
    """Without the sums by which a change of tensors is noticed: as a forger would have it."""

    def both(folder: Path) -> None:
        edit(folder)
        table("weft.json", lambda m: [f.pop("tensors", None) for f in m["files"].values()])(folder)

    return both


def first(change: Callable[[torch.Tensor], Any]) -> Edit:
    """Edit the first tensor of a delta's file."""
    return tensors(lambda held: change(held[sorted(held)[0]]), "weft")


def site(tree: Any) -> Edit:
    """Another expression for a weight."""
    return table("weft.json", lambda m: m["sites"].update({SITE: tree}))


def linked(name: str) -> Edit:
    """A file that is a link out of the folder."""

    def edit(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return edit


def template(folder: Path) -> None:
    """A file for the model's folder that the manifest does not list."""
    (folder / "chat_template.jinja").write_text("{{ evil }}")


EITHER: dict[str, Edit] = {
    "no manifest": lambda f: (f / "weft.json").unlink(),
    "another kind": table("weft.json", lambda m: m.update(kind="plain")),
    "a newer format": table("weft.json", lambda m: m.update(format=2)),
    "no base": table("weft.json", lambda m: m.update(base=None)),
    "a base of no seal": table("weft.json", lambda m: m["base"].pop("seal")),
    "another base": table("weft.json", lambda m: m["base"].update(seal="0" * 16)),
    "manifest cut off": cut("weft.json", 200),
    "manifest a link": linked("weft.json"),
    "a file cut off": cut("weft.safetensors", -8),
    "a file gone": lambda f: (f / "weft.safetensors").unlink(),
    "a file of something else": raw("weft.safetensors", b"no safetensors at all"),
    "a file that is a link": linked("weft.safetensors"),
    "a file that nobody listed": template,
    "a byte changed": first(lambda t: t.view(-1).view(torch.uint8)[:1].add_(1)),
}
TERMS: dict[str, Edit] = {
    "not finite": unsummed(
        tensors(lambda held: [t.fill_(torch.nan) for t in held.values() if t.is_floating_point()], "weft")
    ),
    "a tensor too many": unsummed(tensors(lambda held: held.update(more=torch.zeros(2)), "weft")),
    "a tensor too few": unsummed(tensors(lambda held: held.pop(sorted(held)[0]), "weft")),
    "an unknown node": site({"node": "Evil"}),
    "a node of other fields": site({"node": "LowRank", "scale": 1.0, "run": "rm"}),
    "no tree": site(7),
    "deep": site({"node": "Gated", "kept": {"node": "Gated", "kept": {}}}),
    "a giant": site({"node": "Basis", "kind": "random", "seed": 0, "m": 1 << 40, "n": 1 << 40, "scale": 1.0}),
    "sites gone": table("weft.json", lambda m: m.pop("sites")),
    "no sites": table("weft.json", lambda m: m.update(sites=[1])),
    "a weight of another model": table("weft.json", lambda m: m["sites"].update(other=m["sites"].pop(SITE))),
}
BITS: dict[str, Edit] = {
    "no tensors": table("weft.json", lambda m: m.update(tensors=3)),
    "no entry": table("weft.json", lambda m: m["tensors"].update({SITE: 3})),
    "an unknown dtype": table("weft.json", lambda m: m["tensors"][SITE].update(dtype="F1")),
    "another dtype": table("weft.json", lambda m: m["tensors"][SITE].update(dtype="F64")),
    "planes below zero": table("weft.json", lambda m: m["tensors"][SITE].update(planes=[-1, 1, 1, 1])),
    "planes too long": table("weft.json", lambda m: m["tensors"][SITE].update(planes=[1 << 50] * 4)),
    "planes gone": table("weft.json", lambda m: m["tensors"][SITE].update(planes=[])),
    "the same as nothing": table("weft.json", lambda m: m["tensors"].update({SITE: {"same": "nothing"}})),
    "the same as itself": table("weft.json", lambda m: m["tensors"].update({SITE: {"same": SITE}})),
    "a tensor of no base": table("weft.json", lambda m: m["tensors"].update(other=dict(m["tensors"][SITE]))),
    "other content": unsummed(first(lambda t: t.zero_())),
    "another sum": table("weft.json", lambda m: m["tensors"][SITE].update(sum="0" * 16)),
}
CASES = [(k, n) for k, table_ in (("terms", EITHER | TERMS), ("bits", EITHER | BITS)) for n in table_]


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_what_is_wrong_with_a_delta_is_refused(kind: str, case: str, whole: Path, tmp_path: Path) -> None:
    """With five fields; neither the base nor the delta changes, nothing is written, and no model gets a part of it."""
    edit = (EITHER | (TERMS if kind == "terms" else BITS))[case]
    delta, out = copied(whole / kind, tmp_path / "delta", edit), tmp_path / "out"
    refused(lambda: weft.restore(whole / "base", delta, out), WeftError, delta, whole / "base")
    assert not out.exists() and {p.name for p in tmp_path.iterdir()} <= {"delta", "elsewhere"}
    if kind == "terms" and case not in ("a file that nobody listed",):
        model = load(whole / "base")
        mark = fingerprint(model)
        refused(lambda: weft.patch(model, delta), WeftError, delta)
        assert fingerprint(model) == mark and not weft.adapters(model)


def test_names_that_lead_out_are_refused(whole: Path, tmp_path: Path) -> None:
    """An index that names a file elsewhere."""

    def edit(folder: Path) -> None:
        held = load_file(folder / "weft.safetensors")
        (folder / "weft.safetensors").unlink()
        save_file(held, folder.parent / "weft-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(held, "../weft-00001-of-00001.safetensors")}
        (folder / "weft.safetensors.index.json").write_text(json.dumps(index))

    delta = copied(whole / "terms", tmp_path / "delta", edit)
    refused(lambda: weft.restore(whole / "base", delta, tmp_path / "out"), FormatError, delta)


def written(place: Path, out: Path, lossless: bool) -> None:
    """Write a delta, in a process of its own, again and again."""
    base: Any = place / "base"
    while True:
        how: dict[str, Any] = {"lossless": True} if lossless else {"budget": "20%"}
        weft.diff(base, place / "tuned", out, replace=True, **how)


@pytest.mark.parametrize("lossless", [False, True])
def test_killed_while_writing_leaves_nothing_or_all(
    lossless: bool, whole: Path, tmp_path: Path, fresh: ForkServerContext
) -> None:
    """A delta that is there is whole; the next one sweeps what a dead process left."""
    out = tmp_path / "place" / "out"
    for wait in (0.0, 0.02, 0.05):
        process = fresh.Process(target=written, args=(whole, out, lossless))
        process.start()
        late = time.monotonic() + 60
        while not out.parent.exists() and time.monotonic() < late:
            time.sleep(0.005)
        time.sleep(wait)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert not out.exists() or weft.verify(out) == []
    how: dict[str, Any] = {"lossless": True} if lossless else {"budget": "20%"}
    weft.diff(whole / "base", whole / "tuned", out, replace=True, **how)
    assert [p.name for p in out.parent.iterdir()] == ["out"] and weft.verify(out) == []
    weft.restore(whole / "base", out, tmp_path / "made")
    model: nn.Module = load(tmp_path / "made")
    assert not lossless or fingerprint(model) == fingerprint(load(whole / "tuned"))
