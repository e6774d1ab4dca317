"""Laws of every method of kind schedule: it trains, stays within its budget, goes on from a checkpoint, and keeps what must not change."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import pytest
import torch
from tiny import build_tiny, make_batches, output, tokenizer
from torch import Tensor, nn

import weft
from weft.engine import get, names, optimizers, schedules
from weft.error import ConflictError, FormatError, OptionError, PathError
from weft.expr import Expr
from weft.learn.data import Text
from weft.learn.schedule import Schedule
from weft.learn.train import train
from weft.learn.trainer import trainable
from weft.model import expressions, fork, weave
from weft.model.adapters import trained_terms
from weft.store import load, save

SCHEDULES = [name for name in names() if get(name).kind == "schedule"]
ON: dict[str, tuple[str, dict[str, Any]]] = {"relocate": ("loca", {"count": 40, "alpha": 8.0})}
"""What a schedule works on, where that is not `sparse`."""
SHORT: dict[str, dict[str, Any]] = {"spiel": {"every": 4, "over": 2}}
"""Options with which a schedule acts several times in twelve steps."""
DATA = [Text(f"the {a} sat on the {b} mat .") for a in ("cat", "dog", "bird") for b in ("old", "red")]
STEPS = 12


def ready(name: str, *base: tuple[str, dict[str, Any]], family: str = "llama") -> nn.Module:
    """A tiny model with the terms that a schedule works on."""
    model = weave(build_tiny(family))
    for method, options in base:
        weft.apply(model, method, **options)
    method, options = ON.get(name, ("sparse", {"rank": 2}))
    weft.apply(model, method, **options)
    return model


VARIANTS: dict[str, list[dict[str, Any]]] = {"spiel": [{}, {"by": "momentum"}]}
"""Options under which a schedule goes another way."""


def taught(
    model: nn.Module, name: str | None, more: Mapping[str, Any] = MappingProxyType({}), **options: Any
) -> list[float]:
    """The losses of a run."""
    how: dict[str, Any] = {"batch": 2, "lr": 2e-2, "steps": STEPS, "schedule": "constant", **options}
    during = schedules.named(name, **SHORT.get(name, {}), **more) if name else None
    return [loss for _, loss in train(model, DATA, tokenizer=tokenizer(), during=during, **how).losses]


@cache
def straight(name: str) -> tuple[nn.Module, list[float]]:
    """A model that was trained under a schedule over an int8 base, and its losses; never changed."""
    model = ready(name, ("rtn", {"bits": 8}))
    return model, taught(model, name)


def numbers(model: nn.Module) -> int:
    """How many train."""
    return sum(p.numel() for p in trainable(model).values())


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models are of the same terms with the same bits."""
    one, two = dict(a.state_dict()), dict(b.state_dict())
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def it_trains(name: str) -> None:
    """The loss falls, otherwise than without it, and a second run is the first one."""
    model, losses = straight(name)
    again = ready(name, ("rtn", {"bits": 8}))
    assert taught(again, name) == losses and same(model, again)
    plain = ready(name, ("rtn", {"bits": 8}))
    assert taught(plain, None) != losses and not same(plain, model)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]) and all(map(math.isfinite, losses))


def it_stays_within_the_budget(name: str) -> None:
    """No more numbers train in the end than the terms had, and something does."""
    assert 0 < numbers(straight(name)[0]) <= numbers(ready(name))


def the_base_stays(name: str) -> None:
    """Base terms keep every bit."""
    before, after = (expressions(m) for m in (ready(name, ("rtn", {"bits": 8})), straight(name)[0]))
    for site, expr in before.items():
        old, new = base(expr), base(after[site])
        assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


def base(expr: Expr) -> dict[str, Tensor]:
    """The tensors of a weight's base."""
    held = dict(expr.named_parameters())
    return {k.rpartition("terms.base.")[2]: t for k, t in held.items() if "adapter:" not in k}


class Until:
    """A progress bar that stops the run after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @contextlib.contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def step(n: int, note: str = "") -> None:
            nonlocal done
            done += n
            if done >= self.steps:
                raise KeyboardInterrupt

        yield step


def it_goes_on_from_a_checkpoint(name: str) -> None:
    """Stopped before, while and after it watches, and called again, a run ends at the same bits; another optimizer's state follows too."""
    for stop, optimizer in ((2, None), (4, None), (5, "apollo"), (8, None), (11, "lora_plus")):
        moves = {"optimizer": optimizers.named(optimizer)} if optimizer else {}
        whole, stopped, again = (ready(name, ("rtn", {"bits": 8})) for _ in range(3))
        taught(whole, name, **moves)
        with TemporaryDirectory() as folder:
            kept: dict[str, Any] = {"out": Path(folder), "save_every": 1, **moves}
            with pytest.raises(KeyboardInterrupt):
                taught(stopped, name, progress=Until(stop), **kept)
            taught(again, name, **kept)
            assert same(whole, again), (stop, optimizer)
            done = ready(name, ("rtn", {"bits": 8}))
            taught(done, name, **kept)  # from the last step's
            assert same(whole, done)


