"""weft: every weight is an expression, every method a small rewrite, and everything composes.

    model = weft.load("ref-lm")
    weft.apply(model, "gptq", bits=4)
    weft.save(model, "out")

Importing weft imports nothing heavy; each name below is loaded when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from weft.api import (
        Changes,
        apply,
        attach,
        export,
        load,
        may_write,
        merge,
        methods,
        probe,
        run,
        save,
        show,
        verify,
    )
    from weft.error import WeftError
    from weft.fitting.fit import fit, plan
    from weft.fitting.settings import Settings
    from weft.harness import TaskScore, evaluate_tasks
    from weft.lab.prove import prove, stale
    from weft.learn.tokenizer import tokenizer
    from weft.learn.trainer import Trainer
    from weft.mergekit import merge_config
    from weft.merging import blend_adapters, combine, combine_to, combined
    from weft.model import (
        activate,
        adapters,
        axes,
        begin_step,
        delete_adapter,
        expressions,
        fork,
        gathered,
        mode,
        per_row,
        rename_adapter,
        transport,
        unbranch,
        untap,
        unweave,
        weave,
    )
    from weft.progress import Bars, Silent
    from weft.score import evaluate, generate
    from weft.store.mend import import_
    from weft.training import reader, train

_HOME = {
    "weft.api": (
        "Changes", "apply", "attach", "export", "load", "may_write", "merge", "methods", "probe", "run", "save", "show", "verify",
    ),
    "weft.error": ("WeftError",),
    "weft.fitting.fit": ("fit", "plan"),
    "weft.fitting.settings": ("Settings",),
    "weft.harness": ("TaskScore", "evaluate_tasks"),
    "weft.lab.prove": ("prove", "stale"),
    "weft.learn.tokenizer": ("tokenizer",),
    "weft.learn.trainer": ("Trainer",),
    "weft.mergekit": ("merge_config",),
    "weft.merging": ("blend_adapters", "combine", "combine_to", "combined"),
    "weft.model": (
        "activate", "adapters", "axes", "begin_step", "delete_adapter", "expressions", "fork", "gathered", "mode", "per_row",
        "rename_adapter", "transport", "unbranch", "untap", "unweave", "weave",
    ),
    "weft.progress": ("Bars", "Silent"),
    "weft.store.mend": ("import_",),
    "weft.score": ("evaluate", "generate"),
    "weft.training": ("reader", "train"),
}  # fmt: skip
_WHERE = {name: home for home, names in _HOME.items() for name in names}

__all__ = [
    "Bars", "Changes", "Settings", "Silent", "TaskScore", "Trainer", "WeftError", "activate", "adapters", "apply", "attach", "axes",
    "begin_step", "blend_adapters", "combine", "combine_to", "combined", "delete_adapter", "evaluate", "evaluate_tasks", "export",
    "expressions", "fit", "fork", "gathered", "generate", "import_", "load", "may_write", "merge", "merge_config", "methods", "mode",
    "per_row", "plan", "probe", "prove", "reader", "rename_adapter", "run", "save", "show", "stale", "tokenizer", "train", "transport",
    "unbranch", "untap", "unweave", "verify", "weave",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Weft(ModuleType):
    """`weft.methods` is a function, and importing the package of that name does not replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Weft
