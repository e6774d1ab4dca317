"""Laws of every method of kind merge, on lone weights, and of the merges of whole models; formulas against float64, entry by entry."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny import build_tiny, make_batches
from torch import Tensor, nn

import weft
from weft.engine import Sources, get
from weft.engine import combine as engine
from weft.engine.run import Step
from weft.error import ConflictError, NumericError, OptionError, ShapeError, WeftError
from weft.expr import Dense, Expr, LowRank, SparseDelta, Sum, terms_of, total
from weft.linalg.votes import elected, trimmed
from weft.model import fingerprint, fork, plain_tensors, set_expressions, weave
from weft.model.sources import Together

from .cases import EXPRS, MERGES, ROUTED, STARTS, dense, features, instances, options, quantized, rng, snapshot, weight

Options = dict[str, Any]
COUNT = 3


def count(name: str) -> int:
    """How many members a law gives a merge."""
    return get(name).members or COUNT


RESHAPED = {"iso_c", "tsv", "compeft", "robust_signature"}
"""Merges that make something else even of task vectors that are alike."""
TURNED = {"core_space"}
"""Merges that turn weights and turn them back, in float64: what is stored in float64 has more roundings."""
SYMBOLIC = {"compeft", "graft", "robust_signature"}
"""Merges whose result keeps the base's expression."""


def whole(name: str) -> Options:
    """Options by which nothing is trimmed, dropped or scaled."""
    neutral: Options = {"scale": 1.0, "density": 1.0, "drop": 0.0}
    return {k: v for k, v in neutral.items() if k in get(name).options.model_fields}


def sources(members: Sequence[Expr], weights: Sequence[float] | None = None, **more: Any) -> Sources:
    """These members of one weight; the base is another dense one. What data says of a member depends on its place."""
    m, n = members[0].shape
    given = {"name": "w", "dtype": torch.float32, "base": dense(m, n, rng("base", m, n)), **more}
    given.setdefault("grams", tuple(gram(n, i) for i in range(len(members))))
    given.setdefault("fishers", tuple(torch.rand(m, n, generator=rng("fisher", i, m, n)) for i in range(len(members))))
    return Sources(members=tuple(members), weights=tuple(weights or [1.0] * len(members)), **given)


def gram(n: int, salt: object) -> Tensor:
    """A second moment of inputs that are correlated."""
    x = features(n, ("gram", salt))
    return x.T @ x / len(x)


def random(name: str, m: int = 9, n: int = 14, dtype: torch.dtype = torch.float32) -> list[Expr]:
    """Dense members that differ."""
    return [Dense(weight(m, n, ("merge", i)).to(dtype)) for i in range(count(name))]


def made(name: str, s: Sources, **given: Any) -> Tensor:
    """The merged value, of the right shape and finite."""
    value = get(name)(s, **given).dense()
    assert value.shape == s.members[0].shape and bool(torch.isfinite(value).all())
    return value


def close(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32, roundings: int = 2) -> None:
    """Equal up to two roundings of the dtype."""
    eps = roundings * torch.finfo(dtype).eps
    torch.testing.assert_close(a.double(), b.double(), rtol=eps, atol=eps * float(b.abs().max()))


# ----------------------------------------------------------------------------------------------------------- lone weights


