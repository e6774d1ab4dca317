"""Schedules: the gradients that they see, the optimizer's state that follows, and what each one chooses, by oracles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from jaxtyping import Float
from model import zoo
from tiny import build_tiny, make_batches
from torch import Tensor, nn

import weft
from weft.engine import schedules
from weft.engine.registry import apart
from weft.error import ConflictError, OptionError
from weft.expr import Basis, Dense, Expr, LowRank, SparseDelta, Sum
from weft.learn.data import Text
from weft.learn.schedule import Rewrites, Schedule, Trained
from weft.learn.scheduled import Scheduled
from weft.learn.train import train
from weft.learn.trainer import trainable
from weft.learn.watch import watched
from weft.linalg.masks import largest, largest_together
from weft.model import expressions, fork, set_expressions, weave
from weft.model.adapters import trained_terms

TEXTS = [Text(f"the {a} sat on the {b} mat .") for a in ("cat", "dog", "bird") for b in ("old", "red")]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(term: Expr, weight: Tensor | None = None) -> Trained:
    """A term as a schedule sees it."""
    base = Dense(torch.zeros(term.shape) if weight is None else weight)
    return Trained("w adapter:default", "adapter:default", term, {"base": base}, {"adapter:default": term})


def sparse(places: Sequence[int], values: Sequence[float], shape: tuple[int, int]) -> SparseDelta:
    """A sparse term whose values train."""
    empty = Trained("", "", Dense(torch.zeros(shape)), {})
    return empty.sparse(torch.tensor(places), torch.tensor(values))


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "resnet", "bert", "mixtral"])
@pytest.mark.parametrize("gate", [False, True])
def test_what_is_told_is_the_gradient_of_the_value(name: str, gate: bool) -> None:
    """Of every weight: linear, transposed, convolution, embedding, tied, experts; by any path, gated, in parts; as autograd has it."""
    model, oracle = (weave(build_tiny("llama-tied") if name == "tied" else zoo.build(name)) for _ in range(2))
    weft.apply(model, "sparse", rank=1, at="*")
    if gate:
        weft.activate(model, {"default": 0.5})
    set_expressions(
        oracle, {n: Dense(nn.Parameter(e.dense().detach().clone())) for n, e in expressions(oracle).items()}
    )
    seen: dict[str, Tensor] = {}

    def tell(site: str) -> Callable[[Tensor], None]:
        return lambda g: seen.__setitem__(site, seen.get(site, 0) + g)

    terms = trained_terms(model)
    for _ in range(2):
        with watched((t.term, tell(t.site)) for t in terms):
            loss(model, name).backward()
    loss(oracle, name).backward()
    want = {n: e.w.grad for n, e in expressions(oracle).items() if isinstance(e, Dense)}
    assert len(seen) > 3
    for site, g in want.items():
        if g is not None and site in seen:
            assert torch.allclose(
                seen[site], (1.0 if gate else 2.0) * g, rtol=1e-3, atol=1e-5 * float(g.abs().max()) + 1e-9
            )
    assert {n for n, g in want.items() if g is not None and bool(g.any())} <= set(seen)
    assert not any({"dense", "forward", "rows"} & set(t.term.__dict__) for t in terms)


def loss(model: nn.Module, name: str) -> Tensor:
    """Something that depends on everything."""
    out = model(**(make_batches(1)[0] if name == "tied" else zoo.batch(name)))
    value = next(v for k in ("logits", "last_hidden_state") if (v := getattr(out, k, None)) is not None)
    return (value * torch.linspace(-1, 1, value.numel()).view(value.shape)).sum()


@pytest.mark.parametrize(
    "term", [LowRank(torch.randn(6, 2), torch.randn(2, 9)), Basis(torch.randn(4), "cosine", 1, 6, 9)]
)
def test_nodes_of_every_kind_are_watched(term: Expr) -> None:
    """By products, looked-up rows and the dense value, once each."""
    for p in term.parameters():
        p.requires_grad_()
    seen: list[Tensor] = []
    x, ids, w = torch.randn(2, 5, 9), torch.tensor([[0, 3], [3, 5]]), torch.randn(6, 9)
    with watched([(term, seen.append)]):
        (term(x).sum() + (term.rows(ids) ** 2).sum() + (term.dense() * w).sum()).backward()
    v = term.dense().detach().requires_grad_()
    (torch.nn.functional.linear(x, v).sum() + (v[ids] ** 2).sum() + (v * w).sum()).backward()
    assert len(seen) == 3 and torch.allclose(sum(seen), v.grad, atol=1e-5)  # type: ignore[arg-type]


class Moves(Schedule):
    """Moves half of the places, those in the odd half of the list, at some steps, and keeps what it is told."""

    at: ClassVar[tuple[int, ...]] = (3, 6)

    def watches(self, step: int) -> bool:
        return step in (2, 5)

    def see(self, at: Trained, gradient: Float[Tensor, "m n"], step: int) -> None:
        if step == 2:
            at.nominate(gradient.abs(), 7)
        else:
            at.add("sum", gradient.flatten()[at.notes["nominated"]])

    def after(self, step: int, held: Sequence[Trained]) -> Rewrites:
        return {t.name: t.moved(other_places(t.entries(), t.term.shape)) for t in held} if step in self.at else {}


def other_places(held: Tensor, shape: tuple[int, int]) -> Tensor:
    """Every second place stays, the others move to the next one that is free."""
    taken = set(held.tolist())
    made = []
    for i, p in enumerate(held.tolist()):
        q = p
        while i % 2 and q in taken:
            q = (q + 1) % (shape[0] * shape[1])
        made.append(q)
        taken.add(q)
    return torch.tensor(made)


def small(words: Any, tiny: Any) -> nn.Module:
    """A model with sparse terms."""
    model = weave(tiny())
    weft.apply(model, "sparse", rank=1, at="all-linear")
    return model


def test_the_state_follows_the_entries(tiny: Any, words: Any) -> None:
    """AdamW of sparse terms whose places move is AdamW of dense ones of which those entries alone have gradients; who leaves is zero."""
    options: dict[str, Any] = {
        "tokenizer": words,
        "steps": 9,
        "batch": 2,
        "lr": 1e-2,
        "schedule": "constant",
        "clip": 0.0,
    }
    model = small(words, tiny)
    begun = {t.site: t.term for t in trained_terms(model)}
    places = {s: t.entries() for s, t in begun.items() if isinstance(t, SparseDelta)}
    history = train(model, TEXTS, during=lambda steps: Moves(), **options)
    dense = small(words, tiny)
    set_expressions(
        dense,
        {
            s: Sum({"base": e.named()["base"], "adapter:default": Dense(nn.Parameter(torch.zeros(e.shape)))})
            for s, e in expressions(dense).items()
            if isinstance(e, Sum)
        },
    )
    values = {t.site: next(t.term.parameters()) for t in trained_terms(dense)}
    masks = {s: torch.zeros(v.numel()).index_fill(0, places[s], 1.0).view(v.shape) for s, v in values.items()}

    class Masked(torch.optim.AdamW):
        done = 0

        def step(self, closure: Any = None) -> Any:
            for s, v in values.items():
                if v.grad is not None:
                    v.grad *= masks[s]
            made = super().step(closure)
            self.done += 1
            for s, v in values.items() if self.done in Moves.at else ():
                places[s] = other_places(places[s], tuple(v.shape)).sort().values
                new = torch.zeros(v.numel()).index_fill(0, places[s], 1.0).view(v.shape)
                stays = masks[s] * new
                masks[s] = new
                for t in (v.data, self.state[v]["exp_avg"], self.state[v]["exp_avg_sq"]):
                    t *= stays
            return made

    other = train(dense, TEXTS, optimizer=lambda p, lr: Masked(list(p.values()), lr=lr, weight_decay=0.0), **options)
    assert [x for _, x in history.losses] == pytest.approx([x for _, x in other.losses], rel=1e-4)
    for t in trained_terms(model):
        assert torch.equal(t.term.mask().float(), masks[t.site])  # type: ignore[union-attr]
        assert torch.allclose(t.term.dense(), values[t.site], rtol=1e-3, atol=1e-5), t.site


def test_a_parameter_of_the_same_shape_stays_the_same(tiny: Any, words: Any) -> None:
    """So that what holds it, holds it still; of another one the optimizer moves the new one."""
    model = small(words, tiny)
    before = trainable(model)
    train(model, TEXTS, tokenizer=words, steps=7, batch=2, during=lambda steps: Moves())
    assert all(p is before[n] for n, p in trainable(model).items())

    class Shrinks(Schedule):
        def after(self, step: int, held: Sequence[Trained]) -> Rewrites:
            return {t.name: t.moved(t.entries()[:-1]) for t in held}

    train(model, TEXTS, tokenizer=words, steps=3, batch=2, lr=1e-2, during=lambda steps: Shrinks())
    for t in trained_terms(model):
        assert isinstance(t.term, SparseDelta) and len(t.term.values) == sum(t.term.shape) - 3
    assert not any(p is before[n] for n, p in trainable(model).items())
    assert all(bool(p.any()) for p in trainable(model).values())


def test_notes_are_those_of_the_whole_batch(tiny: Any, words: Any) -> None:
    """Sums are of the batch's gradient, in one part or in several; every part nominates."""
    made = []
    for micro in (4, 2, 1):
        held: list[Scheduled] = []

        class Kept(Moves):
            at = ()

            def after(self, step: int, held: Sequence[Trained]) -> Rewrites:
                self.seen = {t.name: dict(t.notes) for t in held}
                return {}

        kept = Kept()
        train(
            small(words, tiny),
            TEXTS,
            tokenizer=words,
            steps=5,
            batch=4,
            micro_batch=micro,
            lr=1e-12,
            during=lambda _, k=kept: k,
        )
        made.append(kept.seen)
        del held
    for name, notes in made[0].items():
        assert len(notes["nominated"]) == 7
        for other in made[1:]:
            assert 7 <= len(other[name]["nominated"]) <= 28
            both = torch.isin(notes["nominated"], other[name]["nominated"])
            at = torch.searchsorted(other[name]["nominated"], notes["nominated"][both])
            assert torch.allclose(notes["sum"][both], other[name]["sum"][at], rtol=1e-2, atol=1e-5)


