"""Small models that are made where they are needed: seconds to minutes of training on one core, then a folder in the cache."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from weft.error import OptionError

if TYPE_CHECKING:
    from weft.lab.made.recipe import Recipe

NAMES = ("ref-vit", "ref-moe", "ref-seq2seq", "ref-clip", "ref-dlm", "ref-diffusion", "ref-ctr")
"""Every one, each made by the file that its name ends with."""


def get(name: str) -> Recipe:
    """How this model is made and scored. Errors: OptionError for an unknown one."""
    if name not in NAMES:
        raise OptionError(
            "unknown lab model", where="model", got=name, want=", ".join(NAMES), fix="choose one of these"
        )
    return import_module(f"{__name__}.{name.removeprefix('ref-')}").RECIPE
