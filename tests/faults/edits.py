"""Ways to damage a model folder, and what is asked of the error that follows."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weft.engine.run import Step, apply
from weft.error import WeftError
from weft.model import weave
from weft.store import save

Edit = Callable[[Path], Any]


def told(e: WeftError) -> WeftError:
    """All five fields are there, and the text shows each."""
    assert all(isinstance(x, str) and x for x in (e.what, e.fix)) and str(e.where) and str(e.want) and e.got != ""
    assert all(f"  {k}" in str(e) for k in ("where", "got", "want", "fix"))
    return e


def plain(tiny: Any, folder: Path) -> Path:
    """An ordinary checkpoint."""
    return written(folder, _plain(tiny))


@functools.cache
def _plain(tiny: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tiny().save_pretrained(folder)
        return content(Path(folder))


def woven(tiny: Any, folder: Path) -> Path:
    """A weft folder."""
    return unsealed(written(folder, _woven(tiny)))


@functools.cache
def _woven(tiny: Any) -> dict[str, bytes]:
    model = weave(tiny())
    apply(model, [Step.of("rtn")])
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "out")
        return content(Path(folder) / "out")


def content(folder: Path) -> dict[str, bytes]:
    """A folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder: Path, files: dict[str, bytes]) -> Path:
    """A new folder of these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, held in files.items():
        (folder / name).write_bytes(held)
    return folder


def unsealed(folder: Path) -> Path:
    """Without the sums by which a changed tensor would be noticed: as a forger would have it."""
    manifest = json.loads((folder / "weft.json").read_text())
    for entry in manifest["files"].values():
        entry.pop("tensors", None)
    (folder / "weft.json").write_text(json.dumps(manifest))
    return folder


def tree(folder: Path) -> str:
    """Hash of every name, byte and link below a folder."""
    word = hashlib.blake2b()
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        word.update(f"{path.relative_to(folder)} {len(content)} ".encode() + content)
    return word.hexdigest()


def refused(act: Callable[[], Any], kind: type[WeftError], *folders: Path) -> WeftError:
    """The error that `act` raises: of this kind, all five fields filled, and these folders are as they were."""
    before = [tree(f) for f in folders]
    with pytest.raises(WeftError) as e:
        act()
    assert isinstance(told(e.value), kind), e.value
    assert [tree(f) for f in folders] == before
    return e.value


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], stem: str = "model") -> Edit:
    """Edit a checkpoint's tensors."""

    def edit(folder: Path) -> None:
        held = {k: t.clone() for k, t in load_file(folder / f"{stem}.safetensors").items()}
        change(held)
        save_file(held, folder / f"{stem}.safetensors", {"format": "pt"})

    return edit


def table(name: str, change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Edit a JSON file."""

    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def raw(name: str, content: bytes) -> Edit:
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, size: int) -> Edit:
    """Shorten a file; a negative size leaves out that much of the end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def safetensors(entries: str, data: bytes = b"\0" * 16) -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(entries)) + entries.encode() + data


def two(folder: Path) -> None:
    """An index beside a single file."""
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )


def index(**weight_map: str) -> Edit:
    """An index instead of a single file."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> str:
    """One tensor's description."""
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})
