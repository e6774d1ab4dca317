"""Load a model: Hugging Face checkpoints and weft folders, audited first, tensors mapped rather than copied."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.error import ChangedError, FormatError, PathError, WeftError, raise_all
from weft.model import (
    DeviceMap,
    add_branch,
    dispatch,
    first_vectors,
    places,
    plain_tensors,
    set_expressions,
    set_taps,
    vectors,
    weave,
)
from weft.model.weave import Original
from weft.progress import Progress, Silent
from weft.store.assign import assign, assign_plain, misfits, names, names_on_disk, skeleton
from weft.store.checkpoint import Checkpoint, audit, checkpoint
from weft.store.files import must_be_text, read_json
from weft.store.library import stem_in
from weft.store.swap import MANIFEST, digest, read_manifest
from weft.store.tensors import Step, examine, seal
from weft.store.trees import branches_of, broken, expressions_of, taps_of

WANTED = [
    "*.json", "model*.safetensors", "diffusion_pytorch_model*.safetensors", "weft*.safetensors", "*.txt", "*.model", "1_Pooling/*",
    "*.jinja", "README.md",
]  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    """A folder before its tensors are read: what it holds, the empty model, and what is wrong so far."""

    folder: Path
    manifest: Mapping[str, Any]
    found: Checkpoint
    model: nn.Module
    problems: list[WeftError]
    compute: torch.dtype


def load(
    where: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """A woven model, in evaluation mode, frozen, from a folder or a hub id.

    Matrices stay mapped from disk in the file's dtype; everything is computed in `dtype` (default: float32), on
    the CPU or where `device_map` says: `auto`, a device, or devices by module path.
    No code from the folder runs. Every byte is read once: weights must be finite, and where weft wrote the folder, what it wrote.
    Errors: PathError; FormatError with every problem at once, from headers and configuration before a tensor is mapped
    (missing, unexpected or ill-shaped tensors, two checkpoints in one folder, names that leave the folder);
    NumericError naming weights that are not finite; ChangedError naming tensors that the manifest knows otherwise;
    those of `device_map`, after loading.
    """
    folder = find(where)
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if manifest is not None and manifest.get("kind") == "delta":
        want, fix = "a model", "weft patch BASE DELTA --out OUT makes the model"
        raise FormatError("a delta is no model by itself", where=str(folder), got="a delta", want=want, fix=fix)
    woven = manifest is not None and manifest.get("kind") == "weft"
    stem = stem_in(folder)
    found, problems = audit(folder, "weft" if woven else stem)
    if woven and found.tensors and audit(folder, stem)[0].tensors:
        got, want = f"{stem}.safetensors beside weft.safetensors", "one of them"
        fix = "remove the stale one"
        problems.append(FormatError("two checkpoints in one folder", where=str(folder), got=got, want=want, fix=fix))
    try:
        model = skeleton(folder, len(found.tensors) + 10_000 * bool(problems))
    except WeftError as e:
        raise_all([*problems, e])
        raise
    opened = _Opened(folder, manifest or {}, found, model, problems, dtype or torch.float32)
    with (progress or Silent()).bar("load", max(1, len(found.tensors))) as step:
        made = _load_weft(opened, step) if woven else _load_plain(opened, step)
    return made if device_map is None else dispatch(made, device_map)


def _load_plain(o: _Opened, step: Step) -> nn.Module:
    named = names(o.model, o.found.entries, o.folder.name) if not o.problems else {}
    raise_all(o.problems or misfits(o.model, {named[n]: e for n, e in o.found.entries.items()}, o.folder.name))
    content = o.found.read()
    buffers = {n for n, _ in o.model.named_buffers()}
    sums, problems = examine(content, {n for n in content if named[n] in buffers}, step)
    problems += changed(sums, o.found, o.manifest)
    model = plain(o.model, o.folder, {named[n]: t for n, t in content.items()}, problems, o.compute)
    model.__dict__["_weft_base"] = {"path": str(o.folder.resolve()), "seal": seal(content, sums)}
    return model


def plain(
    model: nn.Module, folder: Path, content: Mapping[str, Tensor], problems: list[WeftError], compute: torch.dtype
) -> nn.Module:
    """An empty model with these tensors, by its own names, woven. Errors: `problems` and those of `assign`, at once."""
    raise_all(problems + assign(model, content))
    _ready(model, folder, compute)
    weave(model)
    for t in plain_tensors(model).values():
        t.data = t.data.to(compute) if t.is_floating_point() else t.data
    for place in places(model).values():
        for path in place.modules:
            cast(Any, model.get_submodule(path)).compute = compute
    return model


def changed(sums: Mapping[str, str], found: Checkpoint, manifest: Mapping[str, Any]) -> list[WeftError]:
    """Tensors that the manifest knows otherwise."""
    known: dict[str, str] = {}
    for file in dict.fromkeys(f for f, _ in found.tensors.values()):
        known |= manifest.get("files", {}).get(file, {}).get("tensors", {})
    fix = f"copy the folder again; if another tool wrote this model, delete {MANIFEST}"
    return [
        ChangedError("a tensor is not what was written", where=n, got=total, want=known[n], fix=fix)
        for n, total in sums.items()
        if known.get(n, total) != total
    ]


def find(where: str | Path, wanted: Sequence[str] = WANTED) -> Path:
    """The local folder of a path or hub id; of a hub id the `wanted` files are fetched. Errors: PathError."""
    folder = Path(where)
    must_be_text(folder)
    if folder.is_dir():
        return folder
    if folder.exists() or str(where).count("/") != 1 or str(where).startswith((".", "/")):
        raise PathError(
            "no such model",
            where=str(where),
            got="no folder of that name",
            want="a model folder or a hub id",
            fix="check the path",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(where), allow_patterns=list(wanted)))
    except Exception as e:
        raise PathError(
            "this model cannot be fetched",
            where=str(where),
            got=type(e).__name__,
            want="a hub id you can read, or a local folder",
            fix="check the name and the network",
        ) from e


def _tie(model: nn.Module) -> None:
    """Tie what the model's class ties, where it can tie at all."""
    if hasattr(model, "tie_weights"):
        cast(Any, model).tie_weights()


