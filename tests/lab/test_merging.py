"""Claims of merges on a tiny model: members are tuned once and shared; verdicts of a true and a false claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from weft.engine import get
from weft.engine import names as method_names
from weft.engine.run import Step
from weft.error import ConflictError
from weft.expr import terms_of
from weft.lab import merging
from weft.lab.claims import Lab
from weft.lab.tasks import Task
from weft.lab.trial import Subject
from weft.learn.data import Example, Response
from weft.model import expressions, fingerprint, weave
from weft.store.cache import Cache

MERGES = [name for name in method_names() if get(name).kind == "merge"]
VERBS = {"sat": "ran", "ran": "flew", "flew": "sat"}


def small(name: str, seed: int, pairs: bool = False) -> Task:
    """A word to answer with: the next verb, or the colour."""
    rng = np.random.default_rng(seed)

    def some(count: int) -> list[Example]:
        asked = [
            (str(v), str(c))
            for v, c in zip(rng.choice(list(VERBS), count), rng.choice(["red", "blue"], count), strict=True)
        ]
        return [
            Response(
                f"the {c} cat {v} {'?' if name == 'verbs' else 'question'}", f" {VERBS[v] if name == 'verbs' else c}"
            )
            for v, c in asked
        ]

    train = some(40)
    rng = np.random.default_rng(99)
    return Task(name, "response", some(1), train, some(10), some(20))


@pytest.fixture
def lab(tiny: Callable[..., nn.Module], words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A tiny model with two tasks, and one with none."""
    monkeypatch.setattr(merging, "task_of", small)
    monkeypatch.setattr(merging, "TASKS", {"tiny": ("verbs", "colours")})
    monkeypatch.setattr(merging, "STEPS", 8)
    monkeypatch.setattr(merging, "RATE", 1e-2)
    subjects = [
        Subject(n, weave(tiny("llama", max_position_embeddings=256, seed=i)), words, "x", "x")
        for i, n in enumerate(("tiny", "bare"))
    ]
    return Lab(subjects, cache=Cache(tmp_path / "cache"))


def test_members_are_tuned_once(lab: Lab) -> None:
    """The same bits from the cache; other seeds and tasks give others; the lab model stays."""
    trial = lab.trials["tiny"][1]
    before = fingerprint(trial.subject.model)
    of = merging.members(trial, "tasks", None)
    assert of == [("verbs", 1), ("colours", 1)] and merging.members(trial, "seeds", None) == [
        ("verbs", s) for s in (3, 4, 5)
    ]
    made = [fingerprint(merging.member(trial, m)) for m in (*of, ("verbs", 3))]
    files = sorted((trial.store.folder / "lab-members").iterdir())
    assert made == [fingerprint(merging.member(trial, m)) for m in (*of, ("verbs", 3))]
    assert len(set(made)) == 3 == len(files) and files == sorted((trial.store.folder / "lab-members").iterdir())
    assert fingerprint(trial.subject.model) == before
    tuned = expressions(merging.member(trial, of[0]))
    changed = {n for n, e in expressions(trial.subject.model).items() if not torch.equal(e.dense(), tuned[n].dense())}
    assert len(changed) == 14 and not any("embed" in n or "lm_head" in n for n in changed)


def test_a_claim_has_every_number(lab: Lab) -> None:
    """Only the model with tasks is tried. The mean member's gain is the mean, and the soup's is the merged model's, by task alike."""
    made = lab.merge(ours=("soup", {}), baseline="mean", members="tasks")
    assert made.models == ["tiny"] and made.rule == "ours >= baseline and ours > floor" and made.seeds == 3
    assert made.arms == {
        "ours": "soup() of members with other tasks",
        "baseline": "the mean member",
        "floor": "untuned",
    }
    assert made.methods == {"soup": get("soup").fingerprint()}
    found, trial = made.findings[0], lab.trials["tiny"][0]
    assert found.floor == 0 and found.units == 40 and found.metric == "gain in bits per byte of answers"
    of = merging.members(trial, "tasks", None)
    alone = [merging.gained(Step.of("soup"), trial, of[i : i + 1]) for i in range(2)]
    arm = merging.mean(trial, of)
    assert arm.weights[:20].sum() == pytest.approx(1) == arm.weights[20:].sum()
    for i, one in enumerate(alone):  # a soup of one is that one, on its own task
        np.testing.assert_allclose(merging._alone(trial, of[i], of).values[20 * i : 20 * i + 20], one.values, atol=1e-6)


