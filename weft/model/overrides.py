"""Methods of a model that mean something else once it is woven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from weft.error import ConflictError, OptionError


def _save_pretrained(self: nn.Module, save_directory: str | Path, *_: Any, **options: Any) -> None:
    """Save as `weft.save` does: an ordinary checkpoint where every weight is plain, else a weft folder."""
    from weft.store.save import save

    unknown = set(options) - {"is_main_process", "state_dict", "safe_serialization", "max_shard_size"}
    if unknown:
        raise OptionError(
            "a woven model's save_pretrained has no such option",
            where="save_pretrained",
            got=sorted(unknown),
            want="a folder",
            fix="weft.save(model, folder)",
        )
    if options.get("is_main_process", True):
        save(self, Path(save_directory), replace=True, keep=True)


def _tie_weights(self: nn.Module, *_: Any, **__: Any) -> None:
    """Nothing to do: tied sites share one expression."""


def _resize(self: nn.Module, *_: Any, **__: Any) -> None:
    raise ConflictError(
        "a woven embedding cannot be resized",
        where=type(self).__name__,
        got="resize_token_embeddings",
        want="a plain model",
        fix="weft.unweave(model), resize, weave again",
    )


def _requires_grad(self: nn.Module, requires_grad: bool = True) -> nn.Module:
    packed = next((n for n, p in self.named_parameters() if not p.is_floating_point()), None)
    if requires_grad and packed is not None:
        raise ConflictError(
            "packed weights cannot be trained",
            where=packed,
            got="requires_grad_(True) on the whole model",
            want="parameters of floating point",
            fix='weft.apply(model, "lora"), or weft.unweave(model) to train every weight',
        )
    return nn.Module.requires_grad_(self, requires_grad)


METHODS: dict[str, Callable[..., Any]] = {
    "requires_grad_": _requires_grad,
    "save_pretrained": _save_pretrained,
    "tie_weights": _tie_weights,
    "resize_token_embeddings": _resize,
}
