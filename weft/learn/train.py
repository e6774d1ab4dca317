"""Train what is trainable of a woven model, through one small subclass of the Hugging Face Trainer."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from weft.error import FormatError, NumericError, OptionError, WeftError, raise_all
from weft.learn.data import IGNORE, Encoded, Example, Pair, encode
from weft.learn.objective import contrast, likelihood
from weft.model import must_be_whole
from weft.progress import Progress, Silent
from weft.stats.objective import objective
from weft.stats.walker import forward, in_vocabulary
from weft.store.files import read_json, told
from weft.store.tensors import read_tensors, write_tensors

TRAINABLE = "trainable.safetensors"


@dataclass
class History:
    """What training did: the loss after each step, tokens seen, seconds."""

    losses: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    tokens: int = 0
    seconds: float = 0.0


class Trainer(transformers.Trainer):
    """The Hugging Face Trainer for woven models: checkpoints hold the trainable tensors only, matched strictly on resume."""

    loss_of: Callable[[nn.Module, Mapping[str, Tensor], Any], Tensor]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self.loss_of(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            problem = _diverged(f"step {self.state.global_step + 1}", f"a loss of {float(loss.detach())}")
            raise problem
        return (loss, None) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        out = Path(output_dir or str(self.args.output_dir))
        write_tensors(out / TRAINABLE, trainable(cast(nn.Module, self.model)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(cast(nn.Module, self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        restore(cast(nn.Module, self.model), Path(str(self.state.best_model_checkpoint)))


def _diverged(where: str, got: str) -> NumericError:
    return NumericError(
        "training is not finite",
        where=where,
        got=got,
        want="finite numbers",
        fix="train at a lower rate; if it is the first step, look for NaN or huge weights",
    )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that training changes, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def restore(model: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's tensors back. Errors: FormatError if they are not exactly the model's trainable ones."""
    held, mine = read_tensors(checkpoint / TRAINABLE), trainable(model)
    if {n: t.shape for n, t in held.items()} != {n: p.shape for n, p in mine.items()}:
        raise FormatError(
            "a checkpoint is of another model",
            where=str(checkpoint),
            got=sorted(set(held) ^ set(mine))[:5],
            want="the model's trainable tensors",
            fix="remove the checkpoint folder",
        )
    with torch.no_grad():
        for name, p in mine.items():
            p.copy_(held[name])


class _Items(Dataset[Any]):
    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


