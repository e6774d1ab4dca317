"""Whose classes a model folder is made of, transformers', diffusers' or weft's: how each names its class, configuration and files."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from weft.error import FormatError, OptionError, PathError, WeftError
from weft.store.bare import Bare
from weft.store.files import read_json

STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model", "weft": "model"}
"""What each calls its checkpoint's files. weft's own classes, `weft.nets`, are written as those of transformers."""


def library(model: nn.Module) -> str:
    """`transformers`, `diffusers` or `weft`. Errors: OptionError for a model that is nobody's, which no folder can describe."""
    if isinstance(model, Bare):
        return "transformers"
    import transformers

    diffusers: Any = sys.modules.get("diffusers")
    if isinstance(model, transformers.PreTrainedModel):
        return "weft" if type(model).__module__.startswith("weft.nets.") else "transformers"
    if diffusers is not None and isinstance(model, diffusers.ModelMixin):
        return "diffusers"
    raise OptionError(
        "this model has no configuration to save",
        where=type(model).__name__,
        got=f"a class of {type(model).__module__.partition('.')[0]}",
        want="a model class of transformers or diffusers",
        fix="weft.unweave(model), then save its state_dict",
    )


def stem_of(model: nn.Module) -> str:
    """What the model's checkpoint files are called."""
    return STEMS[library(model)]


def stem_in(folder: Path) -> str:
    """What a folder's checkpoint files are called; as transformers' where its configuration cannot be read."""
    try:
        said = read_json(folder / "config.json")
    except WeftError:
        return STEMS["transformers"]
    return STEMS["diffusers" if isinstance(said, dict) and _of_diffusers(said) else "transformers"]


def config_of(model: nn.Module) -> dict[str, Any]:
    """The model's configuration as its file holds it, with the name of its class."""
    held = cast(Any, model)
    if isinstance(model, Bare):
        made: dict[str, Any] = model.configuration()
    elif library(model) == "diffusers":
        made = json.loads(held.to_json_string())
    else:
        made = {**json.loads(held.config.to_json_string(use_diff=False)), "architectures": [type(model).__name__]}
    made.pop("_name_or_path", None)
    return made


def maker(said: Mapping[str, Any], where: str) -> tuple[str, Callable[[], nn.Module]]:
    """The name of a configuration's class, and what makes a model of it.

    Errors: FormatError for a class that is not the library's own, or weft's; PathError if diffusers is needed and not installed.
    """
    listed = said.get("architectures")
    own = _of_diffusers(said)
    name = said["_class_name"] if own else listed[0] if isinstance(listed, list) and listed else None
    home, base = _diffusers(where) if own else _transformers(name)
    cls: Any = getattr(home, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(cls, type) or not issubclass(cls, base) or getattr(cls, "config_class", cls) is None:
        raise FormatError(
            "unknown architecture",
            where=where,
            got=name,
            want=f"a model class of {home.__name__}",
            fix="weft runs no code from model folders",
        )
    kept = {k: v for k, v in said.items() if k not in ("quantization_config", "auto_map")}
    made = cast(Any, cls)
    return made.__name__, (lambda: made.from_config(kept)) if own else (
        lambda: made(made.config_class.from_dict(dict(kept)))
    )


def remember(model: nn.Module, folder: Path) -> None:
    """Note in the configuration where the model came from, as its library does."""
    held = cast(Any, model)
    if library(model) == "diffusers":
        held.register_to_config(_name_or_path=str(folder))
    else:
        held.config._name_or_path = str(folder)


def _of_diffusers(said: Mapping[str, Any]) -> bool:
    return isinstance(said.get("_class_name"), str) and "architectures" not in said


def _transformers(name: Any) -> tuple[Any, type]:
    """Where a class of this name is, in weft or in transformers, and what it derives from."""
    import transformers

    from weft import nets

    return nets if name in nets.__all__ else transformers, transformers.PreTrainedModel


def _diffusers(where: str) -> tuple[Any, type]:
    try:
        diffusers: Any = importlib.import_module("diffusers")
    except ImportError as e:
        raise PathError(
            "diffusers is not installed",
            where=where,
            got="a model class of diffusers",
            want="the library of that class",
            fix="pip install diffusers",
        ) from e
    return diffusers, diffusers.ModelMixin
