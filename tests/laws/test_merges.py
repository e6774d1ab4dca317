"""Laws of every method of kind merge, on lone weights, and of the merges of whole models; formulas against float64, entry by entry."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny import build_tiny
from torch import Tensor, nn

import weft
from weft.engine import Sources, get
from weft.error import ConflictError, NumericError, OptionError, ShapeError, WeftError
from weft.expr import Dense, Expr, LowRank, SparseDelta, Sum, terms_of
from weft.linalg.votes import elected, trimmed
from weft.model import fingerprint, fork, plain_tensors, set_expressions, weave

from .cases import EXPRS, MERGES, ROUTED, STARTS, dense, instances, options, quantized, rng, snapshot, weight

Options = dict[str, Any]
COUNT = 3


def count(name: str) -> int:
    """How many members a law gives a merge."""
    return get(name).members or COUNT


def whole(name: str) -> Options:
    """Options by which nothing is trimmed, dropped or scaled."""
    neutral: Options = {"scale": 1.0, "density": 1.0, "drop": 0.0}
    return {k: v for k, v in neutral.items() if k in get(name).options.model_fields}


def sources(members: Sequence[Expr], weights: Sequence[float] | None = None, **more: Any) -> Sources:
    """These members of one weight; the base is another dense one."""
    m, n = members[0].shape
    given = {"name": "w", "dtype": torch.float32, "base": dense(m, n, rng("base", m, n)), **more}
    return Sources(members=tuple(members), weights=tuple(weights or [1.0] * len(members)), **given)


def random(name: str, m: int = 9, n: int = 14, dtype: torch.dtype = torch.float32) -> list[Expr]:
    """Dense members that differ."""
    return [Dense(weight(m, n, ("merge", i)).to(dtype)) for i in range(count(name))]


def made(name: str, s: Sources, **given: Any) -> Tensor:
    """The merged value, of the right shape and finite."""
    value = get(name)(s, **given).dense()
    assert value.shape == s.members[0].shape and bool(torch.isfinite(value).all())
    return value


def close(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal up to two roundings of the dtype."""
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(a.double(), b.double(), rtol=2 * eps, atol=2 * eps * float(b.abs().max()))


# ----------------------------------------------------------------------------------------------------------- lone weights


