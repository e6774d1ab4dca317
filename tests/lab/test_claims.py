"""Claims on a tiny model: verdicts of a true, a false and an empty claim; proofs that are written and go stale."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

import weft
from weft.engine import get, names
from weft.engine.run import Step, apply
from weft.error import ConflictError, NumericError, OptionError, WeftError
from weft.expr import Quantized
from weft.lab import (
    claims,
    known,
    merging,
    multitask,
    probing,
    prove,
    realism,
    recalling,
    restoring,
    rewording,
    specimens,
    subjects,
    trial,
    tuning,
    verdicts,
)
from weft.lab.bootstrap import Interval
from weft.lab.claims import Lab
from weft.lab.tasks import Task
from weft.lab.trial import Subject, task_of
from weft.learn.data import Example, Pair, Response, Text
from weft.model import branches, expressions, fork, tagged, weave
from weft.store.cache import Cache

NOUNS = ["cat", "dog", "bird", "mat", "hill", "tree"]


def sentences(count: int, seed: int) -> list[str]:
    """Word salad with some grammar."""
    rng = np.random.default_rng(seed)
    made: list[str] = []
    for _ in range(count):
        a, b, c = rng.choice(NOUNS, 3)
        verb, where = rng.choice(["sat", "ran", "flew"]), rng.choice(["on", "under", "over"])
        made.append(f"the old {a} {verb} {where} the {b} , a red {c} {verb} {where} a blue {a} .")
    return made


def small(name: str, seed: int, pairs: bool = False) -> Task:
    """A task of a few sentences, with pairs for `pairs`."""
    parts = [sentences(n, 10 * i + (seed if i < 2 else 0)) for i, n in enumerate((40, 60, 10, 30))]
    if name == "pairs":
        twos: list[list[Example]] = [[Pair(s, f"yes {s}") for s in part] for part in parts]
        return Task(name, "retrieval", *twos)
    texts: list[list[Example]] = [[Text(s) for s in part] for part in parts]
    return Task(name, "lm", *texts)


@pytest.fixture(scope="module", autouse=True)
def _small_tasks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (trial, tuning, specimens):
            patch.setattr(module, "task_of", small)
        patch.setattr(tuning, "STEPS", 4)
        patch.setattr(tuning, "RATES", (3e-2,))
        yield


@pytest.fixture(scope="module")
def subject(tiny: Callable[..., nn.Module], words: Any) -> Subject:
    """A tiny language model."""
    model = weave(tiny("llama", max_position_embeddings=256))
    return Subject("tiny", model, words, "words", "words", calibration=128, units=40, length=16)


@pytest.fixture(scope="module")
def embedder(tiny: Callable[..., nn.Module], words: Any) -> Subject:
    """A tiny embedding model."""
    model = weave(tiny("bert", max_position_embeddings=256))
    return Subject("tiny-embed", model, words, "pairs", "pairs", calibration=256, units=24, length=32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """What one test has worked out the others need not."""
    return Cache(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def lab(subject: Subject, embedder: Subject, store: Cache) -> Lab:
    """Both models."""
    return Lab([embedder, subject], cache=store)


FINE_STEP = [Step.of("rtn", bits=4, group=0)]
FINE, COARSE = [("rtn", {"bits": 8, "group": 0})], [("rtn", {"bits": 2, "group": 0})]


def test_a_true_claim_is_reproduced(lab: Lab) -> None:
    """Eight bits lose less than two, on every model, with every number there."""
    made = lab.compare(ours=FINE, baseline=COARSE)
    assert made.verdict == "reproduced" and made.models == ["tiny-embed", "tiny"] and made.seeds == 3
    for f in made.findings:
        assert f.verdict == "reproduced" and 0 < f.ours < f.baseline and f.difference.high < 0
        assert f.difference.mean == pytest.approx(f.ours - f.baseline)
    assert made.arms == {"ours": "rtn(bits=8, group=0)", "baseline": "rtn(bits=2, group=0)"}
    assert made.methods == {"rtn": get("rtn").fingerprint()}
    assert [f.units for f in made.findings] == [24, 10]


def test_a_false_claim_is_contradicted(lab: Lab) -> None:
    """And the other way round, also by a factor and by a floor that is not beaten."""
    assert lab.compare(ours=COARSE, baseline=FINE).verdict == "contradicted"
    assert lab.compare(ours=FINE, baseline=COARSE, factor=1e-9).verdict == "contradicted"
    beaten = lab.compare(ours=FINE, baseline=COARSE, floor=[("rtn", {"bits": 7, "group": 0})])
    assert beaten.verdict == "reproduced"
    floored = lab.compare(ours=[("rtn", {"bits": 4})], baseline=COARSE, floor=FINE)
    assert floored.verdict == "contradicted" and all(f.difference.high < 0 for f in floored.findings)


def test_an_empty_claim_shows_no_difference(lab: Lab) -> None:
    """A method against itself."""
    made = lab.compare(ours=COARSE, baseline=COARSE)
    assert made.verdict == "no detectable difference" and made.findings[0].difference.mean == 0


def test_results_are_shared_and_resumed(subject: Subject, embedder: Subject, tmp_path: Path) -> None:
    """A lab begun anew on the same cache computes nothing again and says the same."""
    lab = Lab([embedder, subject], cache=Cache(tmp_path / "cache"))
    first = lab.compare(ours=FINE, baseline=COARSE)
    store = lab.trials["tiny"][0].store
    files = sorted((store.folder / "lab").iterdir())
    again = Lab([embedder, subject], cache=store).compare(ours=FINE, baseline=COARSE)
    assert again == first and sorted((store.folder / "lab").iterdir()) == files and len(files) == 12


def test_seeds_have_other_texts(lab: Lab) -> None:
    """To calibrate and to measure on."""
    for trials in lab.trials.values():
        assert len({t.data for t in trials}) == 3
        held = [{tuple(r) for b in t.held_out for r in b["input_ids"].tolist()} for t in trials]
        assert held[0] != held[1] != held[2]


def test_what_no_output_depends_on_is_left_alone(lab: Lab) -> None:
    """BERT's pooler is no site of a claim."""
    sites = lab.trials["tiny-embed"][0].sites
    assert len(sites) == 12 and not any("pooler" in s for s in sites)


