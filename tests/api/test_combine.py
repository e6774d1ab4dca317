"""Merged models in folders and on the command line: saved, loaded, quantized further; other vocabularies refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from tiny import make_batches
from typer.testing import CliRunner

import weft
from weft.catalog import entries
from weft.cli.app import build
from weft.expr import Dense, LowRank, terms_of
from weft.learn.data import Text
from weft.model import Sources, fingerprint, set_expressions
from weft.stats import collect

from .cases import logits, shake

MODELS = Callable[..., Path]
MERGES = [e.name for e in entries() if e.kind == "merge"]


def run(*argv: str) -> Any:
    """The command line in this process."""
    return CliRunner().invoke(build(argv), list(argv), catch_exceptions=False)


@pytest.fixture
def members(folder: MODELS, tmp_path: Path) -> list[str]:
    """A base and two folders of models that differ from it everywhere, all with a tokenizer."""
    base = folder()
    made = [str(base)]
    for i in range(2):
        model, g = weft.load(base), torch.Generator().manual_seed(i)
        noise = {n: 0.05 * torch.randn(e.shape, generator=g) for n, e in weft.expressions(model).items()}
        changed = {n: Dense((e.dense() + noise[n]).bfloat16()) for n, e in weft.expressions(model).items()}
        set_expressions(model, changed)
        weft.save(model, tmp_path / f"member{i}")
        made.append(str(tmp_path / f"member{i}"))
    return made


@pytest.mark.parametrize("name", MERGES)
def test_the_command_does_what_the_call_does(name: str, members: list[str], tmp_path: Path) -> None:
    """An ordinary checkpoint with tokenizer, in the base's dtype, that transformers loads, with a note of what it was made of."""
    base, *two = members
    out = tmp_path / "out"
    argv = [
        name,
        *two,
        "--base",
        base,
        "--weight",
        "0.25",
        "--weight",
        "0.5",
        "--seed",
        "3",
        "--out",
        str(out),
        "--json",
    ]
    argv += ["--tokens", "200"]
    done = run(*argv)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    how: dict[str, Any] = {"weights": [0.25, 0.5], "seed": 3, "tokens": 200}
    called = weft.combine([weft.load(p) for p in two], name, base=weft.load(base), **how)
    assert {r["site"] for r in rows} == set(weft.expressions(called))
    assert {r["after"].partition(" + ")[0] for r in rows} == {"bfloat16"}
    back = weft.load(out)
    assert fingerprint(back) == fingerprint(called) and weft.verify(out) == []
    assert len(weft.tokenizer(back)) == len(weft.tokenizer(weft.load(base)))
    if {r["after"] for r in rows} == {"bfloat16"}:
        plain = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(logits(plain), logits(called), rtol=1e-4, atol=1e-4)
    said = json.loads((out / "weft.json").read_text())["merged"]
    assert said["models"] == two and said["base"] == base and said["weights"] == [0.25, 0.5] and said["method"] == name


@pytest.mark.parametrize("name", MERGES)
def test_help_has_every_option(name: str) -> None:
    said = run(name, "--help").output
    from weft.engine import get

    for option in [*get(name).options.model_fields, "base", "weight", "at", "seed", "out", "replace", "json", "quiet"]:
        assert f"--{option.replace('_', '-')}" in said


def test_bad_commands_end_with_codes(members: list[str], tmp_path: Path) -> None:
    """Bad options 2, an output that is in the way 4, a declared fallback 3; a member may be replaced by the result."""
    base, one, two = members
    assert run("ties", one, two).exit_code == 2 and run("soup").exit_code == 2
    assert run("ties", one, "nowhere", "--base", base, "--density", "0").exit_code == 2
    assert run("soup", one, two, "--weight", "1").exit_code == 2
    assert run("soup", one, two, "--out", two).exit_code == 4
    assert run("soup", one, two, "--out", two, "--replace").exit_code == 0 and weft.verify(two) == []
    model = weft.load(base)
    set_expressions(model, {n: Dense(-e.dense()) for n, e in weft.expressions(model).items()})
    weft.save(model, tmp_path / "negated")
    opposed = run("slerp", base, str(tmp_path / "negated"), "--at", "q_proj")
    assert opposed.exit_code == 3 and "no arc" in opposed.stderr and "not saved" in opposed.stdout


