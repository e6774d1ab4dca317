"""Quantizers that fit a grid, against slow references in float64: every zero point tried, every step by autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from weft.engine import Group, get
from weft.expr import Dense, Expr, Masked, spread
from weft.linalg.grids import Fitted, grouped, minmax, nearest, refine, refit, search
from weft.linalg.sparse import compact

from .cases import STARTS, group, randn, rng, weight

SIZES = [(bits, symmetric, size) for bits in (2, 3, 8) for symmetric in (True, False) for size in (0, 7)]


def bf16(x: Tensor) -> Tensor:
    """The nearest that a scale's format holds."""
    return x.float().bfloat16().double()


def best_scale(w: Tensor, v: Tensor, codes: Tensor, zeros: range) -> tuple[float, int, float]:
    """The positive scale and the zero point of least Σ v (w - s (c - z))² for one group: s, z, and that error."""
    found = (0.0, -1, float((v * w * w).sum()))
    for z in zeros:
        c = codes - z
        if float((v * c * c).sum()) > 0 and (s := float((v * w * c).sum() / (v * c * c).sum())) > 0:
            error = float((v * (w - s * c).square()).sum())
            found = min(found, (s, z, error), key=lambda f: f[2])
    return found


def cut(x: Tensor, size: int) -> list[list[Tensor]]:
    """The groups of each row, in float64."""
    return [list(row.double().split(size or len(row))) for row in x]


@pytest.mark.parametrize(("bits", "symmetric", "size"), SIZES)
def test_refit_is_the_best_of_all_zero_points(bits: int, symmetric: bool, size: int) -> None:
    """For any codes, some far from the weight; the scale is the exact one, rounded to its format."""
    w, v = weight(6, 24, bits), randn(rng("v", bits), 6, 24).abs()
    start = minmax(w, f"int{bits}", size, symmetric)
    wild = torch.randint(0, 2**bits, w.shape, generator=rng("codes", bits)).to(torch.uint8)
    for codes in (nearest(w + 0.3, start), nearest(w, start), wild):
        made = refit(w, v, codes, start)
        for i, parts in enumerate(zip(*(cut(t, size) for t in (w, v, codes)), strict=True)):
            for j, (x, weights, c) in enumerate(zip(*parts, strict=True)):
                zeros = range(2 ** (bits - 1), 2 ** (bits - 1) + 1) if symmetric else range(2**bits)
                _, z, least = best_scale(x, weights, c, zeros)
                if z < 0:
                    assert made.scales[i, j] == start.scales[i, j] and made.zero()[i, j] == start.zero()[i, j]
                    continue
                along = c - float(made.zero()[i, j])
                exact = (weights * x * along).sum() / (weights * along * along).sum()
                assert abs(float(exact) - float(made.scales[i, j])) <= 2**-8 * float(exact)
                assert float((weights * (x - exact * along).square()).sum()) <= least * (1 + 1e-6) + 1e-12


def missed(w: Tensor, v: Tensor, fit: Fitted) -> Tensor:
    """Σ v (w - q)² of each group."""
    return grouped((fit.encode(nearest(w, fit)).dense().double() - w.double()).square() * v.double(), fit.group).sum(-1)


@pytest.mark.parametrize(("bits", "symmetric", "size"), SIZES)
def test_refined_groups_are_no_worse(bits: int, symmetric: bool, size: int) -> None:
    """No group loses by it and up to 4 bits the whole gains, from both starts."""
    w, v = weight(12, 42, "refine"), randn(rng("v"), 12, 42).abs()
    name = f"int{bits}"
    for start in (minmax(w, name, size, symmetric), search(w, v, name, size, symmetric)):
        before, after = missed(w, v, start), missed(w, v, refine(w, v, start))
        assert bool((after <= before * (1 + 1e-5)).all()) and (bits > 4 or float(after.sum()) < float(before.sum()))


def shrunk(r: Tensor, beta: float, p: float) -> Tensor:
    """sign(r) max(|r| - |r|^(p-1) / beta, 0), and 0 at 0."""
    return torch.where(r == 0, 0.0, r.sign() * (r.abs() - r.abs() ** (p - 1) / beta).clamp(min=0))


def half_quadratic(w: Tensor, s: float, z: int, bits: int, p: float, steps: int) -> float:
    """The least Σ |w - q|^p that the solver sees in one group that starts on scale s and zero point z."""
    least = torch.inf
    for i in range(steps + 1):
        codes = (w / s + z).round().clamp(0, 2**bits - 1)
        rest = w - s * (codes - z)
        least = min(least, float((rest.abs() ** p).sum()))
        goal = w - s * shrunk(rest / s, 10 * 1.01**i, p)
        found = best_scale(goal, torch.ones_like(w), codes, range(2**bits))
        s, z = (float(bf16(torch.tensor(found[0]))), found[1]) if found[1] >= 0 else (s, z)
    return least