def copies_give_it_back(name: str) -> None:
    """Copies of the base, with any options; and copies of any model, whatever the base, where nothing is trimmed or scaled."""
    shares = [1 / count(name)] * count(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        one = Dense(weight(9, 14, "copies").to(dtype))
        copies: list[Expr] = [Dense(one.w.clone()) for _ in range(count(name))]
        close(made(name, sources(copies, base=one, dtype=dtype)), one.w, dtype)
        if name in RESHAPED:
            continue
        base = Dense(weight(9, 14, "another").to(dtype))
        result = made(name, sources(copies, shares, base=base, dtype=dtype), **whole(name))
        assert name in SYMBOLIC or result.dtype == dtype
        close(result, one.w, dtype, 8 if name in TURNED and dtype == torch.float64 else 2)


def one_alone_is_itself(name: str) -> None:
    """A weight of one on a member and none on the others gives that one where nothing is trimmed or scaled."""
    members = random(name)
    for i, e in enumerate(members if name not in RESHAPED else []):
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
            assert result.shape == e.shape
            assert name in SYMBOLIC or (isinstance(result, Dense) and result.w.dtype == torch.float32)
            close(result.dense(), made(name, sources([plain, *others], base=base)))


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
    """A result that the dtype cannot hold is no result; what stays beside the base is not stored in that dtype."""
    if name in SYMBOLIC:
        return
    scale = {"scale": 10.0} if "scale" in get(name).options.model_fields else {}
    big: list[Expr] = [Dense(torch.full((20, 30), 6e4 if scale else 1e6)) for _ in range(count(name))]
    with pytest.raises(NumericError, match="w"):
        get(name)(sources(big, dtype=torch.float16, base=Dense(torch.zeros(20, 30))), **scale)


def settings(name: str) -> list[Sources]:
    """Members anywhere, around their base, and near each other, and with another weight to look at."""
    members = random(name)
    mean = torch.stack([e.dense() for e in members]).mean(0)
    near: list[Expr] = [Dense(mean + 0.03 * (e.dense() - mean)) for e in members]
    return [sources(members), sources(members, base=Dense(mean)), sources(near), beside(sources(members))]


def beside(s: Sources) -> Sources:
    """The same in a layer with another weight, of other size and other likeness."""
    first, *rest = s.members
    others = [Dense(3 * first.dense()), *(Dense(first.dense() + 0.1 * e.dense()) for e in rest)]
    held = [s, replace(s, name="v", members=tuple(others))]
    return replace(s, widen=lambda _: replace(s, together=Together(lambda: iter(held), 2 * s.entries)))


def options_work_or_are_refused(name: str) -> None:
    """Both ends and the middle of every option run and somewhere matter; what is outside or unknown is refused."""
    for option, good, bad in options(get(name)):
        pairs = [(made(name, s), made(name, s, **{option: value})) for s in settings(name) for value in good]
        assert any(not torch.equal(plain, other) for plain, other in pairs), option
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


def within(d: list[float], outliers: float) -> list[float]:
    """The task vector with its largest entries zero."""
    most = sorted((abs(x) for x in d), reverse=True)[int(outliers * len(d))]
    return [x if abs(x) <= most else 0.0 for x in d]


def by_rank(d: list[float], n: int, density: float, spread: float, draws: list[float], *, odds: bool) -> list[float]:
    """Row by row: an entry stays, divided by its probability (`odds`), where the draw is below it."""
    result: list[float] = []
    for start in range(0, len(d), n):
        row = d[start : start + n]
        order = sorted(range(n), key=lambda j: (abs(row[j]), j))
        low = density - spread * min(density, 1 - density)
        high = density + spread * min(density, 1 - density)
        p = {j: low + (high - low) * (rank + 0.5) / n for rank, j in enumerate(order)}
        result += [row[j] / (p[j] if odds else 1) if draws[start + j] < p[j] else 0.0 for j in range(n)]
    return result


def by_outputs(part: list[float], d: list[float], g: list[list[float]]) -> float:
    """The factor that brings the outputs of what was kept nearest to those of the whole, by rows of a Gram."""
    n = len(g)
    both = [0.0, 0.0]
    for start in range(0, len(d), n):
        kept, row = part[start : start + n], d[start : start + n]
        read = [sum(kept[i] * g[i][j] for i in range(n)) for j in range(n)]
        both = [
            both[0] + sum(x * y for x, y in zip(read, row, strict=True)),
            both[1] + sum(x * y for x, y in zip(read, kept, strict=True)),
        ]
    return both[0] / both[1]


def regressed(
    values: list[list[float]], w: Sequence[float], grams: list[list[list[float]]], cross: float
) -> list[float]:
    """The least squares problem itself, by Grams' roots as data: rows of inputs with what every member answers."""
    inputs, answers, n = [], [], len(grams[0])
    for v, a, g in zip(values, w, grams, strict=True):
        one = torch.tensor(g, dtype=torch.float64)
        one = torch.where(torch.eye(n, dtype=torch.bool), one, cross * one) * a
        x = torch.linalg.cholesky(one).T  # one = xᵀ x
        inputs.append(x)
        answers.append(x @ torch.tensor(v, dtype=torch.float64).view(-1, n).T)
    return numbers(torch.linalg.lstsq(torch.cat(inputs), torch.cat(answers)).solution.T)


def stocked(deltas: list[list[float]], w: Sequence[float], *, away: bool) -> list[float]:
    """The mean of the task vectors, as much of it as their angles say."""
    a = [x / sum(w) for x in w]
    pairs = list(itertools.combinations(range(len(a)), 2))
    size = [math.sqrt(sum(x * x for x in d)) for d in deltas]
    cosines = [sum(x * y for x, y in zip(deltas[i], deltas[j], strict=True)) / size[i] / size[j] for i, j in pairs]
    c = sum(a[i] * a[j] * x for (i, j), x in zip(pairs, cosines, strict=True)) / sum(a[i] * a[j] for i, j in pairs)
    c = c if away else max(0.0, c)
    t = c / (sum(x * x for x in a) * (1 - c) + c)
    return [t * sum(x * y for x, y in zip(a, xs, strict=True)) for xs in zip(*deltas, strict=True)]


def balanced(deltas: list[list[float]], w: Sequence[float], density: float) -> list[float]:
    """PCB's scores, masks and weighted mean."""

    def softmax(x: list[float], times: float = 1.0) -> list[float]:
        raised = [math.exp(times * (y - min(x)) / (max(x) - min(x))) for y in x]
        return [y / sum(raised) for y in raised]

    scores = []
    for d in deltas:
        inter = [softmax([x * y for x, y in zip(d, other, strict=True)]) for other in deltas]
        intra = softmax([x * x for x in d], len(deltas))
        scores.append(largest([x * sum(ys) for x, ys in zip(intra, zip(*inter, strict=True), strict=True)], density))
    result = []
    for at in range(len(deltas[0])):
        mass = sum(a * b[at] for a, b in zip(w, scores, strict=True))
        result.append(sum(a * b[at] * d[at] for a, b, d in zip(w, scores, deltas, strict=True)) / mass if mass else 0.0)
    return result


def between(name: str, deltas: list[Tensor], w: Sequence[float], o: Options) -> Tensor:
    """Merges of singular vectors, by plain decompositions."""
    if name == "iso_c":
        u, size, v = torch.linalg.svd(sum(a * d for a, d in zip(w, deltas, strict=True)), full_matrices=False)
        return size.mean() * u @ v
    if name == "tsv":
        keep, parts = max(1, int(o["density"] * 9 / len(deltas))), []
        for a, d in zip(w, deltas, strict=True):
            u = torch.linalg.eigh(d @ d.T).eigenvectors[:, -keep:]
            parts.append((u, a * (u.T @ d).norm(dim=1), (u.T @ d / (u.T @ d).norm(dim=1, keepdim=True)).T))
        u, v = (torch.cat([p[i] for p in parts], 1) for i in (0, 2))
        u, v = (x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x)).T @ _turn(x) for x in (u, v))
        return u @ torch.diag(torch.cat([p[1] for p in parts])) @ v.T
    u = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)[0]
    v = torch.linalg.svd(torch.cat(deltas, 0), full_matrices=False)[2].T
    cores = [largest(numbers(u.T @ d @ v), o["density"]) for d in deltas]
    added = [sum(a * x for a, x in zip(w, xs, strict=True)) for xs in zip(*cores, strict=True)]
    core = torch.tensor(agreed(cores, w) if o["then"] == "ties" else added, dtype=torch.float64).view(9, 14)
    if o["then"] == "iso":
        left, size, right = torch.linalg.svd(core, full_matrices=False)
        core = size.mean() * left @ right
    return u @ core @ v.T


