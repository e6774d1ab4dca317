"""Where a run that was stopped goes on, and that it is the same run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from weft.error import ConflictError, WeftError
from weft.learn.aim import Aim
from weft.learn.data import Example, fingerprint
from weft.learn.settings import Training
from weft.store.cache import key
from weft.store.files import read_json, write_json

RUN = "run.json"
FREE = {"steps", "epochs", "micro_batch", "checkpointing", "save_every", "eval_every", "loggers"}
"""Options that a run may go on with others of: how long it is, and what changes memory, time and what is told."""


def last(work: Path, args: transformers.TrainingArguments) -> str | None:
    """The newest whole checkpoint; what a killed run left behind unfinished (its state file is written last) is removed."""
    for folder in sorted(work.glob("checkpoint-*"), key=lambda p: -int(p.name.rpartition("-")[2])):
        try:
            read_json(folder / "trainer_state.json")
        except WeftError:
            if args.process_index == 0:
                shutil.rmtree(folder)
        else:
            return str(folder)
    return None


def described(
    data: Sequence[Example],
    held_out: Sequence[Example] | None,
    tokenizer: Any,
    how: Training,
    moved: torch.optim.Optimizer | None,
    objective: Aim | None,
) -> dict[str, Any]:
    """What makes a run the one that it is, besides the model."""
    return {
        "data": fingerprint(data),
        "held_out": None if held_out is None else fingerprint(held_out),
        "chat_template": key(getattr(tokenizer, "chat_template", None)),
        "optimizer": type(moved).__name__,
        "objective": objective is not None,
        **how.model_dump(mode="json", exclude=FREE),
    }


def same_run(
    work: Path, checkpoint: str | None, args: transformers.TrainingArguments, about: dict[str, Any]
) -> str | None:
    """The checkpoint, which is of this run; of a new one, what it is is written down.

    Errors: ConflictError for a checkpoint of other data or options: the result would be that of neither run.
    """
    if checkpoint is None:
        if args.process_index == 0:
            work.mkdir(parents=True, exist_ok=True)
            write_json(work / RUN, about)
        return None
    held = read_json(work / RUN) if (work / RUN).exists() else about
    if other := sorted(k for k in about.keys() | held.keys() if held.get(k) != about.get(k)):
        got, want = f"other {', '.join(other)}", "the data and options that it began with"
        fix = "give another folder, or remove this one"
        raise ConflictError("another run is kept there", where=str(work), got=got, want=want, fix=fix)
    return checkpoint
