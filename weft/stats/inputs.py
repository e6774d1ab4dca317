"""What a model is given to read: refused where it does not know it, or reads more than that."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from weft.error import ConflictError, FormatError

_WRITTEN = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
OUTPUTS = ("logits", "logits_per_image", "sample", "last_hidden_state")
"""What a model's main output is called, the first that there is."""
_BESIDES = ("pixel_values", "input_features", "input_values", "input_ids")


def may_read(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse tokens that a model has no embedding for, and texts alone for one that also reads what it wrote.

    Errors: FormatError; ConflictError.
    """
    if "input_ids" in batch:
        in_vocabulary(model, batch["input_ids"])
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and not any(n in batch for n in _WRITTEN):
        raise ConflictError(
            "an encoder-decoder reads more than texts",
            where=type(model).__name__,
            got=" ".join(batch),
            want="what was written, too: decoder_input_ids",
            fix="give batches with both to weft.apply(data=...), or train it with transformers: a woven model is one of its models",
        )


@contextmanager
def reading(model: nn.Module, batch: Mapping[str, Tensor]) -> Generator[None]:
    """What a model says to a batch without some kind of input that it may have is a ConflictError."""
    try:
        yield
    except (IndexError, RuntimeError) as e:
        length, room = (
            _length(batch),
            getattr(getattr(model, "config", None), "max_position_embeddings", None) or 1 << 60,
        )
        if length <= room:
            raise
        where, want, fix = type(model).__name__, f"at most {room} tokens, its positions", "give a smaller length"
        raise ConflictError("texts are too long for the model", where=where, got=length, want=want, fix=fix) from e
    except (AttributeError, TypeError, ValueError) as e:
        missing = [n for n in _BESIDES if n in inspect.signature(type(model).forward).parameters and n not in batch]
        if not missing:
            raise
        raise ConflictError(
            "this model cannot read that alone",
            where=type(model).__name__,
            got=f"{' '.join(batch)}; it said: {e}",
            want=" ".join(missing),
            fix="give batches with all that it reads, as data=[{...}, ...]",
        ) from e


def _length(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch's longest text."""
    return batch["input_ids"].shape[-1] if "input_ids" in batch else 0


def main_output(model: nn.Module, out: Any) -> Tensor:
    """Of what a model gives, the first that is known. Errors: ConflictError."""
    found = next((made for name in OUTPUTS if (made := getattr(out, name, None)) is not None), None)
    if found is None:
        got, want = " ".join(out) if isinstance(out, Mapping) else type(out).__name__, " or ".join(OUTPUTS)
        fix = "use methods that need no data"
        raise ConflictError(
            "this model gives nothing that can be compared", where=type(model).__name__, got=got, want=want, fix=fix
        )
    return found


def in_vocabulary(model: nn.Module, ids: Int[Tensor, "*t"]) -> None:
    """Refuse token ids that the model has no embedding for, where it names its table. Errors: FormatError."""
    try:
        table = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # a model of several towers
        return
    if not isinstance(table, nn.Embedding) or not ids.numel():
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= table.num_embeddings:
        raise FormatError(
            "a token is not in the model's vocabulary",
            where=type(model).__name__,
            got=f"token {low if low < 0 else high}",
            want=f"0 to {table.num_embeddings - 1}",
            fix="use the tokenizer that belongs to the model",
        )
