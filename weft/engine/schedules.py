"""Methods of kind schedule, as training takes them."""

from __future__ import annotations

from typing import Any

from weft.engine.registry import get
from weft.error import OptionError
from weft.learn.schedule import Make, Schedule


def named(method: str, **options: Any) -> Make:
    """What makes a method's schedule with these options. Errors: OptionError for another kind, and for options."""
    chosen = get(method)
    if chosen.kind != "schedule":
        got, want, fix = f"a {chosen.kind} method", "a schedule", "weft methods shows kinds"
        raise OptionError("this method rewrites nothing during training", where=method, got=got, want=want, fix=fix)
    bound = chosen.bind(options)

    def make(steps: int) -> Schedule:
        return chosen.fn(steps, **bound)

    return make
