"""Train what is trainable of a woven model on examples."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.error import ConflictError, FormatError, OptionError
from weft.learn.aim import Aim, Reference
from weft.learn.batches import Collate, Ordered, Row, inputs, order, packed
from weft.learn.data import Example, Pair, encode, reference
from weft.learn.leaks import refuse_leaks
from weft.learn.likelihood import likelihood_of
from weft.learn.objective import contrasted
from weft.learn.resume import described, last, same_run
from weft.learn.schedule import Make
from weft.learn.scheduled import Scheduled
from weft.learn.settings import Training
from weft.learn.suits import suits
from weft.learn.trainer import Loss, Optimizer, Run, Watch, Within, arguments, diverged, trainable
from weft.memory import peak
from weft.model import activate, adapters, must_be_whole, per_row
from weft.progress import Progress, Silent
from weft.stats.inputs import in_vocabulary
from weft.stats.objective import objective as goal_of
from weft.stats.walker import forward
from weft.store.files import told


@dataclass
class History:
    """What training did: the loss of each step, held-out losses after some, tokens seen, seconds, bytes of memory at the peak."""

    losses: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    held_out: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    best: int | None = None
    """The step whose tensors the model ends with, of a run with held-out data."""
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


def train(
    model: nn.Module,
    data: Sequence[Example],
    *,
    tokenizer: Any,
    held_out: Sequence[Example] | None = None,
    optimizer: Optimizer | None = None,
    during: Make | None = None,
    objective: Aim | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> History:
    """Train the model's trainable tensors in place; `options` are those of `Training`. The loss is over target tokens only.

    A step's loss is the mean over its targets, however many processes and micro-batches share them. Pairs train an embedding model by
    contrast with all others of the step in the micro-batch. Every step takes `batch` examples, at most all there are. `optimizer` makes
    what moves them, from their names and the peak rate; AdamW without it. One that has a `measure` is given the loss of each
    micro-batch, to take as often as it likes, and no gradient. `during` makes the schedule that rewrites terms meanwhile. `objective`
    is lowered in place of the labels' loss, in held-out scores too. With `held_out`, it is scored every `eval_every` steps and after
    the last, and the model ends with the tensors of the best score. `by_task`: each example has the adapter that its task names, and no
    other, as within `weft.per_row`; afterwards no task is active. With `out`, checkpoints are kept there, and a later call goes on from
    the last one, bit for bit. Under torchrun every process trains a share of each batch. Deterministic for a seed on one machine and
    number of processes. It trains on a CUDA device where there is one, and the model ends where it was.
    Errors: OptionError for what is out of range, or if nothing trains; ConflictError for a model that fully_shard spread, that cannot learn
    from such data or keep packed examples apart, an `out` of other data or options, held-out data that is trained on, a schedule without
    terms or gradients, a teacher of another kind; FormatError for data of two kinds, without targets, beyond the vocabulary, or without a
    reference; NumericError naming the step whose loss is not finite; PathError, ResourceError for `out` or a reference.
    """
    how = Training.of(**options)
    _may_train(model, data, held_out or (), optimizer, objective, how)
    tasks = _by_task(model, [*data, *(held_out or ())]) if how.by_task else []
    items = _items(model, data, tokenizer, how)
    batch = min(how.batch, len(items))
    steps = how.steps or (max(1, math.ceil(how.epochs * len(items) / batch)) if how.epochs else 200)
    queue = Ordered(items, order(len(items), steps, batch, how.seed, _lengths(items) if how.buckets else None))
    collate = Collate(
        tokenizer, how.length, pack=how.pack, tasks=tasks, references=bool(objective and objective.aligns)
    )
    device, start = next(model.parameters()).device, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, told(work := Path(out or scratch)), _set_up(model, how):
        args = arguments(work, how, steps, batch, save=out is not None, score=held_out is not None)
        _keeps_apart(model, collate, items)
        scored = None if held_out is None else _held(model, held_out, how, batch, collate)
        ref = Reference(model, objective, how.label_smoothing) if objective is not None else None
        moved, rewrites = _movers(model, optimizer, during, how.lr, steps)
        run = Run(
            model=model, args=args, train_dataset=queue, data_collator=collate, eval_dataset=cast(Any, scored),
            optimizers=(moved, None),
        )  # fmt: skip
        run.loss_of, run.measure = _loss(model, isinstance(data[0], Pair), ref, how), getattr(moved, "measure", None)
        run.follow(rewrites)
        run.within, run.model_accepts_loss_kwargs = _within(model, tasks), not isinstance(data[0], Pair)
        here = ref.at(next(model.parameters()).device) if ref is not None else nullcontext()
        with here, (progress or Silent()).bar("tune", steps) as step:
            run.add_callback(Watch(step, len(items) / batch))
            about = described(data, held_out, tokenizer, how, moved, objective)
            run.go(same_run(work, last(work, args), args, about) if out else None)
    _must_be_finite(model.eval().to(device))
    return _history(run, time.monotonic() - start)


def _lengths(items: Sequence[Any]) -> list[int]:
    """How long each item is: tokens of a row, characters of a pair."""
    return [len(i.query) + len(i.positive) if isinstance(i, Pair) else sum(len(e.input_ids) for e in i) for i in items]


def _history(run: Run, seconds: float) -> History:
    """What a run that is over did."""
    log, best = run.state.log_history, str(run.state.best_model_checkpoint or "").rpartition("-")[2]
    return History(
        [(int(e["step"]), float(e["loss"])) for e in log if "loss" in e],
        [(int(e["step"]), float(e["eval_loss"])) for e in log if "eval_loss" in e],
        int(best) if best else None, int(run.state.num_input_tokens_seen), seconds, peak(),
    )  # fmt: skip


def _within(model: nn.Module, tasks: Sequence[str]) -> Within:
    """What a batch is computed within: where there are tasks, each row has the adapter of its own."""
    if not tasks:
        return lambda batch: nullcontext()
    return lambda batch: per_row(model, [tasks[i] for i in batch["tasks"].tolist()])


def _by_task(model: nn.Module, data: Sequence[Example]) -> list[str]:
    """The tasks of the examples; their adapters have gates from now on, and are off outside the steps.

    Errors: FormatError for examples without a task; OptionError for tasks without an adapter; ConflictError for adapters that are
    on and that no example trains, and for what cannot tell rows.
    """
    if bad := [e.name or "an example without a name" for e in data if not e.task]:
        got, want = f"{len(bad)} of {len(data)} examples without", "a task for every example"
        fix = "name it in the field `task`, or train without by_task"
        raise FormatError("an example has no task", where=", ".join(bad[:3]), got=got, want=want, fix=fix)
    tasks = sorted({e.task for e in data})
    if other := [a.name for a in adapters(model).values() if a.strength and a.name not in tasks]:
        want, fix = f"adapters of {', '.join(tasks)} alone", "turn it off (weft.activate), or merge it (weft.merge)"
        what = "an adapter is on that no example trains"
        raise ConflictError(what, where=", ".join(other), got="on", want=want, fix=fix)
    with per_row(model, tasks):
        activate(model, [])
    return tasks


def _own(optimizer: Optimizer | None, how: Training) -> None:
    """Errors: OptionError for AdamW's weight decay beside another optimizer."""
    if optimizer is not None and how.weight_decay:
        got, want, fix = f"{how.weight_decay} and an optimizer of its own", "0", "give it to the optimizer"
        raise OptionError("weight decay is AdamW's", where="weight_decay", got=got, want=want, fix=fix)