def the_best_step_comes_back(name: str) -> None:
    """A run with held-out data ends with the terms of its best step, as the run of so many steps has them there."""
    model = ready(name)
    held = [Text("the old bird flew over the hill")]
    during = schedules.named(name, **SHORT.get(name, {}))
    how: dict[str, Any] = {"batch": 2, "lr": 1e-1, "schedule": "constant", "tokenizer": tokenizer(), "steps": STEPS}
    said = train(model, DATA, during=during, held_out=held, eval_every=1, save_every=1, **how)
    assert said.best is not None
    other = ready(name)
    with TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        train(other, DATA, during=during, progress=Until(said.best), out=Path(folder), save_every=1, **how)
    assert same(model, other)


def zeros_stay(name: str) -> None:
    """Of a base with a pattern of zeros only entries that it keeps are trained, for terms that can be so."""
    for more in VARIANTS.get(name, [{}]) if name not in ON else ():
        model = ready(name, ("magnitude", {"sparsity": 0.5}))
        taught(model, name, more)
        for t in trained_terms(model):
            kept, mine = t.beside["base"].mask(), t.term.mask()
            assert kept is not None and mine is not None and not bool(mine[~kept].any()), t.site


def a_saved_model_is_the_trained_one(name: str) -> None:
    """Through a folder, and forked."""
    model, _ = straight(name)
    batch = make_batches(1)[0]
    with TemporaryDirectory() as folder:
        save(model, Path(folder) / "m")
        assert torch.equal(output(load(Path(folder) / "m"), batch), output(model, batch))
    assert same(fork(model), model)


def others_train_beside_it(name: str) -> None:
    """A low-rank adapter learns too; under checkpointing and in micro-batches the same comes out, but for rounding."""
    ends = []
    for more in ({}, {"checkpointing": True}, {"micro_batch": 1}):
        model = ready(name)
        weft.apply(model, "lora", rank=2, name="low")
        low = {n: p.detach().clone() for n, p in trainable(model).items() if "adapter:low" in n}
        losses = taught(model, name, **more)
        after = trainable(model)
        assert low and all(n in after and not torch.equal(after[n], p) for n, p in low.items())
        ends.append(losses)
    assert ends[0] == ends[1] and ends[2][:2] == pytest.approx(ends[0][:2], rel=1e-4)


def it_refuses(name: str) -> None:
    """A model without such terms, an optimizer without gradients, bad options, another kind: and nothing has changed then."""
    bare = weave(build_tiny())
    weft.apply(bare, "layernorm")
    with pytest.raises(ConflictError, match="nothing to rewrite"):
        taught(bare, name)
    model, before = ready(name), ready(name)
    with pytest.raises(ConflictError, match="gradients"):
        taught(model, name, optimizer=optimizers.named("mezo"))
    assert same(model, before)
    for option, field in get(name).options.model_json_schema()["properties"].items():
        if "minimum" in field or "exclusiveMinimum" in field:
            with pytest.raises(OptionError, match=option):
                schedules.named(name, **{option: -1})
    with pytest.raises(OptionError, match="unheard_of"):
        schedules.named(name, unheard_of=1)
    with pytest.raises(OptionError, match="rewrites nothing"):
        schedules.named("rtn")


def a_short_run_ends_or_is_refused(name: str) -> None:
    """One step and two: as many losses, or an OptionError with nothing changed."""
    for steps in (1, 2):
        model = ready(name)
        try:
            assert len(taught(model, name, steps=steps)) == steps and trainable(model)
        except OptionError:
            assert same(model, ready(name))


def a_checkpoint_of_another_run_is_refused(name: str) -> None:
    """Of one without a schedule, of one with another, and of this one where there is none: the model does not train on."""

    class Another(Schedule):
        takes = (Expr,)

    runs = (None, schedules.named(name, **SHORT.get(name, {})), lambda _: Another())
    for first, second in ((0, 1), (1, 0), (2, 1), (1, 2)):
        with TemporaryDirectory() as folder:
            how: dict[str, Any] = {"batch": 2, "save_every": 1, "tokenizer": tokenizer(), "out": Path(folder)}
            train(ready(name), DATA, steps=4, during=runs[first], **how)
            with pytest.raises((FormatError, PathError)):
                train(ready(name), DATA, steps=STEPS, during=runs[second], **how)


LAWS = (
    it_trains, it_stays_within_the_budget, the_base_stays, it_goes_on_from_a_checkpoint, the_best_step_comes_back, zeros_stay,
    a_checkpoint_of_another_run_is_refused,
    a_saved_model_is_the_trained_one, others_train_beside_it, it_refuses, a_short_run_ends_or_is_refused,
)  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("law", LAWS, ids=lambda f: f.__name__)
def test_schedule(law: Callable[[str], None], name: str) -> None:
    """Every law of every schedule."""
    law(name)