def _turn(x: Tensor) -> Tensor:
    """What takes the orthonormal columns by Cholesky's factor to the nearest ones."""
    left, _, right = torch.linalg.svd(torch.linalg.cholesky(x.T @ x).T)
    return left @ right


def by_hand(name: str, s: Sources, o: Options) -> list[float]:
    """Each formula in Python's floats."""
    base = numbers(s.origin.dense())
    values, w = [numbers(e.dense()) for e in s.members], s.weights
    deltas = [[x - b for x, b in zip(v, base, strict=True)] for v in values]

    def each(option: Any) -> Sequence[float]:
        return [option[i] for i in s.order] if isinstance(option, tuple) else [option] * len(values)

    if name == "soup":
        return [sum(a * x for a, x in zip(w, xs, strict=True)) / sum(w) for xs in zip(*values, strict=True)]
    if name == "slerp":
        one, two = (math.sqrt(sum(x * x for x in v)) for v in values)
        cosine = sum(x * y for x, y in zip(*values, strict=True)) / one / two
        angle, t = math.acos(cosine), w[1] / (w[0] + w[1])
        a, b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
        return [a * x + b * y for x, y in zip(*values, strict=True)]
    if name == "model_stock":
        step = stocked(deltas, w, away=o["opposed"] == "away")
    if name == "pcb":
        step = balanced(deltas, w, o["density"])
    if name in ("iso_c", "tsv", "core_space"):
        step = numbers(between(name, [torch.tensor(d, dtype=torch.float64).view(9, 14) for d in deltas], w, o))
    if name == "compeft":
        step = [0.0] * len(base)
        for a, d in zip(w, deltas, strict=True):
            mean = sum(d) / len(d)
            size = a * math.sqrt(sum((x - mean) ** 2 for x in d) / len(d))
            step = [y + math.copysign(size, x) * (x != 0) for y, x in zip(step, largest(d, o["density"]), strict=True)]
    if name == "regmean":
        return regressed(values, w, [g.tolist() for g in s.grams], o["cross"])
    if name == "fisher":
        f = [numbers(t) for t in s.fishers]
        parts = [[a * y * x for x, y in zip(v, g, strict=True)] for a, v, g in zip(w, values, f, strict=True)]
        mass = [sum(a * y for a, y in zip(w, ys, strict=True)) for ys in zip(*f, strict=True)]
        return [sum(xs) / y for xs, y in zip(zip(*parts, strict=True), mass, strict=True)]
    if name == "dare":
        for k, (d, p) in enumerate(zip(deltas, each(o["drop"]), strict=True)):
            kept = numbers(s.draws(f"dare {k}"))
            part = [x if u >= p else 0.0 for x, u in zip(d, kept, strict=True)]
            times = {"share": 1 / (1 - p), "size": sum(map(abs, d)) / sum(map(abs, part)), "none": 1.0}.get(
                o["rescale"]
            )
            times = times or by_outputs(part, d, s.grams[k].tolist())
            deltas[k] = [x * times for x in part]
    if name == "ties":
        for k, (d, keep, top, wide) in enumerate(
            zip(deltas, *(each(o[n]) for n in ("density", "outliers", "spread")), strict=True)
        ):
            part = within(d, top)
            draws = numbers(s.draws(f"ties {k}"))
            part = by_rank(part, 14, keep, wide, draws, odds=o["rescale"] == "odds") if wide else largest(part, keep)
            times = sum(map(abs, d)) / sum(map(abs, part)) if o["rescale"] == "size" else 1.0
            deltas[k] = [x * times for x in part]
    if name == "robust_signature":
        step, size = [0.0] * len(base), sum(b * b for b in base)
        for a, v in zip(w, values, strict=True):
            share = sum(x * b for x, b in zip(v, base, strict=True)) / size
            step = [y + a * (x - share * b) for y, x, b in zip(step, v, base, strict=True)]
    if name == "graft":
        step = [0.0] * len(base)
        for a, d, f in zip(w, deltas, map(numbers, s.fishers), strict=True):
            cost = largest([y * x * x for x, y in zip(d, f, strict=True)], o["density"])
            step = [y + a * x * (c > 0) for y, x, c in zip(step, d, cost, strict=True)]
    if name in ("model_stock", "pcb", "iso_c", "tsv", "core_space", "compeft", "graft", "robust_signature"):
        pass
    elif o.get("then") == "ties":
        step = agreed(deltas, w)
    elif o.get("then") == "agree":
        mass = [sum(a * x for a, x in zip(w, xs, strict=True)) for xs in zip(*deltas, strict=True)]
        step = [
            sum(a * x for a, x in zip(w, xs, strict=True) if x * m > 0)
            for xs, m in zip(zip(*deltas, strict=True), mass, strict=True)
        ]
    else:
        step = [sum(a * x for a, x in zip(w, xs, strict=True)) for xs in zip(*deltas, strict=True)]
    return [b + o.get("scale", 1.0) * x for b, x in zip(base, step, strict=True)]