def _ready(model: nn.Module, folder: Path, compute: torch.dtype) -> None:
    _tie(model)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if left:
        raise FormatError(
            "some tensors have no value",
            where=folder.name,
            got=left[:5],
            want="a value for every tensor",
            fix="the checkpoint is of another model",
        )
    for module in cast(Iterable[Any], model.modules()):
        for name, b in module._buffers.items():
            if b is not None and b.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = b.to(compute)
    if (folder / "generation_config.json").exists() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        cast(Any, model).generation_config = GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
    model.eval().requires_grad_(False)
    model.__dict__["_weft_source"] = folder


def _load_weft(o: _Opened, step: Step) -> nn.Module:
    folder, manifest, found, model, problems, compute = o.folder, o.manifest, o.found, o.model, o.problems, o.compute
    if manifest.get("format") != 1 or not isinstance(manifest.get("sites"), dict):
        problems.append(
            FormatError(
                "a newer weft wrote this",
                where=f"{folder.name}/{MANIFEST}",
                got=manifest.get("format"),
                want="format 1",
                fix="upgrade weft",
            )
        )
    base = manifest.get("base")
    if base is not None and not names_a_base(base):
        got, want = base, "path and seal"
        where, fix = f"{folder.name}/{MANIFEST}: base", "copy the folder again"
        problems.append(FormatError("a base cannot be read", where=where, got=got, want=want, fix=fix))
    raise_all(problems)
    content = found.read()
    sums, problems = examine(content, {n for n, _ in model.named_buffers()}, step)
    raise_all(changed(sums, found, manifest) + problems)
    _tie(model)
    weave(model)
    sites = manifest["sites"]
    known = places(model)
    if set(sites) != set(known):
        raise FormatError(
            "sites differ from the model's",
            where=MANIFEST,
            got=sorted(set(sites) ^ set(known))[:5],
            want="the model's matrices",
            fix="copy the folder again",
        )
    sites, on, content, problems = taps_of(manifest, content, folder.name)
    added, content, more = branches_of(manifest, content, folder.name)
    raise_all(problems + more)
    exprs, plain, problems = expressions_of(sites, content, folder.name, manifest.get("shared"))
    problems += [*assign_plain(model, plain, compute, folder.name), *broken(exprs)]
    raise_all(problems)
    set_expressions(model, exprs)
    set_taps(model, on)
    _ready(model, folder, compute)
    on_disk = names_on_disk(model, known)
    for place in known.values():
        place.original = Original(_base_reader(base, place.matrix, on_disk[place.name]))
        for path in place.modules:
            cast(Any, model.get_submodule(path)).compute = compute
    first_vectors(model).update(_first(model, manifest.get("vectors", []), base, folder.name))
    for branch in added:
        add_branch(model, branch)
    model.__dict__["_weft_base"] = base
    return model


