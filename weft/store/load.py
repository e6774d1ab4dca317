"""Load a model: Hugging Face checkpoints and weft folders, audited first, tensors mapped rather than copied."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.error import ChangedError, FormatError, PathError, WeftError, raise_all
from weft.expr import Expr, build
from weft.model import places, set_expressions, weave
from weft.model.weave import Original
from weft.store.checkpoint import assign, assign_plain, checkpoint, read_object, skeleton
from weft.store.files import read_json
from weft.store.swap import MANIFEST, digest

WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "1_Pooling/*", "*.jinja"]


def load(where: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A woven model, in evaluation mode, frozen, from a folder or a hub id.

    Matrices stay mapped from disk in the file's dtype; everything is computed in `dtype` (default: float32 on the CPU).
    No code from the folder runs. Errors: PathError, FormatError (every problem at once: missing, unexpected or
    ill-shaped tensors, two checkpoints in one folder, names that leave the folder), ChangedError.
    """
    folder = find(where)
    compute = dtype or torch.float32
    manifest = read_object(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    if manifest is not None and manifest.get("kind") == "weft":
        return _load_weft(folder, manifest, compute)
    content = checkpoint(folder, "model")
    model = skeleton(folder)
    rest = assign(model, content, compute, where=folder.name)
    raise_all(rest)
    _ready(model, folder, compute)
    weave(model)
    for place in places(model).values():
        for path in place.modules:
            cast(Any, model.get_submodule(path)).compute = compute
    model.__dict__["_weft_base"] = {"path": str(folder.resolve()), "hash": _headers(folder)}
    return model


def find(where: str | Path) -> Path:
    """The local folder of a path or hub id; a hub id is fetched (safetensors, JSON and text only). Errors: PathError."""
    folder = Path(where)
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
        return Path(snapshot_download(str(where), allow_patterns=WANTED))
    except Exception as e:
        raise PathError(
            "this model cannot be fetched",
            where=str(where),
            got=type(e).__name__,
            want="a hub id you can read, or a local folder",
            fix="check the name and the network",
        ) from e


def _ready(model: nn.Module, folder: Path, compute: torch.dtype) -> None:
    cast(Any, model).tie_weights()
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


def _load_weft(folder: Path, manifest: dict[str, Any], compute: torch.dtype) -> nn.Module:
    if manifest.get("format") != 1 or not isinstance(manifest.get("sites"), dict):
        raise FormatError(
            "a newer weft wrote this",
            where=f"{folder.name}/{MANIFEST}",
            got=manifest.get("format"),
            want="format 1",
            fix="upgrade weft",
        )
    content = checkpoint(folder, "weft")
    model = skeleton(folder)
    cast(Any, model).tie_weights()
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
    terms: dict[str, dict[str, Tensor]] = {name: {} for name in sites}
    plain: dict[str, Tensor] = {}
    for key, t in content.items():
        name, colon, path = key.partition(":")
        if colon and name in terms:
            terms[name][path] = t
        else:
            plain[key] = t
    exprs, problems = _build(sites, terms, folder.name)
    problems += assign_plain(model, plain, compute, folder.name)
    raise_all(problems)
    set_expressions(model, exprs)
    _ready(model, folder, compute)
    for place in known.values():
        place.original = Original(_base_reader(manifest.get("base"), place.name))
        for path in place.modules:
            cast(Any, model.get_submodule(path)).compute = compute
    model.__dict__["_weft_base"] = manifest.get("base")
    return model


def _build(
    sites: Mapping[str, Any], terms: Mapping[str, dict[str, Tensor]], where: str
) -> tuple[dict[str, Expr], list[WeftError]]:
    """Every site's expression from its tree and its tensors, which are used up; and what cannot be read."""
    exprs: dict[str, Expr] = {}
    problems: list[WeftError] = []
    for name, tree in sites.items():
        try:
            exprs[name] = build(tree, lambda p, name=name: _take(terms[name], p, f"{where}: {name}"))
        except WeftError as e:
            problems.append(e)
            continue
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            problems.append(
                FormatError(
                    "an expression cannot be read",
                    where=f"{where}: {name}",
                    got=f"{type(e).__name__}: {e}",
                    want="an expression",
                    fix="copy the folder again",
                )
            )
            continue
        if terms[name]:
            problems.append(
                FormatError(
                    "unexpected tensors",
                    where=f"{where}: {name}",
                    got=sorted(terms[name]),
                    want="those of its expression",
                    fix="copy the folder again",
                )
            )
    return exprs, problems


def _take(held: dict[str, Tensor], path: str, where: str) -> Tensor:
    if path not in held:
        raise FormatError("missing tensor", where=where, got="nothing", want=path, fix="copy the folder again")
    return held.pop(path)


def _base_reader(base: Mapping[str, str] | None, name: str) -> Any:
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
        if _headers(folder) != base["hash"]:
            raise ChangedError(
                "the base model has changed",
                where=base["path"],
                got=_headers(folder),
                want=base["hash"],
                fix="restore the base model",
            )
        held = checkpoint(folder, "model")
        return (
            held[name]
            if name in held
            else next(t for k, t in held.items() if k.endswith(f".{name}") or name.endswith(f".{k}"))
        )

    return read


def _headers(folder: Path) -> str:
    """Identity of a checkpoint: hash of its files' hashes."""
    paths = sorted(folder.glob("model*.safetensors"))
    return _hash(tuple(paths), tuple((s.st_size, s.st_mtime_ns, s.st_ino) for s in (p.stat() for p in paths)))


@functools.cache
def _hash(paths: tuple[Path, ...], _: tuple[tuple[int, ...], ...]) -> str:
    import hashlib

    word = hashlib.blake2b(digest_size=16)
    for path in paths:
        word.update(str(digest(path)["blake2b"]).encode())
    return word.hexdigest()