VARIANTS: list[tuple[str, Options]] = [
    *((name, {}) for name in MERGES),
    ("task_arithmetic", {"scale": -1.5}),
    ("ties", {"density": 0.5, "scale": 0.7}),
    ("ties", {"density": 1.0}),
    ("dare", {"drop": 0.5, "then": "ties", "scale": 1.0}),
    ("dare", {"drop": 0.3}),
    ("dare", {"drop": 0.6, "rescale": "outputs"}),
    ("ties", {"outliers": 0.1, "density": 0.5, "then": "add", "scale": 0.4}),
    ("ties", {"spread": 0.5, "density": 0.4}),
    ("ties", {"spread": 1.0, "density": 0.7, "outliers": 0.05, "then": "add"}),
    ("ties", {"density": (0.7, 0.2, 0.4), "outliers": (0.1, 0.0, 0.2), "spread": (0.5, 0.0, 1.0), "then": "agree"}),
    ("ties", {"density": (0.7, 0.2, 1.0), "rescale": "size"}),
    ("ties", {"density": 0.4, "spread": 0.5, "rescale": "size"}),
    ("ties", {"density": 0.4, "spread": 0.5, "rescale": "none", "then": "add"}),
    ("dare", {"drop": (0.1, 0.7, 0.4), "then": "agree", "rescale": "size"}),
    ("dare", {"drop": 0.6, "then": "ties", "rescale": "none"}),
    ("model_stock", {"opposed": "away"}),
    ("regmean", {"cross": 0.3}),
    ("pcb", {"density": 0.6, "scale": 1.5}),
    ("tsv", {"density": 0.4}),
    ("core_space", {"density": 0.5}),
    ("core_space", {"then": "iso", "scale": 0.3}),
    ("core_space", {"then": "add", "density": 0.8}),
    ("compeft", {"density": 0.5, "scale": 2.0}),
    ("graft", {"density": 0.3}),
]