def _may_align(data: Sequence[Example], how: Training) -> None:
    """Errors: OptionError for packed rows, FormatError for data without references."""
    if how.pack:
        got, want = "packed rows", "one example a row"
        raise OptionError("references cannot be packed", where="pack", got=got, want=want, fix="leave pack out")
    if not any(map(reference, data)):
        want, fix = "prompts with a field `reference`", "say in it what a prompt says in other words"
        where, got = type(data[0]).__name__, f"{len(data)} examples without"
        raise FormatError("no example has a reference", where=where, got=got, want=want, fix=fix)


def _movers(
    model: nn.Module, optimizer: Optimizer | None, during: Make | None, lr: float, steps: int
) -> tuple[torch.optim.Optimizer | None, Scheduled | None]:
    """The optimizer, and the schedule, which has begun. Errors: ConflictError for one beside an optimizer by losses alone."""
    rewrites = Scheduled(model, during(steps)) if during is not None else None
    moved = optimizer(trainable(model), lr) if optimizer is not None else None
    if rewrites is not None:
        if hasattr(moved, "measure"):
            got, want, fix = "an optimizer by losses alone", "gradients", "leave one of them out"
            raise ConflictError("schedules go by gradients", where="during", got=got, want=want, fix=fix)
        rewrites.begin(moved)
    return moved, rewrites


@contextmanager
def _set_up(model: nn.Module, how: Training) -> Generator[None]:
    """What training does to a model besides, undone after it: autocast around its forward, and blocks that are computed again.

    Where they are, what enters them has gradients, though all before them is frozen.
    """
    if how.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        got, want, fix = "a model without gradient checkpointing", "one with it", "train it without checkpointing"
        raise ConflictError("blocks cannot be computed again", where=type(model).__name__, got=got, want=want, fix=fix)
    hosted, own = cast(Any, model), model.__dict__.get("forward")
    if how.checkpointing:
        hosted.enable_input_require_grads()
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if own is not None:
            hosted.forward = own
        if how.checkpointing:
            hosted.disable_input_require_grads()
            hosted.gradient_checkpointing_disable()


