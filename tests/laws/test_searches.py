"""Laws of the methods that spend a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from weft.engine import get
from weft.error import ConflictError, OptionError

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
        choice = get(name)(cost, error, budget)
        assert choice.shape == (len(cost),) and choice.dtype == torch.long
        assert spent(cost, choice) <= budget and spent(error, choice) < float("inf")


def not_a_byte_more(name: str) -> None:
    """A much better choice that costs five bytes in a hundred million too many is not taken."""
    cost = torch.tensor([[50_000_000, 50_000_003], [50_000_000, 50_000_002]])
    error = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for budget in (100_000_000, 100_000_004):
        assert spent(cost, get(name)(cost, error, budget)) <= budget


def nothing_better_fits(name: str) -> None:
    """Trying every choice finds none of less error."""
    exact = {"gap": 0.0} if "gap" in get(name).options.model_fields else {}
    for seed in range(12):
        t = table(seed)
        best = exhaustive(t, same=name == "uniform")
        assert spent(t[1], get(name)(*t, **exact)) == pytest.approx(best, rel=1e-6)


def uniform_is_no_better(name: str) -> None:
    """No search of choices by site does worse than one choice for all, but for its gap."""
    for seed in range(12):
        t = table(seed)
        assert spent(t[1], get(name)(*t)) <= spent(t[1], get("uniform")(*t)) * (1 + 1e-4)


def dominated_candidates_do_not_matter(name: str) -> None:
    """Candidates that cost more and err more than another change nothing; nor does one that is not available."""
    for seed in range(6):
        cost, error, budget = table(seed)
        before = spent(error, get(name)(cost, error, budget))
        worse = cost[:, :1] + 1, error[:, :1] + 1
        missing = cost[:, :1] * 0 + 1, error[:, :1] * torch.nan
        for more_cost, more_error in (worse, missing):
            wide = torch.cat([cost, more_cost], 1), torch.cat([error, more_error], 1)
            assert spent(wide[1], get(name)(*wide, budget)) == pytest.approx(before, rel=1e-4)


def what_cannot_be_is_refused(name: str) -> None:
    """ConflictError one byte below the least, with the least in it; and where a site has no candidate at all."""
    cost, error = torch.tensor([[3, 5], [4, 9]]), torch.ones(2, 2)
    assert get(name)(cost, error, 7).tolist() == [0, 0]
    with pytest.raises(ConflictError, match="7"):
        get(name)(cost, error, 6)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ConflictError):
            get(name)(cost, torch.tensor([[1.0, 1.0], [bad, bad]]), 100)


def input_is_not_changed(name: str) -> None:
    """The tables stay as they were, and the choice is the same again."""
    cost, error, budget = table(0)
    held = cost.clone(), error.clone()
    choices = [get(name)(cost, error, budget).tolist() for _ in range(2)]
    assert choices[0] == choices[1] and torch.equal(cost, held[0]) and torch.equal(error, held[1])


def options_are_checked(name: str) -> None:
    """Ends and middle of every option run; what is outside or unknown is refused by name."""
    cost, error, budget = table(1)
    for option, good, bad in options(get(name)):
        for value in good:
            assert spent(cost, get(name)(cost, error, budget, **{option: value})) <= budget
        for value in bad:
            with pytest.raises(OptionError, match=option):
                get(name).bind({option: value})
    with pytest.raises(OptionError, match="unheard_of"):
        get(name).bind({"unheard_of": 1})


LAWS: list[Callable[[str], None]] = [
    the_budget_holds,
    not_a_byte_more,
    nothing_better_fits,
    uniform_is_no_better,
    dominated_candidates_do_not_matter,
    what_cannot_be_is_refused,
    input_is_not_changed,
    options_are_checked,
]


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_search(law: Callable[[str], None], name: str) -> None:
    """Each law, for each search."""
    law(name)