@pytest.mark.parametrize(("name", "given"), VARIANTS, ids=lambda v: str(v))
def test_the_formula_is_the_papers(name: str, given: Options) -> None:
    """Against Python's floats, entry by entry, for equal and other weights."""
    for weights in ([1.0] * count(name), [0.5, 2.0, 0.25][: count(name)]):
        s = sources(random(name), weights, order=(2, 0, 1)[: count(name)])
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
    near = sources([Dense(x), Dense(x + 0.05 * y)], [0.5, 0.5])
    assert not torch.equal(made("slerp", near), made("slerp", near, straight=0.1))
    close(made("slerp", near, straight=0.1), x + 0.025 * y)
    zeros = sources([Dense(0 * x), Dense(0 * x)])
    assert not made("slerp", zeros).any() and not zeros.notes


def test_a_signature_is_what_clean_training_does_not_explain() -> None:
    """At right angles to the member's own base, none of a rescaled one; added, subtracted to the bit's neighbours, and stored small."""
    clean, patched = weight(8, 128, "clean"), weight(8, 128, "patched")
    robust = 1.1 * clean + 0.01 * weight(8, 128, "robust")
    base = quantized(8, 128, rng("patched"))

    def patch(on: Expr, member: Tensor, w: float = 1.0, **given: Any) -> Expr:
        return get("robust_signature")(sources([Dense(member)], [w], base=on, own=(Dense(clean),)), **given)

    assert bool(
        (made("robust_signature", sources([Dense(3 * clean)], base=Dense(patched), own=(Dense(clean),))) - patched)
        .abs()
        .max()
        < 1e-6
    )
    on = patch(base, robust)
    terms = terms_of(on)
    assert snapshot(terms["base"]) == snapshot(base) and list(terms) == ["base", "adapter:signature-1"]
    signature = terms["adapter:signature-1"].dense().double()
    assert abs(float((signature * clean.double()).sum())) < 1e-6 * float(clean.norm())
    again = patch(on, robust, -1.0)
    assert list(terms_of(again)) == ["base", "adapter:signature-1", "adapter:signature-2"]
    close(again.dense(), base.dense())
    for stored, most in (("int8", 0.01), ("int4", 0.2)):
        small = terms_of(patch(base, robust, stored=stored))["adapter:signature-1"]
        assert small.nbytes() < terms["adapter:signature-1"].nbytes() / (3 if stored == "int8" else 6)
        assert float((small.dense() - signature).norm() / signature.norm()) < most


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