class _Watch(transformers.TrainerCallback):
    """Moves the progress bar."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self.move = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.move(1)


def _last(work: Path) -> str | None:
    """The newest whole checkpoint; what a killed run left behind unfinished (its state file is written last) is removed."""
    for folder in sorted(work.glob("checkpoint-*"), key=lambda p: -int(p.name.rpartition("-")[2])):
        try:
            read_json(folder / "trainer_state.json")
        except WeftError:
            shutil.rmtree(folder)
        else:
            return str(folder)
    return None


def train(
    model: nn.Module,
    data: Sequence[Example],
    *,
    tokenizer: Any,
    steps: int = 200,
    batch: int = 8,
    length: int = 512,
    lr: float = 2e-3,
    seed: int = 0,
    out: Path | None = None,
    save_every: int = 100,
    checkpointing: bool = False,
    progress: Progress | None = None,
) -> History:
    """Train the model's trainable tensors in place; the loss is over target tokens only.

    Pairs train an embedding model by contrast. AdamW, linear warm-up over a twentieth of the steps, cosine decay to a tenth.
    With `out`, checkpoints are kept there every `save_every` steps and a later call goes on from the last one, bit for bit.
    Deterministic for a seed on one machine. A batch is at most all examples.
    It trains on a CUDA device where there is one, and the model ends where it was.
    Errors: OptionError for what is out of range, or if nothing is trainable; ConflictError for a model that fully_shard
    spread; FormatError if no token is a target or one is not in the vocabulary; NumericError naming the step whose loss
    is not finite; PathError, ResourceError for `out`.
    """
    _may_train(model, data)
    _in_range(lr, seed, steps=steps, batch=batch, length=length, save_every=save_every)
    items, loss = _task(model, data, tokenizer, length)
    batch = min(batch, len(items))
    history, device = History(), next(model.parameters()).device
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, told(work := Path(out or scratch)):
        args = transformers.TrainingArguments(
            output_dir=str(work), max_steps=steps, per_device_train_batch_size=batch, learning_rate=lr, seed=seed, data_seed=seed,
            lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=max(1, steps // 20),
            logging_steps=1, save_strategy="steps" if out else "no", save_steps=save_every, save_total_limit=2, report_to=[],
            disable_tqdm=True, remove_unused_columns=False, weight_decay=0.0, use_cpu=not torch.cuda.is_available(),
            label_names=["labels"], dataloader_pin_memory=False, logging_nan_inf_filter=False,
            gradient_checkpointing=checkpointing or None,
        )  # fmt: skip
        if checkpointing:
            cast(Any, model).enable_input_require_grads()
        trainer = Trainer(model=model, args=args, train_dataset=_Items(items), data_collator=_Pad(tokenizer, length))
        trainer.loss_of = loss
        trainer.model_accepts_loss_kwargs = not isinstance(data[0], Pair)
        trainer.remove_callback(transformers.PrinterCallback)
        with (progress or Silent()).bar("tune", steps) as step:
            trainer.add_callback(_Watch(step))
            trainer.train(resume_from_checkpoint=_last(work) if out else None)
    model.eval().to(device)
    for name, t in trainable(model).items():
        if not bool(torch.isfinite(t).all()):
            problem = _diverged(name, "NaN or infinity after the last step")
            raise problem
    history.losses = [(int(e["step"]), float(e["loss"])) for e in trainer.state.log_history if "loss" in e]
    history.tokens = (
        sum(len(i.input_ids) for i in items if isinstance(i, Encoded)) * steps * batch // max(1, len(items))
    )
    history.seconds = time.monotonic() - start
    return history


def _in_range(lr: float, seed: int, **counts: int) -> None:
    """Errors: OptionError for every number out of range."""
    ranges: dict[str, tuple[object, bool, str]] = {
        **{n: (v, type(v) is int and v >= 1, "a whole number, 1 or more") for n, v in counts.items()},
        "lr": (lr, type(lr) in (int, float) and 0 < lr < math.inf, "a finite number above 0"),
        "seed": (seed, type(seed) is int and 0 <= seed < 1 << 32, "a whole number, 0 to 2^32 - 1"),
    }
    fix = "give another"
    raise_all(
        [
            OptionError("training cannot take this", where=name, got=value, want=want, fix=fix)
            for name, (value, fine, want) in ranges.items()
            if not fine
        ]
    )


def _may_train(model: nn.Module, data: Sequence[Example]) -> None:
    must_be_whole(model.named_parameters())
    if not trainable(model):
        raise OptionError(
            "nothing is trainable",
            where=type(model).__name__,
            got="a frozen model",
            want="an adapter",
            fix='weft.apply(model, "lora") first',
        )
    if len({isinstance(e, Pair) for e in data}) > 1:
        raise FormatError(
            "data must be of one kind",
            where="training data",
            got="pairs and others",
            want="one kind",
            fix="split the data",
        )


def _task(model: nn.Module, data: Sequence[Example], tokenizer: Any, length: int) -> tuple[list[Any], Any]:
    """What the batches are made of, and the loss of one."""
    if data and isinstance(data[0], Pair):
        goal = objective(model)
        items = [{"texts": (e.query, e.positive)} for e in data if isinstance(e, Pair)]

        def apart(m: nn.Module, x: Mapping[str, Tensor], _: Any) -> Tensor:
            queries, positives = (goal.vectors(forward(m, _half(x, h)), _half(x, h)) for h in (0, 1))
            return contrast(queries, positives)

        return items, apart

    def fit(m: nn.Module, x: Mapping[str, Tensor], count: Any) -> Tensor:
        return likelihood(forward(m, _inputs(x)), x["labels"], count)

    encoded = encode(data, tokenizer, length=length)
    in_vocabulary(model, torch.tensor([max(e.input_ids) for e in encoded]))
    return list(encoded), fit


def _inputs(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: x[k] for k in ("input_ids", "attention_mask")}


def _half(x: Mapping[str, Tensor], which: int) -> dict[str, Tensor]:
    """The queries (0) or positives (1) of a batch of pairs."""
    return {k: v[which::2] for k, v in _inputs(x).items()}


class _Pad:
    """Batches: ids and labels padded to the longest; texts tokenized, the two of a pair beside each other."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        if isinstance(items[0], dict):
            texts = [t for i in items for t in i["texts"]]
            made = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
            return {k: made[k] for k in ("input_ids", "attention_mask")}
        width = max(len(i.input_ids) for i in items)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        return {
            "input_ids": torch.tensor([i.input_ids + [pad] * (width - len(i.input_ids)) for i in items]),
            "attention_mask": torch.tensor([[1] * len(i.input_ids) + [0] * (width - len(i.input_ids)) for i in items]),
            "labels": torch.tensor([i.labels + [IGNORE] * (width - len(i.labels)) for i in items]),
        }
