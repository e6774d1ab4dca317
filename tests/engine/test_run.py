"""Runs: what changes, what is told, and that an interrupted run ends where a straight one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft.engine.propagate as module
from weft.engine import get
from weft.engine.propagate import propagate
from weft.engine.run import Chain, Step, apply, group_of, groups, run
from weft.error import NumericError, OptionError
from weft.expr import Dense, LowRank, Quantized, Sum, tensors
from weft.model import expressions, fingerprint, match, places, weave
from weft.stats import Stats, Walker, collect


@pytest.fixture(scope="module")
def evidence(tiny: Any, batches: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stats]:
    """Evidence of the tiny models of three blocks, collected once a family."""
    made: dict[str, Stats] = {}

    def of(family: str) -> Stats:
        if family not in made:
            made[family] = collect(weave(tiny(family, layers=3)), batches(), tmp_path_factory.mktemp(family))
        return made[family]

    return of


def content(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of every expression."""
    return {f"{n}:{k}": t.detach().clone() for n, e in expressions(model).items() for k, t in tensors(e).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_apply_rewrites_what_matches_and_nothing_else(tiny: Any, evidence: Any) -> None:
    """Changes are told for exactly the sites that matched."""
    model = weave(tiny(layers=3))
    before = expressions(model)
    seen: list[int] = []
    changes, notes = apply(
        model, [Step.of("gptq", bits=3)], at=["mlp.*", "o_proj"], stats=evidence("llama"), step=seen.append
    )
    wanted = match(model, ["mlp.*", "o_proj"])
    assert sorted(c.name for c in changes) == sorted(wanted) and sum(seen) == len(wanted) == 12 and notes == []
    for name, expr in expressions(model).items():
        assert isinstance(expr, Quantized) if name in wanted else expr is before[name]


def test_a_change_tells_before_after_bytes_and_error(family: str, tiny: Any, evidence: Any) -> None:
    """As the expressions say; the error is that of the output on the evidence."""
    model = weave(tiny(family, layers=3))
    changes, _ = apply(model, [Step.of("rtn", bits=3)], stats=evidence(family))
    plain = {n: p.detach() for n, p in tiny(family, layers=3).named_parameters()}
    assert len(changes) == len(places(model))
    for c in changes:
        expr = expressions(model)[c.name]
        gram = evidence(family).evidence([c.name])[c.name][0].gram.double()
        w = plain[c.name].double()
        gap = expr.dense().double() - w
        want = (((gap @ gram) * gap).sum() / ((w @ gram) * w).sum().clamp(min=1e-20)).sqrt()
        assert (c.before, c.after, c.nbytes) == ("float32", expr.describe(), expr.nbytes())
        assert c.error == pytest.approx(float(want), rel=1e-3, abs=1e-6)


def test_without_evidence_there_is_no_error_figure(tiny: Any) -> None:
    """None, rather than a number that means something else."""
    changes, _ = apply(weave(tiny()), [Step.of("rtn")])
    assert changes and all(c.error is None for c in changes)


@pytest.mark.parametrize(
    ("chain", "needy"),
    [(("gptq",), "gptq"), (("wanda",), "wanda"), (("rtn", "eora"), "eora"), (("magnitude", "gptq", "lora"), "gptq")],
)
def test_a_method_that_needs_evidence_is_refused_without(chain: tuple[str, ...], needy: str, tiny: Any) -> None:
    """Before anything runs; the error names the method that needs it."""
    model = weave(tiny())
    mark = fingerprint(model)
    with pytest.raises(OptionError) as e:
        apply(model, [Step.of(m) for m in chain])
    assert fingerprint(model) == mark and e.value.where == needy and "gram" in str(e.value.want)


def test_evidence_of_another_model_is_refused(tiny: Any, evidence: Any) -> None:
    """Sites that the evidence does not know are an error, not left out."""
    model = weave(tiny(layers=4))
    mark = fingerprint(model)
    with pytest.raises(OptionError):
        apply(model, [Step.of("gptq")], stats=evidence("llama"))
    assert fingerprint(model) == mark


def test_only_rewrites_rewrite(tiny: Any) -> None:
    """A search is no step of a chain."""
    with pytest.raises(OptionError):
        apply(weave(tiny()), [Step.of("uniform")])


def test_a_pattern_without_a_match_changes_nothing(tiny: Any) -> None:
    """Also where another pattern matches."""
    model = weave(tiny())
    mark = fingerprint(model)
    with pytest.raises(OptionError):
        apply(model, [Step.of("rtn")], at=["q_proj", "absent"])
    assert fingerprint(model) == mark


def test_fallbacks_are_told(tiny: Any, evidence: Any, monkeypatch: Any) -> None:
    """With the group's name, once."""
    gptq = get("gptq")

    def act(g: Any, **options: Any) -> Any:
        g.fallback("did less")
        return gptq.fn(g, **options)

    model = weave(tiny(layers=3))
    monkeypatch.setattr(
        "weft.engine.run.get", lambda n: gptq if n != "gptq" else type(gptq)(**{**vars(gptq), "fn": act})
    )
    _, notes = apply(
        model, [Step("gptq", tuple(gptq.bind({}).items()))], at=["q_proj", "v_proj"], stats=evidence("llama")
    )
    assert notes == [(f"model.layers.{i}.self_attn.q_proj.weight", "did less") for i in range(3)]


@pytest.mark.parametrize("chain", [("rtn",), ("gptq",), ("magnitude", "nf4")])
def test_a_rewrite_after_lora_leaves_the_adapter(chain: tuple[str, ...], tiny: Any, evidence: Any) -> None:
    """The base changes; the adapter is the same object, and trains on."""
    model = weave(tiny(layers=3))
    apply(model, [Step.of("lora", rank=2)], at="all-linear")
    before = {n: e.named()["adapter:default"] for n, e in expressions(model).items() if isinstance(e, Sum)}
    apply(model, [Step.of(m) for m in chain], at="all-linear", stats=evidence("llama"))
    for n, e in expressions(model).items():
        if n in before:
            assert (
                isinstance(e, Sum)
                and e.named()["adapter:default"] is before[n]
                and not isinstance(e.named()["base"], Dense)
            )
            assert isinstance(before[n], LowRank) and before[n].b.requires_grad


def test_groups_follow_the_evidence(tiny: Any, evidence: Any) -> None:
    """By input where there is evidence, one by one where there is none; only the sites that were asked for."""
    model = weave(tiny(layers=3))
    names = match(model, ["q_proj", "v_proj", "down_proj"])
    assert [len(g) for g in groups(model, names, evidence("llama"))] == [2, 1] * 3
    assert groups(model, names, None) == [(n,) for n in names]


def test_runs_do_not_depend_on_order_or_repetition(tiny: Any, evidence: Any) -> None:
    """A site's result is the same alone, in any order, and each time: randomness comes from the name and the seed."""
    made = []
    for ats in (["q_proj", "up_proj"], ["up_proj", "q_proj"]):
        model = weave(tiny(layers=3))
        for at in ats:
            apply(model, [Step.of("rtn"), Step.of("lora", rank=2)], at=at)
        made.append(content(model))
    assert same(*made)
    model = weave(tiny(layers=3))
    group = group_of(model, ["model.layers.0.self_attn.q_proj.weight"], evidence("llama"))
    mark = fingerprint(model)
    (a,), (b,) = run(group, (Step.of("lora"),)), run(group, (Step.of("lora"),))
    (c,) = run(group_of(model, [group.name], None, seed=1), (Step.of("lora"),))
    assert (
        fingerprint(model) == mark
        and same(dict(tensors(a)), dict(tensors(b)))
        and not same(dict(tensors(a)), dict(tensors(c)))
    )


def plan(model: nn.Module) -> dict[str, Chain]:
    """A chain for every site; not all the same within a group."""
    kinds: list[Chain] = [
        (Step.of("gptq", bits=3),),
        (Step.of("wanda"), Step.of("nf4")),
        (Step.of("rtn", bits=4), Step.of("eora", rank=2)),
    ]
    return {n: kinds[i % 3] for i, n in enumerate(places(model))}


def propagated(
    tiny: Any, family: str, stats: Stats, data: Any, *, journal: Path | None = None, turned: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """What a run makes of a fresh model."""
    model = weave(tiny(family, layers=3))
    chains = plan(model)
    propagate(model, dict(reversed(chains.items())) if turned else chains, stats, data, journal=journal, seed=seed)
    return content(model)


def test_propagate_does_not_depend_on_the_order_of_the_plan(
    family: str, tiny: Any, batches: Any, evidence: Any
) -> None:
    """The plan is a mapping: its order means nothing, a journal neither."""
    straight = propagated(tiny, family, evidence(family), batches())
    assert same(straight, propagated(tiny, family, evidence(family), batches(), turned=True))
    assert not any(k.endswith(":w") for k in straight)


class Stop(BaseException):
    """Not an Exception: nothing may catch it and go on."""


@pytest.mark.parametrize("at", ["first", "block-0001", "solve", "write", "last"])
@pytest.mark.parametrize("family_", ["llama", "bert"])
def test_an_interrupted_run_ends_where_a_straight_one_does(
    family_: str, at: str, tiny: Any, batches: Any, evidence: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Stopped anywhere and called again with the same journal, the result has the same bytes."""
    stats, data = evidence(family_), batches()
    straight = propagated(tiny, family_, stats, data)
    with monkeypatch.context() as m:
        count = 0

        def stop_at(number: int, plain: Callable[..., Any]) -> Callable[..., Any]:
            def act(*args: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    raise Stop
                return plain(*args, **named)

            return act

        if at == "solve":
            m.setattr(module, "_solve", stop_at(9, module._solve))
        elif at == "write":
            m.setattr(module, "write_json", stop_at(2, module.write_json))
        else:
            stage = module._Journal.stage

            def named(self: Any, name: str, work: Any) -> None:
                if name == at:
                    raise Stop
                stage(self, name, work)

            m.setattr(module._Journal, "stage", named)
        with pytest.raises(Stop):
            propagated(tiny, family_, stats, data, journal=tmp_path)
    done = {p.stem for p in tmp_path.glob("*.json")}
    assert "last" not in done and (at == "first" or done)
    assert same(propagated(tiny, family_, stats, data, journal=tmp_path), straight)


def test_a_finished_journal_is_read_not_computed(
    tiny: Any, batches: Any, evidence: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """A third run solves nothing."""
    straight = propagated(tiny, "llama", evidence("llama"), batches(), journal=tmp_path)

    def refuse(*_: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "_solve", refuse)
    assert same(propagated(tiny, "llama", evidence("llama"), batches(), journal=tmp_path), straight)


def test_a_journal_keeps_adapters_trainable(tiny: Any, batches: Any, evidence: Any, tmp_path: Path) -> None:
    """A resumed run's model trains as a straight run's does."""
    flags = []
    for _ in range(2):
        model = weave(tiny(layers=3))
        chains = {n: (Step.of("rtn"), Step.of("lora", rank=2)) for n in match(model, "all-linear")}
        propagate(model, chains, evidence("llama"), batches(), journal=tmp_path)
        flags.append({n: p.requires_grad for n, p in model.named_parameters()})
    assert flags[0] == flags[1] and any(flags[0].values())


def test_propagate_sees_the_errors_before_it(tiny: Any, batches: Any, evidence: Any) -> None:
    """The first block's inputs are dense but for the embedding; later blocks are solved behind what came before."""
    chain, stats = (Step.of("gptq", bits=2, group=0),), evidence("llama")
    dense, behind = weave(tiny(layers=3)), weave(tiny(layers=3))
    names = match(dense, "all-linear")
    apply(dense, chain, at=names, stats=stats)
    propagate(behind, dict.fromkeys(names, chain), stats, batches())
    a, b = content(dense), content(behind)
    equal = {n: torch.equal(a[f"{n}:data"], b[f"{n}:data"]) for n in names}
    assert not any(v for n, v in equal.items() if ".layers.1." in n or ".layers.2." in n)
    walker = Walker(behind, batches())
    assert all(torch.isfinite(out).all() for out in [*walker.finish()])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_propagate_leaves_sites_without_a_chain(
    method: str, family: str, tiny: Any, batches: Any, evidence: Any
) -> None:
    """They keep their expression."""
    model = weave(tiny(family, layers=3))
    before = expressions(model)
    names = [n for n in places(model) if ".1." in n]
    propagate(model, dict.fromkeys(names, (Step.of(method),)), evidence(family), batches())
    assert names and all((expressions(model)[n] is e) is (n not in names) for n, e in before.items())


def test_propagate_refuses_sites_that_the_evidence_lacks(tiny: Any, batches: Any, evidence: Any) -> None:
    """A site that is not in the evidence, or not in the model, is an error, not left out."""
    for layers, name in ((4, "model.layers.3.mlp.up_proj.weight"), (3, "nowhere.weight")):
        model = weave(tiny(layers=layers))
        with pytest.raises(OptionError):
            propagate(model, {name: (Step.of("gptq"),)}, evidence("llama"), batches())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_propagate_stops_at_inputs_that_are_not_finite(value: float, tiny: Any, batches: Any, evidence: Any) -> None:
    """NumericError that names a site of the block, or of the model."""
    model = weave(tiny(layers=3))
    model.model.layers[1].input_layernorm.weight.data[0] = value
    with pytest.raises(NumericError) as e:
        propagate(model, {n: (Step.of("gptq"),) for n in match(model, "layers.*")}, evidence("llama"), batches())
    assert "model." in str(e.value.where)
