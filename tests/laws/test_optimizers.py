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
        if by_losses(made):
            made.step(loss)
            continue
        made.zero_grad()
        loss().backward()
        made.step()


def by_losses(made: Any) -> bool:
    """Whether an optimizer asks for losses rather than gradients."""
    return hasattr(made, "measure")


def it_goes_down(name: str) -> None:
    """A convex loss falls to a tenth, or by losses alone, in more steps, to a third; every tensor moves."""
    held, loss = problem()
    start, before = float(loss().detach()), {n: p.detach().clone() for n, p in held.items()}
    made = optimizers.named(name)(held, 0.02)
    go(made, loss, 3000 if by_losses(made) else 300)
    assert float(loss().detach()) < (0.33 if by_losses(made) else 0.1) * start and not any(
        torch.equal(p, before[n]) for n, p in held.items()
    )


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
    """Tensors without one, and at a rate of zero all, keep their bits; zero gradients give finite values.

    By losses alone all move together, in place and back, which leaves their last bits.
    """
    held, loss = problem()
    before = {n: p.detach().clone() for n, p in held.items()}
    made = optimizers.named(name)(held, 0.1)
    if by_losses(made):
        made.step(lambda: torch.zeros(()))
        go(optimizers.named(name)(held, 0.0), loss, 2)
        assert all(torch.allclose(p, before[n], rtol=1e-6, atol=2e-6) for n, p in held.items())
        return
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
    """Adapters on a packed base: the loss falls, otherwise than by AdamW, and a second run is the first one."""
    long = {"steps": 150, "lr": 3e-3} if by_losses(optimizers.named(name)(problem()[0], 0.1)) else {}
    model, losses = learnt(name, **long)
    again, same = learnt(name, **long)
    _, plain = learnt(None)
    few = max(1, len(losses) // 10)
    assert losses == same and losses[:6] != plain and sum(losses[-few:]) < sum(losses[:few])
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
    assert all(bool(first("muon", torch.full((40, 50), size)).isfinite().all()) for size in (1e-18, 1e-24, 1e-30))


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


def test_a_step_of_allora_grows_slower_with_its_row() -> None:
    """A sign step of B, each row times 1 / sqrt(||(B A)_i|| + 1 / most²); of A, and of what is no such pair, Adam's."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"x.b": (12, 3), "x.a": (3, 20), "y.b": (4, 3), "z.a": (3, 5)}
    held = {n: nn.Parameter(torch.randn(s, generator=rng)) for n, s in shapes.items()}
    with torch.no_grad():
        held["x.b"][:6] = 0
    norms = (held["x.b"].double() @ held["x.a"].double()).norm(dim=1)
    before, grads = (
        {n: p.detach().clone() for n, p in held.items()},
        {n: torch.randn(p.shape, generator=rng) for n, p in held.items()},
    )
    for n, p in held.items():
        p.grad = grads[n].clone()
    optimizers.named("allora", most=5.0)(held, 0.01).step()
    rates = (norms + 1 / 25).rsqrt().float()[:, None]
    assert float(rates.max()) == pytest.approx(5.0) and float(rates.min()) < 0.5
    for n, p in held.items():
        want = -0.01 * grads[n].sign() * (rates if n == "x.b" else 1)
        assert torch.allclose(p.detach() - before[n], want, rtol=1e-4, atol=1e-6), n


def apollo_by_its_formula(grads: list[Tensor], basis: Tensor, per: str, scale: float) -> list[Tensor]:
    """Steps at a rate of one, in float64, of wide gradients."""
    mean = square = last = None
    made = []
    for t, g in enumerate((g.double() for g in grads), 1):
        r = basis.double() @ g
        mean = 0.1 * r + (0.9 * mean if mean is not None else 0)
        square = 0.001 * r**2 + (0.999 * square if square is not None else 0)
        s = (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        ratio = s.norm(dim=0) / r.norm(dim=0) if per == "channel" else s.norm() / r.norm()
        step = scale * g * ratio
        if last is not None and float(step.norm()) > 1.01 * last:
            step = step * 1.01 * last / step.norm()
        last = float(step.norm())
        made.append(-step)
    return made


@pytest.mark.parametrize(("rank", "per", "scale"), [(2, "channel", 1.0), (1, "tensor", 128**0.5)])
def test_steps_of_apollo_are_its_formulas(rank: int, per: str, scale: float) -> None:
    """For five gradients, wide and tall; the projection has entries from N(0, 1 / rank)."""
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, 30, generator=rng) * (1 + t) for t in range(5)]
    for turn in (lambda t: t, lambda t: t.T.contiguous()):
        p = nn.Parameter(turn(torch.zeros(6, 30)))
        made = optimizers.named("apollo", rank=rank, per=per, scale=scale)({"p": p}, 1.0)
        steps = []
        for g in grads:
            before, p.grad = p.detach().clone(), turn(g)
            made.step()
            steps.append(turn(p.detach() - before))
        basis = made.state[p]["basis"]
        for step, want in zip(steps, apollo_by_its_formula(grads, basis, per, scale), strict=True):
            assert torch.allclose(step.double(), want, rtol=1e-3, atol=1e-5)


def test_projections_of_apollo_are_random_and_renewed() -> None:
    """Of variance 1 / rank, others for another tensor and after `every` steps; a stopped run goes on to the same bits."""
    rng = torch.Generator().manual_seed(0)
    held = {n: nn.Parameter(torch.randn(40, 60, generator=rng)) for n in "ab"}
    goals = {n: torch.randn(40, 60, generator=rng) for n in held}
    other = {n: nn.Parameter(p.detach().clone()) for n, p in held.items()}

    def loss(of: dict[str, nn.Parameter]) -> Tensor:
        return torch.stack([(p - goals[n]).square().mean() for n, p in of.items()]).sum()

    made = optimizers.named("apollo", rank=20, every=3)(held, 0.01)
    seen = []
    for _ in range(4):
        go(made, lambda: loss(held), 1)
        seen.append(made.state[held["a"]]["basis"].clone())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[3], made.state[held["b"]]["basis"])
    assert float(seen[0].var()) == pytest.approx(1 / 20, rel=0.2)
    first, again = (optimizers.named("apollo", rank=20, every=3)(other, 0.01) for _ in range(2))
    go(first, lambda: loss(other), 2)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    go(again, lambda: loss(other), 2)
    assert all(torch.equal(held[n], other[n]) for n in held)


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 1, "per": "tensor", "scale": 3.0}])
def test_apollo_goes_down_in_its_projection(options: dict[str, Any]) -> None:
    """A convex loss falls where every matrix is projected, stacks too."""
    held, loss = problem()
    start = float(loss().detach())
    go(optimizers.named("apollo", **options)(held, 0.05), loss, 300)
    assert float(loss().detach()) < 0.2 * start


def test_a_step_of_mezo_is_the_slope_along_its_direction() -> None:
    """-rate (g · z) z, z the same before and after, standard normal, another one each step; of parts of a batch the sum."""
    rng = torch.Generator().manual_seed(0)
    p, g = nn.Parameter(torch.randn(40, 50, generator=rng)), torch.randn(40, 50, generator=rng).double()
    made = optimizers.named("mezo")({"p": p}, 0.5)

    def loss() -> Tensor:
        return (g * p.double()).sum()

    moves = []
    for parts in (1, 1, 3):
        before = p.detach().clone()
        for _ in range(parts):
            assert float(made.measure(loss)) == pytest.approx(float(loss()), rel=1e-4)
        made.step()
        moves.append((p.detach() - before).double() / -0.5 / parts)
    for move in moves:  # move = (g · z) z, so that g · move = (g · z)²
        slope = (g * move).sum().sqrt()
        z = move / slope
        assert float(z.std()) == pytest.approx(1, abs=0.05) and float(z.mean()) == pytest.approx(0, abs=0.1)
    assert float(torch.nn.functional.cosine_similarity(*(m.flatten() for m in moves[:2]), dim=0).abs()) < 0.1


def test_mezo_follows_the_gradient_on_average() -> None:
    """The mean of many steps points along the gradient."""
    g = torch.randn(30, generator=torch.Generator().manual_seed(1))
    p = nn.Parameter(torch.zeros(30))
    made = optimizers.named("mezo")({"p": p}, 1e-3)
    for _ in range(2000):
        made.step(lambda: (g * p).sum())
    assert float(torch.nn.functional.cosine_similarity(-p.detach(), g, dim=0)) > 0.97


def test_mezo_takes_both_losses_under_the_same_dropout() -> None:
    """What does not depend on the tensors gives no slope; the next step has other dropout."""
    p, ones = nn.Parameter(torch.zeros(3)), torch.ones(200)
    made, seen = optimizers.named("mezo")({"p": p}, 1.0), []

    def loss() -> Tensor:
        seen.append(torch.nn.functional.dropout(ones).mean())
        return seen[-1]

    for _ in range(2):
        made.step(loss)
    assert seen[0] == seen[1] != seen[2] == seen[3] and float(p.detach().abs().max()) < 1e-6