def test_largest_breaks_ties_by_place() -> None:
    """As a stable sort does, alone and together, with entries that are never chosen."""
    score = torch.randint(0, 4, (200,), generator=rng(0)).float()
    score[::7] = -torch.inf
    for count in (0, 1, 50, 120, 171, 500):
        order = score.sort(descending=True, stable=True).indices
        want = order[: min(count, int((score >= 0).sum()))].sort().values
        assert torch.equal(largest(score, count), want)
        parts = largest_together([score[:90], score[90:91], score[91:]], count)
        assert torch.equal(torch.cat([parts[0], parts[1] + 90, parts[2] + 91]), want)
    some = torch.rand(1000, generator=rng(1))
    assert torch.equal(
        torch.cat(largest_together([some[:1], some[1:]], 37)).shape and largest(some, 37),
        some.topk(37).indices.sort().values,
    )


def test_spiel_drops_the_least_changed_and_grows_by_gradient() -> None:
    """Candidates of the first step's largest gradients, chosen by the sum of the next ones'; as many as the share says."""
    schedule = schedules.named("spiel", every=10, over=2, share=0.5)(40)
    assert [s for s in range(1, 24) if schedule.watches(s)] == [1, 2, 3, 11, 12, 13, 21, 22, 23]
    at = trained(sparse([0, 5, 7, 11], [0.1, -3.0, 0.2, 1.0], (3, 4)))
    first = torch.zeros(12)
    first[[1, 2, 5, 6]] = torch.tensor([5.0, -6.0, 9.0, 4.0])
    later = [torch.zeros(12), torch.zeros(12)]
    later[0][[1, 2, 6, 3]], later[1][[1, 2, 6, 3]] = (
        torch.tensor([1.0, 2.0, -4.0, 99.0]),
        torch.tensor([2.0, -2.0, -1.0, 99.0]),
    )
    accelerator = Alone()
    for step, g in zip((11, 12, 13), (first, *later), strict=True):
        schedule.see(at, g.view(3, 4), step)
        accelerator.settle(at)
    made = schedule.after(13, [at])[at.name]
    count = int(0.5 * (1 - 13 / 40) * 4)
    assert count == 1 and isinstance(made, SparseDelta)
    assert made.entries().tolist() == [5, 6, 7, 11] and made.values.tolist() == pytest.approx([-3.0, 0.0, 0.2, 1.0])
    assert not at.notes and schedule.after(14, [at]) == {}
    for step, g in zip((1, 2, 3), (first, *later), strict=True):
        schedule.see(at, g.view(3, 4), step)
        accelerator.settle(at)
    made = schedule.after(3, [at])[at.name]
    assert made.entries().tolist() == [1, 2, 5, 6]
    assert made.values.tolist() == pytest.approx([0.0, 0.0, -3.0, 0.0])