def copies_give_it_back(name: str) -> None:
    """Copies of the base, with any options; and copies of any model, whatever the base, where nothing is trimmed or scaled."""
    shares = [1 / count(name)] * count(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        one = Dense(weight(9, 14, "copies").to(dtype))
        copies: list[Expr] = [Dense(one.w.clone()) for _ in range(count(name))]
        close(made(name, sources(copies, base=one, dtype=dtype)), one.w, dtype)
        base = Dense(weight(9, 14, "another").to(dtype))
        result = made(name, sources(copies, shares, base=base, dtype=dtype), **whole(name))
        assert result.dtype == dtype
        close(result, one.w, dtype)


def one_alone_is_itself(name: str) -> None:
    """A weight of one on a member and none on the others gives that one where nothing is trimmed or scaled."""
    members = random(name)
    for i, e in enumerate(members):
        weights = [float(k == i) for k in range(len(members))]
        close(made(name, sources(members, weights), **whole(name)), e.dense())


def every_node_is_a_member(name: str) -> None:
    """Every kind of expression merges as its value does; so does one of a lone row or column. The dtype and shape are kept."""
    for kind in EXPRS:
        for e in instances(kind):
            others = [dense(*e.shape, rng("other", i, *e.shape)) for i in range(count(name) - 1)]
            base = dense(*e.shape, rng("base", *e.shape))
            plain = Dense(e.dense().detach().float())
            result = get(name)(sources([e, *others], base=base))
            assert result.shape == e.shape and isinstance(result, Dense) and result.w.dtype == torch.float32
            close(result.w, made(name, sources([plain, *others], base=base)))


def every_node_is_a_base(name: str) -> None:
    """So does every kind as the base."""
    for kind in EXPRS if "base" in get(name).needs else ():
        for e in instances(kind):
            members = [dense(*e.shape, rng("member", i, *e.shape)) for i in range(count(name))]
            plain = Dense(e.dense().detach().float())
            close(made(name, sources(members, base=e)), made(name, sources(members, base=plain)))


def input_is_not_changed(name: str) -> None:
    """No bit of members or base, and what is trainable stays so."""
    for start in STARTS:
        members = [STARTS[start](weight(8, 32, ("in", i))) for i in range(count(name))]
        base = STARTS[start](weight(8, 32, "in base"))
        before = [snapshot(e) for e in (*members, base)]
        result = get(name)(sources(members, base=base))
        assert [snapshot(e) for e in (*members, base)] == before
        with torch.no_grad():
            for t in result.parameters():
                if t.is_floating_point():
                    held = {p.data_ptr() for e in (*members, base) for p in e.parameters()}
                    assert not t.requires_grad or t.data_ptr() not in held


def only_the_weight_decides(name: str) -> None:
    """Bit for bit the same again and under another global seed."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(made(name, sources(random(name))))
    assert torch.equal(*results)


def not_a_number_is_named(name: str) -> None:
    """NaN and infinity in a member or the base stop with the weight's name and whose it is, whatever is trimmed or dropped."""
    for bad, at in itertools.product((float("nan"), float("inf")), range(count(name))):
        members = random(name)
        broken = members[at].dense().clone()
        broken[3, 5] = bad
        members[at] = Dense(broken)
        with pytest.raises(NumericError, match=rf"(?s)w of member {at + 1}.*1 of 126"):
            get(name)(sources(members))
        if "base" in get(name).needs:
            with pytest.raises(NumericError, match="w of base"):
                get(name)(sources(random(name), base=Dense(broken)))


def what_overflows_is_refused(name: str) -> None:
    """A result that the dtype cannot hold is no result."""
    scale = {"scale": 10.0} if "scale" in get(name).options.model_fields else {}
    big: list[Expr] = [Dense(torch.full((20, 30), 6e4 if scale else 1e6)) for _ in range(count(name))]
    with pytest.raises(NumericError, match="w"):
        get(name)(sources(big, dtype=torch.float16, base=Dense(torch.zeros(20, 30))), **scale)


def options_work_or_are_refused(name: str) -> None:
    """Both ends and the middle of every option run and somewhere matter; what is outside or unknown is refused."""
    plain = made(name, sources(random(name)))
    for option, good, bad in options(get(name)):
        results = [made(name, sources(random(name)), **{option: value}) for value in good]
        assert any(not torch.equal(r, plain) for r in results), option
        for value in bad:
            with pytest.raises(OptionError, match=option):
                get(name).bind({option: value})
    with pytest.raises(OptionError, match="unheard_of"):
        get(name).bind({"unheard_of": 1})


def slices_make_the_whole(name: str) -> None:
    """What goes a slice of rows at a time gives the same in slices."""
    for start in ("dense", "sum", "2:4-quantized"):
        members = [STARTS[start](weight(24, 32, ("slice", i))) for i in range(count(name))]
        at_once = made(name, sources(members))
        with mock.patch.multiple("weft.expr.base", CHUNK=5 * 32):
            torch.testing.assert_close(made(name, sources(members)), at_once, rtol=1e-6, atol=1e-6)


def signs_do_not_matter(name: str) -> None:
    """The merge of negated models is the negated merge."""
    members = random(name)
    base = dense(9, 14, rng("base", 9, 14))
    negated = [Dense(-e.dense()) for e in members]
    assert torch.equal(
        made(name, sources(negated, base=Dense(-base.dense()))), -made(name, sources(members, base=base))
    )


LAWS: list[Callable[[str], None]] = [
    copies_give_it_back,
    one_alone_is_itself,
    every_node_is_a_member,
    every_node_is_a_base,
    input_is_not_changed,
    only_the_weight_decides,
    not_a_number_is_named,
    what_overflows_is_refused,
    options_work_or_are_refused,
    slices_make_the_whole,
    signs_do_not_matter,
]


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_merge(law: Callable[[str], None], name: str) -> None:
    """Each law, for each merge."""
    law(name)


# ---------------------------------------------------------------------------------------------------------------- formulas


def numbers(t: Tensor) -> list[float]:
    """The entries, in Python's float64."""
    return t.double().flatten().tolist()


def largest(d: list[float], density: float) -> list[float]:
    """The task vector with all but its largest entries zero."""
    keep = max(1, round(density * len(d)))
    least = sorted((abs(x) for x in d), reverse=True)[keep - 1]
    return [x if abs(x) >= least else 0.0 for x in d]


def agreed(votes: list[list[float]], weights: Sequence[float]) -> list[float]:
    """Entry by entry the weighted mean of those that have the sign of the weighted sum."""
    result = []
    for at in range(len(votes[0])):
        mass = sum(w * v[at] for w, v in zip(weights, votes, strict=True))
        with_it = [(w, v[at]) for w, v in zip(weights, votes, strict=True) if v[at] * mass > 0]
        result.append(sum(w * x for w, x in with_it) / sum(w for w, _ in with_it) if with_it else 0.0)
    return result


def by_hand(name: str, s: Sources, o: Options) -> list[float]:
    """Each formula in Python's floats."""
    base = numbers(s.origin.dense())
    values, w = [numbers(e.dense()) for e in s.members], s.weights
    deltas = [[x - b for x, b in zip(v, base, strict=True)] for v in values]
    if name == "soup":
        return [sum(a * x for a, x in zip(w, xs, strict=True)) / sum(w) for xs in zip(*values, strict=True)]
    if name == "slerp":
        one, two = (math.sqrt(sum(x * x for x in v)) for v in values)
        cosine = sum(x * y for x, y in zip(*values, strict=True)) / one / two
        angle, t = math.acos(cosine), w[1] / (w[0] + w[1])
        a, b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
        return [a * x + b * y for x, y in zip(*values, strict=True)]
    if name == "dare":
        p = o["drop"]
        for k, d in enumerate(deltas):
            kept = numbers(torch.rand(s.members[0].shape, generator=s.rng(f"dare {k}")))
            deltas[k] = [x / (1 - p) if u >= p else 0.0 for x, u in zip(d, kept, strict=True)]
    if name == "ties":
        deltas = [largest(d, o["density"]) for d in deltas]
    if name == "ties" or o.get("then") == "ties":
        step = agreed(deltas, w)
    else:
        step = [sum(a * x for a, x in zip(w, xs, strict=True)) for xs in zip(*deltas, strict=True)]
    return [b + o["scale"] * x for b, x in zip(base, step, strict=True)]


VARIANTS: list[tuple[str, Options]] = [
    *((name, {}) for name in MERGES),
    ("task_arithmetic", {"scale": -1.5}),
    ("ties", {"density": 0.5, "scale": 0.7}),
    ("ties", {"density": 1.0}),
    ("dare", {"drop": 0.5, "then": "ties", "scale": 1.0}),
    ("dare", {"drop": 0.3}),
]


@pytest.mark.parametrize(("name", "given"), VARIANTS, ids=lambda v: str(v))
def test_the_formula_is_the_papers(name: str, given: Options) -> None:
    """Against Python's floats, entry by entry, for equal and other weights."""
    for weights in ([1.0] * count(name), [0.5, 2.0, 0.25][: count(name)]):
        s = sources(random(name), weights)
        oracle = torch.tensor(by_hand(name, s, get(name).bind(given)), dtype=torch.float64).view(9, 14)
        torch.testing.assert_close(made(name, s, **given).double(), oracle, rtol=1e-5, atol=1e-5)


def test_votes() -> None:
    """A worked example: trimming keeps equals; the sign goes by mass; an even vote and a lone zero are zero."""
    d = torch.tensor([[3.0, -2.0, 2.0, 1.0, 0.0]])
    assert trimmed(d, 0.4).tolist() == [[3.0, -2.0, 2.0, 0.0, 0.0]]
    assert torch.equal(trimmed(d, 1.0), d) and trimmed(d, 1e-9).tolist() == [[3.0, 0.0, 0.0, 0.0, 0.0]]
    votes = [(1.0, torch.tensor([[4.0, 1.0, 2.0, 0.0]])), (1.0, torch.tensor([[2.0, -3.0, -2.0, 0.0]]))]
    assert elected(votes).tolist() == [[3.0, -3.0, 0.0, 0.0]]
    assert elected([(3.0, votes[0][1]), votes[1]]).tolist() == [[3.5, 0.0, 2.0, 0.0]]


def test_dare_is_right_on_average() -> None:
    """What is kept is scaled up: over many seeds the mean is task arithmetic; another seed drops others; nothing dropped is equal."""
    members = random("dare")
    whole_ = made("task_arithmetic", sources(members))
    results = [made("dare", sources(members, seed=k), drop=0.5) for k in range(600)]
    assert not torch.equal(results[0], results[1])
    spread = torch.stack(results).std(0) / 600**0.5
    assert bool(((torch.stack(results).mean(0) - whole_).abs() <= 5 * spread + 1e-6).all())
    close(made("dare", sources(members), drop=0.0), whole_)


def test_dare_drops_a_share() -> None:
    """Of a large task vector, the share that it says, in every member apart."""
    one = [Dense(torch.ones(200, 100)), Dense(2 * torch.ones(200, 100))]
    value = made("dare", sources(one, base=Dense(torch.zeros(200, 100))), drop=0.9, scale=1.0)
    shares = [float((value.round() == v).float().mean()) for v in (0, 10, 20, 30)]
    assert shares == pytest.approx([0.81, 0.09, 0.09, 0.01], abs=0.01)


def test_slerp_stays_on_the_arc_and_says_where_there_is_none() -> None:
    """Between vectors of one length the length stays; opposite and zero weights go straight, which is declared; parallel ones need not."""
    x, y = weight(4, 6, 1), weight(4, 6, 2)
    y = y / y.norm() * x.norm()
    for t in (0.2, 0.5, 0.9):
        assert float(made("slerp", sources([Dense(x), Dense(y)], [1 - t, t])).norm()) == pytest.approx(float(x.norm()))
    for other, told in ((-x, True), (0 * x, True), (3 * x, False), (x, False), (y, False)):
        s = sources([Dense(x), Dense(other)], [0.75, 0.25])
        value = made("slerp", s)
        assert bool(s.notes) == told and (not told or "straight" in s.notes[0][1])
        if other is not y:
            close(value, 0.75 * x + 0.25 * other)
    zeros = sources([Dense(0 * x), Dense(0 * x)])
    assert not made("slerp", zeros).any() and not zeros.notes


# ---------------------------------------------------------------------------------------------------------------- symbolic


def tuned(base: Expr, i: int) -> Expr:
    """The same base with an adapter, a trained one."""
    g = rng("adapter", i)
    pair = nn.Parameter(torch.randn(8, 2 + i, generator=g)), nn.Parameter(torch.randn(2 + i, 32, generator=g))
    return Sum({"base": base.rebuild(), f"adapter:a{i}": LowRank(*pair, 1.0 + i)})


@pytest.mark.parametrize("name", ["soup", "task_arithmetic"])
def test_adapters_on_one_base_merge_into_one(name: str) -> None:
    """The base keeps its bytes, the adapters become one of all their ranks, frozen, and the value is that of the dense merge."""
    base = quantized(8, 32, rng("q"))
    members = [tuned(base, i) for i in range(3)]
    s = sources(members, [0.2, 1.0, 0.7], base=base)
    result = get(name)(s)
    terms = terms_of(result)
    assert snapshot(terms["base"]) == snapshot(base) and terms.keys() == {"base", "adapter:merged"}
    assert terms["adapter:merged"].promises().rank == 9 and result.frozen()
    plain = sources([Dense(e.dense().detach()) for e in members], s.weights, base=Dense(base.dense()))
    torch.testing.assert_close(result.dense(), made(name, plain), rtol=1e-5, atol=1e-4)


def test_sparse_terms_merge_into_one() -> None:
    """At every place where one of them has an entry, beside low-rank ones."""
    base = quantized(8, 32, rng("q"))
    one = Sum({"base": base, "adapter:s": SparseDelta.of(weight(8, 32, 1), weight(8, 32, 1) > 0.2)})
    two = Sum({"base": base.rebuild(), "adapter:s": SparseDelta.of(weight(8, 32, 2), weight(8, 32, 2) > 0.2)})
    result = terms_of(get("soup")(sources([one, two, tuned(base, 1)])))
    assert result.keys() == {"base", "adapter:merged", "adapter:merged-sparse"}
    both = terms_of(one)["adapter:s"].mask() | terms_of(two)["adapter:s"].mask()
    assert torch.equal(result["adapter:merged-sparse"].mask(), both)
    plain = sources([Dense(e.dense().detach()) for e in (one, two, tuned(base, 1))])
    torch.testing.assert_close(sum(t.dense() for t in result.values()), made("soup", plain), rtol=1e-5, atol=1e-5)


def test_what_differs_by_more_becomes_dense() -> None:
    """Another base under the adapter, or a term that is neither low-rank nor sparse."""
    members = [tuned(quantized(8, 32, rng("q", i)), i) for i in range(2)]
    assert isinstance(get("soup")(sources(members)), Dense)
    base = quantized(8, 32, rng("q"))
    added = Sum({"base": base, "adapter:d": dense(8, 32, rng("d"))})
    assert isinstance(get("soup")(sources([tuned(base, 1), added])), Dense)


# ------------------------------------------------------------------------------------------------------------ whole models


def family(name: str, seed: int = 0, members: int | None = None, **how: Any) -> tuple[nn.Module, list[nn.Module]]:
    """A tiny woven base and members that differ from it everywhere."""
    base = weave(build_tiny("llama-tied", seed=seed, **how))
    made_: list[nn.Module] = []
    for i in range(members or count(name)):
        m, g = fork(base), rng("member", seed, i)
        set_expressions(
            m,
            {
                n: Dense((e.dense() + 0.05 * torch.randn(e.shape, generator=g)).to(e.w.dtype))
                for n, e in weft.expressions(m).items()
            },
        )  # type: ignore[attr-defined]
        for t in plain_tensors(m).values():
            t.data = t.data + 0.05 * torch.randn(t.shape, generator=g)
        made_.append(m)
    return base, made_


@pytest.mark.parametrize("name", MERGES)
def test_models_merge_whole(name: str) -> None:
    """Every weight and norm, the tie kept, members and base as they were; permuted members and a second time give the same bits."""
    base, models = family(name)
    before = [fingerprint(m) for m in (base, *models)]
    weights = [0.3, 1.2, 0.5][: len(models)]
    result = weft.combine(models, name, base=base, weights=weights, seed=5)
    assert [fingerprint(m) for m in (base, *models)] == before
    assert weft.expressions(result).keys() == weft.expressions(base).keys()
    for order in itertools.permutations(range(len(models))):
        given: Options = {"base": base, "weights": [weights[i] for i in order], "seed": 5}
        assert fingerprint(weft.combine([models[i] for i in order], name, **given)) == fingerprint(result)
    for n, t in plain_tensors(result).items():
        assert not torch.equal(t, plain_tensors(base)[n])
    head, embedding = result.get_output_embeddings(), result.get_input_embeddings()
    assert head.expr is embedding.expr and not any(p.requires_grad for p in result.parameters())
    for n, e in weft.expressions(result).items():
        value = weft.model.places(result)[n].original()
        assert torch.equal(value, e.dense()) and isinstance(e, Dense) and e.w.dtype == torch.float32


@pytest.mark.parametrize("name", MERGES)
def test_vectors_are_merged_by_the_same_formula(name: str) -> None:
    """A norm is a matrix of one row."""
    base, models = family(name)
    result = plain_tensors(weft.combine(models, name, base=base))
    for n, t in plain_tensors(base).items():
        rows = [Dense(plain_tensors(m)[n].detach().view(1, -1)) for m in models]
        order = sorted(range(len(rows)), key=lambda i: weft.engine.combine._mark(rows[i]))
        s = sources([rows[i] for i in order], base=Dense(t.detach().view(1, -1)), name=n)
        assert torch.equal(result[n], made(name, s).view(t.shape))


def test_at_chooses_weights_and_norms() -> None:
    """What no glob matches is the base's, or the first model's."""
    base, models = family("soup")
    for lead, given in ((base, {"base": base}), (models[0], {})):
        result = weft.combine(models, "soup", at=["q_proj", "*.norm.weight"], **given)
        for n, e in weft.expressions(result).items():
            assert torch.equal(e.dense(), weft.expressions(lead)[n].dense()) == ("q_proj" not in n)
        for n, t in plain_tensors(result).items():
            assert torch.equal(t, plain_tensors(lead)[n]) == (n != "model.norm.weight")
    with pytest.raises(OptionError, match="nothing_like_it"):
        weft.combine(models, "soup", at=["q_proj", "nothing_like_it"])


def test_a_negative_weight_takes_away() -> None:
    """Task arithmetic alone takes one: adding and taking away one member is the base."""
    base, (one, *_) = family("task_arithmetic")
    back = weft.combine([one, one], "task_arithmetic", base=base, weights=[1, -1])
    for n, e in weft.expressions(back).items():
        close(e.dense(), weft.expressions(base)[n].dense())


def _with(model: nn.Module, **changed: Any) -> nn.Module:
    for k, v in changed.items():
        setattr(model.config, k, v)
    return model


BAD_CALLS: dict[str, tuple[Options, type[WeftError], str]] = {
    "no base": ({"method": "ties", "base": None}, OptionError, "base"),
    "no models": ({"method": "soup", "models": []}, OptionError, "one or more"),
    "three for two": ({"method": "slerp"}, OptionError, "2 models"),
    "few weights": ({"method": "soup", "weights": [1.0]}, OptionError, "1 for 3 models"),
    "no weight": ({"method": "soup", "weights": [0.0] * 3}, OptionError, "not all 0"),
    "negative": ({"method": "ties", "weights": [1.0, -1.0, 1.0]}, OptionError, "0 or more"),
    "not finite": ({"method": "soup", "weights": [1.0, float("nan"), 1.0]}, OptionError, "finite numbers"),
    "a rewrite": ({"method": "rtn"}, OptionError, "a merge"),
    "unknown option": ({"method": "soup", "density": 0.5}, OptionError, "density"),
    "seed": ({"method": "soup", "seed": -1}, OptionError, "seed"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(case: str) -> None:
    """By name, before anything runs."""
    given, error, said = BAD_CALLS[case]
    base, models = family("soup")
    with pytest.raises(error, match=said):
        weft.combine(**{"models": models, "base": base, **given})


def _strangers() -> dict[str, tuple[Callable[[], nn.Module], str]]:
    llama = {"family": "llama-tied"}
    return {
        "family": (lambda: weave(build_tiny("bert")), "one family"),
        "vocabulary": (lambda: weave(build_tiny(**llama, vocab_size=90)), "vocab_size"),
        "depth": (lambda: weave(build_tiny(**llama, layers=1)), "(?s)num_hidden_layers"),
        "untied": (lambda: weave(build_tiny("llama")), "tie_word_embeddings"),
        "heads": (lambda: weave(build_tiny(**llama, num_attention_heads=8, head_dim=8)), "num_attention_heads"),
        "shape": (
            lambda: _with(weave(build_tiny(**llama, intermediate_size=40)), intermediate_size=48),
            "(?s)32, 40.*8 more|32, 40",
        ),
        "buffer": (lambda: _buffered(1), "a buffer cannot be merged"),
    }


def _buffered(value: int) -> nn.Module:
    model = weave(build_tiny("llama-tied"))
    model.register_buffer("steps", torch.tensor(value))
    return model


@pytest.mark.parametrize("case", ["family", "vocabulary", "depth", "untied", "heads", "shape", "buffer"])
def test_models_of_other_kinds_are_refused(case: str) -> None:
    """Whichever of them is strange, with what it is that differs."""
    make, said = _strangers()[case]
    for models in ([_buffered(0), make()], [_buffered(0), _buffered(0), make()]):
        before = [fingerprint(m) for m in models]
        with pytest.raises(WeftError, match=said):
            weft.combine(models, "soup")
        assert [fingerprint(m) for m in models] == before


def test_merged_vectors_are_the_first_ones() -> None:
    """What a member's norms were before they were trained is not what the merged ones were."""
    base, (one, *_) = family("soup")
    tuned_ = fork(one)
    weft.apply(tuned_, "layernorm")
    with torch.no_grad():
        tuned_.model.norm.weight.add_(1.0)
    merged = weft.combine([tuned_, one], "soup")
    plain = weft.unweave(fork(merged), original=True)
    assert torch.equal(plain.model.norm.weight, merged.model.norm.weight)
    assert not torch.equal(merged.model.norm.weight, base.model.norm.weight)


def test_all_problems_are_told_at_once() -> None:
    """A missing base, a strange member and one without a value, together."""
    base, (one, *_) = family("ties")
    routed = fork(one)
    place = "model.layers.0.self_attn.o_proj.weight"
    set_expressions(routed, {place: ROUTED["routed"](32, 32, rng("r"))})
    with pytest.raises(WeftError) as e:
        weft.combine([one, routed, weave(build_tiny("bert"))], "ties", weights=[1.0])
    told = str(e.value)
    assert all(word in told for word in ("no base", "1 for 3 models", place, "one family"))
    with pytest.raises(ConflictError, match="tap"):
        tapped = fork(one)
        weft.apply(tapped, "act_quant")
        weft.combine([one, tapped], "soup", base=base)
    with pytest.raises(ConflictError, match="branch"):
        prompted = fork(one)
        weft.apply(prompted, "prompt", length=2)
        weft.combine([one, prompted], "soup", base=base)
    short = fork(one)
    del short.model.norm.weight
    with pytest.raises(ShapeError, match=r"model\.norm\.weight"):
        weft.combine([one, short], "soup")


def test_agreeing_buffers_stay() -> None:
    """What is no parameter is the base's."""
    made_ = weft.combine([_buffered(7), _buffered(7)], "soup")
    assert int(made_.steps) == 7


def test_the_process_does_not_matter() -> None:
    """Another hash seed and more threads give the same bits."""
    code = (
        "import sys, torch; sys.path[:0] = ['tests']; torch.set_num_threads(2)\n"
        "from laws.test_merges import marks\n"
        "print(*marks())"
    )
    root = Path(weft.__file__).parent.parent
    env = {"PYTHONPATH": str(root), "PYTHONHASHSEED": "7", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=env, timeout=400)
    assert done.stdout.split() == marks(), done.stderr[-800:]


def marks() -> list[str]:
    """Of a merge of each kind that is random, votes, or sums over a whole weight."""
    return [fingerprint(weft.combine(family(n)[1], n, base=family(n)[0])) for n in ("dare", "ties", "slerp")]
