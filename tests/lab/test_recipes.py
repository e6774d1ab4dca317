"""What the recipes of lab models promise of their data and their scores, against models that know the answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from weft.engine.run import Step, apply
from weft.lab import made
from weft.lab.made import clip, ctr, diffusion, digits, dlm
from weft.lab.made.digits import Images
from weft.lab.made.recipe import train
from weft.lab.metrics import Scores
from weft.model import expressions, fork, match, weave
from weft.stats import collect


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


class Drawn(nn.Module):
    """The velocity of a flow that ends at these images."""

    def __init__(self, ends: Tensor) -> None:
        super().__init__()
        self.ends, self.config = ends, diffusion.RECIPE.model().config

    def forward(self, pixel_values: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        return type("Out", (), {"sample": (pixel_values - self.ends) / timestep.view(-1, 1, 1, 1)})


def test_a_flow_that_knows_the_image() -> None:
    """It has no error at any time, and noise becomes the image, whatever the steps; one that says nothing errs by all of e - x."""
    pytest.importorskip("sklearn")
    known, held = diffusion.RECIPE, digits.digits().test
    assert mean(known.score(Drawn(held.images))) < 1e-6
    for steps in (1, 7):
        made_ = diffusion.generate(Drawn(held.images), held.labels, seed=1, steps=steps)
        torch.testing.assert_close(made_, held.images, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    values, _ = known.score(known.model().eval())
    want = 1 + held.images.square().flatten(1).mean(1).double().numpy()
    assert values.mean() == pytest.approx(want.mean(), rel=0.01) and np.corrcoef(values, want)[0, 1] > 0.3
    at = known.batches()[0]["timestep"]
    assert float(at.min()) >= 0 and float(at.max()) < 1


def test_the_best_linear_estimate() -> None:
    """From noise alone it says the class's mean; any other share of it errs more on the images that it was fitted to."""
    pytest.importorskip("sklearn")
    held = digits.digits().train
    best, rng = diffusion.Linear(held), torch.Generator().manual_seed(0)
    noise, time = torch.randn(held.images.shape, generator=rng), torch.rand(len(held.labels), generator=rng)
    at_one = best(noise, torch.ones(len(noise)), held.labels).sample
    means = torch.stack([held.images[held.labels == d].mean(0) for d in range(10)])
    torch.testing.assert_close(at_one, noise - means[held.labels], atol=1e-4, rtol=0)

    def error(share: float) -> float:
        def scaled(**given: Tensor) -> Any:
            return type("Out", (), {"sample": share * best(**given).sample})

        return float(diffusion.errors(scaled, held, time, noise).mean())

    assert error(1.0) < min(error(0.95), error(1.05))


def test_what_the_card_says_of_generated_digits() -> None:
    """Held-out digits under their own labels are read and vary; under other labels a tenth is read; all alike do not vary."""
    pytest.importorskip("sklearn")
    held = digits.digits().test
    assert diffusion.read(held) > 0.98 and diffusion.spread(held) > 0.05
    assert diffusion.read(Images(held.images, held.labels.roll(1))) < 0.2
    one = torch.stack([held.images[held.labels == d][0] for d in range(10)])
    assert diffusion.spread(Images(one[held.labels], held.labels)) == 0.0


def test_the_area_under_the_curve() -> None:
    """How often a clicked one is above one that was not, by counting pairs; ties count half, and one class alone has none."""
    rng = torch.Generator().manual_seed(0)
    scores, labels = torch.randint(6, (60,), generator=rng).float(), torch.randint(2, (60,), generator=rng)
    gaps = scores[labels == 1][:, None] - scores[labels == 0]
    assert ctr.auc(scores, labels) == pytest.approx(float(((gaps > 0) + 0.5 * (gaps == 0)).double().mean()), abs=1e-9)
    assert ctr.auc(labels.float(), labels) == 1.0 and ctr.auc(torch.zeros(60), labels) == 0.5
    assert np.isnan(ctr.auc(scores, torch.zeros(60)))


@pytest.fixture(scope="module")
def log() -> Iterator[ctr.Clicks]:
    """Both logs, fewer impressions than the recipe's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctr, "LOG", 60_000)
        yield ctr.clicks()


def test_categories_follow_the_power_law(log: ctr.Clicks) -> None:
    """Each field has rows of its own, drawn in proportion to 1 / r^1.1, within five standard errors."""
    ids, first = log.train.ids, 0
    for k, size in enumerate(ctr.FIELDS):
        own = ids[:, k] - first
        share = torch.arange(1, size + 1).double() ** -ctr.POWER
        share /= share.sum()
        seen = torch.bincount(own, minlength=size).double() / len(ids)
        assert len(seen) == size and int(own.min()) == 0
        assert ((seen - share).abs() <= 5 * (share * (1 - share) / len(ids)).sqrt() + 1e-4).all()
        first += size
    assert len(log.train.ids) == 60_000 and len(log.test.ids) == ctr.HELD_OUT


def test_nothing_scores_better_than_the_planted_model(log: ctr.Clicks) -> None:
    """Clicks come as often as it says, among rare and among frequent ones; any other logits cost more bits, no click rate is worth 1."""
    for part in (log.train, log.test):
        chance = part.logits.sigmoid()
        for some in (chance < chance.median(), chance >= chance.median()):
            error = float((chance[some] * (1 - chance[some])).mean() / some.sum()) ** 0.5
            assert abs(float(part.clicks[some].float().mean() - chance[some].mean())) < 4 * error
    known, best = ctr.RECIPE, log.test.logits

    class Says(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits, self.at = logits, 0

        def forward(self, input_ids: Tensor) -> Any:
            mine = self.logits[self.at : self.at + len(input_ids)]
            self.at += len(input_ids)
            return type("Out", (), {"logits": torch.stack([-mine, mine], 1) / 2})

    facts = known.facts(Says(best))
    score = mean(known.score(Says(best)))
    assert score == pytest.approx(facts["bits per impression of the planted model"], rel=1e-5)
    assert facts["AUC"] == pytest.approx(facts["AUC of the planted model"], abs=1e-6) and facts["AUC"] > 0.75
    noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(1))
    others = (0.7 * best, 1.5 * best, best + 0.3, best + 0.3 * noise)
    assert all(mean(known.score(Says(x))) > score for x in others)
    assert mean(known.score(Says(torch.zeros_like(best)))) == pytest.approx(1.0)
    assert score < facts["bits per impression of the click rate alone"] - 0.05


@pytest.mark.parametrize("name", ["ref-vit", "ref-diffusion", "ref-ctr"])
def test_evidence_is_taken_of_batches(name: str, tmp_path: Path, log: ctr.Clicks) -> None:
    """Every site has some, and gptq, given it, errs less on what the weights read than rtn does."""
    if name != "ref-ctr":
        pytest.importorskip("sklearn")
    known = made.get(name)
    model = weave(train(known, 5, 0))
    given = [{k: v[:16] for k, v in b.items()} for b in known.batches()[:2]]
    stats, sites = collect(model, given, tmp_path), match(model, "all-linear")
    seen = {n: stats.evidence([n])[n][-1] for n in expressions(model)}
    assert all(bool(e.gram.any()) and bool(e.weight.any()) for e in seen.values())

    def error(method: str) -> float:
        apply(other := fork(model), [Step.of(method, bits=3)], at=sites, stats=stats)
        total = 0.0
        for n in sites:
            gap = expressions(other)[n].dense() - expressions(model)[n].dense()
            total += float((((gap @ seen[n].gram) * gap).sum(1) * seen[n].weight).sum())
        return total

    assert error("gptq") < 0.9 * error("rtn")
