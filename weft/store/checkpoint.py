"""Read checkpoints: every tensor of a folder, the empty model of its config, and each tensor put in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.error import FormatError, PathError, WeftError
from weft.store.files import read_json, read_tensors
from weft.store.swap import inside


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
    table = read_object(index).get("weight_map")
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

    config_file = read_object(folder / "config.json")
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
    cast(Any, model.config)._name_or_path = str(folder)
    return model


def assign(model: nn.Module, content: Mapping[str, Tensor], compute: torch.dtype, where: str) -> list[WeftError]:
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
        value = content.get(name)
        problem = _misfit(slot, value, f"{where}: {name}")
        if problem is not None and (value is not None or name not in tied):
            problems.append(problem)
        elif problem is None and value is not None:
            as_is = name in matrices or not value.is_floating_point()
            _put(model, name, value if as_is else value.to(compute))
    return problems


def _misfit(slot: Tensor, value: Tensor | None, where: str) -> FormatError | None:
    """Why a checkpoint's tensor (None: it has none) cannot take a place of the model."""
    if value is None:
        what, got, want = "missing tensor", "nothing", list(slot.shape)
    elif value.shape != slot.shape:
        what, got, want = "a tensor has another shape", list(value.shape), list(slot.shape)
    elif value.is_floating_point() != slot.is_floating_point():
        return FormatError(
            "a tensor has another type",
            where=where,
            got=str(value.dtype),
            want=str(slot.dtype),
            fix="weft reads no other tool's codes",
        )
    else:
        return None
    return FormatError(what, where=where, got=got, want=want, fix="the checkpoint is of another model")


def assign_plain(model: nn.Module, content: Mapping[str, Tensor], compute: torch.dtype, where: str) -> list[WeftError]:
    """Put a weft folder's plain tensors in their places, tied ones once, in the compute dtype. Returns every mismatch."""
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


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = cast(Any, model.get_submodule(path))
    if leaf in module._parameters:
        module._parameters[leaf] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )
    else:
        module._buffers[leaf] = value
