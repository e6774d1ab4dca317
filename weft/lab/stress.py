"""Lab models made hard to round: the same function with a few huge activation channels. For stress only, never for a claim."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft import store
from weft.error import ConflictError
from weft.lab.made.recipe import sound
from weft.model import Scale, Transform, axes, transport
from weft.store.cache import Cache, default, key
from weft.store.lock import turn

CHANNELS = 3
BY = 32.0
"""A power of two, so that no weight is rounded by it."""
CARD = """# {name}

For stress only: never a model to try a claim on. It computes what {base} does, but what its norms give is {by:g} times as large
in channels {channels}, and the columns that read these are as many times smaller. Made, not learnt: no trained model got its
outliers in this way.
"""


def stress(model: nn.Module) -> list[int]:
    """Make the same few channels of what every norm gives `BY` times as large, in place; the output stays as it is.

    Returns the channels. Errors: ConflictError for a model whose norms do not admit it, or of whose family nothing is known.
    """
    norms = {n: a for n, a in axes(model).items() if a.kind == "norm" and a.admits("scale")}
    if not norms:
        got, want = "none of whose outputs can be scaled", "norms that layers alone read"
        raise ConflictError("no norm here", where=type(model).__name__, got=got, want=want, fix="take another model")
    width = min(a.size for a in norms.values())
    channels = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:CHANNELS].sort().values
    changes: dict[str, Transform] = {}
    for name, axis in norms.items():
        by = torch.ones(axis.size)
        by[channels] = BY
        changes[name] = Scale(by)
    transport(model, changes)
    return channels.tolist()


def folder(base: str, source: Path) -> Path:
    """The stress variant of a lab model, in the cache, made if it is not there. Errors: those of `stress` and of saving."""
    word = hashlib.blake2b(digest_size=16)
    for path in sorted(source.glob("*.safetensors")):
        word.update(path.read_bytes())
    name = f"{base}-stress"
    out = Cache(default()).path("models", f"{name}-{key(Path(__file__).read_text('utf8'), word.hexdigest())[:16]}")
    with turn(out):
        if not sound(out):
            model: Any = store.load(source)
            text = CARD.format(name=name, base=base, by=BY, channels=", ".join(map(str, stress(model))))
            store.save(model, out, replace=True, files={"README.md": text})
    return out
