"""What training lowers in place of the labels' loss: the distance to a reference, which another model gives, or this one once did."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from weft.error import ConflictError, ShapeError
from weft.learn.batches import inputs, references
from weft.learn.objective import contrasted, predictions
from weft.model import pretrained
from weft.stats.objective import Objective, objective
from weft.stats.walker import forward


@dataclass(frozen=True)
class Compared:
    """A batch as an objective sees it. A unit is a target token, or a text of a pair."""

    out: Float[Tensor, "u c"]
    """What the model gives: logits, or embeddings."""
    ref: Float[Tensor, "u c"]
    """What the reference gives, without a gradient."""
    labels: Callable[[], Float[Tensor, "u"]]
    """What training lowers otherwise: -log p(target), or the contrast of pairs."""
    goal: Objective

    def distance(self, temperature: float = 1.0) -> Float[Tensor, "u"]:
        """T² KL(softmax(ref / T) || softmax(out / T)) in nats; of embeddings 1 - cosine, whatever T."""
        if self.goal.kind != "classes":
            return self.goal.distance(self.out, self.ref)
        return temperature**2 * self.goal.distance(self.out / temperature, self.ref / temperature)


@dataclass(frozen=True)
class Aim:
    """An objective: the loss of each unit, of which training lowers the mean over a step."""

    loss: Callable[[Compared], Float[Tensor, "u"]]
    aligns: bool = False
    """Whether the reference reads the prompts' references."""
    teacher: nn.Module | None = None
    """The reference; without one it is the pretrained weights of the model that trains."""


class Reference:
    """The model whose outputs an objective compares with."""

    def __init__(self, model: nn.Module, aim: Aim, smoothing: float) -> None:
        """Errors: ConflictError for a teacher of another kind; those of `pretrained`."""
        self.aim, self.goal, self.smoothing, teacher = aim, objective(model), smoothing, aim.teacher
        if teacher is not None and (kind := objective(teacher).kind) != self.goal.kind:
            got, want, fix = f"{kind} of {type(teacher).__name__}", self.goal.kind, "give a teacher of the same kind"
            raise ConflictError("a teacher gives something else", where="teacher", got=got, want=want, fix=fix)
        self.own = model if teacher is None else None
        self.model = pretrained(model) if teacher is None else teacher

    @contextmanager
    def at(self, device: torch.device) -> Generator[None]:
        """Within, it is on this device, without dropout; then as it was. What it shares with the model that trains, it shares there too."""
        there, training = next(self.model.parameters()).device, self.model.training
        if self.own is not None and there != device:
            self.model = pretrained(self.own)
        self.model.to(device).eval()
        try:
            yield
        finally:
            self.model.to(there).train(training)

    def tokens(self, model: nn.Module, batch: Mapping[str, Tensor], count: Any) -> Float[Tensor, ""]:
        """The objective's sum over a batch's targets, divided by `count`, as `likelihood` is."""
        out, labels = predictions(forward(model, inputs(batch)), batch["labels"])
        other = references(batch) if self.aim.aligns else batch
        with torch.no_grad():
            ref, _ = predictions(forward(self.model, inputs(other)), other["labels"])
        smoothing = self.smoothing if model.training else 0.0

        def likelihood() -> Tensor:
            return F.cross_entropy(out, labels, reduction="none", label_smoothing=smoothing)

        total = self._loss(out, ref, likelihood).sum()
        return total / (count if count is not None else max(1, len(labels)))

    def pairs(self, model: nn.Module, halves: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> Float[Tensor, ""]:
        """The objective's mean over the texts of a batch's pairs."""
        queries, positives = (self.goal.vectors(forward(model, half), half) for half in halves)
        with torch.no_grad():
            ref = torch.cat([self.goal.vectors(forward(self.model, half), half) for half in halves])
        out = torch.cat([queries, positives])

        def labels() -> Tensor:
            return contrasted(queries, positives, model.training, self.smoothing).expand(len(out))

        return self._loss(out, ref, labels).mean()

    def _loss(self, out: Tensor, ref: Tensor, labels: Callable[[], Tensor]) -> Float[Tensor, "u"]:
        if out.shape != ref.shape:
            got, want, fix = list(ref.shape), list(out.shape), "give a teacher with the same tokenizer"
            raise ShapeError("a teacher gives other outputs", where="teacher", got=got, want=want, fix=fix)
        return self.aim.loss(Compared(out, ref, labels, self.goal))
