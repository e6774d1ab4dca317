"""Which models learn and are scored on which examples."""

from __future__ import annotations

from torch import nn

from weft.error import ConflictError
from weft.learn.data import Example, Pair
from weft.stats.objective import objective


def writes(model: nn.Module) -> bool:
    """Whether it is a language model: one that goes on from a text."""
    read = getattr(model, "main_input_name", "input_ids")
    return read == "input_ids" and bool(getattr(model, "can_generate", lambda: False)())


def suits(model: nn.Module, example: Example, where: str, what: str) -> None:
    """Refuse pairs for a model that gives no embeddings, and other examples for one that writes no text. Errors: ConflictError."""
    kind = "text" if writes(model) else "embeddings" if objective(model).embeds else "other classes"
    if kind != ("embeddings" if isinstance(example, Pair) else "text"):
        raise ConflictError(
            f"this model cannot be {what} on these examples",
            where=where,
            got=f"{type(example).__name__} examples, a model of {kind}",
            want="pairs for an embedding model; text, responses or messages for a language model",
            fix="use data of the other kind; for classes, train the woven model with transformers",
        )
