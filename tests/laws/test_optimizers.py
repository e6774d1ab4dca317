"""Laws of every method of kind optimizer: on a small regression, and through `weft.train`; and what each one's step is, by an oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import build_tiny, tokenizer
from torch import Tensor, nn

import weft
from weft.engine import get, names, optimizers
from weft.error import OptionError
from weft.learn.data import Text
from weft.learn.train import train
from weft.learn.trainer import trainable
from weft.model import weave

OPTIMIZERS = [name for name in names() if get(name).kind == "optimizer"]
SHAPES = {
    "wide": (6, 40),
    "tall": (40, 6),
    "stack": (2, 8, 12),
    "vector": (7,),
    "number": (1,),
    "b": (12, 3),
    "x.b": (12, 3),
}


def problem(seed: int = 0) -> tuple[dict[str, nn.Parameter], Callable[[], Tensor]]:
    """Tensors of all shapes, and the mean square of their distance to others."""
    rng = torch.Generator().manual_seed(seed)
    held = {n: nn.Parameter(torch.randn(s, generator=rng)) for n, s in SHAPES.items()}
    goals = {n: torch.randn(s, generator=rng) for n, s in SHAPES.items()}
    return held, lambda: torch.stack([(p - goals[n]).square().mean() for n, p in held.items()]).sum()


def go(made: Any, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        made.zero_grad()
        loss().backward()
        made.step()


def it_goes_down(name: str) -> None:
    """A convex loss falls to a tenth; every tensor moves."""
    held, loss = problem()
    start, before = float(loss().detach()), {n: p.detach().clone() for n, p in held.items()}
    go(optimizers.named(name)(held, 0.02), loss, 300)
    assert float(loss().detach()) < 0.1 * start and not any(torch.equal(p, before[n]) for n, p in held.items())


def it_goes_on_from_its_state(name: str) -> None:
    """Stopped, its state saved and given to another, it ends with the same bits."""
    (one, loss), (two, other) = problem(), problem()
    straight, stopped = optimizers.named(name)(one, 0.02), optimizers.named(name)(two, 0.02)
    go(straight, loss, 8)
    go(stopped, other, 5)
    again = optimizers.named(name)(two, 0.02)
    again.load_state_dict(copy.deepcopy(stopped.state_dict()))
    go(again, other, 3)
    assert all(torch.equal(one[n], two[n]) for n in one)


def it_moves_only_what_has_a_gradient(name: str) -> None:
    """Tensors without one, and at a rate of zero all, keep their bits; zero gradients give finite values."""
    held, loss = problem()
    before = {n: p.detach().clone() for n, p in held.items()}
    made = optimizers.named(name)(held, 0.1)
    held["wide"].square().sum().backward()
    made.step()
    assert [n for n, p in held.items() if not torch.equal(p, before[n])] == ["wide"]
    still = optimizers.named(name)(held, 0.0)
    before = {n: p.detach().clone() for n, p in held.items()}
    go(still, loss, 2)
    assert all(torch.equal(p, before[n]) for n, p in held.items())
    (torch.stack([p.sum() for p in held.values()]).sum() * 0).backward()
    made.step()
    assert all(bool(torch.isfinite(p).all()) for p in held.values())


def options_are_checked(name: str) -> None:
    """Unknown ones, and numbers outside their range; a rewrite is no optimizer, and its own weight decay is refused."""
    model = weave(build_tiny())
    weft.apply(model, "lora", rank=2)
    for option, field in get(name).options.model_json_schema()["properties"].items():
        if "minimum" in field or "exclusiveMinimum" in field:
            with pytest.raises(OptionError, match=option):
                optimizers.named(name, **{option: -1})
    with pytest.raises(OptionError, match="unheard_of"):
        optimizers.named(name, unheard_of=1)
    with pytest.raises(OptionError, match="moves no tensors"):
        optimizers.named("rtn")
    with pytest.raises(OptionError, match="weight_decay"):
        learnt(name, weight_decay=0.1)


def it_trains(name: str) -> None:
    """Adapters on a packed base: the loss falls, otherwise than by AdamW, and a resumed run is the straight run."""
    model, losses = learnt(name)
    again, same = learnt(name)
    _, plain = learnt(None)
    assert losses == same and losses != plain and losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(trainable(model).values(), trainable(again).values(), strict=True))


def learnt(name: str | None, **options: Any) -> tuple[nn.Module, list[float]]:
    """A tiny model after six steps."""
    model = weave(build_tiny())
    weft.apply(model, "rtn", bits=8)
    weft.apply(model, "lora", rank=4)
    data = [Text(f"the {a} sat on the {b} mat .") for a in ("cat", "dog") for b in ("old", "red")]
    given = {"steps": 6, "batch": 2, "lr": 5e-3, "schedule": "constant", **options}
    said = train(model, data, tokenizer=tokenizer(), optimizer=name and optimizers.named(name), **given)  # type: ignore[arg-type]
    return model, [loss for _, loss in said.losses]


LAWS = (it_goes_down, it_goes_on_from_its_state, it_moves_only_what_has_a_gradient, options_are_checked, it_trains)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("law", LAWS, ids=lambda f: f.__name__)
def test_optimizer(law: Callable[[str], None], name: str) -> None:
    """Every law of every optimizer."""
    law(name)


def first(name: str, grad: Tensor, **options: Any) -> Tensor:
    """The first step from zero at a rate of one."""
    p = nn.Parameter(torch.zeros_like(grad))
    made = optimizers.named(name, **options)({"p": p}, 1.0)
    p.grad = grad
    made.step()
    return p.detach()


def test_a_step_of_muon_is_orthogonal() -> None:
    """Singular values near 0.2 sqrt(largest side), in the directions of the gradient, whatever its scale."""
    grad = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(grad, full_matrices=False)
    step = -first("muon", grad) / (0.2 * 20**0.5)
    inside = u.T @ step @ v.T
    assert float((inside - inside.diagonal().diag()).abs().max()) < 0.02
    assert bool(((inside.diagonal() > 0.65) & (inside.diagonal() < 1.25)).all())
    assert torch.allclose(first("muon", 1e-6 * grad), first("muon", grad), atol=1e-5)


def test_a_step_of_galore_is_adams_in_the_projection() -> None:
    """P sign(Pᵀ G), P the leading left singular vectors, of the shorter side; all of G where the rank is no less."""
    grad = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    p = torch.linalg.svd(grad, full_matrices=False)[0][:, :2]
    want = -p @ (p.T @ grad).sign()
    assert torch.allclose(first("galore", grad, rank=2), want, atol=1e-4)
    assert torch.allclose(first("galore", grad.T, rank=2), want.T, atol=1e-4)
    assert torch.allclose(first("galore", grad, rank=6), -grad.sign(), atol=1e-4)


def test_lora_plus_is_adamw_but_for_b() -> None:
    """B of a low-rank term at sixteen times the rate."""
    held, loss = problem()
    loss().backward()
    before = {n: p.detach().clone() for n, p in held.items()}
    optimizers.named("lora_plus")(held, 0.01).step()
    moved = {n: float((p - before[n]).abs().max()) for n, p in held.items()}
    assert moved["x.b"] == pytest.approx(0.16, rel=1e-3) and moved["b"] == pytest.approx(0.01, rel=1e-3)