@pytest.mark.parametrize("then", ["ties", "iso", "add"])
def test_adapters_merge_in_their_core_space(then: str) -> None:
    """The base keeps its bytes, the result has the ranks' sum, and is what the merge of the whole matrices is; what is shared stays."""
    base = quantized(8, 32, rng("q"))
    members = [tuned(base, i) for i in range(3)]
    s = sources(members, [0.2, 1.0, 0.7], base=base)
    terms = terms_of(get("core_space")(s, then=then, density=0.7))
    assert snapshot(terms["base"]) == snapshot(base) and terms.keys() == {"base", "adapter:merged"}
    assert terms["adapter:merged"].promises().rank == 8  # 9 ranks of which 8 rows have room
    plain = sources([Dense(e.dense().detach()) for e in members], s.weights, base=Dense(base.dense()))
    torch.testing.assert_close(
        total(terms).dense(), made("core_space", plain, then=then, density=0.7), rtol=1e-4, atol=1e-4
    )
    same = get("core_space")(sources([base, base.rebuild()], base=base))
    assert snapshot(same) == snapshot(base)
    tall = [Dense(weight(200, 6, i)) for i in range(2)]  # fewer directions than rows
    added = made("core_space", sources(tall, base=Dense(torch.zeros(200, 6))), then="add")
    torch.testing.assert_close(added, tall[0].w + tall[1].w, rtol=1e-5, atol=1e-5)


def test_signs_take_their_bytes_and_merge() -> None:
    """A base that stays, a term of about nine bits an entry; of several such models the mean has one sparse term."""
    base = quantized(64, 512, rng("q"))
    members = [Sum({"base": base.rebuild(), "adapter:d": dense(64, 512, rng("d", i))}) for i in range(2)]
    small = [get("compeft")(sources([e], base=base), density=0.05) for e in members]
    for e in small:
        terms = terms_of(e)
        assert snapshot(terms["base"]) == snapshot(base) and terms.keys() == {"base", "adapter:member-1"}
        assert terms["adapter:member-1"].promises().levels == 3 and terms["adapter:member-1"].bits_per_weight() < 0.47
    merged = get("soup")(sources(small, base=base))
    assert terms_of(merged).keys() == {"base", "adapter:merged-sparse"}
    torch.testing.assert_close(merged.dense(), (small[0].dense() + small[1].dense()) / 2)


def test_what_no_data_reached_is_averaged() -> None:
    """Where a member's input was not seen, the mean, which is declared; of what is no linear layer, the mean; unread features too."""
    members, weights = random("regmean"), [0.5, 2.0, 0.25]
    mean = made("soup", sources(members, weights))
    unseen = sources(members, weights, grams=(gram(14, 0), None, gram(14, 2)))
    close(made("regmean", unseen), mean)
    assert "no input" in unseen.notes[0][1]
    vector = sources(members, weights, grams=(), fishers=())
    close(made("regmean", vector), mean)
    close(made("fisher", vector), mean)
    assert not vector.notes
    half = torch.ones(14, 14)
    half[:, 7:] = half[7:] = 0
    read = made("regmean", sources(members, weights, grams=tuple(gram(14, i) * half for i in range(3))))
    close(read[:, 7:], mean[:, 7:])
    assert not torch.allclose(read[:, :7], mean[:, :7])
    known = tuple(torch.ones(9, 14) * (torch.arange(14) < 5) for _ in range(3))
    close(made("fisher", sources(members, weights, fishers=known)), mean)


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
    data: Options = {"data": make_batches()} if get(name).needs - {"base"} else {}
    result = weft.combine(models, name, base=base, weights=weights, seed=5, **data)
    assert [fingerprint(m) for m in (base, *models)] == before
    assert weft.expressions(result).keys() == weft.expressions(base).keys()
    for order in itertools.permutations(range(len(models))):
        given: Options = {"base": base, "weights": [weights[i] for i in order], "seed": 5, **data}
        assert fingerprint(weft.combine([models[i] for i in order], name, **given)) == fingerprint(result)
    for n, t in plain_tensors(result).items() if name != "model_stock" else ():  # whose members may agree on nothing
        assert not torch.equal(t, plain_tensors(base)[n])
    head, embedding = result.get_output_embeddings(), result.get_input_embeddings()
    assert head.expr is embedding.expr and not any(p.requires_grad for p in result.parameters())
    for n, e in weft.expressions(result).items():
        value = weft.model.places(result)[n].original()
        assert torch.equal(value, e.dense()) and value.dtype == torch.float32
        assert name in SYMBOLIC or isinstance(e, Dense)


