"""The Hugging Face Trainer, as far as weft has to change it, and the arguments of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers.integrations.integration_utils import get_available_reporting_integrations

from weft.error import ConflictError, FormatError, NumericError, OptionError
from weft.learn.scheduled import Scheduled, refuse_scheduled
from weft.learn.settings import Training
from weft.memory import peak
from weft.model.branch import begin_step
from weft.progress import Step
from weft.store.tensors import read_tensors, write_tensors

TRAINABLE = "trainable.safetensors"
Loss = Callable[[nn.Module, Mapping[str, Tensor], Any], Tensor]
"""`(model, batch, targets of the whole step) -> loss`"""
Optimizer = Callable[[Mapping[str, nn.Parameter], float], torch.optim.Optimizer]
"""`(trainable tensors by name, peak rate) -> optimizer`"""
Measure = Callable[[Callable[[], Tensor]], Tensor]
"""`(loss of a part of the batch, as often as asked) -> loss`: the method `measure` of an optimizer that needs losses and no gradients."""


Within = Callable[[Mapping[str, Any]], AbstractContextManager[Any]]
"""`(batch) -> context`"""


class Trainer(transformers.Trainer):
    """The Hugging Face Trainer for woven models: checkpoints hold the trainable tensors only, matched strictly on resume."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        begin_step(model, self.state.global_step, self.args.seed)
        return super().training_step(model, inputs, num_items_in_batch)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        out = Path(output_dir or str(self.args.output_dir))
        write_tensors(out / TRAINABLE, trainable(cast(nn.Module, self.model)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(cast(nn.Module, self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint)).name  # the folder may have moved since
        self._load_from_checkpoint(str(Path(str(self.args.output_dir)) / best))


class Run(Trainer):
    """One run of `train`: items come in an order of their own, the loss is weft's, held-out batches are scored whole."""

    loss_of: Loss
    measure: Measure | None = None
    """What takes the losses, of an optimizer that goes by them alone."""
    during: Scheduled | None = None
    """What rewrites terms while they train."""
    within: Within
    """What a batch is computed within, forward and backward."""

    def follow(self, during: Scheduled | None) -> None:
        """Let a schedule rewrite terms while they train."""
        self.during = during
        if during is not None:
            self.add_callback(Rewrite(during))

    def go(self, checkpoint: str | None) -> None:
        """Train, from a checkpoint on if there is one; from the last step's, take what is there, for one more step would be another run.

        Errors: ConflictError for a checkpoint of more steps than are asked for.
        """
        self.remove_callback(transformers.PrinterCallback)
        held = (
            transformers.TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            if checkpoint
            else None
        )
        if held is None or held.global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=checkpoint)
            return
        if held.global_step > self.args.max_steps:
            got, want = f"a checkpoint of {held.global_step} steps", f"{self.args.max_steps} at most"
            fix = "ask for more steps, or give another folder"
            raise ConflictError("a longer run is kept there", where=str(checkpoint), got=got, want=want, fix=fix)
        self.state = held
        if held.best_model_checkpoint:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.during is not None:
            self.during.save(Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.during is not None:
            self.during.restore(Path(resume_from_checkpoint), cast(Any, self.optimizer))
        else:
            refuse_scheduled(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(cast(Any, self.train_dataset))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with self.within(inputs):
            if self.during is not None:
                return self._scheduled(self.during, inputs, num_items_in_batch)
            if self.measure is None:
                return super().training_step(model, inputs, num_items_in_batch)
            return self._measured(self.measure, model, inputs, num_items_in_batch)

    def _measured(self, measure: Measure, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """A step by losses alone."""
        begin_step(model, self.state.global_step, self.args.seed)
        model.train()
        here = cast(dict[str, Any], self._prepare_inputs(inputs))
        whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = 1 if whole else self.current_gradient_accumulation_steps

        def loss() -> Tensor:
            with torch.no_grad(), self.compute_loss_context_manager():
                found = self.compute_loss(model, here, num_items_in_batch=num_items_in_batch)
            return cast(Tensor, self.accelerator.reduce(found / parts, "mean"))

        return measure(loss)

    def _scheduled(self, during: Scheduled, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """A part of a step in which parameters may be others than in the last one, so that gradients are averaged here and not by DDP."""
        model = cast(nn.Module, self.model)
        with during.watching(self.state.global_step + 1):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            during.settle(self.accelerator)
            for p in trainable(model).values() if self.accelerator.num_processes > 1 else ():
                p.grad = cast(
                    Tensor, self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
                )
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self.loss_of(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            problem = diverged(f"step {self.state.global_step + 1}", f"a loss of {float(loss.detach())}")
            raise problem
        if num_items_in_batch is not None:  # a sum over all processes' targets, of which gradients are then averaged
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _track_num_input_tokens(self, inputs: Mapping[str, Tensor]) -> None:
        seen = cast(Tensor, self.accelerator.gather(inputs["tokens"]))
        self.state.num_input_tokens_seen += int(seen.sum())

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out loss, logged as `eval_loss`: nats a target, or a query."""
        model, total, count = cast(nn.Module, self.model), 0.0, 0
        model.eval()
        with torch.no_grad():
            for batch in cast(Sequence[Mapping[str, Tensor]], self.eval_dataset):
                here = cast(dict[str, Any], self._prepare_inputs(dict(batch)))
                targets = (
                    int((batch["labels"][:, 1:] >= 0).sum()) if "labels" in batch else len(batch["input_ids"]) // 2
                )
                with self.within(batch), self.compute_loss_context_manager():
                    total += float(self.loss_of(model, here, None)) * targets
                count += targets
        (found,) = broadcast_object_list([total / count])  # all processes must choose the same step
        scores = {"eval_loss": found}
        if not math.isfinite(scores["eval_loss"]):
            problem = diverged(f"step {self.state.global_step}", f"a held-out loss of {scores['eval_loss']}")
            raise problem
        self.log(scores)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return scores


class Watch(transformers.TrainerCallback):
    """Moves the progress bar, says how fast it goes, counts epochs, and has the last step scored, and it and the best one saved."""

    def __init__(self, step: Step, per_epoch: float) -> None:
        self.move, self.per_epoch = step, per_epoch
        self.start, self.seen = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start, self.seen = time.monotonic(), int(state.num_input_tokens_seen)
        if state.global_step:
            self.move(int(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.epoch = state.global_step / self.per_epoch
        speed = (state.num_input_tokens_seen - self.seen) / max(1e-9, time.monotonic() - self.start)
        self.move(1, f"{speed:,.0f} tokens/s, {peak() / 1e9:.2f} GB")
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """The best step is kept, whether or not a checkpoint was due."""
        if state.best_metric is None or metrics["eval_loss"] < state.best_metric:
            control.should_save = True


class Rewrite(transformers.TrainerCallback):
    """Lets a schedule rewrite terms after each step of the optimizer."""

    def __init__(self, during: Scheduled) -> None:
        self.during = during

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.during.rewrite(state.global_step + 1, given["optimizer"])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
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


def arguments(
    work: Path, how: Training, steps: int, batch: int, *, save: bool, score: bool
) -> transformers.TrainingArguments:
    """The Trainer's arguments. Errors: OptionError for a batch that processes and micro-batches do not divide, and unknown loggers."""
    kinds = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
    every = how.eval_every or how.save_every
    _loggers(how.loggers, save)
    rising = int(steps * how.warmup)  # from 0 on: one step alone would change nothing
    args = transformers.TrainingArguments(
        output_dir=str(work), max_steps=steps, learning_rate=how.lr, seed=how.seed, data_seed=how.seed, weight_decay=how.weight_decay,
        lr_scheduler_type=kinds[how.schedule], lr_scheduler_kwargs={"min_lr_rate": 0.1} if how.schedule == "cosine" else {},
        warmup_steps=rising if rising > 1 else 0, max_grad_norm=how.clip, logging_steps=1,
        save_strategy="steps" if save or score else "no", save_steps=how.save_every, save_total_limit=2,
        eval_strategy="steps" if score else "no", eval_steps=every, load_best_model_at_end=score,
        metric_for_best_model="loss" if score else None, greater_is_better=False if score else None,
        report_to=list(how.loggers), disable_tqdm=True, remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
        bf16=how.precision == "bf16", label_names=["labels"], dataloader_pin_memory=False, logging_nan_inf_filter=False,
        gradient_checkpointing=how.checkpointing or None, include_num_input_tokens_seen="non_padding",
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]  # one process, one device
    each, rest = divmod(batch, args.world_size)
    micro = min(how.micro_batch or each, each)
    if rest or each % micro:
        raise OptionError(
            "a batch must divide evenly",
            where="batch, micro_batch",
            got=f"{batch} examples for {args.world_size} processes, {micro} at once",
            want="as many micro-batches in every process",
            fix="choose a batch that is a multiple of processes times micro_batch",
        )
    if score and not save and args.world_size > 1:
        fix, want = "give out, a folder that all processes see", "a place for the best tensors"
        raise OptionError("processes cannot share the best model", where="out", got="nothing", want=want, fix=fix)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = micro, each // micro
    return args


def diverged(where: str, got: str) -> NumericError:
    return NumericError(
        "training is not finite",
        where=where,
        got=got,
        want="finite numbers",
        fix="train at a lower rate; if it is the first step, look for NaN or huge weights",
    )


def _loggers(names: Sequence[str], save: bool) -> None:
    """Errors: OptionError for a logger that transformers does not know or whose package is missing, or that has no folder to write to."""
    known = get_available_reporting_integrations()
    for name in names:
        if name not in known or (name == "tensorboard" and not save):
            here = name in known
            want = "a folder that it writes to" if here else f"of those installed: {', '.join(known) or 'none'}"
            fix = "give out" if here else "install its package, or leave it out"
            raise OptionError("this logger cannot be used", where="loggers", got=name, want=want, fix=fix)