def _must_be_finite(model: nn.Module) -> None:
    for name, t in trainable(model).items():
        if not bool(torch.isfinite(t).all()):
            problem = diverged(name, "NaN or infinity after the last step")
            raise problem


def _may_train(
    model: nn.Module,
    data: Sequence[Example],
    held_out: Sequence[Example],
    optimizer: Optimizer | None,
    aim: Aim | None,
    how: Training,
) -> None:
    """Errors: those of `train` that show at once."""
    must_be_whole(model.named_parameters())
    if not trainable(model):
        raise OptionError(
            "nothing is trainable",
            where=type(model).__name__,
            got="a frozen model",
            want="an adapter",
            fix='weft.apply(model, "lora") first',
        )
    if len({isinstance(e, Pair) for e in (*data, *held_out)}) > 1:
        raise FormatError(
            "data must be of one kind",
            where="training and held-out data",
            got="pairs and others",
            want="one kind",
            fix="split the data",
        )
    for example in data[:1]:
        suits(model, example, "training data", "trained")
    _own(optimizer, how)
    if aim is not None and aim.aligns:
        _may_align([*data, *held_out], how)
    refuse_leaks(data, held_out)


def _items(model: nn.Module, data: Sequence[Example], tokenizer: Any, how: Training) -> list[Any]:
    """What batches are made of, pairs or rows. Errors: FormatError; OptionError to pack pairs."""
    if data and isinstance(data[0], Pair):
        if how.pack:
            got, want, fix = "pairs", "texts, responses or messages", "leave pack out"
            raise OptionError("pairs cannot be packed", where="pack", got=got, want=want, fix=fix)
        return list(data)
    encoded = encode(data, tokenizer, length=how.length)
    seen = [ids for e in encoded for ids in (e.input_ids, e.reference.input_ids if e.reference else ())]
    in_vocabulary(model, torch.tensor([max(ids) for ids in seen if ids]))
    return packed(encoded, how.length) if how.pack else [(e,) for e in encoded]


def _loss(model: nn.Module, pairs: bool, ref: Reference | None, how: Training) -> Loss:
    """The loss of a batch: that of its labels, or what an objective says of the reference."""
    goal = goal_of(model)

    def apart(m: nn.Module, x: Mapping[str, Tensor], _: Any) -> Tensor:
        halves = _half(x, 0), _half(x, 1)
        if ref is not None:
            return ref.pairs(m, halves)
        queries, positives = (goal.vectors(forward(m, half), half) for half in halves)
        return contrasted(queries, positives, m.training, how.label_smoothing)

    if pairs:
        return apart
    if ref is not None:
        return ref.tokens
    loss = likelihood_of(model)
    return lambda m, x, count: loss(m, inputs(x), x["labels"], count, how.label_smoothing if m.training else 0.0)


def _half(x: Mapping[str, Tensor], which: int) -> dict[str, Tensor]:
    """The queries (0) or positives (1) of a batch of pairs."""
    return {k: v[which::2] for k, v in inputs(x).items()}


def _held(
    model: nn.Module, data: Sequence[Example], how: Training, batch: int, collate: Collate
) -> list[dict[str, Tensor]]:
    """Held-out batches, as wide as those of training, unpacked. Errors: as for training data."""
    items = _items(model, data, collate.tokenizer, how.model_copy(update={"pack": False}))
    plain = Collate(collate.tokenizer, how.length, tasks=collate.tasks, references=collate.references)
    return [plain(items[i : i + batch]) for i in range(0, len(items), batch)]


def _keeps_apart(model: nn.Module, collate: Collate, rows: Sequence[Row]) -> None:
    """Compare an example in a packed row, if there is one, with itself alone. Errors: ConflictError where what stands before it shows."""
    row = next((r for r in rows if len(r) > 1), None) if collate.pack else None
    if row is None:
        return
    (first, second), was = row[:2], model.training
    model.eval()
    with torch.no_grad():
        device = next(model.parameters()).device
        both, alone = (
            forward(model, {k: v.to(device) for k, v in inputs(collate([r])).items()})[0]
            for r in ((first, second), (second,))
        )
    model.train(was)
    start, size = len(first.input_ids), len(second.input_ids)
    seen, want = both[start : start + size].float(), alone[:size].float()
    gap = float((seen - want).abs().max() / want.abs().max())
    if not gap <= (1e-4 if alone.dtype in (torch.float32, torch.float64) else 3e-2):
        raise ConflictError(
            "this model does not keep packed examples apart",
            where=type(model).__name__,
            got=f"outputs that differ by {gap:.1%} from those of an example alone",
            want="the same outputs",
            fix="train without pack",
        )