@pytest.mark.parametrize("name", MERGES)
def test_vectors_are_merged_by_the_same_formula(name: str) -> None:
    """A norm is a matrix of one row."""
    base, models = family(name)
    data: Options = {"data": make_batches()} if get(name).needs - {"base"} else {}
    result = plain_tensors(weft.combine(models, name, base=base, **data))
    for n, t in plain_tensors(base).items():
        rows = [Dense(plain_tensors(m)[n].detach().view(1, -1)) for m in models]
        order = sorted(range(len(rows)), key=lambda i: weft.engine.combine.mark(rows[i]))
        s = sources([rows[i] for i in order], base=Dense(t.detach().view(1, -1)), name=n, grams=(), fishers=())
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


def test_options_of_members_go_with_them() -> None:
    """In whatever order members are given; and by site, with weights that are not one for all."""
    base, models = family("ties")
    marks = set[str]()
    for order in itertools.permutations(range(3)):
        density = tuple((0.1, 0.5, 0.9)[i] for i in order)
        marks.add(fingerprint(weft.combine([models[i] for i in order], "ties", base=base, density=density)))
    assert len(marks) == 1
    heavy = Step.of("ties", density=(0.1, 0.5, 0.9)), (1.0, 2.0, 0.5)
    plain = Step.of("ties", density=0.3), (1.0, 1.0, 1.0)
    mixed, _ = engine.run(engine.plan(models, plain[0], base=base, per=lambda n: heavy if "q_proj" in n else plain))
    for n, e in weft.expressions(mixed).items():
        one, weights = heavy if "q_proj" in n else plain
        alone, _ = engine.run(engine.plan(models, one, base=base, weights=weights, at=n))
        assert torch.equal(e.dense(), weft.expressions(alone)[n].dense())
    for bad, said in (
        ((plain[0], (1.0, 1.0)), "2 for 3"),
        ((plain[0], (1.0, -1.0, 1.0)), "(?s)0 or more.*also"),
        ((Step.of("soup"), (1.0, 1.0, 1.0)), "ties, as everywhere"),
        ((Step.of("ties", density=(0.1, 0.2)), (1.0, 1.0, 1.0)), "2 for 3"),
    ):
        with pytest.raises(OptionError, match=said):
            engine.plan(models, plain[0], base=base, per=lambda n, bad=bad: bad if "proj" in n else plain)


def test_results_are_stored_in_the_dtype_that_is_asked_for() -> None:
    """Weights and vectors have one rounding, from sums in float32; the configuration says so."""
    _, models = family("soup")
    wide, _ = engine.run(engine.plan(models, Step.of("soup")))
    made_, _ = engine.run(engine.plan(models, Step.of("soup"), dtype=torch.bfloat16))
    for n, e in weft.expressions(made_).items():
        assert torch.equal(e.w, weft.expressions(wide)[n].w.bfloat16()) and e.w.dtype == torch.bfloat16
    for n, t in plain_tensors(made_).items():
        assert torch.equal(t, plain_tensors(wide)[n].bfloat16().to(t.dtype))
    assert made_.config.dtype == torch.bfloat16 != models[0].config.dtype


def test_a_negative_weight_takes_away() -> None:
    """Task arithmetic alone takes one: adding and taking away one member is the base."""
    base, (one, *_) = family("task_arithmetic")
    back = weft.combine([one, one], "task_arithmetic", base=base, weights=[1, -1])
    for n, e in weft.expressions(back).items():
        close(e.dense(), weft.expressions(base)[n].dense())


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "core_space", "model_stock"])
def test_members_may_have_bases_of_their_own(name: str) -> None:
    """What each learnt since its own base is added to the first, symbolic or not; bases that are all one are one."""
    base, members = family(name, members=2)
    other, _ = family(name, seed=1)
    moved = fork(other)
    lifted = {n: e.dense() - weft.expressions(base)[n].dense() for n, e in weft.expressions(members[1]).items()}
    set_expressions(moved, {n: Dense(weft.expressions(other)[n].dense() + d) for n, d in lifted.items()})
    for n, t in plain_tensors(moved).items():
        t.data = t.data + plain_tensors(members[1])[n] - plain_tensors(base)[n]
    want = weft.combine(members, name, base=base)
    made_ = weft.combine([members[0], moved], name, base=[base, other])
    for n, e in weft.expressions(want).items():
        torch.testing.assert_close(weft.expressions(made_)[n].dense(), e.dense(), rtol=1e-3, atol=1e-4)
    for n, t in plain_tensors(want).items():
        torch.testing.assert_close(plain_tensors(made_)[n], t, rtol=1e-3, atol=1e-4)
    same = weft.combine(members, name, base=[base, fork(base)])
    for n, e in weft.expressions(want).items():
        torch.testing.assert_close(weft.expressions(same)[n].dense(), e.dense(), rtol=1e-4, atol=1e-5)


