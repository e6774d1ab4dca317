"""Realism cards: every number against a direct computation, and what they say of models that are not realistic."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import weft
from weft.cli.app import build
from weft.error import ConflictError, OptionError
from weft.expr import Dense
from weft.lab import made, models, prove, realism, specimens, stress, subjects
from weft.lab.inputs import Inputs, Tails, kurtosis, powers
from weft.lab.made import ctr
from weft.lab.realism import Specimen
from weft.model import axes, expressions, fork, match, set_expressions, weave
from weft.stats import Walker, forward
from weft.store.cache import Cache


def batches(seed: int = 0, *, mask: bool = True) -> list[dict[str, Tensor]]:
    """Two batches of another size, padded if asked."""
    rng = torch.Generator().manual_seed(seed)
    made_: list[dict[str, Tensor]] = []
    for rows, width in ((3, 7), (2, 5)):
        batch = {"input_ids": torch.randint(3, 24, (rows, width), generator=rng)}
        if mask:
            batch["attention_mask"] = (torch.arange(width) < torch.tensor([width] + [3] * (rows - 1))[:, None]).long()
        made_.append(batch)
    return made_


@pytest.fixture
def model(tiny: Callable[..., nn.Module]) -> nn.Module:
    """A tiny woven embedding model."""
    torch.manual_seed(0)
    return weave(tiny("bert", max_position_embeddings=32))


def specimen(model: nn.Module, score: Callable[[nn.Module], Any] | None = None, **more: Any) -> Specimen:
    """With a score that is the same for every model, if none is given."""
    return Specimen("tiny", model, batches(), score or (lambda m: (np.ones(4), np.ones(4))), "bits", **more)


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (torch.tensor([-1.0, 1.0] * 50), 1.0),
        (torch.tensor([0.0] * 98 + [7.0, -7.0]), 50.0),
        (torch.linspace(-1, 1, 100_001), 1.8),
        (torch.randn(400_000, generator=torch.Generator().manual_seed(0)), 3.0),
    ],
    ids=["two points", "outliers", "uniform", "gaussian"],
)
@pytest.mark.parametrize("moved", [0.0, 5.0])
def test_kurtosis_of_known_distributions(x: Tensor, want: float, moved: float) -> None:
    """Wherever they lie, and whatever they are measured in."""
    assert kurtosis(powers(3 * x + moved)) == pytest.approx(want, rel=0.02)


def test_rank_and_outlier_of_known_grams() -> None:
    """Independent inputs have full rank, a single direction 1 / n; an outlier's ratio is its square."""
    by = torch.tensor([1.0, 1.0, 10.0, 1.0])
    for x, rank, outlier in (
        (torch.eye(4), 1.0, 1.0),
        (torch.ones(5, 4), 0.25, 1.0),
        (torch.eye(4) * by, None, 100.0),
    ):
        seen = Tails.zero(4, torch.device("cpu"))
        assert seen.add(x) and seen.outlier == pytest.approx(outlier)
        assert rank is None or seen.rank == pytest.approx(rank)


