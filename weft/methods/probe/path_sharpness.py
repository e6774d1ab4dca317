"""How sharp the loss is in each weight on the way from the pretrained model to the tuned one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from weft.engine import Findings, method
from weft.error import ConflictError, OptionError, raise_all
from weft.expr import Dense, valueless
from weft.learn.data import IGNORE
from weft.learn.objective import likelihood
from weft.model import Group, Site, expressions, fork, match, put, set_expressions, site, vectors
from weft.model.branch import refuse_branches
from weft.stats import Batch, forward
from weft.stats.gradients import lean
from weft.store import load

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="probe", rows="P001", paper="2410.16476", needs={"data"})
def path_sharpness(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    points: Annotated[int, Field(ge=2, description="points of the way, both ends among them")] = 5,
    radius: Annotated[float, Field(gt=0, le=1, description="how far a weight is moved, as a share of its norm")] = 0.05,
    at: Annotated[str, Field(description="weights: a glob, or all-linear")] = "all-linear",
    base: Annotated[str | None, Field(description="the pretrained model, where the tuned one does not know it")] = None,
) -> Findings:
    """Tell how much the loss rises when one weight is moved uphill, at points a of the straight way W_a = W_0 + a (W - W_0).

    sharpness = L(W_a + radius ||W_a||_F g / ||g||_F) - L(W_a), g the gradient at W_a, L nats a token; all other weights, norms and
    biases are at a too. most is the largest of the way, where its a; a straggler is sharpest between the ends. Departure from the paper,
    which climbs in many steps: one step. It takes `points` backward passes over the data, and as many forward passes for every weight.
    """
    names, ways, made = match(model, at), _ways(model, base), fork(model).eval()
    losses, found = list[float](), {n: dict[str, float]() for n in names}
    stops = [i / (points - 1) for i in range(points)]
    for a in stops:
        here = {n: torch.lerp(w.original, w.now.dense().detach().float(), a) for n, w in ways.items()}
        put(made, Group(tuple(replace(w, now=Dense(here[n].to(_dtype(w)))) for n, w in ways.items())))
        loss, uphill = _slope(made, {n: here[n] for n in names}, batches)
        losses.append(loss)
        for n, g in uphill.items():
            step = radius * here[n].norm() / g.norm().clamp(min=1e-30)
            set_expressions(made, {n: Dense(here[n] + step * g)})
            found[n][f"at {a:g}"] = _nats(made, batches) - loss
            set_expressions(made, {n: Dense(here[n])})
    for told in found.values():
        told["where"] = max(stops, key=lambda a: told[f"at {a:g}"])
        told["most"] = told[f"at {told['where']:g}"]
    first, late = max(found, key=lambda n: found[n]["most"]), sum(0 < told["where"] < 1 for told in found.values())
    says = f"{', '.join(f'{x:.4g}' for x in losses)} nats a token on the way; {late} of {len(found)} weights are stragglers"
    return Findings(f"{says}; the sharpest is {first}, at {found[first]['where']:g}", found)


def _ways(model: nn.Module, base: str | None) -> dict[str, Site]:
    """Every weight and vector, its value today and the pretrained one.

    Errors: ConflictError for a model that predicts no text, weights without a value, branches, and another base; OptionError if nothing
    was tuned.
    """
    config, generates = getattr(model, "config", None), getattr(model, "can_generate", lambda: False)()
    if not generates or getattr(config, "is_encoder_decoder", False):
        got, fix = type(model).__name__, "probe a model that writes text"
        raise ConflictError("this model predicts no text", where="model", got=got, want="a decoder", fix=fix)
    refuse_branches(model, "a way between weights")
    raise_all(valueless(expressions(model)))
    ways = {n: site(model, n) for n in (*expressions(model), *vectors(model))}
    if base is not None:
        first = load(base)
        known = {n: site(first, n) for n in (*expressions(first), *vectors(first))}
        if odd := [n for n, w in ways.items() if n not in known or known[n].now.shape != w.now.shape]:
            got, want, fix = (
                f"{len(odd)} weights it has not",
                "these weights",
                "give the model that this one was tuned from",
            )
            raise ConflictError("the base is another model", where=f"{base}: {odd[0]}", got=got, want=want, fix=fix)
        ways = {n: replace(w, source=partial(_value, known[n], w)) for n, w in ways.items()}
    if all(torch.equal(w.now.dense().detach().float(), w.original) for w in ways.values()):
        got, want = "the pretrained value everywhere", "a tuned model"
        fix = "give base, the folder of the pretrained model, if this one was saved as an ordinary checkpoint"
        raise OptionError("nothing was tuned", where="model", got=got, want=want, fix=fix)
    return ways


def _value(first: Site, now: Site) -> Tensor:
    """A base's value, behind the turns that the tuned model's input has."""
    value = first.now.dense().detach().float()
    return now.tap.turned(value) if now.tap is not None else value


def _dtype(way: Site) -> torch.dtype:
    """What a weight is put back in: float32, a vector in its own."""
    return way.now.dense().dtype if way.kind == "vector" else torch.float32


def _slope(
    model: nn.Module, here: Mapping[str, Float[Tensor, "m n"]], batches: Sequence[Batch]
) -> tuple[float, dict[str, Float[Tensor, "m n"]]]:
    """The loss, and its gradient at these weights."""
    free = {n: nn.Parameter(w.clone()) for n, w in here.items()}
    set_expressions(model, {n: Dense(p) for n, p in free.items()})
    with lean(model):
        loss = _nats(model, batches, grad=True)
    set_expressions(model, {n: Dense(w) for n, w in here.items()})
    return loss, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in free.items()}


def _nats(model: nn.Module, batches: Sequence[Batch], *, grad: bool = False) -> float:
    """Nats a token, the first of each row aside; what is free is given its gradient."""
    labels = [b["input_ids"].masked_fill(b.get("attention_mask", torch.ones(1)) == 0, IGNORE) for b in batches]
    count, total = sum(int((x[:, 1:] != IGNORE).sum()) for x in labels), 0.0
    for batch, target in zip(batches, labels, strict=True):
        with torch.set_grad_enabled(grad):
            loss = likelihood(forward(model, batch), target, count)
        if grad:
            loss.backward()
        total += float(loss.detach())
    return total


@path_sharpness.claim(
    "half way to a tuned model, another domain loses less where the sharpest weights keep only their largest changes"
)
def claim(lab: Lab) -> Claim:
    return lab.halfway(probe=("path_sharpness", {}), number="most")
