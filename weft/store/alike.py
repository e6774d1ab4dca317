"""Models whose checkpoints are alike, loaded without their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.error import WeftError
from weft.progress import Progress, Silent
from weft.store.audit import Entry
from weft.store.bare import Bare
from weft.store.checkpoint import Checkpoint, audit, read_object
from weft.store.load import changed, load, plain
from weft.store.swap import MANIFEST
from weft.store.tensors import examine

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SILENT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Entries of a configuration in which models that are alike may differ."""
_TURNED = {"c_attn", "c_fc", "c_proj", "c_mlp", "q_attn"}
"""Layers whose matrices some families store inputs by outputs."""
_OWN = {*dir(Bare({}, {})), *dir(nn.Linear(1, 1))}
"""What modules have themselves."""


def loaded(folders: Sequence[Path], progress: Progress | None = None) -> list[nn.Module]:
    """Woven models of these folders, without their classes where they are `alike`. Errors: those of `load`."""
    return alike(folders, progress) or [load(folder, progress=progress) for folder in folders]


def alike(folders: Sequence[Path], progress: Progress | None = None) -> list[nn.Module] | None:
    """Woven models of these folders as `Bare`, or None where it takes their classes to tell what is in them, or what is wrong.

    They have one configuration and the same tensors in the same shapes: vectors and matrices of floating point, all of them weights
    and biases. What imports the classes, and makes models of them, takes longer than a small merge. What weft wrote is checked as `load`
    does; values of others are not read here, as what goes weight by weight looks at each.
    Errors: NumericError naming weights that are not finite; ChangedError naming tensors that the manifest knows otherwise.
    """
    found = [one for folder in folders if (one := _opened(folder)) is not None]
    if len(found) < len(folders) or len({_form(said, held) for said, _, held in found}) != 1:
        return None
    made: list[nn.Module] = []
    with (progress or Silent()).bar("load", sum(len(held.tensors) for *_, held in found)) as step:
        for said, manifest, held in found:
            content, problems = held.read(), list[WeftError]()
            if "files" in manifest:
                sums, problems = examine(content, step=step)
                problems += changed(sums, held, manifest)
            kind = type(said["architectures"][0], (Bare,), {"__module__": Bare.__module__})
            made.append(plain(kind(said, held.entries), held.folder, content, problems, torch.float32))
    return made


def _opened(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Checkpoint] | None:
    """Configuration, manifest and checkpoint of a folder, where they are sound and usual."""
    try:
        said = read_object(folder / "config.json")
        manifest = read_object(folder / MANIFEST) if (folder / MANIFEST).exists() else {"kind": "plain"}
        held, problems = audit(folder, "model")
    except WeftError:
        return None
    usual = manifest.get("kind") == "plain" and not problems and _usual(said, held.entries)
    return (said, manifest, held) if usual else None


def _usual(said: Mapping[str, Any], entries: Mapping[str, Entry]) -> bool:
    """Whether names and shapes say all that matters: no code, no codes, nothing tied that is stored twice, nothing turned."""
    listed, words = said.get("architectures"), said.get("vocab_size")
    named = isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], str) and listed[0].isidentifier()
    parts = {part for name in entries for part in name.split(".")[:-1]}
    tables = sum(e.shape[:1] == (words,) for e in entries.values() if len(e.shape) == 2)
    return (
        named
        and not {"auto_map", "quantization_config", "_class_name"} & said.keys()
        and (tables < 2 or said.get("tie_word_embeddings") is False)
        and not parts & (_TURNED | _OWN)
        and all(
            name.endswith((".weight", ".bias")) and len(e.shape) in (1, 2) and e.dtype in _FLOATS and 0 not in e.shape
            for name, e in entries.items()
        )
    )


def _form(said: Mapping[str, Any], held: Checkpoint) -> str:
    """What must be the same of models that are alike."""
    kept = sorted((k, repr(v)) for k, v in said.items() if k not in _SILENT)
    return repr((kept, sorted((n, e.shape) for n, e in held.entries.items())))