def test_a_fallback_is_a_warning(members: list[str]) -> None:
    model, other = weft.load(members[0]), weft.load(members[0])
    set_expressions(other, {n: Dense(-e.dense()) for n, e in weft.expressions(other).items()})
    with pytest.warns(UserWarning, match="no arc"):
        weft.combine([model, other], "slerp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weft.combine([model, other], "soup")


def test_another_vocabulary_is_refused(members: list[str]) -> None:
    """Of the same size, with two words exchanged."""
    place = Path(members[2]) / "tokenizer.json"
    held = json.loads(place.read_text())
    words = held["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    place.write_text(json.dumps(held))
    with pytest.raises(weft.WeftError, match=r"(?s)other tokenizers.*another model"):
        weft.combine([weft.load(p) for p in members[1:]], "soup")
    assert run("soup", *members[1:]).exit_code == 4


def test_quantized_members_merge(members: list[str], tmp_path: Path) -> None:
    """As their values do; the result takes the next rewrite, which sees the merged weights as the pretrained ones."""
    models = [weft.load(p) for p in members[1:]]
    for m in models:
        weft.apply(m, "rtn", bits=4, group=16)
    made = weft.combine(models, "soup", base=weft.load(members[0]))
    for n, e in weft.expressions(made).items():
        mean = sum(weft.expressions(m)[n].dense() for m in models) / 2
        torch.testing.assert_close(e.dense().float(), mean, rtol=1e-2, atol=1e-3)
    (first, *_) = weft.apply(made, "svd_residual", at="*.0.self_attn.q_proj", rank=4)
    assert first.before == "bfloat16"
    weft.apply(made, "rtn", bits=8, at="q_proj")
    weft.save(made, tmp_path / "again")
    assert fingerprint(weft.load(tmp_path / "again")) == fingerprint(made)


def test_adapters_on_one_quantized_base_stay_adapters(members: list[str], tmp_path: Path) -> None:
    """The packed base is the same, the adapters are one, the output is the mean model's; loaded again it still knows its base."""
    weft.save(_quantized(members[0]), tmp_path / "packed")
    tuned = [weft.load(tmp_path / "packed") for _ in range(2)]
    for i, m in enumerate(tuned):
        weft.apply(m, "lora", rank=2 + i, seed=i)
        shake(m, i)
    made = weft.combine(tuned, "soup")
    weft.save(made, tmp_path / "merged")
    back = weft.load(tmp_path / "merged")
    assert fingerprint(back) == fingerprint(made)
    held = weft.expressions(back)
    for n, e in held.items():
        terms, parts = terms_of(e), [weft.expressions(m)[n] for m in tuned]
        assert terms["base"].describe() == terms_of(parts[0])["base"].describe()
        torch.testing.assert_close(e.dense(), sum(p.dense() for p in parts) / 2, rtol=1e-5, atol=1e-5)
    assert {t.promises().rank for e in held.values() for t in terms_of(e).values() if isinstance(t, LowRank)} == {5}
    original = weft.model.places(back)["model.layers.0.self_attn.q_proj.weight"].original()
    assert torch.equal(
        original, weft.expressions(weft.load(members[0]))["model.layers.0.self_attn.q_proj.weight"].dense()
    )


def _quantized(place: str) -> Any:
    model = weft.load(place)
    weft.apply(model, "rtn", bits=4, group=16)
    return model


# ------------------------------------------------------------------------------------------------------- data and searches


def test_every_member_has_its_own_data(members: list[str], tmp_path: Path) -> None:
    """A Gram of each on its own texts, or of all on the same; what was found is not looked for again; data that is of no use is refused."""
    models = [weft.load(p) for p in members[1:]]
    ours, theirs = make_batches(seed=1), make_batches(seed=2)
    how: dict[str, Any] = {"cache": tmp_path / "kept"}
    one, other = (weft.combine(models, "regmean", data=d, **how) for d in (ours, [ours, theirs]))
    assert fingerprint(one) != fingerprint(other)
    with mock.patch("weft.stats.evidence._Writer", None), mock.patch("weft.stats.fisher.fisher", None):
        assert fingerprint(weft.combine(models, "regmean", data=[ours, theirs], **how)) == fingerprint(other)
    name = "model.layers.0.mlp.up_proj.weight"
    grams = [
        collect(m, d, tmp_path / "kept" / "evidence").evidence([name])[name][0].gram.double()
        for m, d in zip(models, (ours, theirs), strict=True)
    ]
    grams = [g * 0.9 + 0.1 * torch.diag(g.diagonal()) for g in grams]
    values = [weft.expressions(m)[name].dense().double() for m in models]
    want = sum(v @ g for v, g in zip(values, grams, strict=True)) @ torch.linalg.pinv(sum(grams))
    gap = (weft.expressions(other)[name].dense().double() - want) @ sum(grams)
    assert float(gap.norm() / (want @ sum(grams)).norm()) < 1e-2  # stored in bfloat16
    for bad, said in (
        ({"data": [ours]}, "1 for 2 models"),
        ({"data": ours, "method": "soup"}, "looks at weights alone"),
    ):
        with pytest.raises(weft.WeftError, match=said):
            weft.combine(**{"models": models, "method": "regmean", **bad})


def test_weights_are_searched(members: list[str]) -> None:
    """The best of all that was tried, told with its score; a half-way model beats both ends here; the search's own errors come first."""
    base, *two = (weft.load(p) for p in members)
    held = [Text("the cat sat on the mat . a dog ran home ."), Text("the red cat saw the dog .")]
    made = weft.combined(two, "soup", search="grid", held_out=held, trials=5)
    assert [t.weights for t in made.tried] == [(1 - i / 4, i / 4) for i in range(5)]
    scores = [weft.evaluate(weft.combine(two, "soup", weights=t.weights), held)["mean"] for t in made.tried]
    assert scores == pytest.approx([t.score for t in made.tried]) and all(t.seconds > 0 for t in made.tried)
    assert weft.evaluate(made.model, held)["mean"] == pytest.approx(min(scores))
    bad: list[tuple[dict[str, Any], str]] = [
        ({"search": "grid"}, "nothing to score on"),
        ({"held_out": held}, "no search"),
        ({"search": "grid", "held_out": held, "weights": [1.0, 1.0]}, "what is searched"),
        ({"search": "greedy", "held_out": held, "trials": 4}, "tries each member twice"),
        ({"search": "grid", "held_out": held, "models": [base, *two]}, "greedy and cma take more"),
    ]
    for given, said in bad:
        with pytest.raises(weft.WeftError, match=said):
            weft.combine(**{"models": two, "method": "soup", **given})


def test_a_search_on_the_command_line(members: list[str], tmp_path: Path) -> None:
    """It says what it tried, and the folder keeps it."""
    base, one, _ = members
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"text": "the cat sat on the mat ."}) + "\n")
    argv = [
        "soup",
        base,
        one,
        "--search",
        "grid",
        "--trials",
        "3",
        "--held-out",
        str(held),
        "--out",
        str(tmp_path / "out"),
    ]
    done = run(*argv)
    assert done.exit_code == 0 and done.stderr.count("weights ") == 3, done.output
    said = json.loads((tmp_path / "out" / "weft.json").read_text())["merged"]
    assert len(said["tried"]) == 3 and said["weights"] in [t[:2] for t in said["tried"]]
    least = min(t[2] for t in said["tried"])
    assert next(t for t in said["tried"] if t[:2] == said["weights"])[2] == least
    assert run("soup", base, one, "--search", "grid").exit_code == 2


def test_adapters_stay_adapters_in_a_search(members: list[str]) -> None:
    """No weight becomes dense, in any trial."""
    tuned = [weft.load(members[0]) for _ in range(2)]
    for i, m in enumerate(tuned):
        weft.apply(m, "lora", rank=2, seed=i)
        shake(m, i)
    held = [Text("the cat sat on the mat . a dog ran home .")]
    with mock.patch.object(Sources, "dense", None):
        made = weft.combine(tuned, "soup", at="all-linear", search="greedy", held_out=held)
    assert any(isinstance(t, LowRank) for e in weft.expressions(made).values() for t in terms_of(e).values())
