"""The model card: a README.md that says what a folder holds and how to load it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Literal

from torch import nn

from weft.model import branches, expressions, taps
from weft.store.library import library

_CHECKPOINTS = {"weft": "a checkpoint of a model class that is weft's own"}
_LICENCE = re.compile(r"license: ([A-Za-z0-9.-]{1,64})")


def card(model: nn.Module, kind: Literal["plain", "weft", "compressed-tensors"]) -> str:
    """The card of a folder of this kind."""
    name, name_of_base = type(model).__name__, _base(model)
    home = "weft" if kind == "weft" else library(model)
    head = ["---", f"library_name: {home}"]
    if licence := _licence(model):
        head.append(f"license: {licence}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name_of_base):
        head.append(f"base_model: {name_of_base}")
    lines = [*head, "tags: [weft]", "---", "", f"# {name}", ""]
    lines += [f"Made with weft from `{name_of_base}`." if name_of_base else "Made with weft.", ""]
    exprs = expressions(model)
    if kind == "plain":
        lines += [f"All weights are plain: this is {_CHECKPOINTS.get(home, 'an ordinary Hugging Face checkpoint')}."]
    else:
        bits = (
            8 * sum(e.nbytes() for e in exprs.values()) / max(1, sum(e.shape[0] * e.shape[1] for e in exprs.values()))
        )
        lines += [f"{bits:.2f} bits per weight, scales and all.", "", "| weights | stored as |", "| ---: | --- |"]
        lines += [f"| {n} | {form} |" for form, n in Counter(e.describe() for e in exprs.values()).most_common(20)]
        if on := Counter(tap.describe() for tap in taps(model).values()):
            lines += ["", "| weights | read their input through |", "| ---: | --- |"]
            lines += [f"| {n} | {form} |" for form, n in on.most_common(20)]
        if added := branches(model):
            lines += ["", "| branch | is |", "| --- | --- |", *(f"| `{b.key}` | {b.describe()} |" for b in added)]
    load = 'weft.load("FOLDER")' if home == "weft" else f'{home}.{name}.from_pretrained("FOLDER")'
    use = [f"import {load.partition('.')[0]}", "", f"model = {load}"]
    return "\n".join([*lines, "", "```python", *use, "```", ""])


def _base(model: nn.Module) -> str:
    """The base model's name: a hub id as the hub's cache spells it, else its folder's name."""
    known = model.__dict__.get("_weft_base") or {}
    for part in Path(known.get("path") or "").parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return Path(known.get("path") or "").name


def _licence(model: nn.Module) -> str:
    """The licence that the source's own card names."""
    source = model.__dict__.get("_weft_source")
    if source is None or not (Path(source) / "README.md").is_file():
        return ""
    with (Path(source) / "README.md").open("rb") as f:
        text = f.read(1 << 16).decode("utf8", "replace")
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = next((m for line in head.splitlines() if (m := _LICENCE.fullmatch(line.strip()))), None)
    return found[1] if found else ""
