"""Take a checkpoint that `load` refuses: pickles become safetensors, and what is wrong is mended as far as it is asked for."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.error import FormatError, OptionError, WeftError, raise_all
from weft.progress import Progress, Silent
from weft.store.assign import misfits, names, skeleton, tied
from weft.store.audit import Entry, header
from weft.store.checkpoint import Checkpoint, audit, nearest, read_object
from weft.store.files import safe_name, told, unique
from weft.store.library import stem_in
from weft.store.load import WANTED, find, plain
from weft.store.save import save
from weft.store.swap import inside, may_replace, room
from weft.store.tensors import examine
from weft.store.unpickle import unpickle

_PICKLE = "pytorch_model.bin"


def import_(
    source: str | Path,
    out: str | Path,
    *,
    drop: Sequence[str] = (),
    init: Sequence[str] = (),
    zero: Sequence[str] = (),
    tie: bool | None = None,
    seed: int = 0,
    replace: bool = False,
    progress: Progress | None = None,
) -> list[tuple[str, str]]:
    """Write a checkpoint that `load` refuses as one that it takes; returns what was mended: (tensor, how).

    `pytorch_model.bin` is read in a limited process of its own that can build nothing but tensors. Globs name what may be
    mended, by the names that the errors of `load` give: tensors that the model lacks are dropped (`drop`), tensors that the
    checkpoint lacks get the fresh values of their model class (`init`, from `seed`), values that are not finite become zero
    (`zero`). `tie`: of tied weights stored twice, True keeps the first, False both. Nothing else is changed.
    Errors: those of `load` for what is left; OptionError for a glob with nothing to mend; those of `save`.
    """
    place = Path(out).resolve()
    may_replace(place, replace)
    folder = find(source)
    if not any(folder.glob("*.safetensors")):
        folder = find(source, [*WANTED, "pytorch_model*"])
    bars = progress or Silent()
    with _opened(folder, place, bars) as (found, problems):
        raise_all(problems)
        model = skeleton(folder, len(found.tensors), {} if tie is None else {"tie_word_embeddings": tie})
        named = names(model, found.entries, folder.name)
        content = {named[n]: t for n, t in found.read().items()}
        done = [*_dropped(model, content, drop), *_tied(model, content, tie)]
        done += [*_fresh(model, content, init, seed), *_zeroed(content, zero)]
        entries = {n: Entry(t.dtype, tuple(t.shape), 0, 0) for n, t in content.items()}
        raise_all(misfits(model, entries, folder.name))
        with bars.bar("check", len(content)) as step:
            _, problems = examine(content, {n for n, _ in model.named_buffers()}, step)
        model = plain(model, folder, content, problems, torch.float32)
        note = {"imported": {"from": folder.name, "mended": [list(pair) for pair in done]}}
        save(model, out, replace=replace, manifest=note, progress=progress)
    return done


@contextmanager
def _opened(folder: Path, out: Path, bars: Progress) -> Generator[tuple[Checkpoint, list[WeftError]]]:
    """A folder's checkpoint; pickles are converted beside `out` first, and removed at the end."""
    pickles = [] if any(folder.glob("*.safetensors")) else _pickles(folder)
    if not pickles:
        yield audit(folder, stem_in(folder))
        return
    room(out, 2 * sum(p.stat().st_size for p in pickles))
    scratch = out.with_name(unique())
    with told(out):
        scratch.mkdir(parents=True)
    held: dict[str, tuple[str, Entry]] = {}
    try:
        with bars.bar("unpickle", len(pickles)) as step:
            for i, path in enumerate(pickles):
                target = scratch / f"{i}.safetensors"
                unpickle(path, target)
                for name, entry in header(target).tensors.items():
                    if name in held:
                        got, want = f"also in {pickles[int(held[name][0].split('.')[0])].name}", "each tensor once"
                        fix = "copy the model again"
                        raise FormatError(
                            "a tensor is in two files", where=f"{path.name}: {name}", got=got, want=want, fix=fix
                        )
                    held[name] = (target.name, entry)
                step(1)
        yield Checkpoint(scratch, held), []
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pickles(folder: Path) -> list[Path]:
    """The files of a pickled checkpoint. Errors: FormatError for an index that names others."""
    index = folder / f"{_PICKLE}.index.json"
    if not index.exists():
        return [folder / _PICKLE] if (folder / _PICKLE).exists() else []
    table = read_object(index).get("weight_map")
    listed = sorted({str(v) for v in table.values()}) if isinstance(table, dict) else []
    wrong = [n for n in listed if not (safe_name(n) and n.endswith(".bin") and inside(folder, folder / n))]
    if wrong or not listed:
        got, want = ascii(wrong[:3] or table)[:200], "pickled files in this folder"
        raise FormatError(
            "an index names files that it must not", where=index.name, got=got, want=want, fix="do not use this model"
        )
    return [folder / n for n in listed]


