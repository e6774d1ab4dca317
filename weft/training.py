"""Training in Python: what is trainable of a woven model learns from examples, or from one long text for as long as it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from weft.api import apply, load
from weft.engine import objectives, optimizers, schedules
from weft.engine.registry import apart
from weft.engine.run import Step
from weft.error import OptionError
from weft.learn.data import Example
from weft.learn.reader import Reader
from weft.learn.settings import Reading, Training
from weft.learn.tokenizer import opening, tokenizer
from weft.learn.train import History
from weft.learn.train import train as learn
from weft.model import fork
from weft.progress import Progress
from weft.score import examples


def train(
    model: nn.Module,
    data: str | Path | Sequence[Example],
    *,
    held_out: str | Path | Sequence[Example] | None = None,
    optimizer: str | Step | None = None,
    during: str | None = None,
    objective: str | None = None,
    teacher: str | Path | nn.Module | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> History:
    """Train what is trainable, in place, on a file, a folder, a lab task's name or examples.

    `options` are those of `weft.learn.settings.Training`: steps or epochs, batch, micro_batch, length, pack, buckets, lr, schedule,
    warmup, weight_decay, label_smoothing, clip, precision, checkpointing, save_every, eval_every, loggers, by_task, seed.
    `held_out` is scored in between, and the best step stays. `out` keeps checkpoints, which a later call goes on from.
    `optimizer` names a method of that kind (`muon`, `lora_plus` ...), `during` a schedule, which rewrites terms while they train
    (`spiel` ...). A recipe's optimizer is `Changes.optimizer`. `objective` names what is lowered in place of the labels' loss
    (`distill` ...): it compares with `teacher`, a model or where to load it from, without one with the pretrained weights. Options of
    all three come with the others; one that two have, with the method's name before it (`galore_every`).
    Errors: OptionError for options that are unknown or out of range, or if nothing is trainable; FormatError if no token is a
    target; ConflictError for held-out data that is trained on; NumericError where the loss is not finite.
    """
    name = None if isinstance(optimizer, Step) else optimizer
    (moves, rewrites, lowers), options = apart(options, name, during, objective)
    if isinstance(optimizer, Step):
        name, moves = optimizer.method, dict(optimizer.options)
    aim = objectives.named(objective, **lowers) if objective is not None else None
    if teacher is not None and aim is None:
        got, want, fix = "a teacher and no objective", "both", "name an objective, such as distill"
        raise OptionError("nothing is learnt from a teacher", where="teacher", got=got, want=want, fix=fix)
    if aim is not None and teacher is not None:
        aim = replace(aim, teacher=load(teacher) if isinstance(teacher, str | Path) else teacher)
    seed = Training.of(**options).seed
    learned = examples(str(data), "train", seed) if isinstance(data, str | Path) else data
    scored = examples(str(held_out), "test", seed) if isinstance(held_out, str | Path) else held_out
    how: dict[str, Any] = {
        "held_out": scored,
        "optimizer": optimizers.named(name, **moves) if name is not None else None,
        "during": schedules.named(during, **rewrites) if during is not None else None,
        "objective": aim,
        "out": out,
        "progress": progress,
    }
    return learn(model, learned, tokenizer=tokenizer(model), **how, **options)


def reader(model: nn.Module, method: str = "lora", *, start: int | None = None, **options: Any) -> Reader:
    """Something to read or write one long text with, which learns each chunk of it into weights that last as long as the reader.

    `method` makes what learns, in a fork: the model itself never changes. `options` are its own, and those of
    `weft.learn.settings.Reading`: chunk, window, epochs, lr, seed. `start`: the token before the first; if not given, the one that the
    tokenizer puts before texts, or its end of text. Errors: OptionError; ConflictError for a model that predicts no text; PathError for
    one without a tokenizer.
    """
    how = Reading.of(**{k: options.pop(k) for k in list(options) if k in Reading.model_fields})
    own = fork(model).requires_grad_(False)
    apply(own, method, seed=how.seed, **options)
    if start is None:
        words = tokenizer(model)
        found = [*opening(words)[-1:], words.eos_token_id, words.bos_token_id]
        start = next((i for i in found if i is not None), None)
    if start is None:
        got, want, fix = "a tokenizer without an end of text", "the token before the first", "give start"
        raise OptionError("a text has nothing to begin with", where="start", got=got, want=want, fix=fix)
    return Reader(own, how, start=start)