def test_searches_are_compared_at_the_same_bytes(lab: Lab) -> None:
    """The knapsack loses no more than the uniform choice; a quarter of the bytes loses more than a half."""
    made = lab.allocate(ours="knapsack", baseline="uniform", share=0.5)
    assert set(made.methods) == {"knapsack", "uniform", "rtn"} and made.verdict != "contradicted"
    assert lab.allocate(ours="uniform", baseline="uniform", share=0.25, baseline_share=0.5).verdict == "contradicted"


@pytest.mark.parametrize("name", ["sensitivity", "higgs", "evolutionary"])
def test_searches_that_measure_are_given_a_bench(lab: Lab, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lose less with half of the bytes than the best uniform width with a quarter."""
    short = get(name).bind({"generations": 2, "offspring": 2} if name == "evolutionary" else {})
    monkeypatch.setattr(get(name), "bind", lambda given: short)
    made = lab.only("tiny").allocate(ours=name, baseline="uniform", share=0.5, baseline_share=0.25)
    assert made.verdict == "reproduced" and set(made.methods) == {name, "uniform", "rtn"}


def test_searches_choose_among_sparsities_too(lab: Lab) -> None:
    """Within a share of the model's own bytes."""
    made = lab.only("tiny").allocate(ours="owl", baseline="uniform", share=0.7, baseline_share=0.3, among="sparsities")
    assert made.verdict == "reproduced" and set(made.methods) == {"owl", "uniform", "wanda"}


@pytest.mark.parametrize("of", ["tiny", "tiny-embed"])
def test_a_part_of_a_distance_is_some_of_its_sequences(lab: Lab, of: str) -> None:
    """Each with the distance it has in the whole; another draw is another part, the same draw the same, a share of one all."""
    held = lab.trials[of][0]
    other, whole = fork(held.subject.model), held.distance
    apply(other, FINE_STEP, stats=held.stats)
    all_, weight = whole.documents(other)
    parts = [whole.part(0.4, draw).documents(other) for draw in (1, 1, 2)]
    assert len(parts[0][0]) == round(0.4 * len(all_)) and np.array_equal(parts[0][0], parts[1][0])
    assert not np.array_equal(parts[0][0], parts[2][0]) and whole.part(1.0, 3) is whole
    near = np.abs(parts[0][0][:, None] - all_).argmin(1)
    assert len(set(near)) == len(near) and np.allclose(parts[0][0], all_[near], rtol=1e-3, atol=1e-7)
    assert np.array_equal(parts[0][1], weight[near]) and len(whole.part(1e-9, 0).documents(other)[0]) == 1


def lora(rank: int) -> list[tuple[str, dict[str, int]]]:
    """An arm of one adapter."""
    return [("lora", {"rank": rank})]


def test_tuned_arms_gain(lab: Lab) -> None:
    """The same rank gains half of what it gains, and not twice as much; gains are above nothing."""
    lm = lab.only("tiny")
    made = lm.tune(ours=lora(2), baseline=lora(2), share=0.5)
    found = made.findings[0]
    assert made.verdict == "reproduced" and found.ours == found.baseline > 0 and found.floor == 0
    assert found.metric == "gain in bits per byte" and made.arms["floor"] == "untuned"
    assert lm.tune(ours=lora(2), baseline=lora(2), share=2.0).verdict == "contradicted"
    assert lab.only("tiny-embed").tune(ours=lora(2), baseline=lora(1), share=1.0).findings[0].units == 30


def test_tuned_arms_are_chains(lab: Lab) -> None:
    """Rewrites and branches one after another; of a model of embeddings too."""
    chain: Any = [("rtn", {"bits": 8, "group": 0}), ("prompt", {"length": 2}), ("lora", {"rank": 1})]
    made = lab.tune(ours=chain, baseline=[("prompt", {"length": 1})], share=1.0)
    assert made.arms["ours"].startswith("rtn(bits=8, group=0) then prompt(length=2) then lora(")
    assert set(made.methods) == {"rtn", "prompt", "lora"} and all(f.ours != f.baseline for f in made.findings)


def test_a_branch_begins_as_text_of_the_tuning_task(lab: Lab) -> None:
    """What needs texts is given those that are trained on, in their order; of pairs the query first."""
    for trials in lab.trials.values():
        model = tuning.tuned(trials[0], claims._chain([("cpt", {"length": 4})]), 1e-3, 1)
        (branch,), words = branches(model), trials[0].subject.tokenizer
        first = trial.texts(tuning._task(trials[0]).train)[0]
        ids = words(first, add_special_tokens=False)["input_ids"][:3]
        table = cast(Any, trials[0].subject.model).get_input_embeddings()
        with torch.no_grad():
            torch.testing.assert_close(branch.start[:3], table(torch.tensor(ids)).float())


def test_arms_are_chains_of_any_methods(lab: Lab, subject: Subject) -> None:
    """Each goes where it goes by default, with evidence where it needs some; all methods that took part are named."""
    chain = [("gptq", {"bits": 8}), *lora(2)]
    made = lab.only("tiny").tune(ours=chain, baseline=[("layernorm", {})], share=0.0)
    assert made.arms["ours"] == "gptq(bits=8) then lora(rank=2)" and set(made.methods) == {"gptq", "lora", "layernorm"}
    trial = lab.trials["tiny"][0]
    model = tuning.tuned(trial, claims._chain(chain), 1e-3, 1)
    kinds = {n: e.describe() for n, e in expressions(model).items()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "int8[g64] + adapter:default: LowRank(2)"
    assert "lm_head.weight" not in {n for n, d in kinds.items() if "LowRank" in d}
    model = tuning.tuned(trial, claims._chain([("layernorm", {})]), 1e-2, 3)
    before = dict(subject.model.named_parameters())
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(tagged(model, ("norm",)))
    assert not any(p.requires_grad for p in [*before.values(), *model.parameters()])


def test_the_best_rate_is_chosen_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the select set, by the first seed; a rate that diverges is not it."""
    monkeypatch.setattr(tuning, "RATES", (1e-6, 3e-2, 1e30))
    trials, chain = lab.trials["tiny"], claims._chain(lora(2))
    scores = [tuning.selected(trials[0], chain, r) for r in tuning.RATES]
    assert scores[1] < scores[0] and not scores[2] < scores[1]
    assert [tuning.rate(t, chain) for t in trials] == [3e-2] * 3


def test_the_model_of_the_best_rate_is_not_trained_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "RATES", (1e-6, 2e-2, 1e-5))
    trials, chain, best = lab.trials["tiny"], claims._chain(lora(3)), dict[int, nn.Module]()
    lr = tuning.rate(trials[1], chain, best)
    again = tuning.tuned(trials[0], chain, lr)
    assert list(best) == [0]
    assert all(torch.equal(p, dict(best[0].named_parameters())[n]) for n, p in again.named_parameters())
    gains = [tuning.gained(t, chain) for t in trials]
    want = tuning.untuned(trials[0]).values - tuning._score(trials[0], again, tuning._task(trials[0]).test)[0]
    assert np.array_equal(gains[0].values, want)


@pytest.mark.parametrize("scores", [(9, 4, 2, 1, 3), (1, 2, 3, 4, 5), (5, 4, 3, 4, 5), (np.inf, 3, np.inf, np.inf, 9)])
def test_the_best_rate_is_looked_for_downhill(scores: tuple[float, ...]) -> None:
    asked: list[float] = []
    assert tuning.lowest(range(5), lambda i: asked.append(i) or scores[int(i)]) == np.argmin(scores)
    assert len(asked) == len(set(asked))


def test_a_compressed_model_is_restored(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned towards the original it is nearer than as it was; what trains through rounding ends packed; no rate that diverges is taken."""
    for name, value in (
        ("task_of", small),
        ("STEPS", 6),
        ("RATES", (1e-6, 1e-2, 1e30)),
        ("TOKENS", 16),
        ("CHOICE", 64),
    ):
        monkeypatch.setattr(restoring, name, value)
    made = lab.restore(ours=[*COARSE, *lora(2), ("distill", {})], baseline=COARSE)
    assert made.verdict == "reproduced" and made.arms["ours"].endswith("then distill()")
    assert set(made.methods) == {"rtn", "lora", "distill"}
    chain = claims._chain([("lsq", {"bits": 2, "group": 0}), ("distill", {})])
    for t, finding in zip([t[0] for t in lab.trials.values()], made.findings, strict=True):
        alone = lab.trials[t.subject.name][0].rewritten(tuple(claims._chain(COARSE)))
        assert (
            np.array_equal(restoring.restored(t, chain=claims._chain(COARSE)).values, alone.values) and finding.ours > 0
        )
        assert restoring._rate(t, chain) < 1
        model = restoring._tuned(t, chain, 1e-2)
        found = [e for n, e in expressions(model).items() if n in t.sites]
        assert all(isinstance(e, Quantized) and e.grid == "int2" for e in found)


def reworded(name: str, seed: int, pairs: bool = False) -> Task:
    """A task with wordings: a noun after its own, in words that each set has alone."""
    said = {"train": "please {}", "select": "now {}", "test": "the {} ?", "calibration": "{}"}
    words = {k: [Response(f.format(n), "cat sat", reference=n) for n in NOUNS] for k, f in said.items()}
    return Task(name, "response", *(list[Example](words[k]) for k in ("calibration", "train", "select", "test")))


def test_wordings_are_adapted_to_what_was_learnt(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model learns the references and nothing else; the arms train on other words, towards it, and are tested on yet others."""
    for name, value in (("LEARNT", 12), ("STEPS", 4), ("RATES", (1e-2,)), ("BATCH", 4), ("RATE", 1e-2)):
        monkeypatch.setattr(rewording, name, value)
    monkeypatch.setattr(merging, "task_of", reworded)
    monkeypatch.setattr(multitask, "MODEL", "tiny")
    made = lab.reword(ours=[*lora(2), ("align", {})], baseline=lora(2))
    (finding,) = made.findings
    assert (
        set(made.methods) == {"lora", "align"}
        and made.arms["floor"] == "no adapter"
        and finding.ours != finding.baseline
    )
    t = lab.trials["tiny"][0]
    learnt, fresh = rewording._learnt(t), t.subject.model
    held = [Response(n, "cat sat") for n in NOUNS]
    (after, _), (before, _) = (merging.score(t, m, held) for m in (learnt, fresh))
    assert after.mean() < 0.5 * before.mean() and not any(p.requires_grad for p in learnt.parameters())


def test_probed_arms_gain_alike(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The better one takes the steps next to the other's gain, on the side that does not help the claim."""
    monkeypatch.setattr(probing, "LADDER", (1, 2, 4))
    trial = lab.only("tiny").trials["tiny"][0]
    some, few = claims._chain(lora(4)), claims._chain([("layernorm", {})])
    score = {c: [probing._score(trial, c, s) for s in probing.LADDER] for c in (some, few)}
    better, worse = (some, few) if score[some][-1] < score[few][-1] else (few, some)
    goal = score[worse][-1]
    low, high = (probing.steps_of(trial, better, worse, below) for below in (True, False))
    assert {probing.steps_of(trial, worse, better, below) for below in (True, False)} == {4}
    assert low <= high and probing._score(trial, better, high) <= goal
    assert low == 1 or probing._score(trial, better, low) >= goal
    made = lab.only("tiny").probe(
        ours=lora(4), baseline=[("full", {})], probe=("intruder_dimensions", {"k": 4}), number="change"
    )
    assert made.findings[0].units == 14 and made.arms["probe"] == "change, by intruder_dimensions(k=4)"
    assert set(made.methods) == {"lora", "full", "intruder_dimensions"} and made.findings[0].ours > 0


def test_half_way_a_probe_chooses_what_is_trimmed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model that writes text: bits a byte of both arms, which differ, and all methods' fingerprints."""
    monkeypatch.setattr(probing, "task_of", small)
    made = lab.halfway(probe=("path_sharpness", {"points": 2}), number="most")
    (found,) = made.findings
    assert made.models == ["tiny"] and found.floor is None and 0 < found.ours != found.baseline > 0
    assert set(made.methods) == {"path_sharpness", "full", "task_arithmetic", "ties"}


def test_recall_counts_tokens_behind_the_window(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both arms read segments; a branch is given whole texts, and as it begins gains nothing."""
    for name, value in {
        "SEGMENT": 4,
        "SEGMENTS": 3,
        "STEPS": 2,
        "BATCH": 2,
        "CHOICE": 4,
        "TESTED": 6,
        "RATES": (1e-2,),
    }.items():
        monkeypatch.setattr(recalling, name, value)
    monkeypatch.setattr(recalling, "task_of", small)
    t = lab.only("tiny").trials["tiny"][0]
    rows = recalling._rows(t, "test", 6)
    assert rows.shape == (6, 12)
    values, size = recalling._behind(t, t.subject.model, rows)
    logits = t.subject.model(input_ids=rows.view(-1, 4)).logits.detach().reshape(6, 12, -1).log_softmax(-1)
    nats = [-sum(float(logits[k, i - 1, rows[k, i]]) for i in range(5, 12)) for k in range(6)]
    np.testing.assert_allclose(values * size, np.array(nats) / np.log(2), rtol=1e-5)
    model = fork(t.subject.model)
    weft.apply(model, "generative", window=4)
    np.testing.assert_allclose(recalling._behind(t, model, rows)[0], values, rtol=1e-5)
    made = lab.recall(ours=[("generative", {"window": 4})], baseline=lora(2))
    (found,) = made.findings
    assert found.units == 6 and found.floor == 0 and np.isfinite([found.ours, found.baseline]).all()
    assert made.arms["ours"] == "generative(window=4)" and set(made.methods) == {"generative", "lora"}


def test_answers_are_pairs_to_a_model_of_embeddings() -> None:
    """Prompts with their responses, the same ones in the same order; other tasks stay as they are."""
    told, asked = task_of("dates", 0, pairs=True), task_of("dates", 0)
    assert [(p.query, p.positive) for p in told.test if isinstance(p, Pair)] == [
        (r.prompt, r.response) for r in asked.test if isinstance(r, Response)
    ]
    assert len(told.test) == len(asked.test) == 400 and told.kind == "retrieval"


@pytest.mark.parametrize(
    ("spans", "side", "verdict"),
    [
        ([(-2, -1)], "less", "reproduced"),
        ([(1, 2)], "less", "contradicted"),
        ([(-1, 1)], "less", "no detectable difference"),
        ([(-2, 0)], "less", "no detectable difference"),
        ([(1, 2)], "more", "reproduced"),
        ([(-2, -1)], "more", "contradicted"),
        ([(-2, -1), (-1, 1)], "less", "no detectable difference"),
        ([(-2, -1), (1, 2)], "less", "contradicted"),
    ],
)
def test_verdicts(spans: list[tuple[float, float]], side: Any, verdict: str) -> None:
    """Intervals entirely on one side of zero decide, others do not."""
    assert verdicts._verdict([Interval((a + b) / 2, a, b) for a, b in spans], side) == verdict


def test_the_overall_verdict_needs_every_model() -> None:
    """One contradiction is enough, one doubt too."""
    good, bad, doubt = "reproduced", "contradicted", "no detectable difference"
    assert verdicts.overall([good, good]) == good and verdicts.overall([good, doubt]) == doubt
    assert verdicts.overall([doubt, bad, good]) == bad


def test_a_score_that_is_not_finite_stops(lab: Lab) -> None:
    """With the model's name."""
    with pytest.raises(NumericError, match="tiny, seed 0"):
        lab.trials["tiny"][0].arm("x", [], lambda: (np.array([np.nan]), np.ones(1)), ("", ""))


def test_prove_writes_and_proofs_go_stale(
    subject: Subject, store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file each with everything in it, the same when written again; a method that changes needs a new one."""
    monkeypatch.setattr(prove, "today", lambda: "2026-01-02")
    folder = tmp_path / "proofs"
    (made,) = prove.prove(["rtn"], folder=folder, cache=store, subjects=[subject]).values()
    held = json.loads((folder / "rtn.json").read_text())
    assert held["verdict"] == made.verdict and held["claim"] == get("rtn").proofs["rtn"].claim
    assert [m["model"] for m in held["models"]] == ["tiny"] and held["seeds"] == 3
    assert {"mean", "low", "high", "detectable"} == set(held["models"][0]["difference"])
    before = (folder / "rtn.json").read_bytes()
    prove.prove(["rtn"], folder=folder, cache=store, subjects=[subject])
    assert (folder / "rtn.json").read_bytes() == before
    assert list(prove.stale(folder)) == [claim for n in names() for claim in get(n).proofs if n != "rtn"]
    monkeypatch.setattr(type(get("rtn")), "fingerprint", lambda self: "changed")
    assert "rtn" in prove.stale(folder)


def test_rates_are_those_of_the_proofs(
    subject: Subject, store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof says its arms' rates; tried again elsewhere they are not looked for, unless that is asked, or a method changed."""
    given: Any = {"folder": tmp_path / "proofs", "subjects": [subject]}
    asked: list[float] = []
    lowest = tuning.lowest
    monkeypatch.setattr(tuning, "lowest", lambda among, score: asked.append(1) or lowest(among, score))
    prove.prove(["lora.rslora"], cache=store, **given)
    before = json.loads((tmp_path / "proofs" / "lora.rslora.json").read_text())
    (rates,) = [m["rates"] for m in before["models"]]
    assert len(asked) == len(rates) == 2 and set(rates.values()) <= set(tuning.RATES)
    (again,) = prove.prove(["lora.rslora"], cache=Cache(tmp_path / "fresh"), **given).values()
    assert len(asked) == 2 and again.findings[0].rates == rates
    assert [again.findings[0].ours, again.findings[0].baseline] == [
        before["models"][0][k] for k in ("ours", "baseline")
    ]
    for m in before["models"]:
        m["rates"] = dict.fromkeys(m["rates"], 1e-6)
    (tmp_path / "proofs" / "lora.rslora.json").write_text(json.dumps(before))
    (other,) = prove.prove(["lora.rslora"], cache=Cache(tmp_path / "fresh"), **given).values()
    assert len(asked) == 2 and other.findings[0].ours != again.findings[0].ours
    (found,) = prove.prove(["lora.rslora"], cache=Cache(tmp_path / "other"), search=True, **given).values()
    assert len(asked) == 4 and found.findings[0].rates == rates
    monkeypatch.setattr(type(get("lora")), "fingerprint", lambda self: "changed")
    prove.prove(["lora.rslora"], cache=Cache(tmp_path / "other"), **given)
    assert len(asked) == 6


def test_a_first_look_writes_nothing(
    subject: Subject, store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some of the lab's models, as what comes out is no proof; a claim about another model is refused."""
    monkeypatch.setattr(prove, "installed", lambda names: [subject] if names == ["tiny"] else [])
    given: Any = {"folder": tmp_path / "proofs", "cache": store, "models": ["tiny"]}
    (made,) = prove.prove(["rtn"], **given).values()
    assert made.models == ["tiny"] and not (tmp_path / "proofs").exists()
    with pytest.raises(ConflictError, match="no lab model is left"):
        prove.prove(["awq"], **given)


def test_a_proof_goes_stale_with_its_baseline(subject: Subject, store: Cache, tmp_path: Path) -> None:
    """Every method that took part counts."""
    folder = tmp_path / "proofs"
    prove.prove(["nf4"], folder=folder, cache=store, subjects=[subject])
    assert "nf4" not in prove.stale(folder)
    held = json.loads((folder / "nf4.json").read_text())
    held["methods"]["rtn"] = "0"
    (folder / "nf4.json").write_text(json.dumps(held))
    assert prove.stale(folder)["nf4"] == "changed: rtn" and prove.stale(folder)["rtn"] == "no proof"


def test_methods_without_a_claim_and_too_few_seeds_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything runs."""
    with pytest.raises(OptionError, match="too few seeds"):
        prove.prove(["rtn"], folder=tmp_path, seeds=2, subjects=[])
    monkeypatch.setattr(get("rtn"), "proofs", {})
    with pytest.raises(OptionError, match="has a claim"):
        prove.prove(["gptq", "rtn"], folder=tmp_path, subjects=[])
    with pytest.raises(OptionError, match="has a claim"):
        prove.stale(tmp_path)


def test_known_answers_are_written_and_guard(
    subject: Subject, embedder: Subject, store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes out the other way on a model leaves the model out of that verb's claims, and the proof says so."""
    true = known.Known("quantize", "8 bits beat 2", lambda lab: lab.compare(ours=FINE, baseline=COARSE))
    false = known.Known("prune", "2 bits beat 8", lambda lab: lab.compare(ours=COARSE, baseline=FINE))
    monkeypatch.setattr(known, "KNOWN", {"true": true, "false": false})
    folder = tmp_path / "proofs"
    made = prove.answer(folder=folder, cache=store, subjects=[embedder, subject])
    held = json.loads((folder / prove.KNOWN_ANSWERS).read_text())
    assert [c.verdict for c in made.values()] == ["reproduced", "contradicted"] == [c["verdict"] for c in held.values()]
    assert known.failed(held, "quantize") == {} and known.failed(held, "prune") == {
        "tiny-embed": ["false"],
        "tiny": ["false"],
    }
    held["false"]["models"][1]["verdict"] = "reproduced"
    (folder / prove.KNOWN_ANSWERS).write_text(json.dumps(held))
    (claim,) = prove.prove(["magnitude"], folder=folder, cache=store, subjects=[embedder, subject]).values()
    proof = json.loads((folder / "magnitude.json").read_text())
    assert claim.models == ["tiny"] and proof["left_out"] == {"tiny-embed": ["false"]}
    (claim,) = prove.prove(["rtn"], folder=folder, cache=store, subjects=[embedder, subject]).values()
    assert claim.models == ["tiny-embed", "tiny"] and "left_out" not in json.loads((folder / "rtn.json").read_text())
    with pytest.raises(ConflictError, match="no lab model is left"):
        prove.prove(["magnitude"], folder=folder, cache=store, subjects=[embedder])


def test_claims_are_shared_among_processes() -> None:
    """Each is tried once, in another process than this one; a failure ends them all."""
    paths = ["a/b", "c/d"]
    assert dict(prove._each("x", paths, pytest.fail, os.path.basename, 2, None)) == {"a/b": "b", "c/d": "d"}
    assert dict(prove._each("x", paths, os.path.dirname, None, 2, None)) == {"a/b": "a", "c/d": "c"}
    with pytest.raises(FileNotFoundError):
        dict(prove._each("x", ["/no/such", "/nor/this"], pytest.fail, os.stat, 2, None))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_claim_that_cannot_be_tried_stops_no_other(jobs: int) -> None:
    step, seen = cast(Any, Step.of), dict[str, str]()
    made = prove._each("x", ["rtn", "no_method", "gptq"], step, step if jobs == 2 else None, jobs, None)
    with pytest.raises(WeftError, match="no_method"):
        for name, found in made:
            seen[name] = cast(Any, found).method
    assert seen == {"rtn": "rtn", "gptq": "gptq"}


def test_claims_can_be_about_some_sites(lab: Lab) -> None:
    """Only what matches is rewritten; another choice is another arm."""
    every, downs = (lab.compare(ours=FINE, baseline=COARSE, at=at).findings for at in (("*",), known.DOWN))
    assert all(0 < d.baseline < e.baseline for d, e in zip(downs, every, strict=True))


def test_blocks_go_before_weights_are_rounded(lab: Lab) -> None:
    """One of two, and the other by evidence of what is left; each does its part."""
    half = ("depth", {"share": 0.5})
    made = lab.compare(
        ours=[half, ("gptq", {"bits": 8, "group": 0})], baseline=[half, ("gptq", {"bits": 2, "group": 0})]
    )
    alone = lab.compare(ours=FINE, baseline=[half])
    assert made.models == ["tiny-embed", "tiny"] and {"depth", "gptq"} == set(made.methods)
    for f, g in zip(made.findings, alone.findings, strict=True):
        assert g.ours < f.ours < f.baseline and f.ours == pytest.approx(g.baseline, rel=0.05)


def test_a_dozen_answers_are_known() -> None:
    """Each guards a verb that has methods, or decoding."""
    assert len(known.KNOWN) >= 12 and {k.verb for k in known.KNOWN.values()} <= {
        "decode",
        *(get(n).verb for n in names()),
    }


def test_random_models_are_not_realistic(lab: Lab) -> None:
    """Gaussian activations: the cards of both say so."""
    for trials in lab.trials.values():
        made = realism.card(specimens.of(trials[0]))
        assert not made["pass"] and not made["checks"]["largest over median feature second moment, any input"]["pass"]


def test_lab_models_are_there() -> None:
    """ref-lm always; minilm leads where it is installed. Others are refused by name."""
    assert [s.name for s in subjects.installed(["ref-lm"])] == ["ref-lm"]
    with pytest.raises(OptionError, match="no lab model"):
        subjects.installed(["ref-lm", "gpt"])
    assert [s.name for s in subjects.installed()][-1] == "ref-lm"


def test_claims_of_one_method_do_not_start_together() -> None:
    """What they share is made once: others wait for the longest one; what is new comes first."""
    took = {"soup": 5.0, "soup.greedy": 9.0, "rtn": 7.0, "dare.darex": 1.0}
    names = ["rtn", "soup", "soup.greedy", "dare", "dare.darex"]
    assert prove._longest_first(names, took) == ["dare", "soup.greedy", "rtn", "soup", "dare.darex"]