def test_spiel_by_momentum_follows_sm3() -> None:
    """v = min(r, c) + g², r and c its largest of each row and column; the largest r c among free places grow. No gradient is watched."""
    schedule = schedules.named("spiel", every=5, over=1, by="momentum")(20)
    assert not any(schedule.watches(s) for s in range(1, 21))
    at = trained(sparse([0, 1, 5, 8], [1.0, 2.0, 3.0, 4.0], (3, 3)))
    v, r, c = torch.zeros(3, 3), torch.zeros(3), torch.zeros(3)
    for step in (7, 8, 9):
        g = torch.randn(4, generator=rng(step))
        at.values.grad = g
        assert schedule.after(step if step != 7 else 9, [at]) == {}
        dense, mask = torch.zeros(9).index_put((at.entries(),), g).view(3, 3), torch.zeros(9)
        mask[at.entries()] = 1
        v = (torch.minimum(r[:, None], c) + dense**2) * mask.view(3, 3)
        r, c = v.amax(1), v.amax(0)
        assert torch.allclose(at.notes["rows"], r) and torch.allclose(at.notes["columns"], c)
    at.values.grad = torch.zeros(4)
    made = schedules.named("spiel", every=5, over=1, by="momentum", share=1.0)(20).after(7, [at])[at.name]
    count = int((1 - 7 / 20) * 4)
    rc = (at.notes["rows"][:, None] * at.notes["columns"]).flatten()
    stays = at.entries()[at.values.abs().topk(4 - count).indices]
    rc[stays] = -1
    assert set(made.entries().tolist()) == {
        *stays.tolist(),
        *rc.sort(descending=True, stable=True).indices[:count].tolist(),
    }


