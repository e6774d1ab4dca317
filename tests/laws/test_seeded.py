"""Laws are only worth what they catch: each deliberate bug must fail the law that is there for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.engine import Group, Sources, get
from weft.expr import (
    Codebook,
    Dense,
    Expr,
    Hadamard,
    LowRank,
    Masked,
    Quantized,
    SparseDelta,
    Sum,
    basis,
    kernels,
    tensors,
)
from weft.expr.derived import Derived
from weft.grid import Grid, ScaleFormat, bits
from weft.linalg import grids, swaps
from weft.linalg.allocation import dynamic
from weft.linalg.grids import minmax
from weft.linalg.lowrank import truncate
from weft.linalg.votes import elected

from . import test_grids, test_kernels, test_linalg, test_merges, test_nodes, test_rewrites, test_searches
from .cases import EXPRS, randn, rng, weight

Bug = AbstractContextManager[Any]
patch, swap = mock.patch, mock.patch.object


def after_it(owner: object, name: str, change: Callable[..., Any]) -> Bug:
    """`owner.name`, its result changed: change(result, *arguments)."""
    good = getattr(owner, name)
    return swap(owner, name, lambda *a, **k: change(good(*a, **k), *a))


def swapped(data: Tensor, codes: Tensor, width: int) -> Tensor:
    """Rows packed with their first two codes exchanged."""
    return PACK(codes[:, [1, 0, *range(2, codes.shape[1])]] if codes.shape[1] > 1 else codes, width)


PACK = bits.pack


def unpushed(w: Tensor, upper: Tensor, settle: Callable[..., Tensor], start: Any = None) -> Tensor:
    """The column solver without its error push."""
    return torch.stack([settle(w[:, j].float(), j, slice(0, len(w))) for j in range(w.shape[1])], 1)


def spoil(made: Any, g: Group, **_: Any) -> Any:
    """A method that writes into the weight it was given."""
    next(iter(tensors(g.now).values())).data.view(-1)[0] += 1
    return made


def node(kind: str) -> Expr:
    return EXPRS[kind](5, 8, rng("seeded", kind))


def on(law: Callable[[Expr], None], kind: str) -> Callable[[], None]:
    """A law of nodes on one expression."""
    return lambda: law(node(kind))


def of(law: Callable[[str], None], name: str) -> Callable[[], None]:
    """A law of methods on one method."""
    return lambda: law(name)


def fit(law: test_grids.Law) -> Callable[[], None]:
    """A law of grids on 3-bit integers in groups of 7."""
    return lambda: law(weight(6, 24, "seeded"), "int3", 7, True, "bf16")


def codes() -> Tensor:
    return torch.randint(0, 8, (3, 11), generator=rng("codes")).to(torch.uint8)


RTN, DARE, SOUP, OWL = (get(name).fn for name in ("rtn", "dare", "soup", "owl"))
K, N, G, L, M, R, S = test_kernels, test_nodes, test_grids, test_linalg, test_merges, test_rewrites, test_searches
ULP: Callable[..., Tensor] = lambda t, *_: torch.nextafter(t, t + 1)  # noqa: E731

BUGS: dict[str, tuple[Callable[[], Bug], Callable[[], None]]] = {
    "a layout that stays": (
        lambda: swap(Derived, "good", lambda _: True),
        lambda: K.test_no_layout_is_stale(K.change_written, torch.float32),
    ),
    "a layout that is copied": (
        lambda: swap(Expr, "__getstate__", lambda e: dict(e.__dict__)),
        lambda: K.test_a_layout_is_made_once_and_never_copied(torch.bfloat16),
    ),
    "an offset's rest forgotten": (
        lambda: swap(kernels, "_corrected", lambda x, size, more: F.pad(x, (0, more * size))),
        lambda: K.test_inputs_of_one_sign_lose_nothing(torch.bfloat16, False, 1),
    ),
    "scales one ulp off": (lambda: after_it(Quantized, "scales", ULP), on(N.value_is_the_definition, "int4-g5")),
    "mask one column off": (
        lambda: after_it(Masked, "mask", lambda t, *_: t.roll(1, 1)),
        on(N.value_is_the_definition, "masked"),
    ),
    "a sum drops its last term": (
        lambda: swap(Sum, "dense", lambda e: e.terms["base"].dense()),
        on(N.value_is_the_definition, "sum"),
    ),
    "a divisor forgotten": (
        lambda: after_it(ScaleFormat, "decode", lambda s, e, *_: s * 2 if e.top else s),
        on(N.value_is_the_definition, "fp4-g16-e4m3"),
    ),
    "low bytes only": (
        lambda: after_it(Codebook, "codes", lambda c, *_: c & 255),
        on(N.value_is_the_definition, "codebook-vector"),
    ),
    "a delta's rows shifted": (
        lambda: after_it(SparseDelta, "forward", lambda y, *_: y.roll(1, -1)),
        on(N.forward_is_the_product, "delta"),
    ),
    "a transform without its signs": (
        lambda: after_it(Hadamard, "flips", lambda s, *_: s.abs()),
        on(N.value_is_the_definition, "hadamard"),
    ),
    "a basis from another seed": (
        lambda: swap(basis, "_hash", lambda seed, x, f=basis._hash: f(seed + 1, x)),
        on(N.value_is_the_definition, "basis-random"),
    ),
    "ties away from zero": (
        lambda: swap(Grid, "nearest", lambda g, x, f=Grid.nearest: f(g, x * (1 + 1e-6))),
        lambda: G.test_eight_bit_floats_are_torchs("fp8_e4m3", torch.float8_e4m3fn),
    ),
    "forward in half precision": (
        lambda: swap(Expr, "forward", lambda e, x: F.linear(x.half(), e.dense().half()).to(x.dtype)),
        on(N.forward_is_the_product, "int8-g5"),
    ),
    "forward keeps the dense weight": (
        lambda: swap(Expr, "forward", lambda e, x: F.linear(x, e.dense().to(x.dtype))),
        on(N.frozen_keeps_nothing_dense, "2:4"),
    ),
    "rows from the end": (
        lambda: patch.multiple("torch.nn.functional", embedding=lambda ids, w: w[-1 - ids]),
        on(N.rows_are_looked_up, "dense"),
    ),
    "a slice is a copy": (
        lambda: after_it(Dense, "take", lambda e, *_: Dense(e.w.clone())),
        on(N.a_slice_is_those_rows, "dense"),
    ),
    "a map of the inputs goes to the outputs": (
        lambda: swap(LowRank, "mapped", lambda e, dim, values, beside: LowRank(values(e.b), e.a)),
        on(N.takes_a_linear_map, "lowrank"),
    ),
    "slices stack backwards": (
        lambda: swap(N, "stack", lambda parts, good=N.stack: good(parts[::-1])),
        on(N.slices_stack_to_the_whole, "lowrank"),
    ),
    "plain fields lost in the spec": (
        lambda: after_it(N, "spec", lambda tree, *_: {**tree, "group": 4}),
        on(N.written_and_read_it_is_the_same, "int4-g5"),
    ),
    "bytes of children forgotten": (
        lambda: swap(Expr, "nbytes", lambda e: sum(t.nbytes for t in e.parameters(recurse=False))),
        on(N.bytes_are_counted, "masked"),
    ),
    "input gradient scaled": (
        lambda: after_it(N.Expr.forward.__globals__["FrozenProduct"], "backward", lambda g, *_: (g[0] * 1.001, None)),
        on(N.inputs_get_the_dense_gradient, "masked"),
    ),
    "trainable leaves detached": (
        lambda: swap(Expr, "frozen", lambda e: True),
        on(N.leaves_get_the_dense_gradient, "masked"),
    ),
    "a rank promised too low": (
        lambda: after_it(N.LowRank, "promises", lambda p, *_: type(p)(rank=1)),
        on(N.promises_hold, "lowrank"),
    ),
    "casts reach the bytes": (
        lambda: swap(Quantized, "_apply", lambda e, fn, *_: (e.data.bitwise_xor_(1), e)[1]),
        on(N.casts_spare_bytes, "masked-quantized"),
    ),
    "forks share what is trained": (
        lambda: patch("weft.expr.tree.own", lambda t, apart: t),
        on(N.forks_part_ways, "lowrank"),
    ),
    "normal form without its right": (
        lambda: after_it(N, "normal", lambda f, *_: f and type(f)(f.left, f.base, f.terms, ())),
        on(N.normal_form_has_the_value, "product"),
    ),
    "two codes exchanged": (lambda: after_it(bits, "pack", swapped), lambda: G.packing_goes_back(codes(), 3)),
    "highest bit first": (
        lambda: patch.multiple(
            bits, pack=lambda c, b: PACK(c.flip(1), b), unpack=lambda d, b, n, u=bits.unpack: u(d, b, n).flip(1)
        ),
        lambda: G.packing_goes_back(codes(), 3),
    ),
    "range cut": (
        lambda: swap(grids, "_place", lambda n, g, s, *a, f=grids._place: f(n, g, s / 2, *a)),
        fit(G.minmax_covers),
    ),
    "rounds down": (
        lambda: swap(grids, "_codes", lambda x, zero, name: x.add_(zero).floor_().clamp_(0, 7)),
        fit(G.nearest_is_nearest),
    ),
    "search takes the last": (
        lambda: swap(G, "search", lambda w, v, *a, **_: [*grids._trials(grids.grouped(w, a[1]), minmax(w, *a), 8)][-1]),
        fit(G.search_is_never_worse),
    ),
    "gptq without error push": (
        lambda: patch("weft.methods.quantize.gptq.solve", unpushed),
        of(R.beats_its_baseline, "gptq"),
    ),
    "wanda ignores activations": (
        lambda: swap(Group, "second_moment", lambda g: torch.ones(g.now.shape[1])),
        of(R.beats_its_baseline, "wanda"),
    ),
    "swaps without a gain": (
        lambda: after_it(swaps, "_anywhere", lambda found, w, *_: (found[0] - 1e9, *found[1:])),
        lambda: L.test_swaps_never_hurt("row", 4),
    ),
    "svd_llm in weight space": (
        lambda: patch("weft.methods.factor.svd_llm.whitened", lambda w, to, back, rank: truncate(w, rank)),
        of(R.beats_its_baseline, "svd_llm"),
    ),
    "eora in weight space": (
        lambda: patch("weft.methods.factor.eora.whitened", lambda e, to, back, rank: truncate(e, rank)),
        of(R.beats_its_baseline, "eora"),
    ),
    "pruned weights come back": (
        lambda: patch("weft.methods.quantize.rtn.quantize", lambda now, round_: Dense(now.dense() + 0.01)),
        of(R.zeros_stay, "rtn"),
    ),
    "the input is written to": (lambda: after_it(get("rtn"), "fn", spoil), of(R.input_is_not_changed, "rtn")),
    "global randomness": (
        lambda: after_it(
            get("lora"), "fn", lambda e, g, **_: Sum({**e.named(), "adapter:default": Dense(torch.randn(g.now.shape))})
        ),
        of(R.only_the_site_decides, "lora"),
    ),
    "adapters lost": (
        lambda: patch("weft.engine.run.total", lambda terms: terms["base"]),
        of(R.every_start_is_sound, "rtn"),
    ),
    "broken evidence let through": (
        lambda: patch("weft.model.site.finite", lambda t, where: t),
        of(R.broken_evidence_is_refused, "wanda"),
    ),
    "an option ignored": (
        lambda: swap(get("rtn"), "fn", lambda g, **o: RTN(g, **{**o, "symmetric": True})),
        of(R.options_work_or_are_refused, "rtn"),
    ),
    "more bits are worse": (
        lambda: swap(get("rtn"), "fn", lambda g, **o: RTN(g, **{**o, "bits": 10 - o["bits"]})),
        of(R.more_of_a_better_option_is_no_worse, "rtn"),
    ),
    "slices in the wrong place": (
        lambda: patch("weft.engine.run.stack", lambda parts, good=N.stack: good(parts[::-1])),
        of(R.slices_make_the_whole, "magnitude"),
    ),
    "the budget ignored": (
        lambda: swap(get("knapsack"), "fn", lambda cost, error, budget, **_: error.argmin(1)),
        of(S.the_budget_holds, "knapsack"),
    ),
    "greedy instead of exact": (
        lambda: swap(get("knapsack"), "fn", lambda cost, error, budget, **_: get("uniform").fn(cost, error, budget)),
        of(S.nothing_better_fits, "knapsack"),
    ),
    "noise that does not count": (
        lambda: swap(
            get("higgs"),
            "fn",
            lambda cost, error, budget, bench, **_: get("knapsack").fn(cost, bench.relative(), budget),
        ),
        of(S.nothing_better_fits, "higgs"),
    ),
    "cells that hold more than they do": (
        lambda: patch(
            "weft.methods.allocate.sensitivity.dynamic",
            lambda cost, error, budget, f=dynamic, **o: f(cost, error, budget + 40 * len(cost), **o),
        ),
        of(S.the_budget_holds, "sensitivity"),
    ),
    "outliers that do not count": (
        lambda: swap(get("owl"), "fn", lambda *problem, **o: OWL(*problem, **{**o, "spread": 0.0})),
        lambda: S.test_owl_follows_the_outliers(5000),
    ),
    "tables written to": (
        lambda: after_it(get("knapsack"), "fn", lambda made, cost, error, budget: error.zero_()[:, 0].long()),
        of(S.input_is_not_changed, "knapsack"),
    ),
    "the first member decides alone": (
        lambda: patch("weft.methods.merge.ties.elected", lambda votes: elected((w, d) for w, d in [*votes][:1])),
        lambda: M.test_the_formula_is_the_papers("ties", {}),
    ),
    "nothing trimmed": (
        lambda: patch("weft.methods.merge.ties.limit", lambda parts, rank: 0.0),
        lambda: M.test_the_formula_is_the_papers("ties", {}),
    ),
    "dropped and not scaled up": (
        lambda: swap(
            get("dare"), "fn", lambda s, *, drop, **o: DARE(s, drop=drop, **{**o, "scale": o["scale"] * (1 - drop)})
        ),
        M.test_dare_is_right_on_average,
    ),
    "members' weights ignored": (
        lambda: swap(get("soup"), "fn", lambda s: SOUP(dataclasses.replace(s, weights=(1.0,) * len(s.weights)))),
        of(M.one_alone_is_itself, "soup"),
    ),
    "a member written to": (
        lambda: swap(get("soup"), "fn", lambda s: s.dense(s.members[0].dense().detach().mul_(2) / 2)),
        of(M.input_is_not_changed, "soup"),
    ),
    "NaN dropped in silence": (
        lambda: swap(Sources, "_value", lambda self, e, label: e.dense().detach().nan_to_num(0, 0, 0)),
        of(M.not_a_number_is_named, "ties"),
    ),
    "the dtype of a member": (
        lambda: swap(
            Sources, "by_slices", lambda s, make, light=False: Dense(torch.cat([make(part) for part in s.slices()]))
        ),
        of(M.copies_give_it_back, "slerp"),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded(bug: str) -> None:
    """The law holds without the bug and breaks with it."""
    seed, law = BUGS[bug]
    law()
    with seed(), pytest.raises((AssertionError, pytest.fail.Exception)):
        law()


def test_the_bugs_do_not_stay() -> None:
    """Every patch was taken back: a plain round trip still works."""
    w = randn(rng("stay"), 4, 6)
    assert torch.equal(bits.unpack(bits.pack(codes(), 3), 3, 11), codes())
    assert torch.equal(Dense(w).take(slice(1, 3)).dense(), w[1:3])
