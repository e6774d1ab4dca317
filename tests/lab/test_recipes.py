"""What the recipes of lab models promise of their data and their scores, against models that know the answer."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from weft.lab.made import clip, digits, dlm
from weft.lab.metrics import Scores


def mean(scores: Scores) -> float:
    """The score."""
    return float(np.average(scores[0], weights=scores[1]))


def test_captions_of_digits() -> None:
    """Chance is log2(10) bits and a tenth of the captions right; a model that knows the digit gets all; no caption is cut."""
    pytest.importorskip("sklearn")
    known, labels = clip.RECIPE, digits.digits().test.labels
    texts = known._captions([(w, d) for w in range(len(clip.TEMPLATES)) for d in range(10)])
    assert texts["input_ids"].shape[1] <= clip.LENGTH and int((texts["input_ids"] == 2).sum()) == 0
    assert len({tuple(row) for row in texts["input_ids"].tolist()}) == 10 * len(clip.TEMPLATES)

    class Knows(nn.Module):
        def __init__(self, sharp: float) -> None:
            super().__init__()
            self.sharp, self.at = sharp, 0

        def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Any:
            mine = labels[self.at : self.at + len(pixel_values)]
            self.at += len(pixel_values)
            right = nn.functional.one_hot(mine, 10).repeat(1, len(clip.TEMPLATES))
            return type("Out", (), {"logits_per_image": self.sharp * right.float()})

    for sharp, score, share in ((0.0, np.log2(10), 0.1), (100.0, 0.0, 1.0)):
        assert mean(known.score(Knows(sharp))) == pytest.approx(score, abs=1e-6)
        assert known.facts(Knows(sharp))["retrieval of the right caption"] == pytest.approx(share, abs=0.03)


class Guess(nn.Module):
    """Any logits, of a small vocabulary, that depend on all that is seen."""

    def __init__(self, size: int = 6, *, flat: bool = False) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.flat, self.size, self.mix = flat, size, torch.randn(5, size + 1, 5, size, generator=rng)

    def forward(self, input_ids: Tensor) -> Any:
        seen = nn.functional.one_hot(input_ids, self.size + 1).float()
        logits = torch.einsum("btv,tvsc->bsc", seen, self.mix[: input_ids.shape[1], :, : input_ids.shape[1]])
        return type("Out", (), {"logits": torch.tanh(logits) * (0 if self.flat else 3)})


def test_the_bound_is_the_mean_over_orders() -> None:
    """Over all sets of hidden tokens it is what the row costs token by token, on average over all orders; draws come near it."""
    model, row, size = Guess(), torch.tensor([2, 4, 0, 5, 1]), 4

    def cost(hidden: set[int]) -> Tensor:
        hide = torch.tensor([[i in hidden for i in range(size)]])
        return dlm.nats(model, row[None], hide, model.size)[0] / np.log(2)

    orders = [
        float(sum(cost(set(order[i:]))[order[i]] for i in range(size))) for order in itertools.permutations(range(size))
    ]
    every = [
        np.mean([size / k * float(cost(set(s)).sum()) for s in itertools.combinations(range(size), k)])
        for k in range(1, size + 1)
    ]
    assert np.mean(every) == pytest.approx(np.mean(orders), rel=1e-5) and np.std(orders) > 0.01
    rng = torch.Generator().manual_seed(0)
    drawn = np.array([dlm.bound(model, row, model.size, rng) for _ in range(600)])
    assert abs(drawn.mean() - np.mean(orders)) < 4 * drawn.std() / 600**0.5 and drawn.std() < 0.5 * drawn.mean()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_bound_of_a_blind_model_is_exact(size: int) -> None:
    """Where all tokens are alike likely, each draw costs log2 of the vocabulary a token."""
    row, rng = torch.arange(size + 1), torch.Generator().manual_seed(1)
    assert dlm.bound(Guess(flat=True), row, 6, rng) == pytest.approx(size * np.log2(6), rel=1e-5)


def test_hidden_tokens_are_not_seen() -> None:
    """Another token where one is hidden changes its own cost alone; what is not hidden costs nothing."""
    model, hide = Guess(), torch.tensor([[True, False, True, False]])
    a, b = (dlm.nats(model, torch.tensor([[2, 4, 0, x, 1]]), hide, model.size)[0] for x in (5, 3))
    assert float(a[0]) == float(b[0]) > 0 and float(a[2]) != float(b[2]) and a[[1, 3]].tolist() == [0.0, 0.0]


def test_ref_dlm_starts_as_ref_lm_that_looks_both_ways() -> None:
    """All its weights but the row of the hidden token, which is the mean of the others; a later token changes earlier logits."""
    model: Any = dlm.RECIPE.model().eval()
    lm: Any = weft.unweave(weft.load("ref-lm"))
    own, old = model.state_dict(), lm.state_dict()
    assert own.keys() == old.keys() and dlm.RECIPE.hidden == len(old["lm_head.weight"])
    for name, value in old.items():
        assert torch.equal(own[name][: len(value)], value.float()), name
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(own["lm_head.weight"][-1], old["lm_head.weight"].float().mean(0))
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        gap = model(input_ids=ids).logits[:, 0].diff(dim=0).abs().max()
    assert float(gap) > 1e-3
