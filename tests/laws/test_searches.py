"""Laws of the methods that spend a budget, on tables whose true loss is known: what is measured says what is predicted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.engine import get
from weft.error import ConflictError, OptionError
from weft.linalg.allocation import dynamic, frontier, integer

from .cases import SEARCHES, options, rng

Table = tuple[Tensor, Tensor, int]


def table(seed: int, sites: int = 4, candidates: int = 4, unit: int = 1) -> Table:
    """Bytes, errors and a budget between the least and the most; some candidates are not available."""
    g = rng("table", seed)
    cost = torch.randint(1, 40, (sites, candidates), generator=g) * unit
    error = torch.rand(sites, candidates, generator=g) * 10 ** (2 * torch.rand(sites, 1, generator=g))
    error[1:][torch.rand(sites - 1, candidates, generator=g) < 0.1] = torch.inf
    error[:, 0] = error[:, 0].nan_to_num(posinf=5.0)
    least, most = int(cost.amin(1).sum()), int(cost.amax(1).sum())
    return cost, error, max(least + int((most - least) * float(torch.rand(1, generator=g))), int(cost[:, 0].sum()))


class Measured:
    """A bench on which the loss of a choice is the sum of `error`. It has nothing that a search does not declare."""

    def __init__(self, name: str, error: Tensor, outliers: Tensor | None = None) -> None:
        g = rng("measured", len(error))
        growth = torch.rand(len(error), generator=g, dtype=torch.float64) + 0.1
        shares = torch.rand(len(error), generator=g, dtype=torch.float64) if outliers is None else outliers
        there: dict[str, Callable[..., Any]] = {
            "evaluate": lambda choice, share=1.0, draw=0: spent(error, choice),
            "disturb": lambda site, size, share=1.0, draw=0: float(growth[site]) * size,
            "relative": lambda: error.double() / growth[:, None],
            "fisher": lambda: error.double(),
            "outliers": lambda above: shares,
        }
        for need in get(name).needs:
            setattr(self, need, there[need])

    def rng(self, salt: str) -> torch.Generator:
        """Of these laws."""
        return rng(salt)


def chosen(name: str, cost: Tensor, error: Tensor, budget: int, **options: Any) -> Tensor:
    """What a search chooses; given a bench if it needs one."""
    given = (Measured(name, error),) if get(name).needs else ()
    return get(name)(cost, error, budget, *given, **options)


def spent(by: Tensor, choice: Tensor) -> float:
    """The sum of what was chosen."""
    return float(by.double().gather(1, choice[:, None]).sum())


def exhaustive(t: Table, *, same: bool) -> float:
    """The least error within the budget, by trying every choice (one for all sites if `same`)."""
    cost, error, budget = t
    sites, candidates = cost.shape
    every = [(c,) * sites for c in range(candidates)] if same else itertools.product(range(candidates), repeat=sites)
    choices = torch.tensor(list(every))
    at = torch.arange(sites)
    total = error.double()[at, choices].sum(1)
    return float(total[(cost[at, choices].sum(1) <= budget) & total.isfinite()].min())


def the_budget_holds(name: str) -> None:
    """What is chosen is available and never costs a byte more than the budget, at sizes of real models too."""
    for seed, unit in itertools.product(range(12), (1, 1_000_003)):
        cost, error, budget = table(seed, unit=unit)
        choice = chosen(name, cost, error, budget)
        assert choice.shape == (len(cost),) and choice.dtype == torch.long
        assert spent(cost, choice) <= budget and spent(error, choice) < float("inf")


def not_a_byte_more(name: str) -> None:
    """A much better choice that costs five bytes in a hundred million too many is not taken."""
    cost = torch.tensor([[50_000_000, 50_000_003], [50_000_000, 50_000_002]])
    error = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for budget in (100_000_000, 100_000_004):
        assert spent(cost, chosen(name, cost, error, budget)) <= budget


def by_loss(name: str) -> bool:
    """Whether a search goes by losses. One that is only told which blocks have outliers has laws of its own, below."""
    return "outliers" not in get(name).needs


def nothing_better_fits(name: str) -> None:
    """Trying every choice finds none of less error."""
    exact = {"gap": 0.0} if "gap" in get(name).options.model_fields else {}
    for seed in range(12):
        t = table(seed)
        best = exhaustive(t, same=name == "uniform")
        assert spent(t[1], chosen(name, *t, **exact)) == pytest.approx(best, rel=1e-6)


def uniform_is_no_better(name: str) -> None:
    """No search of choices by site does worse than one choice for all, but for its gap."""
    for seed in range(12):
        t = table(seed)
        assert spent(t[1], chosen(name, *t)) <= spent(t[1], get("uniform")(*t)) * (1 + 1e-4)


def dominated_candidates_do_not_matter(name: str) -> None:
    """Candidates that cost more and err more than another change nothing; nor does one that is not available."""
    for seed in range(6):
        cost, error, budget = table(seed)
        before = spent(error, chosen(name, cost, error, budget))
        worse = cost[:, :1] + 1, error[:, :1] + 1
        missing = cost[:, :1] * 0 + 1, error[:, :1] * torch.nan
        for more_cost, more_error in (worse, missing):
            wide = torch.cat([cost, more_cost], 1), torch.cat([error, more_error], 1)
            assert spent(wide[1], chosen(name, *wide, budget)) == pytest.approx(before, rel=1e-4)


def what_cannot_be_is_refused(name: str) -> None:
    """ConflictError one byte below the least, with the least in it; and where a site has no candidate at all."""
    cost, error = torch.tensor([[3, 5], [4, 9]]), torch.ones(2, 2)
    assert chosen(name, cost, error, 7).tolist() == [0, 0]
    with pytest.raises(ConflictError, match="7"):
        chosen(name, cost, error, 6)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ConflictError):
            chosen(name, cost, torch.tensor([[1.0, 1.0], [bad, bad]]), 100)


def input_is_not_changed(name: str) -> None:
    """The tables stay as they were, and the choice is the same again."""
    cost, error, budget = table(0)
    held = cost.clone(), error.clone()
    choices = [chosen(name, cost, error, budget).tolist() for _ in range(2)]
    assert choices[0] == choices[1] and torch.equal(cost, held[0]) and torch.equal(error, held[1])


def options_are_checked(name: str) -> None:
    """Ends and middle of every option run; what is outside or unknown is refused by name."""
    cost, error, budget = table(1)
    for option, good, bad in options(get(name)):
        for value in good:
            assert spent(cost, chosen(name, cost, error, budget, **{option: value})) <= budget
        for value in bad:
            with pytest.raises(OptionError, match=option):
                get(name).bind({option: value})
    with pytest.raises(OptionError, match="unheard_of"):
        get(name).bind({"unheard_of": 1})


def the_seed_decides(name: str) -> None:
    """The same problem has the same choice whatever was drawn before."""
    cost, error, budget = table(2, sites=6)
    first = chosen(name, cost, error, budget)
    torch.rand(3)
    assert torch.equal(first, chosen(name, cost, error, budget))


LAWS: list[Callable[[str], None]] = [
    the_budget_holds,
    not_a_byte_more,
    dominated_candidates_do_not_matter,
    what_cannot_be_is_refused,
    input_is_not_changed,
    options_are_checked,
    the_seed_decides,
]
LOSS_LAWS: list[Callable[[str], None]] = [nothing_better_fits, uniform_is_no_better]
"""Of searches that go by losses."""


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_search(law: Callable[[str], None], name: str) -> None:
    """Each law, for each search."""
    law(name)


@pytest.mark.parametrize("name", [n for n in SEARCHES if by_loss(n)])
@pytest.mark.parametrize("law", LOSS_LAWS, ids=lambda law: law.__name__)
def test_search_by_loss(law: Callable[[str], None], name: str) -> None:
    """Each law, for each search that goes by losses."""
    law(name)


def by_share(outliers: Tensor, budget: int, sites: int = 6, levels: int = 20) -> Tensor:
    """What is spent on sites of one size, with evenly spaced candidates, by their shares of outliers."""
    cost = (torch.arange(levels) + 1).expand(sites, levels).clone() * 100
    error = (levels - torch.arange(levels)).double().expand(sites, levels).clone()
    choice = get("owl")(cost, error, budget, Measured("owl", error, outliers))
    return cost.gather(1, choice[:, None]).flatten()


@pytest.mark.parametrize("budget", [2400, 5000, 7300, 11900])
def test_owl_follows_the_outliers(budget: int) -> None:
    """More outliers never get less; the span is twice `spread`, up to a candidate; the budget is used up to one candidate a site."""
    o = torch.tensor([0.3, 0.1, 0.5, 0.15, 0.2, 0.4], dtype=torch.float64)
    got = by_share(o, budget)
    assert bool((got[o.argsort(stable=True)].diff() >= 0).all())
    assert budget - 6 * 100 < int(got.sum()) <= budget
    if budget == 5000:
        assert 0.16 * 2000 - 100 <= int(got.max() - got.min()) <= 0.16 * 2000 + 100
    assert torch.equal(by_share(o * 7 + 2, budget), got), "only how shares compare counts"
    assert len(by_share(torch.full((6,), 0.2), 6 * 700).unique()) == 1


@pytest.mark.parametrize("spread", [0.0, 0.08, 0.4])
def test_owl_is_its_formula(spread: float) -> None:
    """Every density d is tried: the choice is that of the largest one that fits."""
    for seed in range(8):
        cost, error, budget = table(seed, sites=5, candidates=6)
        o = torch.rand(5, generator=rng("shares", seed), dtype=torch.float64)
        more = 2 * spread * (o - o.min()) / (o.max() - o.min())
        levels = [
            sorted(u.nonzero()[0].tolist(), key=c.tolist().__getitem__)
            for u, c in zip(frontier(cost, error, budget, ""), cost, strict=True)
        ]
        dense = [[int(cost[s, k]) / int(cost[s, ks[-1]]) for k in ks] for s, ks in enumerate(levels)]

        def at(d: float, levels: Any = levels, dense: Any = dense, more: Any = more) -> list[int]:
            fits = [max(1, sum(x <= d + float(m) for x in xs)) for xs, m in zip(dense, more, strict=True)]
            return [ks[n - 1] for ks, n in zip(levels, fits, strict=True)]

        tried = [at(x - float(m) + 1e-9) for xs, m in zip(dense, more, strict=True) for x in xs]
        want = max(
            (x for x in tried if spent(cost, torch.tensor(x)) <= budget), key=lambda x: spent(cost, torch.tensor(x))
        )
        got = get("owl")(cost, error, budget, Measured("owl", error, o), spread=spread)
        assert spent(cost, got) <= budget and (got.tolist() == want or spread == 0)
        assert spent(cost, got) >= spent(cost, torch.tensor(want))


@pytest.mark.parametrize("cells", [256, 1024])
def test_dynamic_programming_is_exact_up_to_its_cells(cells: int) -> None:
    """As good as the integer programme where cells hold every byte; else no worse than that with a cell a site less to spend."""
    for seed in range(6):
        cost, error, budget = table(seed, sites=8, candidates=6)
        best = spent(error, integer(cost, error, budget, gap=0, where="here"))
        assert spent(error, dynamic(cost, error, budget, cells=2048, where="here")) == pytest.approx(best, rel=1e-9)
        wide = cost * 997 + torch.randint(0, 997, cost.shape, generator=rng(seed))
        budget = budget * 997 + 8 * 997
        least = int(torch.where(error.isfinite(), wide, 1 << 40).amin(1).sum())
        cell = -(-(budget - least) // cells)
        made = dynamic(wide, error, budget, cells=cells, where="here")
        tight = integer(wide, error, budget - (len(wide) + 1) * cell, gap=0, where="here")
        assert spent(wide, made) <= budget
        assert spent(error, integer(wide, error, budget, gap=0, where="here")) <= spent(error, made) + 1e-9
        assert spent(error, made) <= spent(error, tight) + 1e-9


def test_evolution_finds_what_sums_do_not() -> None:
    """Where four pairs of sites are good only together, it ends at the best of all choices, and every run alike."""
    cost = torch.tensor([[1, 2, 3]] * 8)
    error = torch.tensor([[3.0, 2.0, 1.0]] * 8) * torch.linspace(1, 1.2, 8)[:, None]

    def together(choice: Tensor, share: float = 1.0, draw: int = 0) -> float:
        return spent(error, choice) + float((choice[:4] - choice[4:]).abs().sum())

    bench: Any = Measured("evolutionary", error)
    bench.evaluate = together
    runs = [get("evolutionary")(cost, error, 16, bench, generations=60) for _ in range(2)]
    every = [torch.tensor(x) for x in itertools.product(range(3), repeat=8) if sum(x) + 8 <= 16]
    best = min(together(x) for x in every)
    assert torch.equal(*runs) and spent(cost, runs[0]) <= 16
    assert together(runs[0]) == best < together(integer(cost, error, 16, gap=0, where="here")) - 3