def _first(model: nn.Module, changed: Any, base: Mapping[str, str] | None, where: str) -> dict[str, Original]:
    """The pretrained values of the vectors that are said to be changed, read when asked for. Errors: FormatError."""
    known, said = vectors(model), cast(list[Any], changed if isinstance(changed, list) else [type(changed)])
    if strange := [n for n in said if not isinstance(n, str) or n not in known]:
        want, fix = "a list of names of the model's vectors", "copy the folder again"
        where = f"{where}/{MANIFEST}: vectors"
        raise FormatError("changed vectors cannot be read", where=where, got=strange[:5], want=want, fix=fix)
    on_disk = names_on_disk(model, said)
    return {n: Original(_base_reader(base, lambda t: t, file)) for n, file in on_disk.items()}


def names_a_base(base: Any) -> bool:
    """Whether a manifest says where the pretrained weights were, and which they were."""
    match base:
        case {"path": str(), "seal": str()} | {"path": str(), "hash": str()}:
            return True
        case _:
            return False


def _base_reader(base: Mapping[str, str] | None, lies: Callable[[Tensor], Tensor], name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if base is None or not Path(base["path"]).is_dir():
            raise PathError(
                "the pretrained weights are not at hand",
                where=name,
                got=base and base["path"],
                want="the base model's folder",
                fix="put it back where it was",
            )
        folder = Path(base["path"])
        kind = "seal" if "seal" in base else "hash"
        if (now := _identity(folder, kind)) != base[kind]:
            raise ChangedError(
                "the base model has changed",
                where=base["path"],
                got=now,
                want=base[kind],
                fix="restore the base model",
            )
        held = checkpoint(folder, stem_in(folder))
        known = {n.replace("LayerNorm.gamma", "LayerNorm.weight"): n for n in held.tensors}
        near = next((k for k in known if k.endswith(f".{name}") or name.endswith(f".{k}")), name)
        if (found := known.get(name) or known.get(near)) is None:
            fix = "restore the base model"
            raise FormatError("the base has no such weight", where=base["path"], got="nothing", want=name, fix=fix)
        return lies(held.one(found))

    return read


def _identity(folder: Path, kind: str) -> str:
    """Identity of a checkpoint: its tensors' seal, or (`hash`, in older folders) the hash of its files' hashes."""
    paths = sorted(folder.glob(f"{stem_in(folder)}*.safetensors"))
    return _read_identity(
        folder, kind, tuple((str(p), s.st_size, s.st_mtime_ns, s.st_ino) for p in paths for s in [p.stat()])
    )


@functools.cache
def _read_identity(folder: Path, kind: str, files: tuple[tuple[str, int, int, int], ...]) -> str:
    if kind == "seal":
        return seal(checkpoint(folder, stem_in(folder)).read())
    word = hashlib.blake2b(digest_size=16)
    for path, *_ in files:
        word.update(str(digest(Path(path))["blake2b"]).encode())
    return word.hexdigest()
