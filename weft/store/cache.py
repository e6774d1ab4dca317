"""Results by content: what they depend on is their name, so a run that is repeated, interrupted or extended reuses them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.store.files import read_json, read_tensors, write_json, write_tensors


def default() -> Path:
    """`$WEFT_CACHE`, or `~/.cache/weft`."""
    return Path(os.environ.get("WEFT_CACHE") or Path.home() / ".cache" / "weft")


def key(*parts: Any) -> str:
    """Hash of JSON-able parts."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


class Cache:
    """A folder of results. `hits` counts those that were there, `misses` those that were made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hits = self.misses = 0

    def json(self, kind: str, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value called `name`, made when it is not there."""
        path = self.folder / kind / f"{name}.json"
        if path.exists():
            self.hits += 1
        else:
            self.misses += 1
            write_json(path, make())
        return read_json(path)

    def tensors(self, kind: str, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors called `name`, made when they are not there; mapped from disk either way."""
        path = self.folder / kind / f"{name}.safetensors"
        if path.exists():
            self.hits += 1
        else:
            self.misses += 1
            write_tensors(path, make())
        return read_tensors(path)

    def path(self, kind: str, name: str) -> Path:
        """A folder of results of its own."""
        return self.folder / kind / name
