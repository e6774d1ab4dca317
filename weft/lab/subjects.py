"""The lab models that claims are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weft.error import OptionError, ResourceError
from weft.lab import models
from weft.lab.trial import Subject

TASKS = {"minilm": ("docstrings", "naming"), "ref-lm": ("python", "cpp")}
"""The lab models, the leading one first, with the tasks of distances and of tuning."""


def installed(names: Sequence[str] | None = None) -> list[Subject]:
    """These lab models; if not given all that are here, which is ref-lm alone without minilm's package.

    Errors: OptionError for a model that is not the lab's; ResourceError for one that was asked for and is not here.
    """
    if unknown := [n for n in names or () if n not in TASKS]:
        want = ", ".join(TASKS)
        raise OptionError(
            "this is no lab model", where="models", got=", ".join(unknown), want=want, fix="choose of these"
        )
    here: list[Subject] = []
    for name in (n for n in TASKS if names is None or n in names):
        try:
            folder = models.resolve(name)
        except ResourceError:
            if names is not None:
                raise
            continue
        here.append(Subject.load(name, Path(folder), *TASKS[name]))
    return here