@pytest.mark.parametrize(("bits", "p"), [(2, 0.7), (3, 0.7), (4, 0.3), (3, 1.0)])
def test_hqq_is_the_half_quadratic_solver(bits: int, p: float) -> None:
    """The loss of each group is that of a plain loop that tries every zero point; no group is worse than it began."""
    w = weight(5, 32, ("hqq", bits))
    (made,) = [get("hqq")(s, bits=bits, group=16, p=p, steps=6) for s in [lone(w)]]
    start = minmax(w, f"int{bits}", 16, False)
    first, last = (
        grouped((q.dense().double() - w.double()).abs() ** p, 16).sum(-1)
        for q in (start.encode(nearest(w, start)), made)
    )
    for (i, row), j in itertools.product(enumerate(cut(w, 16)), range(2)):
        want = half_quadratic(row[j], float(start.scales[i, j]), int(start.zero()[i, j]), bits, p, 6)
        assert float(last[i, j]) == pytest.approx(want, rel=1e-4)
    assert bool((last <= first * (1 + 1e-5)).all()) and float(last.sum()) < float(first.sum())


def lone(w: Tensor) -> Group:
    """A group of this weight, with evidence."""
    g = group(rows=(w.shape[0],), n=w.shape[1])
    return g.put([Dense(w)])


def half_pruned(w: Tensor) -> Expr:
    """The larger half of every row."""
    order = w.abs().argsort(1, descending=True)[:, : w.shape[1] // 2]
    return Masked.of(w, torch.zeros_like(w, dtype=torch.bool).scatter_(1, order, True))


def through(x: Tensor, to: Tensor) -> Tensor:
    """`to`, with the gradient of x."""
    return x + (to - x).detach()


def by_autograd(now: Expr, gram: Tensor, start: Fitted, iters: int, lr: float) -> Tensor:
    """The value [m n] that signed descent by autograd reaches, rows by their best step, all in float64."""
    mask, w = now.mask(), now.dense().double()
    x, top = (w if mask is None else w[mask].view(len(w), -1)), 2 ** int(start.name[3:]) - 1
    n = x.shape[1]
    scale, zero = start.scales.double(), start.zero().double()
    v, low, high = (torch.full(shape, fill, dtype=torch.float64).requires_grad_() for shape, fill in
                    ((x.shape, 0.0), (scale.shape, 1.0), (scale.shape, 1.0)))  # fmt: skip
    best, found = torch.full((len(x), 1), torch.inf, dtype=torch.float64), w
    for t in range(iters + 1):
        s = high * scale if start.zeros is None else (low * zero + high * (top - zero)) * scale / top
        s = through(s, bf16(s))
        z = zero if start.zeros is None else low * zero * scale / s
        z = through(z, z.round()).clamp(0, top)
        step, point = (spread(k, start.group, n) for k in (s, z))
        inner = x / step + v
        q = step * ((point + through(inner, (inner + point).round() - point)).clamp(0, top) - point)
        value = q if mask is None else torch.zeros_like(w).masked_scatter(mask, q)
        loss = (((value - w) @ gram) * (value - w)).sum(1, keepdim=True)
        found = torch.where(loss < best, value.detach(), found)
        best = torch.where(loss < best, loss, best).detach()
        total = loss.sum()
        with torch.no_grad():
            for k, (a, b) in ((v, (-0.5, 0.5)), (low, (0, 1)), (high, (0, 1))):
                (d,) = torch.autograd.grad(total, k, retain_graph=True, allow_unused=True)
                k.copy_((k - lr * (1 - t / iters) * (0 if d is None else d.sign())).clamp(a, b))
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sparse", [False, True])
def test_autoround_descends_as_autograd_does(symmetric: bool, sparse: bool) -> None:
    """The same value, entry by entry, after steps long enough to clip, with and without a zero pattern."""
    w = weight(8, 24, "autoround")
    g = lone(w) if not sparse else lone(w).put([half_pruned(w)])
    kept = w if not sparse else compact(w, g.now.mask())
    with torch.enable_grad():
        want = by_autograd(g.now, g.gram(), minmax(kept, "int3", 8, symmetric), 12, 0.037)
    made = get("autoround")(g, bits=3, group=8, symmetric=symmetric, iters=12, lr=0.037).dense()
    torch.testing.assert_close(made.double(), want.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("start", ["dense", "masked", "2:4-quantized"])
@pytest.mark.parametrize("lr", [0.005, 1.0])
def test_no_row_of_autoround_is_worse_than_it_began(start: str, lr: float) -> None:
    """Even with steps that are far too long; with good ones most rows gain."""
    g = Group((group(start, (24,), salt="rows").sites[0],))
    value = STARTS[start](weight(24, 32, ("rows", 0))).dense().double()

    def rows(e: Expr) -> Tensor:
        gap = e.dense().double() - value
        return ((gap @ g.gram()) * gap).sum(1)

    first, last = (
        rows(get(m)(g, bits=3, group=8, **o)) for m, o in (("rtn", {}), ("autoround", {"iters": 40, "lr": lr}))
    )
    assert bool((last <= first * (1 + 1e-5) + 1e-12).all())
    if lr < 1:
        assert float((last < first * 0.99).double().mean()) > 0.5