def test_id3_takes_in_by_gradient_over_magnitude() -> None:
    """Over all weights, to i / n of the budget, what is in stays in; the last choice leaves a step to train."""
    schedule = schedules.named("id3", every=2, power=1.0, eps=0.5)(7)
    weights = [torch.randn(3, 4, generator=rng(1)), torch.randn(5, 2, generator=rng(2))]
    places = (sparse([0, 1, 2, 3], [0.0] * 4, (3, 4)), sparse([4, 5], [0.0] * 2, (5, 2)))
    held = [trained(t, w) for t, w in zip(places, weights, strict=True)]
    for i, at in enumerate(held):
        at.name = str(i)
    put(held, schedule.begin(held))
    assert [len(at.values) for at in held] == [0, 0]
    assert [s for s in range(1, 9) if schedule.watches(s)] == [1, 2, 3, 4, 5, 6]
    inside: set[tuple[int, int]] = set()
    for choice in (1, 2, 3):
        grads = [
            [torch.randn(w.shape, generator=rng(10 * choice + k + 5 * i)) for i, w in enumerate(weights)]
            for k in (0, 1)
        ]
        for k in (0, 1):
            for at, g in zip(held, grads[k], strict=True):
                schedule.see(at, g, 2 * choice - 1 + k)
                Alone().settle(at)
            if k == 0:
                assert schedule.after(2 * choice - 1, held) == {}
        scores: dict[tuple[int, int], tuple[float, float]] = {}
        for i, w in enumerate(weights):
            for p in range(w.numel()):
                if (i, p) not in inside:
                    size = float(w.abs().flatten()[p]) + 0.5
                    scores[i, p] = tuple(float(g[i].abs().flatten()[p]) / size for g in grads)  # type: ignore[assignment]
        nominated = {
            q for i in (0, 1) for q in sorted((q for q in scores if q[0] == i), key=lambda q: -scores[q][0])[:2]
        }
        inside |= set(sorted(nominated, key=lambda q: -scores[q][1])[:2])
        put(held, schedule.after(2 * choice, held))
        assert {(i, p) for i, at in enumerate(held) for p in at.entries().tolist()} == inside and len(
            inside
        ) == 2 * choice
    assert schedule.after(7, held) == {} and all(set(at.notes) == {"budget"} for at in held)


