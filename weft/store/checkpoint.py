"""A checkpoint's files, audited by their headers alone: which tensors there are, in which file, of which dtype and shape."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.error import FormatError, PathError, WeftError, raise_all
from weft.store.audit import Entry, header
from weft.store.files import read_json, safe_name
from weft.store.swap import inside
from weft.store.tensors import read_tensor, read_tensors


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder: name to file and entry. Nothing is mapped before `read`."""

    folder: Path
    tensors: dict[str, tuple[str, Entry]]

    @property
    def entries(self) -> dict[str, Entry]:
        """What the headers say of each tensor."""
        return {name: entry for name, (_, entry) in self.tensors.items()}

    def read(self) -> dict[str, Tensor]:
        """Every tensor, mapped from disk."""
        files = dict.fromkeys(file for file, _ in self.tensors.values())
        return {name: t for file in files for name, t in read_tensors(self.folder / file).items()}

    def one(self, name: str) -> Tensor:
        """One tensor, mapped from disk."""
        return read_tensor(self.folder / self.tensors[name][0], name)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table. Errors: PathError, FormatError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise FormatError(
            "a file holds no table",
            where=path.name,
            got=type(value).__name__,
            want="a JSON object",
            fix="copy the file again",
        )
    return value


def checkpoint(folder: Path, stem: str) -> Checkpoint:
    """A folder's audited checkpoint: `stem`.safetensors, or its index and shards. Errors: `audit`'s problems, all at once."""
    found, problems = audit(folder, stem)
    raise_all(problems)
    return found


def audit(folder: Path, stem: str) -> tuple[Checkpoint, list[WeftError]]:
    """A folder's checkpoint as far as it is sound, and everything that is wrong with it.

    A stale file beside the checkpoint, an index and headers that disagree, one tensor in two shards, a shard that is missing,
    cut off, a link out of the folder or no safetensors file: all are problems.
    """
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    shards = sorted(p for p in folder.glob(f"{stem}-*.safetensors") if re.search(r"-\d+-of-\d+\.safetensors$", p.name))
    if not index.exists() and not single.exists():
        return Checkpoint(folder, {}), [_absent(folder, single, shards)]
    table, problems = _index(index) if index.exists() else ({}, list[WeftError]())
    stale = [p for p in ([single] if single.exists() else []) + shards if p.name not in table.values()]
    if (index.exists() and stale) or (single.exists() and shards):
        problems.append(_two(folder, [index] * index.exists() + [single] * single.exists() + shards))
    files = sorted(set(table.values())) if index.exists() else [single.name]
    held: dict[str, list[tuple[str, Entry]]] = {}
    for file in files:
        try:
            if not inside(folder, folder / file):
                problems.append(_leaves(file, (folder / file).resolve()))
                continue
            for name, entry in header(folder / file).tensors.items():
                held.setdefault(name, []).append((file, entry))
        except WeftError as e:
            problems.append(e)
    if index.exists() and not problems:
        problems += _disagreement(index.name, table, held)
    return Checkpoint(folder, {name: places[0] for name, places in held.items()}), problems


def _index(path: Path) -> tuple[dict[str, str], list[WeftError]]:
    """Tensor to file, as far as an index names files that may be opened."""
    try:
        table = read_object(path).get("weight_map")
    except WeftError as e:
        return {}, [e]
    if not isinstance(table, dict) or not table:
        want = "a weight_map: tensor names to files"
        return {}, [
            FormatError("an index names no files", where=path.name, got=table, want=want, fix="copy the file again")
        ]
    problems: list[WeftError] = []
    for name, file in table.items():
        if not isinstance(file, str) or not safe_name(file) or not file.endswith(".safetensors"):
            problems.append(
                FormatError(
                    "an index names a file that it must not",
                    where=f"{path.name}: {name[:80]!a}",
                    got=ascii(file)[:200],
                    want="a safetensors file in this folder",
                    fix="do not use this model",
                )
            )
    return ({}, problems[:20]) if problems else (table, [])


def _disagreement(index: str, table: dict[str, str], held: dict[str, list[tuple[str, Entry]]]) -> list[WeftError]:
    """What an index says that the shards' headers do not, and the other way round."""
    sets = {
        "in the index only": sorted(set(table) - set(held)),
        "in the shards only": sorted(set(held) - set(table)),
        "in another shard, or in two": sorted(
            n for n, places in held.items() if n in table and [f for f, _ in places] != [table[n]]
        ),
    }
    got = "; ".join(f"{what}: {some(names)}" for what, names in sets.items() if names)
    want, fix = "each tensor once, in the file that the index names", "copy the model again"
    return [FormatError("an index and its shards differ", where=index, got=got, want=want, fix=fix)] if got else []


def some(names: Iterable[str], most: int = 5) -> str:
    """The first of these names, and how many more there are."""
    held = list(names)
    return ", ".join(held[:most]) + (f" and {len(held) - most} more" if len(held) > most else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the likeliest of the known names."""
    close = difflib.get_close_matches(name, list(known)[:2000], 1)
    return f" (nearest: {close[0]})" if close else ""


def _absent(folder: Path, single: Path, shards: list[Path]) -> WeftError:
    listed = some(sorted(p.name for p in folder.iterdir()), 8) if folder.is_dir() else "no folder"
    if shards:
        fix = "copy the model again"
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        fix = "weft load opens no pickles; weft import converts them in a process of its own"
    else:
        fix = "convert the model to safetensors"
    want = f"{single.name}.index.json beside its shards" if shards else single.name
    return PathError("no safetensors checkpoint", where=str(folder), got=listed or "nothing", want=want, fix=fix)


def _two(folder: Path, files: list[Path]) -> WeftError:
    when = {p.name: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(p.stat().st_mtime)) for p in files}
    return FormatError(
        "two checkpoints in one folder",
        where=str(folder),
        got=some((f"{name} of {t}" for name, t in when.items()), 8),
        want="one single file, or one index and the shards that it names",
        fix="remove the stale one",
    )


def _leaves(file: str, end: Path) -> WeftError:
    want = "a file in this folder"
    return FormatError(
        "a shard leaves the folder", where=file, got=f"a link to {end}", want=want, fix="do not use this model"
    )