def test_what_is_added_to_may_be_no_members_base() -> None:
    """One base more than members: what each learnt since its own is added to the first, of which it is told what it is called."""
    (base, members), (other, _) = family("task_arithmetic", members=2), family("task_arithmetic", seed=1)
    for count in (1, 2):
        made_ = weft.combine(members[:count], "task_arithmetic", base=[other, *[base] * count], scale=0.5)
        for n, e in weft.expressions(made_).items():
            was = weft.expressions(base)[n].dense()
            learnt = sum((weft.expressions(m)[n].dense() - was for m in members[:count]), torch.zeros(()))
            close(e.dense(), weft.expressions(other)[n].dense() + 0.5 * learnt, roundings=8)
        for n, t in plain_tensors(made_).items():
            learnt = sum((plain_tensors(m)[n] - plain_tensors(base)[n] for m in members[:count]), torch.zeros(()))
            close(t, plain_tensors(other)[n] + 0.5 * learnt, roundings=8)
    with pytest.raises(OptionError, match="4 for 2 models"):
        weft.combine(members, "task_arithmetic", base=[base] * 4)
    with pytest.raises(WeftError, match="the base of member 2"):
        weft.combine(members, "task_arithmetic", base=[base, base, weave(build_tiny("bert"))])


def test_a_patched_model_is_taken_back_to_the_bit() -> None:
    """Signatures are adapters: off, weighed and deleted; a second patch stands beside the first; globs keep it to some blocks."""
    (clean, (robust, *_)), (other, _) = family("robust_signature"), family("robust_signature", seed=1)
    shallow = ["*.layers.0.*proj*"]
    made_ = weft.combine([robust], "robust_signature", base=[other, clean], at=shallow)
    places = [n for n, e in weft.expressions(made_).items() if "adapter:signature-1" in terms_of(e)]
    assert len(places) == 7 and all(".layers.0." in n for n in places)
    twice = weft.combine([robust], "robust_signature", base=[made_, clean], at=shallow, weights=[-1])
    assert list(weft.model.adapters(twice)) == ["signature-1", "signature-2"]
    for n, e in weft.expressions(twice).items():
        close(e.dense(), weft.expressions(other)[n].dense())
    weft.activate(made_, {"signature-1": 0.5})
    name = places[0]
    was, is_ = weft.expressions(other)[name].dense(), weft.expressions(made_)[name].dense()
    whole_ = terms_of(weft.expressions(twice)[name])["adapter:signature-1"].dense()
    close(is_ - was, 0.5 * whole_, roundings=64)
    weft.delete_adapter(made_, "signature-1")
    assert fingerprint(made_) == fingerprint(other)


def test_adapters_on_bases_of_their_own_are_dense_or_refused() -> None:
    """A sum of differences is exact; as many bases as models, or one; none for a merge that takes no differences."""
    one, two = quantized(8, 32, rng("q")), quantized(8, 32, rng("other"))
    members = [tuned(one, 1), tuned(two, 2)]
    s = sources(members, base=one, own=(one, two))
    want = one.dense() + sum(terms_of(e)[f"adapter:a{i}"].dense().detach() for i, e in enumerate(members, 1))
    torch.testing.assert_close(get("task_arithmetic")(s, scale=1.0).dense(), want, rtol=1e-4, atol=1e-4)
    base, models = family("soup")
    for name, bases, said in (("ties", [base, base], "2 for 3 models"), ("soup", [base] * 3, "no differences")):
        with pytest.raises(OptionError, match=said):
            weft.combine(models, name, base=bases)
    with pytest.raises(WeftError, match="one family"):
        weft.combine(models, "ties", base=[base, base, weave(build_tiny("bert"))])


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
    "two densities for three": ({"method": "ties", "density": (0.5, 0.2)}, OptionError, "2 for 3 models"),
    "a density of none": ({"method": "ties", "density": (0.5, 0.2, 0.0)}, OptionError, "greater than 0"),
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