def put(held: Sequence[Trained], made: Rewrites) -> None:
    """Put new terms in place, as training does."""
    for at in held:
        if at.name in made:
            new = made[at.name]
            at.parts = new.named() if isinstance(new, Sum) else {at.role: new}
            at.term = at.parts[at.role]


def test_sara_goes_on_with_what_is_still_small() -> None:
    """The smallest weights first; halfway those that stayed within the largest of these magnitudes; at the end all in one."""
    schedule, w = schedules.named("sara", turn=0.5)(8), torch.tensor([[0.1, -2.0, 0.3], [-0.2, 0.05, 4.0]])
    at = trained(sparse([1, 2, 5, 0], [0.0] * 4, (2, 3)), w)
    put([at], schedule.begin([at]))
    assert at.entries().tolist() == [0, 2, 3, 4]
    at.values.data = torch.tensor([-0.1, 0.2, 0.6, -0.4])  # the weights become 0, 0.5, 0.4, -0.35; the limit is 0.3
    assert not any(schedule.watches(s) for s in range(1, 9)) and schedule.after(3, [at]) == {}
    put([at], schedule.after(4, [at]))
    assert at.entries().tolist() == [0] and at.values.tolist() == pytest.approx([-0.1])
    frozen = at.parts["adapter:default-start"]
    assert isinstance(frozen, SparseDelta) and frozen.frozen() and frozen.entries().tolist() == [2, 3, 4]
    at.values.data = torch.tensor([0.7])
    assert schedule.after(5, [at]) == {}
    put([at], schedule.after(8, [at]))
    assert at.entries().tolist() == [0, 2, 3, 4] and at.values.tolist() == pytest.approx([0.7, 0.2, 0.6, -0.4])
    with pytest.raises(ConflictError, match="begun already"):
        schedule.begin([at])


def test_lt_sft_keeps_what_moved_most() -> None:
    """Of all weights together, from zero again, and of what a pattern keeps."""
    schedule = schedules.named("lt_sft", full=0.25)(8)
    held = [trained(sparse([0, 1], [0.0] * 2, (2, 3))), trained(sparse([4], [0.0], (5, 2)))]
    for i, at in enumerate(held):
        at.name = str(i)
    put(held, schedule.begin(held))
    assert all(isinstance(at.term, Dense) and not bool(at.values.any()) for at in held)
    held[0].values.data = torch.tensor([[0.1, -0.9, 0.0], [0.2, 0.3, -0.1]])
    held[1].values.data = torch.linspace(-0.5, 0.45, 10).view(5, 2)
    assert schedule.after(1, held) == {}
    put(held, schedule.after(2, held))
    assert held[0].entries().tolist() == [1] and held[1].entries().tolist() == [0, 9]
    assert not any(bool(at.values.any()) or at.notes for at in held)


def test_sums_of_two_lt_sft_deltas(tiny: Any, words: Any) -> None:
    """Two trainings of one base add up to the base and both differences, and take no more than both."""
    base, made = weave(tiny()), []
    for name, data in (("task", TEXTS[:3]), ("tongue", TEXTS[3:])):
        model = fork(base)
        weft.apply(model, "sparse", rank=1, name=name, at="all-linear")
        train(model, data, tokenizer=words, steps=4, batch=2, lr=2e-2, during=schedules.named("lt_sft"))
        made.append({t.site: (t.role, t.term) for t in trained_terms(model)})
    both = fork(base)
    put_both = {s: Sum({"base": e, **dict(m[s] for m in made)}) for s, e in expressions(base).items() if s in made[0]}
    set_expressions(both, put_both)
    assert set(weft.adapters(both)) == {"task", "tongue"}
    for site, e in expressions(both).items():
        want = expressions(base)[site].dense() + sum(m[site][1].dense() for m in made if site in m)
        assert torch.allclose(e.dense(), want, atol=1e-6)
    weft.activate(both, "task")
    weft.activate(both, ["task", "tongue"])
    assert sum(bool(t.term.dense().any()) for t in trained_terms(both)) > 4