def test_verdicts(lab: Lab) -> None:
    """A merge against itself gains half of what it gains, and not twice; one that adds nothing is not above the floor."""
    arm = ("task_arithmetic", {"scale": 0.5})
    assert lab.merge(ours=arm, baseline=arm, members="tasks", share=0.5).verdict == "reproduced"
    assert lab.merge(ours=arm, baseline=arm, members="tasks", share=2.0).verdict == "contradicted"
    none = lab.merge(ours=("task_arithmetic", {"scale": 0.0}), baseline=arm, members="tasks")
    assert none.verdict == "contradicted" and none.findings[0].ours == pytest.approx(0, abs=1e-6)


def test_the_best_member_is_chosen_by_other_examples(lab: Lab) -> None:
    """Its gain is that of one of the members."""
    trial = lab.trials["tiny"][0]
    of = merging.members(trial, "seeds", None)
    arms = [merging._alone(trial, m, of).values for m in of]
    assert any(np.array_equal(merging.best(trial, of).values, a) for a in arms)


def test_too_few_tasks_are_refused(lab: Lab) -> None:
    with pytest.raises(ConflictError, match="no lab model is left"):
        lab.merge(ours=("soup", {}), baseline="mean", members="tasks", count=3)
    with pytest.raises(ConflictError, match="no lab model is left"):
        lab.only("bare").merge(ours=("soup", {}), baseline="mean", members="seeds")


def test_every_claim_of_a_merge_has_a_verdict(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with data, searches, adapters, rates, mixtures and views among them: numbers for every arm, and the merge's fingerprint."""
    pytest.importorskip("cma")
    monkeypatch.setattr(merging, "TASKS", {"tiny": ("verbs", "colours", "again")})
    monkeypatch.setattr(merging, "VIEWS", {"tiny": ("verbs", "colours")})
    monkeypatch.setattr(merging, "TRIALS", {"cma": 4})
    for name in MERGES:
        for of, proof in get(name).proofs.items():
            made = proof.tried(lab)
            assert name in made.methods and made.models == ["tiny"] and made.seeds == 3, of
            found = made.findings[0]
            assert all(np.isfinite([found.ours, found.baseline, found.floor])), of


def test_a_member_depends_on_its_data_its_rate_and_what_tunes_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture has every task's examples in turn; an adapter stays one, on the model's own base."""
    trial = lab.trials["tiny"][0]
    monkeypatch.setattr(merging, "TASKS", {"tiny": ("verbs", "colours", "again")})
    mixed = merging.members(trial, "mixtures", None)
    assert [m[0] for m in mixed] == ["verbs+colours", "verbs+again", "colours+again"]
    train = merging.short_task(trial, "verbs+colours").train
    assert train[:4] == [e for i in range(2) for e in (small("verbs", 0).train[i], small("colours", 0).train[i])]
    assert merging._names([("verbs+colours", 0), ("verbs+again", 0)]) == ["verbs", "colours", "again"]
    rates = [fingerprint(merging.member(trial, m)) for m in merging.members(trial, "rates", 2)]
    assert len({*rates, fingerprint(merging.member(trial, mixed[0]))}) == 3
    assert rates[0] == fingerprint(merging.member(trial, ("verbs", 0)))
    adapted = merging.member(trial, ("verbs", 0), (Step.of("lora", rank=2),))
    for n, e in expressions(adapted).items():
        if "proj" in n:
            assert torch.equal(terms_of(e)["base"].dense(), expressions(trial.subject.model)[n].dense())
            assert bool(terms_of(e)["adapter:default"].dense().any())


def test_noisy_prompts_ask_the_same(lab: Lab) -> None:
    """Stray characters and nothing else, the same for another seed in what is tested; members tuned on them, or smoothly, are others."""
    trial = lab.trials["tiny"][0]
    plain, noisy = (merging.short_task(trial, name) for name in ("verbs", "verbs~"))
    assert noisy.test == merging.short_task(lab.trials["tiny"][1], "verbs~").test != plain.test
    for asked, disturbed in ((plain.train, noisy.train), (plain.test, noisy.test)):
        pairs = [
            (a, b) for a, b in zip(asked, disturbed, strict=True) if isinstance(a, Response) and isinstance(b, Response)
        ]
        assert len(pairs) == len(asked) and all(a.response == b.response for a, b in pairs)
        assert [a.prompt for a, _ in pairs] == ["".join(c for c in b.prompt if c not in "~^|`") for _, b in pairs]
        added, size = sum(len(b.prompt) - len(a.prompt) for a, b in pairs), sum(len(a.prompt) for a, _ in pairs)
        assert added / size == pytest.approx(merging.NOISE, abs=0.06)
    members = [merging.member(trial, ("verbs", 0)), merging.member(trial, ("verbs~", 0))]
    members.append(merging.member(trial, ("verbs", 0), smoothing=0.3))
    assert len({fingerprint(m) for m in members}) == 3