def _chosen(globs: Sequence[str], known: Iterable[str], option: str, what: str) -> list[str]:
    """The names that a list of globs matches. Errors: OptionError for a glob that matches none."""
    held = list(known)
    for glob in globs:
        if not any(fnmatchcase(n, glob) for n in held):
            got = f"nothing like it among {len(held)}{nearest(glob, held)}"
            raise OptionError(
                "there is nothing to mend", where=option, got=f"{glob}: {got}", want=what, fix="leave it out"
            )
    return [n for n in held if any(fnmatchcase(n, glob) for glob in globs)]


def _dropped(model: nn.Module, content: dict[str, Tensor], globs: Sequence[str]) -> Generator[tuple[str, str]]:
    extra = set(content) - set(model.state_dict(keep_vars=True))
    for name in _chosen(globs, sorted(extra), "drop", "a tensor that the model lacks"):
        del content[name]
        yield name, "dropped"


def _tied(model: nn.Module, content: dict[str, Tensor], tie: bool | None) -> Generator[tuple[str, str]]:
    pairs = tied(model, always=True)
    if tie is None:
        return
    if not pairs:
        got, want = type(model).__name__, "a model whose weights can be tied"
        raise OptionError("there is nothing to tie", where="tie", got=got, want=want, fix="leave it out")
    for name, first in pairs.items():
        if tie and name in content and first in content:
            del content[name]
            yield name, f"tied to {first}"
        elif not tie and name in content:
            yield name, f"kept beside {first}"


def _fresh(model: nn.Module, content: dict[str, Tensor], globs: Sequence[str], seed: int) -> Generator[tuple[str, str]]:
    """Initial values, drawn module by module, each from a seed of its own."""
    shared = tied(model)
    missing = [n for n in model.state_dict(keep_vars=True) if n not in content and n not in shared]
    chosen = _chosen(globs, missing, "init", "a tensor that the checkpoint lacks")
    dtype = (
        Counter(t.dtype for t in content.values() if t.is_floating_point()).most_common(1)[0][0] if content else None
    )
    for path in dict.fromkeys(n.rpartition(".")[0] for n in chosen):
        module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu", recurse=False)
        word = hashlib.blake2b(f"{seed} {path}".encode(), digest_size=7).digest()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int.from_bytes(word, "little"))
            for p in module.parameters(recurse=False):
                p.fill_(torch.nan)
            cast(Any, model)._init_weights(module)
        for name in (n for n in chosen if n.rpartition(".")[0] == path):
            value = cast(Tensor, getattr(module, name.rpartition(".")[2])).detach()
            content[name] = value.to(dtype or value.dtype) if value.is_floating_point() else value
            yield name, "fresh values"


def _zeroed(content: dict[str, Tensor], globs: Sequence[str]) -> Generator[tuple[str, str]]:
    bad = {n: e for n, t in content.items() if any(fnmatchcase(n, g) for g in globs) and (e := _infinite(t))}
    for name in _chosen(globs, bad, "zero", "a tensor with values that are not finite"):
        content[name] = content[name].nan_to_num(0.0, 0.0, 0.0)
        yield name, f"{bad[name]} values set to zero"


def _infinite(t: Tensor) -> int:
    """How many values are not finite."""
    return int((~torch.isfinite(t)).sum()) if t.is_floating_point() else 0