def test_relocate_goes_down_the_central_difference() -> None:
    """(L(p + 1) - L(p - 1)) / 2 for L = <G, value>, and so q; steps of a given root mean square, within the table, rounded."""
    m, n = 6, 9
    schedule = schedules.named("relocate", until=0.5, every=2, by=0.8)(8)
    assert [s for s in range(1, 9) if schedule.watches(s)] == [2, 4]
    at = trained(Basis(nn.Parameter(torch.zeros(5)), "cosine", 3, m, n, 0.7))
    first = at.term.dense
    put([at], schedule.begin([at]))
    with torch.no_grad():
        at.values.copy_(torch.randn(5, generator=rng(4)))
    assert torch.allclose(at.term.dense(), first(), atol=1e-6)  # the same parameter, the same places
    g, places = torch.randn(m, n, generator=rng(5)), torch.stack([at.term.p, at.term.q]).long()
    schedule.see(at, g, 2)
    Alone().settle(at)

    def wave(p: int, q: int) -> Tensor:
        i, j = torch.arange(m).double()[:, None] + 0.5, torch.arange(n).double() + 0.5
        return 0.7 * 2 * torch.cos(torch.pi * i * p / m) * torch.cos(torch.pi * j * q / n)

    want = torch.zeros(2, 5).double()
    for k, (p, q) in enumerate(places.T.tolist()):
        for axis, (a, b) in enumerate((((p + 1, q), (p - 1, q)), ((p, q + 1), (p, q - 1)))):
            want[axis, k] = float(at.values.detach()[k]) * float((g * (wave(*a) - wave(*b))).sum()) / 2
    assert torch.allclose(at.notes["slope"].double(), want, rtol=1e-4, atol=1e-5)
    held = at.values
    put([at], schedule.after(2, [at]))
    moved = places - 0.8 * want / want.square().mean().sqrt()
    moved = torch.stack([moved[0].clamp(0, m - 1), moved[1].clamp(0, n - 1)])
    assert torch.allclose(at.notes["places"].double(), moved, atol=1e-4) and at.values is held
    assert torch.equal(torch.stack([at.term.p, at.term.q]).double(), moved.round())
    other = trained(Basis(nn.Parameter(torch.zeros(5)), "fourier", 3, m, n))
    with pytest.raises(ConflictError, match="no places that move"):
        schedule.begin([other])


@pytest.mark.parametrize("name", ["spiel", "id3", "relocate"])
def test_a_term_that_is_not_used_stays_as_it_is(name: str, tiny: Any, words: Any) -> None:
    """An adapter that is off is not computed: it sees nothing, and no run breaks; the one that is on goes its way."""
    model, base = weave(tiny()), {"relocate": ("loca", {"count": 20})}.get(name, ("sparse", {"rank": 1}))
    for which in ("on", "off"):
        weft.apply(model, base[0], name=which, at="all-linear", **base[1])
    weft.activate(model, {"on": 0.5})
    options = {"spiel": {"every": 3, "over": 1}}.get(name, {})
    before = {(t.site, t.role): t.term.dense().detach() for t in trained_terms(model)}
    train(model, TEXTS, tokenizer=words, steps=6, batch=2, lr=2e-2, during=schedules.named(name, **options))
    for t in trained_terms(model):
        assert torch.equal(t.term.dense(), before[t.site, t.role]) == (t.role == "adapter:off")


def test_an_option_of_two_methods_has_one_of_their_names() -> None:
    """Without it, it is refused; what is no method's is left."""
    (moves, rewrites), rest = apart({"galore_every": 3, "spiel_every": 4, "over": 2, "lr": 1.0}, "galore", "spiel")
    assert (moves, rewrites, rest) == ({"every": 3}, {"every": 4, "over": 2}, {"lr": 1.0})
    assert apart({"every": 3, "lr": 1.0}, None, "spiel") == ([{}, {"every": 3}], {"lr": 1.0})
    with pytest.raises(OptionError, match="two methods"):
        apart({"every": 3}, "galore", "spiel")


class Alone:
    """What one process does with notes."""

    def settle(self, at: Trained) -> None:
        at.notes |= {k: at.notes[k] + v if k in at.notes and k != "nominated" else v for k, v in at.fresh.items()}
        at.fresh.clear()
