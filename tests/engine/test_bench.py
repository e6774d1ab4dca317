"""The bench: what it measures is what a plain computation gives, it is put back, and nothing is measured twice."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.engine import Bench
from weft.engine.run import Step, apply
from weft.model import expressions, fork, places, weave
from weft.model.blocks import block_of
from weft.stats import Stats, collect, fisher, objective
from weft.store.cache import Cache

CHAINS = [(), (Step.of("rtn", bits=3, group=16),), (Step.of("gptq", bits=2, group=0),)]
Made = tuple[nn.Module, Bench, list[nn.Module]]


def values(model: nn.Module) -> dict[str, Tensor]:
    """Today's value of every site."""
    return {n: e.dense().detach().clone() for n, e in expressions(model).items()}


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """A distance that tells every two models apart."""
    return float(sum((i + 1) * (a[n] - b[n]).double().square().sum() for i, n in enumerate(sorted(a))))


@pytest.fixture
def evidence(tiny: Any, batches: Any, tmp_path: Path) -> Stats:
    """Evidence of a tiny model."""
    return collect(weave(tiny("llama-tied")), batches(), tmp_path / "evidence")


@pytest.fixture
def make(tiny: Any, batches: Any, evidence: Stats, tmp_path: Path) -> Callable[[], Made]:
    """A model, a bench on it whose distance is that of its weights, and a log of the models that were measured."""

    def of() -> Made:
        model = weave(tiny("llama-tied"))
        names, plain, seen = list(expressions(model)), values(model), list[Any]()
        usable = torch.ones(len(names), len(CHAINS), dtype=torch.bool)
        usable[3, 2] = False

        def distance(m: nn.Module, share: float, draw: int) -> float:
            seen.append(values(m))
            return gap(values(m), plain) * share + draw

        given = (names, CHAINS, usable, evidence, batches(), objective(model), distance)
        return model, Bench(fork(model), *given, cache=Cache(tmp_path / "cache"), about="test", seed=1), seen

    return of


def test_a_choice_is_that_of_a_rewritten_model(make: Any, evidence: Stats) -> None:
    """Whatever was tried before, the bench measures the model that `apply` makes from the plain one."""
    model, bench, seen = make()
    g = torch.Generator().manual_seed(0)
    choices = [torch.randint(0, 3, (len(bench.sites),), generator=g) for _ in range(4)]
    for choice in choices:
        got = bench.evaluate(choice)
        fresh = fork(model)
        for c, chain in enumerate(CHAINS):
            if names := [s for s, x in zip(bench.sites, choice.tolist(), strict=True) if x == c]:
                apply(fresh, chain, at=names, stats=evidence, seed=1)
        now = values(fresh)
        assert all(torch.equal(now[n], seen[-1][n]) for n in now) and got == gap(now, values(model)) > 0
    assert bench.evaluate(torch.zeros(len(bench.sites), dtype=torch.long)) == 0


def test_nothing_is_measured_twice(make: Any) -> None:
    """Neither by one bench nor by the next; another share, draw or choice is another number."""
    _, bench, seen = make()
    one, two = [1] * len(bench.sites), [2] * len(bench.sites)
    first = [bench.evaluate(one), bench.evaluate(one, 0.5), bench.evaluate(one, 0.5, 7), bench.evaluate(two)]
    noise = [bench.disturb(2, 0.1), bench.disturb(2, 0.2), bench.disturb(3, 0.1)]
    assert len(seen) == 7 == len({*first, *noise}) and bench.evaluate(torch.tensor(one)) == first[0]
    tables = bench.relative(), bench.fisher()
    _, again, later = make()
    assert [again.evaluate(one), again.evaluate(one, 0.5), again.evaluate(one, 0.5, 7), again.evaluate(two)] == first
    assert [again.disturb(2, 0.1), again.disturb(2, 0.2), again.disturb(3, 0.1)] == noise
    assert torch.equal(again.relative(), tables[0]) and torch.equal(again.fisher(), tables[1]) and not later


@pytest.mark.parametrize("size", [0.001, 0.3])
def test_noise_has_its_size_and_goes_again(make: Any, size: float) -> None:
    """On one site alone, of a plain model even after a choice; it depends on the seed and the site only."""
    model, bench, seen = make()
    bench.evaluate([1] * len(bench.sites))
    plain = values(model)
    bench.disturb(4, size)
    name = bench.sites[4]
    off = {n: float((seen[-1][n] - w).double().square().sum() / w.double().square().sum()) for n, w in plain.items()}
    assert off.pop(name) == pytest.approx(size, rel=1e-4) and not any(off.values())
    now = values(bench.model)
    assert all(torch.equal(now[n], w) for n, w in plain.items())


def test_relative_errors_are_those_of_the_weights(make: Any, evidence: Stats) -> None:
    """||W_c - W||² / ||W||², infinite where a site has no such candidate."""
    model, bench, _ = make()
    got, plain = bench.relative(), values(model)
    for c, chain in enumerate(CHAINS):
        fresh = fork(model)
        apply(fresh, chain, stats=evidence, seed=1)
        now = values(fresh)
        for s, n in enumerate(bench.sites):
            w = plain[n].double()
            want = float((now[n].double() - w).square().sum() / w.square().sum()) if (s, c) != (3, 2) else torch.inf
            assert float(got[s, c]) == pytest.approx(want, rel=1e-5), (n, c)


def test_fisher_scores_weigh_every_entry(make: Any, evidence: Stats, monkeypatch: pytest.MonkeyPatch) -> None:
    """½ Σ F dW², however many sites are held at a time."""
    model, bench, _ = make()
    fishers = import_module("weft.stats.fisher")
    monkeypatch.setattr(fishers, "TOGETHER", 3000)
    lots = list(fishers.lots(expressions(model)))
    assert len(lots) > 3 and [n for lot in lots for n in lot] == bench.sites
    got = bench.fisher()
    weights = fisher(model, bench.sites, bench.batches, bench.goal, seed=1)
    fresh = fork(model)
    apply(fresh, CHAINS[1], stats=evidence, seed=1)
    now, plain = values(fresh), values(model)
    for s, n in enumerate(bench.sites):
        want = 0.5 * float((weights[n].double() * (now[n] - plain[n]).double() ** 2).sum())
        assert float(got[s, 1]) == pytest.approx(want, rel=1e-4) and float(got[s, 0]) == 0, n


@pytest.mark.parametrize("above", [1.0, 2.0, 5.0])
def test_outliers_are_counted_a_block(make: Any, evidence: Stats, above: float) -> None:
    """The share of |w_ij| sqrt(E[x_j²]) above so many means, over all weights of a block together."""
    model, bench, _ = make()
    got = dict(zip(bench.sites, bench.outliers(above).tolist(), strict=True))
    plain, held = values(model), evidence.evidence(bench.sites)
    shares: set[float] = set()
    for block in {block_of(model, n) for n in bench.sites}:
        names = [n for n in bench.sites if block_of(model, n) == block]
        flat = torch.cat([(plain[n].abs() * held[n][0].gram.diagonal().sqrt()).flatten() for n in names]).double()
        want = float((flat > above * flat.mean()).double().mean())
        assert all(got[n] == pytest.approx(want, abs=1e-4) for n in names)
        shares.add(want)
    assert len(shares) == 3 == 1 + len({block_of(model, n) for n in places(model)} - {None})
