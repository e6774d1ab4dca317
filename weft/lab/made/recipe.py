"""What the files beside this share: how a lab model is trained, measured, written and kept."""

from __future__ import annotations

import inspect
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft import store
from weft.error import NumericError, WeftError, whole
from weft.lab.made import NAMES
from weft.lab.metrics import Scores
from weft.model import weave
from weft.progress import Progress, Silent
from weft.store.cache import Cache, default, key
from weft.store.library import library
from weft.store.lock import turn

REF_LM = Path(__file__).parent.parent / "assets" / "ref-lm"
"""The language model that weft ships."""
WARM = 0.05
"""The share of steps in which the learning rate rises; it then falls to zero along a cosine."""


class Recipe(ABC):
    """One lab model: data, configuration and loss for training, batches for evidence, and scores. Same seed, same model."""

    name: str
    about: str
    """What it is and what it was trained on, in a sentence or two."""
    steps: int
    rate: float
    """Peak learning rate of AdamW."""
    metric: str
    """What `score` gives; less is better."""
    limit: float
    """A model that was trained to the end and does not score less has not learnt, and is refused."""
    net: type[nn.Module] | None = None
    """The model's class, where it is weft's own."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The model before training, in float32. Random numbers are torch's own, which are seeded."""

    @abstractmethod
    def loss(self, model: nn.Module, rng: torch.Generator) -> Tensor:
        """The loss of a training batch, drawn by `rng`."""

    @abstractmethod
    def batches(self, seed: int = 0) -> list[dict[str, Tensor]]:
        """Inputs from the training data, for evidence."""

    @abstractmethod
    def score(self, model: nn.Module) -> Scores:
        """`metric` of every held-out item, and its weight."""

    def facts(self, model: nn.Module) -> Mapping[str, float | list[float]]:
        """What else the card says of a trained model, such as its accuracy."""
        return {}

    def words(self) -> Any:
        """The tokenizer, where it reads text."""
        return None

    def files(self) -> Mapping[str, str]:
        """Further files of the folder by name, such as how images become its inputs."""
        return {}


def folder(recipe: Recipe, progress: Progress | None = None) -> Path:
    """The model's folder in the cache, made if it is not there or not whole.

    Its name depends on the code that makes it: its own file, its class's if that is weft's, and those that recipes share.
    A process that finds another one at work on it waits.
    Errors: those of `make`; ConflictError if the other one takes more than half an hour.
    """
    own = [Path(inspect.getfile(c)) for c in (type(recipe), recipe.net) if c is not None]
    shared = [p for p in sorted(Path(__file__).parent.glob("*.py")) if f"ref-{p.stem}" not in NAMES]
    code = [p.read_text("utf8") for p in (*own, *shared)]
    out = Cache(default()).path("models", f"{recipe.name}-{key(code)[:16]}")
    with turn(out):
        if not sound(out):
            make(recipe, out, progress=progress)
    return out


def sound(out: Path) -> bool:
    """Whether the folder is there, and holds what was written."""
    try:
        return not store.verify(out)
    except WeftError:
        return False


def make(
    recipe: Recipe, out: Path, *, steps: int | None = None, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Train the model and write it in bfloat16, whole or not at all, with its card. Returns what made.json says.

    Errors: OptionError; NumericError for a loss that is not finite, and for a model that has not learnt after all of the
    recipe's steps; ResourceError for a package that is missing; those of `save`.
    """
    count, start = recipe.steps if steps is None else steps, time.process_time()
    whole(steps=count)
    with _alone(seed):
        model: Any = train(recipe, count, seed, progress)
        minutes = (time.process_time() - start) / 60
        _narrow(model)
        values, weights = recipe.score(model)
        score = float((values * weights).sum() / weights.sum())
        if count >= recipe.steps:
            _learnt(recipe, score)
        facts = recipe.facts(model)
    about: dict[str, Any] = {
        "score": {recipe.metric: _four(score), "items": len(values)},
        "facts": {k: [_four(x) for x in v] if isinstance(v, list) else _four(v) for k, v in facts.items()},
        "steps": count,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes of one core": round(minutes, 2),
    }
    if library(model) != "diffusers":
        model.config.dtype = torch.bfloat16
    texts = {"README.md": _card(recipe, model, about), "made.json": json.dumps(about, indent=1) + "\n"}
    files = {**recipe.files(), **texts}
    store.save(weave(model.to(torch.bfloat16)), out, tokenizer=recipe.words(), replace=True, files=files)
    return about


def _learnt(recipe: Recipe, score: float) -> None:
    if not score < recipe.limit:
        got, want = f"{score:.4g} {recipe.metric}", f"less than {recipe.limit:g}"
        fix = "change the recipe: its rate, its steps or its data"
        raise NumericError("the model has not learnt", where=recipe.name, got=got, want=want, fix=fix)


@contextmanager
def _alone(seed: int) -> Generator[None]:
    """One thread, so that sums do not depend on the machine's load, and torch's generator seeded; both as before afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train(recipe: Recipe, steps: int, seed: int, progress: Progress | None = None) -> nn.Module:
    """The model after so many steps of AdamW, in evaluation mode. Errors: NumericError."""
    model, rng = recipe.model().train(), torch.Generator().manual_seed(seed)
    held = [p for p in model.parameters() if p.requires_grad]
    decay = [
        {"params": [p for p in held if p.ndim > 1]},
        {"params": [p for p in held if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(decay, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.05)
    with (progress or Silent()).bar(f"make {recipe.name}", steps) as done:
        for i in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * _rate(i, steps)
            loss = recipe.loss(model, rng)
            if not math.isfinite(float(loss.detach())):
                want, fix = "a finite loss", "lower the recipe's rate"
                raise NumericError(
                    "training broke down", where=recipe.name, got=f"{float(loss)} at step {i}", want=want, fix=fix
                )
            loss.backward()
            nn.utils.clip_grad_norm_(held, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done(1)
    return model.eval().requires_grad_(False)


def _rate(step: int, steps: int) -> float:
    """The learning rate's share of its peak."""
    warm = max(1, round(WARM * steps))
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))))


def _narrow(model: nn.Module) -> None:
    """Round weights to what the file will hold, so that what is measured is what is loaded."""
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16).to(p.dtype)


def _four(value: float) -> float:
    return float(f"{value:.4g}")


def _card(recipe: Recipe, model: nn.Module, about: Mapping[str, Any]) -> str:
    """The model card."""
    name = type(model).__name__
    rows = {**about["score"], **about["facts"], **{k: v for k, v in about.items() if k not in ("score", "facts")}}
    shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in rows.items()}
    head = [
        "---",
        f"library_name: {library(model)}",
        "license: apache-2.0",
        "tags: [weft]",
        "---",
        "",
        f"# {recipe.name}",
        "",
    ]
    body = [recipe.about, "", "| held out | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in shown.items())]
    use = ["", "```python", "import weft", "", f'model = weft.load("{recipe.name}")  # {name}', "```", ""]
    return "\n".join([*head, *body, *use])


def pick(rng: torch.Generator, count: int, among: int) -> Tensor:
    """Indices [count] of a training batch, drawn with replacement."""
    return torch.randint(among, (count,), generator=rng)


def bits(logits: Tensor, labels: Tensor) -> np.ndarray:
    """-log2 of each label's [k] probability under its logits [k c]."""
    nats = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    return (nats / math.log(2)).numpy()


def logits_of(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The logits of all batches, one below the other."""
    with torch.no_grad():
        return torch.cat([model(**b).logits.float() for b in batches])
