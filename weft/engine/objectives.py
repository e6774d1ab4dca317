"""Methods of kind objective, as training takes them."""

from __future__ import annotations

from typing import Any

from weft.engine.registry import get
from weft.error import OptionError
from weft.learn.aim import Aim


def named(method: str, **options: Any) -> Aim:
    """A method's objective with these options. Errors: OptionError for another kind, and for options."""
    chosen = get(method)
    if chosen.kind != "objective":
        got, want, fix = f"a {chosen.kind} method", "an objective", "weft methods shows kinds"
        raise OptionError("this method is nothing to lower", where=method, got=got, want=want, fix=fix)
    bound = chosen.bind(options)
    return Aim(lambda seen: chosen.fn(seen, **bound), "reference" in chosen.needs)
