"""Load a model: Hugging Face checkpoints and weft folders, audited first, tensors mapped rather than copied."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.error import ChangedError, FormatError, PathError, WeftError, raise_all
from weft.expr import build
from weft.model import places, set_expressions, weave
from weft.model.weave import Original
from weft.store.files import read_json, read_tensors
from weft.store.swap import MANIFEST, digest, inside

WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "1_Pooling/*", "*.jinja"]


def load(where: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A woven model, in evaluation mode, frozen, from a folder or a hub id.

    Matrices stay mapped from disk in the file's dtype; everything is computed in `dtype` (default: float32 on the CPU).
    No code from the folder runs. Errors: PathError, FormatError (every problem at once: missing, unexpected or
    ill-shaped tensors, two checkpoints in one folder, names that leave the folder), ChangedError.
    """
    folder = find(where)
    compute = dtype or torch.float32
    manifest = _object(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    if manifest is not None and manifest.get("kind") == "weft":
        return _load_weft(folder, manifest, compute)
    content = checkpoint(folder, "model")
    model = skeleton(folder)
    rest = _assign(model, content, compute, where=folder.name)
    raise_all(rest)
    _ready(model, folder, compute)
    weave(model)
    for place in places(model).values():
        for path in place.modules:
            model.get_submodule(path).compute = compute
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


def _object(path: Path) -> dict[str, Any]:
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


def checkpoint(folder: Path, stem: str) -> dict[str, Tensor]:
    """Every tensor of a folder's checkpoint (`stem`.safetensors, or its index and shards), mapped. Errors: PathError, FormatError."""
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists() and single.exists():
        raise FormatError(
            "two checkpoints in one folder",
            where=str(folder),
            got=f"{index.name} and {single.name}",
            want="one of them",
            fix="remove the stale one",
        )
    if single.exists():
        return read_tensors(single)
    if not index.exists():
        raise PathError(
            "no safetensors checkpoint",
            where=str(folder),
            got=", ".join(sorted(p.name for p in folder.glob("*"))[:8]) or "nothing",
            want=single.name,
            fix="convert the model to safetensors",
        )
    table = _object(index).get("weight_map")
    if not isinstance(table, dict) or not all(
        isinstance(v, str) and v.endswith(".safetensors") and inside(folder, folder / v) for v in table.values()
    ):
        raise FormatError(
            "an index names files that it must not",
            where=index.name,
            got="a bad weight_map",
            want="safetensors files in this folder",
            fix="do not use this model",
        )
    made: dict[str, Tensor] = {}
    for file in sorted(set(table.values())):
        held = read_tensors(folder / file)
        want = {k for k, v in table.items() if v == file}
        if set(held) != want:
            raise FormatError(
                "a shard and its index differ",
                where=file,
                got=sorted(set(held) ^ want)[:5],
                want="the tensors that the index names",
                fix="copy the model again",
            )
        made |= held
    return made


def skeleton(folder: Path) -> nn.Module:
    """The model's class on `meta`, from config.json. Errors: FormatError for a class that is not transformers' own."""
    import transformers
    from accelerate import init_empty_weights

    config_file = _object(folder / "config.json")
    listed = config_file.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel) or cls.config_class is None:
        raise FormatError(
            "unknown architecture",
            where=f"{folder.name}/config.json",
            got=name,
            want="a model class of transformers",
            fix="weft runs no code from model folders",
        )
    config_file.pop("quantization_config", None)
    config_file.pop("auto_map", None)
    try:
        config = cls.config_class.from_dict(config_file)
        with init_empty_weights(include_buffers=False):
            model = cls(config)
    except Exception as e:
        raise FormatError(
            "a configuration makes no model",
            where=f"{folder.name}/config.json",
            got=f"{type(e).__name__}: {e}",
            want=f"a configuration of {name}",
            fix="copy the file again",
        ) from e
    model.config._name_or_path = str(folder)
    return model


