"""Methods of kind optimizer, as training takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from weft.engine.registry import get
from weft.engine.run import Step
from weft.error import OptionError

if TYPE_CHECKING:
    from weft.learn.trainer import Optimizer as Make


def named(method: str, **options: Any) -> Make:
    """What makes a method's optimizer with these options. Errors: OptionError for another kind, and for options."""
    chosen = get(method)
    if chosen.kind != "optimizer":
        got, want, fix = f"a {chosen.kind} method", "an optimizer", "weft methods shows kinds"
        raise OptionError("this method moves no tensors", where=method, got=got, want=want, fix=fix)
    bound = chosen.bind(options)

    def make(params: Mapping[str, nn.Parameter], lr: float) -> Optimizer:
        return chosen.fn(params, lr, **bound)

    return make


def split(method: str | Step | None, options: Mapping[str, Any]) -> tuple[Make | None, dict[str, Any]]:
    """The optimizer of this name, made with those of the options that are its own, and the options that are left."""
    if method is None:
        return None, dict(options)
    if isinstance(method, Step):
        return named(method.method, **dict(method.options)), dict(options)
    own = {n: v for n, v in options.items() if n in get(method).options.model_fields}
    return named(method, **own), {n: v for n, v in options.items() if n not in own}
