"""The tokenizer that belongs to a model: the one beside its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from weft.error import PathError


def tokenizer(model: nn.Module) -> Any:
    """The tokenizer of the folder or hub id that the model came from. Errors: PathError."""
    from transformers import AutoTokenizer

    place = source(model)
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as e:
        where, fix = place or type(model).__name__, "copy them into the model's folder"
        raise PathError(
            "the model has no tokenizer", where=where, got=type(e).__name__, want="tokenizer files", fix=fix
        ) from e


def source(model: nn.Module) -> str:
    """The folder or hub id that the model came from; nothing if it came from none."""
    return str(model.__dict__.get("_weft_source") or getattr(getattr(model, "config", None), "_name_or_path", ""))