def _assign(model: nn.Module, content: Mapping[str, Tensor], compute: torch.dtype, where: str) -> list[WeftError]:
    """Put tensors in their places; matrices as they are (mapped), the rest in the compute dtype. Returns every mismatch."""
    want: dict[str, Tensor] = model.state_dict(keep_vars=True)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix != "." and not set(content) & set(want):
        strip = all(k.startswith(prefix) for k in content)
        content = {k.removeprefix(prefix) if strip else prefix + k: t for k, t in content.items()}
    loose = {n for n, _ in model.named_buffers()} - set(want)
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ())
        if getattr(model.config, "tie_word_embeddings", False)
        else set()
    )
    matrices = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    problems: list[WeftError] = []
    for name in sorted(set(content) - set(want) - loose):
        problems.append(
            FormatError(
                "unexpected tensor",
                where=f"{where}: {name}",
                got=list(content[name].shape),
                want="no such tensor",
                fix="the checkpoint is of another model",
            )
        )
    for name, slot in want.items():
        if name not in content:
            if name not in tied:
                problems.append(
                    FormatError(
                        "missing tensor",
                        where=f"{where}: {name}",
                        got="nothing",
                        want=list(slot.shape),
                        fix="the checkpoint is of another model",
                    )
                )
        elif content[name].shape != slot.shape:
            problems.append(
                FormatError(
                    "a tensor has another shape",
                    where=f"{where}: {name}",
                    got=list(content[name].shape),
                    want=list(slot.shape),
                    fix="the checkpoint is of another model",
                )
            )
        elif content[name].is_floating_point() != slot.is_floating_point():
            problems.append(
                FormatError(
                    "a tensor has another type",
                    where=f"{where}: {name}",
                    got=str(content[name].dtype),
                    want=str(slot.dtype),
                    fix="weft reads no other tool's codes",
                )
            )
        else:
            value = (
                content[name]
                if name in matrices or not content[name].is_floating_point()
                else content[name].to(compute)
            )
            _put(model, name, value)
    return problems


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )
    else:
        module._buffers[leaf] = value


def _ready(model: nn.Module, folder: Path, compute: torch.dtype) -> None:
    model.tie_weights()  # type: ignore[operator]
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if left:
        raise FormatError(
            "some tensors have no value",
            where=folder.name,
            got=left[:5],
            want="a value for every tensor",
            fix="the checkpoint is of another model",
        )
    for module in model.modules():
        for name, b in module._buffers.items():
            if b is not None and b.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = b.to(compute)
    if (folder / "generation_config.json").exists() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
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
    model.tie_weights()  # type: ignore[operator]
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
    exprs = {}
    problems: list[WeftError] = []
    for name, tree in sites.items():
        try:
            exprs[name] = build(tree, lambda p, name=name: _take(terms[name], p, f"{folder.name}: {name}"))
        except WeftError as e:
            problems.append(e)
            continue
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            problems.append(
                FormatError(
                    "an expression cannot be read",
                    where=f"{folder.name}: {name}",
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
                    where=f"{folder.name}: {name}",
                    got=sorted(terms[name]),
                    want="those of its expression",
                    fix="copy the folder again",
                )
            )
    problems += _assign_plain(model, plain, compute, folder.name)
    raise_all(problems)
    set_expressions(model, exprs)
    _ready(model, folder, compute)
    for place in known.values():
        place.original = Original(_base_reader(manifest.get("base"), place.name))
        for path in place.modules:
            model.get_submodule(path).compute = compute
    model.__dict__["_weft_base"] = manifest.get("base")
    return model


def _assign_plain(model: nn.Module, content: Mapping[str, Tensor], compute: torch.dtype, where: str) -> list[WeftError]:
    want = {n: t for n, t in model.state_dict(keep_vars=True).items() if ".expr." not in f".{n}"}
    problems: list[WeftError] = []
    alike: dict[int, list[str]] = {}
    for n, t in want.items():
        alike.setdefault(id(t), []).append(n)
    expected = {names[0] for names in alike.values()}
    for name in sorted(set(content) ^ expected):
        problems.append(
            FormatError(
                "a tensor is missing or unexpected",
                where=f"{where}: {name}",
                got="in one only",
                want="the model's tensors",
                fix="copy the folder again",
            )
        )
    for name in set(content) & set(want):
        value = content[name].to(compute) if content[name].is_floating_point() else content[name]
        if value.shape != want[name].shape:
            problems.append(
                FormatError(
                    "a tensor has another shape",
                    where=f"{where}: {name}",
                    got=list(value.shape),
                    want=list(want[name].shape),
                    fix="copy the folder again",
                )
            )
        else:
            shared = nn.Parameter(value, requires_grad=False) if isinstance(want[name], nn.Parameter) else value
            for other in alike[id(want[name])]:
                _put(model, other, shared)
    return problems


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
