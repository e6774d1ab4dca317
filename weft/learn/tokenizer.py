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


def opening(tokenizer: Any) -> list[int]:
    """The tokens that this tokenizer puts before every text: the start token of Llama or Gemma, nothing of Qwen or GPT-2."""
    bare, whole = (tokenizer("a", add_special_tokens=more, verbose=False)["input_ids"] for more in (False, True))
    places = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return list(whole[: next(places, 0)])


def behind(tokenizer: Any, text: str, lead: list[int]) -> list[int]:
    """The tokens of a text without this opening, which it may have written out."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[len(lead) :] if ids[: len(lead)] == lead else ids


def source(model: nn.Module) -> str:
    """The folder or hub id that the model came from; nothing if it came from none."""
    return str(model.__dict__.get("_weft_source") or getattr(getattr(model, "config", None), "_name_or_path", ""))
