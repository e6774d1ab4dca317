"""How a model is trained: every option, its range and what it is by default."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weft.error import OptionError, WeftError, raise_all


def _about(text: str, **limits: Any) -> Any:
    return Field(description=text, **limits)


class Checked(BaseModel):
    """Options with ranges and descriptions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @classmethod
    def of(cls, **given: Any) -> Self:
        """The settings. Errors: OptionError for every option that is unknown or out of range, and for contradictions."""
        try:
            made = cls(**given)
        except ValidationError as e:
            fix = f"options: {', '.join(cls.model_fields)}"
            raise_all([_refused(str(p["loc"][0]), p["input"], str(p["msg"]), fix) for p in e.errors()])
            raise
        made.agree()
        return made

    def agree(self) -> None:
        """Errors: OptionError for options that contradict each other."""


class Reading(Checked):
    """How a reader reads and learns."""

    chunk: Annotated[int, _about("tokens that are learnt at a time", ge=1)] = 256
    window: Annotated[int, _about("tokens before a chunk that are seen with it", ge=1)] = 256
    epochs: Annotated[int, _about("steps on a chunk; 0: nothing is learnt", ge=0)] = 2
    lr: Annotated[float, _about("learning rate of AdamW", gt=0)] = 2e-3
    seed: Annotated[int, _about("of the start of what is learnt, and of what is drawn", ge=0, lt=1 << 32)] = 0


class Training(Checked):
    """Options of a training run; their descriptions are what the command line says of them."""

    steps: Annotated[int | None, _about("steps; 200, unless epochs are given", ge=1)] = None
    epochs: Annotated[float | None, _about("times that every example is seen, instead of steps", gt=0)] = None
    batch: Annotated[int, _about("examples (packed: rows) a step, in all processes together", ge=1)] = 8
    micro_batch: Annotated[int | None, _about("of these at once in a process; all, if not given", ge=1)] = None
    length: Annotated[int, _about("tokens an example, at most", ge=2)] = 512
    pack: Annotated[bool, _about("fill rows of `length` tokens with examples that do not see each other")] = False
    buckets: Annotated[bool, _about("batches of examples of like lengths: less padding")] = False
    by_task: Annotated[bool, _about("each example trains the adapter that its field `task` names, and no other")] = (
        False
    )
    lr: Annotated[float, _about("peak learning rate", gt=0)] = 2e-3
    schedule: Annotated[
        Literal["cosine", "linear", "constant"],
        _about("cosine: to a tenth of the peak; linear: to zero; constant, all after the warm-up"),
    ] = "cosine"
    warmup: Annotated[float, _about("share of the steps that the rate rises in", ge=0, le=1)] = 0.05
    weight_decay: Annotated[float, _about("of AdamW", ge=0)] = 0.0
    label_smoothing: Annotated[
        float, _about("share of each target that all tokens share, in training alone", ge=0, lt=1)
    ] = 0.0
    clip: Annotated[float, _about("largest norm of the gradients together; 0: any", ge=0)] = 1.0
    precision: Annotated[Literal["fp32", "bf16"], _about("bf16: products in bfloat16, trained tensors as they are")] = (
        "fp32"
    )
    checkpointing: Annotated[bool, _about("compute activations again going back: less memory, more time")] = False
    save_every: Annotated[int, _about("steps between checkpoints, which are kept where the run has a folder", ge=1)] = (
        100
    )
    eval_every: Annotated[int | None, _about("steps between scores on held-out data; as checkpoints", ge=1)] = None
    loggers: Annotated[
        tuple[str, ...],
        _about("where numbers go besides: tensorboard, wandb, mlflow, trackio ..., as in transformers", strict=False),
    ] = ()
    seed: Annotated[int, _about("of the order of examples, dropout and all that is drawn", ge=0, lt=1 << 32)] = 0

    def agree(self) -> None:
        problems: list[WeftError] = []
        if self.steps is not None and self.epochs is not None:
            got = f"steps {self.steps} and epochs {self.epochs:g}"
            problems.append(_refused("steps, epochs", got, "one of them", "leave one out"))
        if self.by_task and self.pack:
            want, fix = "one of them: a row of a batch has one task", "leave pack out"
            problems.append(_refused("by_task, pack", "both", want, fix))
        if self.eval_every is not None and self.save_every % self.eval_every:
            want = f"a divisor of {self.save_every}, the steps between checkpoints: the best one is kept"
            problems.append(_refused("eval_every", self.eval_every, want, "change one of them"))
        raise_all(problems)


def _refused(where: str, got: object, want: str, fix: str) -> OptionError:
    return OptionError("training cannot take this", where=where, got=got, want=want, fix=fix)