def test_inputs_are_what_sites_read(model: nn.Module) -> None:
    """Grams, tails and means of each input without its padding, against all values held at once; q, k and v share one."""
    inputs, seen = Inputs(model, batches()), dict[str, list[Tensor]]()
    for name in match(model, "all-linear"):
        module = model.get_submodule(name.removesuffix(".weight"))

        def see(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            x, keep = args[0].detach(), batch["attention_mask"].bool()
            seen.setdefault(name, []).append(x[keep] if x.shape[:-1] == keep.shape else x.flatten(0, -2))

        module.register_forward_pre_hook(see)
    for batch in batches():
        model(**batch)
    assert len(inputs.groups()) < len(seen)
    for name, parts in seen.items():
        x, tails = torch.cat(parts).double(), inputs.tails[inputs.of[name]]
        got = inputs.evidence([name])[name]
        torch.testing.assert_close(got.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.mean.double(), x.mean(0), rtol=1e-4, atol=1e-6)
        assert got.tokens == len(x) and len(got.weight) == expressions(model)[name].shape[0]
        gap = x - x.mean()
        assert kurtosis(tails.powers) == pytest.approx(float(gap.pow(4).mean() / gap.square().mean() ** 2), rel=1e-6)


@pytest.mark.parametrize("power", [1, 2])
def test_slope_and_curvature_of_known_losses(model: nn.Module, power: int) -> None:
    """Of a sum of weights all of it is slope, of a sum of squares of what the noise changed all is curvature."""
    sites = match(model, "all-linear")
    plain = {n: e.dense().double() for n, e in expressions(model).items() if n in sites}

    def score(other: nn.Module) -> Any:
        gaps = [(expressions(other)[n].dense().double() - w).pow(power).sum() for n, w in plain.items()]
        return np.array([1.0, 3.0]) * float(sum(gaps)), np.array([3.0, 1.0])

    found = realism._losses(specimen(model, score), Inputs(model, batches()), sites)
    weft.apply(other := fork(model), "rtn", at="all-linear", bits=4)
    whole = 1.5 * float(sum((expressions(other)[n].dense().double() - w).pow(power).sum() for n, w in plain.items()))
    slope, curvature = (whole, 0.0) if power == 1 else (0.0, 2 * whole)
    assert found["slope at 4 bits"].mean == pytest.approx(slope, rel=1e-3, abs=1e-3 * abs(whole))
    assert found["curvature at 4 bits"].mean == pytest.approx(curvature, rel=1e-3, abs=1e-3 * abs(whole))
    assert found["score"].mean == 0.0 and found["gptq at 3 bits"].mean != 0.0


def test_roundings_of_a_card_are_those_of_the_engine(model: nn.Module) -> None:
    """rtn as `weft.apply` gives it; gptq's output error is less, measured on the values themselves."""
    sites, inputs = match(model, "all-linear"), Inputs(model, batches())
    by = {m: realism._rounded(model, inputs, sites, m, 3) for m in ("rtn", "gptq")}
    weft.apply(other := fork(model), "rtn", at="all-linear", bits=3)
    assert all(torch.equal(v, expressions(other)[n].dense().float()) for n, v in by["rtn"].items())
    assert by["rtn"].keys() == by["gptq"].keys() == set(sites)

    def error(values: Mapping[str, Tensor]) -> float:
        gaps = {n: v - expressions(model)[n].dense() for n, v in values.items()}
        return sum(float(((e @ inputs.evidence([n])[n].gram) * e).sum()) for n, e in gaps.items())

    assert error(by["gptq"]) < error(by["rtn"])


def test_a_card_says_what_is_not_like_real_models(model: nn.Module) -> None:
    """Every check has what is asked; a loss that nothing changes is neither lowered by gptq nor curved; it is JSON."""
    held = realism.card(specimen(model))
    assert json.loads(json.dumps(held, allow_nan=False)) == held and not held["pass"] and held["walked"] is True
    failed = {k for k, c in held["checks"].items() if not c["pass"]}
    assert {"loss by gptq less that by rtn, at 3 bits", "curvature along the noise of rtn at 4 bits"} <= failed
    assert all(set(r) == {"kurtosis", "outlier", "rank", "kurtosis of weights"} for r in held["inputs"].values())


def test_a_stress_variant_never_passes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though all of its checks do."""
    for name, value in {"KURTOSIS": 0.0, "OUTLIER": 0.0, "RANK": (0.0, 1.0)}.items():
        monkeypatch.setattr(realism, name, value)
    monkeypatch.setattr(realism, "_sign", lambda seen, below: {"value": 0.0, "pass": True})
    assert realism.card(specimen(model))["pass"]
    hard = realism.card(specimen(model, stress=True))
    assert not hard["pass"] and hard["stress"] and all(c["pass"] for c in hard["checks"].values())


@pytest.mark.parametrize("name", ["ref-vit", "ref-clip", "ref-seq2seq", "ref-diffusion", "ref-ctr"])
def test_every_kind_of_made_model_has_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, pairs, an encoder with its decoder, noise, categories: each linear layer is seen; blocks that cannot be walked are named."""
    if name not in ("ref-seq2seq", "ref-ctr"):
        pytest.importorskip("sklearn")
    torch.manual_seed(0)
    monkeypatch.setattr(ctr, "LOG", 5000)
    recipe, walks = made.get(name), name != "ref-seq2seq"
    model, some = weave(recipe.model().eval()), recipe.batches()[:1]
    inputs = Inputs(model, some)
    assert {inputs.of[n] for n in match(model, "all-linear")} <= inputs.tails.keys()
    said = realism.walked(Specimen(name, model, some, recipe.score, recipe.metric))
    assert said is True if walks else "hand on 3 things" in str(said)
    if not walks:
        with pytest.raises(ConflictError, match="cannot be walked"):
            Walker(model, some)


@pytest.mark.parametrize("family", ["llama", "ref-vit", "ref-seq2seq"])
def test_stress_changes_activations_and_nothing_else(family: str, tiny: Callable[..., nn.Module]) -> None:
    """The output stays as it is to the last bits; in the chosen channels what norms give is 32 times as large."""
    torch.manual_seed(0)
    if family == "ref-vit":
        pytest.importorskip("sklearn")
    recipe = made.get(family) if family in made.NAMES else None
    hard = weave(recipe.model().eval() if recipe else tiny(family))
    given = recipe.batches()[0] if recipe else batches(mask=False)[0]
    plain = fork(hard)
    before = {n: plain.get_submodule(n).weight.clone() for n, a in axes(plain).items() if a.kind == "norm"}
    channels = stress.stress(hard)
    with torch.no_grad():
        want, got = forward(plain, given), forward(hard, given)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    moved = 0
    for name, was in before.items():
        ratio = hard.get_submodule(name).weight / was
        if not torch.equal(ratio, torch.ones_like(ratio)):
            moved += 1
            assert ratio[channels].tolist() == [stress.BY] * stress.CHANNELS
            assert float(ratio.sum()) == len(ratio) + stress.CHANNELS * (stress.BY - 1)
    assert moved >= 4


def test_stress_needs_a_norm_before_its_readers(model: nn.Module) -> None:
    """BERT's norms stand on the stream; of CLIP's family nothing is known."""
    with pytest.raises(ConflictError, match="no norm here"):
        stress.stress(model)
    with pytest.raises(ConflictError, match="nothing is known"):
        stress.stress(weave(made.get("ref-clip").model()))


def test_no_claim_is_tried_on_a_stress_variant() -> None:
    """They are made and loaded by name, have a card that says so, and the lab refuses them."""
    names = [f"{n}-stress" for n in models.STRESSED]
    assert set(names) <= set(models.names()) and not set(names) & set(subjects.TASKS)
    with pytest.raises(OptionError, match="no lab model"):
        subjects.installed(["ref-lm-stress"])
    one = Path(models.resolve("ref-lm-stress"))
    assert "For stress only" in (one / "README.md").read_text() and models.resolve("ref-lm-stress") == str(one)
    of = specimens.specimen("ref-lm-stress")
    assert of.stress and of.name == "ref-lm-stress" and of.metric == "bits per byte"


def test_cards_are_kept_beside_those_of_others(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file; a model that has not changed is not measured again; without a folder nothing is written."""
    calls: list[str] = []
    monkeypatch.setattr(prove, "card", lambda s: calls.append(s.name) or {"pass": False})
    (tmp_path / prove.REALISM).write_text('{"other": {"pass": true}}')
    store, given = Cache(tmp_path / "cache"), [specimen(model)]
    for _ in range(2):
        assert prove.realism(given, folder=tmp_path, cache=store) == {"tiny": {"pass": False}}
    assert json.loads((tmp_path / prove.REALISM).read_text()) == {"other": {"pass": True}, "tiny": {"pass": False}}
    set_expressions(model, {n: Dense(e.dense() * 2) for n, e in expressions(model).items()})
    prove.realism(given, folder=None, cache=store)
    assert calls == ["tiny"] * 2 and len(list(tmp_path.iterdir())) == 2


def test_the_command_shows_or_keeps_cards(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some models it shows them; of all it keeps them."""
    monkeypatch.setattr(specimens, "specimens", lambda names=None, progress=None: [specimen(model)])
    for extra, kept in ((["tiny"], False), ([], True)):
        argv = ["realism", "--json", "--folder", str(tmp_path), *extra]
        held = CliRunner().invoke(build(argv), argv, catch_exceptions=False)
        assert held.exit_code == 0 and list(json.loads(held.stdout)) == ["tiny"]
        assert (tmp_path / "realism.json").exists() == kept
