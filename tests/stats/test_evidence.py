"""Evidence: the sums that one walk collects are those of the plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.engine.run import Step, apply
from weft.error import ConflictError, NumericError
from weft.model import expressions, places, plain_tensors, weave
from weft.stats import Stats, Walker, collect, forward, objective
from weft.stats import evidence as module
from weft.stats.evidence import key

FAMILIES = ("llama", "llama-tied", "bert", "bert-mlm")


@pytest.fixture(scope="module")
def held(tiny: Any, batches: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stats]:
    """Evidence of padded batches, collected once a family."""
    made: dict[str, Stats] = {}

    def of(family: str) -> Stats:
        if family not in made:
            made[family] = collect(weave(tiny(family)), batches(), tmp_path_factory.mktemp(family))
        return made[family]

    return of


def inputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What every Linear of the plain model reads, in float64, padding left out."""
    seen: dict[str, list[Tensor]] = {}
    keep: list[Tensor] = []

    def hook(path: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].double()
            fits = x.shape[:-1] == keep[-1].shape
            seen.setdefault(path, []).append(x[keep[-1]] if fits else x.flatten(0, -2))

        return see

    hooks = [m.register_forward_pre_hook(hook(p)) for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for batch in batches:
            keep.append(batch["attention_mask"].bool())
            model(**batch)
    for h in hooks:
        h.remove()
    return {p: torch.cat(x) for p, x in seen.items()}


def test_gram_is_the_plain_models(family: str, tiny: Any, batches: Any, held: Any) -> None:
    """Gram, mean and mean absolute value of every Linear equal sums over the plain model's activations."""
    seen, checked = inputs(tiny(family), batches()), 0
    model = weave(tiny(family))
    for name, place in places(model).items():
        path = next((p for p in place.modules if p in seen), None)
        if path is None:
            continue
        x, e = seen[path], held(family).evidence([name])[name][0]
        want = x.T @ x / len(x)
        assert (e.gram.double() - want).abs().max() <= 1e-6 * want.abs().max(), name
        assert e.mean is not None and torch.allclose(e.mean.double(), x.mean(0), rtol=1e-5, atol=1e-6), name
        assert e.mean_abs is not None and torch.allclose(e.mean_abs.double(), x.abs().mean(0), rtol=1e-5), name
        assert e.most is not None and torch.allclose(e.most.double(), x.abs().amax(0), rtol=1e-5), name
        checked += 1
    assert checked == len(seen) > 10


def test_tokens_are_those_that_are_kept(family: str, batches: Any, held: Any) -> None:
    """Padding is no token."""
    want = sum(int(b["attention_mask"].sum()) for b in batches())
    assert held(family).tokens == want < sum(b["input_ids"].numel() for b in batches())


@pytest.mark.parametrize(
    ("family_", "together"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"o_proj"}, {"down_proj"}]),
        ("bert", [{"attention.self.query", "attention.self.key", "attention.self.value"}, {"intermediate.dense"}]),
    ],
)
def test_sites_that_read_one_tensor_are_one_group(family_: str, together: list[set[str]], held: Any) -> None:
    """q, k and v share an edge and its tensors; o does not."""
    stats = held(family_)
    for parts in together:
        group = next(g for g in stats.groups if any(n.removesuffix(".weight").endswith(tuple(parts)) for n in g))
        ends = [next(p for p in parts if n.removesuffix(".weight").endswith(p)) for n in group]
        assert set(ends) == parts and len(ends) == len(parts) and all(".0." in n for n in group)
        evidence = stats.evidence(group)
        assert len({id(evidence[n][0].gram) for n in group}) == 1


def test_every_site_is_in_one_group(family: str, tiny: Any, held: Any) -> None:
    """Groups are a partition of the sites, each with evidence of the site's shape."""
    model = weave(tiny(family))
    names = [n for g in held(family).groups for n in g]
    assert sorted(names) == sorted(places(model))
    for n, uses in held(family).evidence(names).items():
        m, k = expressions(model)[n].shape
        assert uses and all(e.gram.shape == (k, k) and e.weight.shape == (m,) for e in uses), n


def test_a_tied_weight_has_two_uses(held: Any) -> None:
    """As a head: inputs and output gradients; as an embedding: look-ups and gradients of what was looked up."""
    uses = held("llama-tied").evidence(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert len(uses) == 2 and uses[0].mean is not None and uses[1].mean is None
    assert float(uses[1].weight.sum()) == pytest.approx(1, abs=1e-6)
    apart = held("llama")
    assert [len(apart.evidence([n])[n]) for n in ("model.embed_tokens.weight", "lm_head.weight")] == [1, 1]


def test_lookups_count_tokens(tiny: Any, batches: Any, tmp_path: Path) -> None:
    """Without gradients, a row's weight is the share of look-ups, and the Gram is the identity."""
    model, data = weave(tiny()), batches(pad=False)
    stats = collect(model, data, tmp_path, gradient=False)
    (e,) = stats.evidence(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    ids = torch.cat([b["input_ids"].flatten() for b in data])
    assert torch.allclose(e.weight, torch.bincount(ids, minlength=96) / len(ids))
    assert torch.equal(e.gram, torch.eye(32))
    (head,) = stats.evidence(["lm_head.weight"])["lm_head.weight"]
    assert torch.equal(head.weight, torch.ones(96))


def test_lookups_leave_out_padding(family: str, tiny: Any, batches: Any, tmp_path: Path) -> None:
    """Every table's shares, of positions and token types too, are the same with and without a backward pass."""
    model, data = weave(tiny(family)), batches()
    a, b = (collect(model, data, tmp_path, gradient=g) for g in (True, False))
    tables = [n for n, p in places(model).items() if p.kind == "embedding"]
    assert len(tables) == (3 if family.startswith("bert") else 1)
    for n in tables:
        assert torch.equal(a.evidence([n])[n][-1].weight, b.evidence([n])[n][-1].weight), n


@pytest.mark.parametrize("family_", FAMILIES)
def test_gradients_are_autograds(family_: str, tiny: Any, batches: Any, tmp_path: Path) -> None:
    """Row weights equal the squared output gradients of a direct pass over one batch with the same probe."""
    (batch,) = batches(1, rows=3)
    stats = collect(weave(tiny(family_)), [batch], tmp_path, seed=4)
    model, goal, rng = tiny(family_), objective(weave(tiny(family_))), torch.Generator().manual_seed(4)
    total: dict[str, Tensor] = {}
    outs: dict[str, Tensor] = {}
    for p, m in model.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda _m, _a, out, p=p: outs.__setitem__(p, out))
    units = 0
    for i in range(3):
        length = int(batch["attention_mask"][i].sum())
        one = {k: v[i : i + 1, :length] for k, v in batch.items()}
        vectors = goal.vectors(forward(model, one), one)
        units += len(vectors)
        grads = torch.autograd.grad(goal.probe(vectors, rng), list(outs.values()), allow_unused=True)
        for (path, out), g in zip(outs.items(), grads, strict=True):
            g = torch.zeros_like(out) if g is None else g
            total[path] = total.get(path, torch.zeros(())) + g.double().flatten(0, -2).square().sum(0)
    assert stats.units == units
    woven = weave(tiny(family_))
    checked = 0
    for name, place in places(woven).items():
        path = next((p for p in place.modules if p in total), None)
        if path is not None:
            found, want = stats.evidence([name])[name][0].weight.double(), total[path] / units
            assert (found - want).abs().max() <= 1e-4 * want.abs().max(), name
            checked += bool(want.any())
    assert checked > 10


def test_embedding_gradients_are_autograds(tiny: Any, batches: Any, tmp_path: Path) -> None:
    """The Gram of the gradient at an embedding's output, and the share of look-ups."""
    (batch,) = batches(1, rows=2, pad=False)
    stats = collect(weave(tiny()), [batch], tmp_path, seed=2)
    model, goal, rng = tiny(), objective(tiny()), torch.Generator().manual_seed(2)
    gram = torch.zeros(32, 32, dtype=torch.float64)
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        x = model.model.embed_tokens(one["input_ids"]).detach().requires_grad_()
        out = model(inputs_embeds=x, attention_mask=one["attention_mask"]).logits
        (g,) = torch.autograd.grad(goal.probe(goal.vectors(out, one), rng), x)
        gram += g[0].double().T @ g[0].double()
    (e,) = stats.evidence(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert (e.gram - gram / stats.units).abs().max() <= 1e-4 * gram.abs().max() / stats.units
    assert torch.allclose(
        e.weight, torch.bincount(batch["input_ids"].flatten(), minlength=96) / batch["input_ids"].numel()
    )


def test_evidence_is_collected_once(tiny: Any, batches: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A second call reads what the first wrote: neither the walker nor the backward pass runs."""
    first = collect(weave(tiny()), batches(), tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "Walker", refuse)
    monkeypatch.setattr(module, "gradients", refuse)
    again = collect(weave(tiny()), batches(), tmp_path)
    assert again.groups == first.groups and again.tokens == first.tokens
    with pytest.raises(AssertionError, match="computed again"):
        collect(weave(tiny()), batches(seed=1), tmp_path)


def test_an_interrupted_collection_starts_over(tiny: Any, batches: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Half a collection is no evidence: what a later call gives equals a straight one."""
    step = Walker.step

    def stop(self: Walker, block: int, *args: Any, **named: Any) -> None:
        if block == 1:
            raise KeyboardInterrupt
        step(self, block, *args, **named)

    with monkeypatch.context() as m:
        m.setattr(Walker, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            collect(weave(tiny()), batches(), tmp_path / "a")
    a, b = (collect(weave(tiny()), batches(), tmp_path / p) for p in ("a", "b"))
    names = [n for g in b.groups for n in g]
    x, y = a.evidence(names), b.evidence(names)
    assert all(
        torch.equal(p.gram, q.gram) and torch.equal(p.weight, q.weight)
        for n in names
        for p, q in zip(x[n], y[n], strict=True)
    )


CHANGES: dict[str, Callable[[Any, Any], tuple[Any, Any, int, bool]]] = {
    "data": lambda tiny, batches: (weave(tiny()), batches(seed=1), 0, True),
    "fewer batches": lambda tiny, batches: (weave(tiny()), batches()[:2], 0, True),
    "mask": lambda tiny, batches: (
        weave(tiny()),
        [{**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in batches()],
        0,
        True,
    ),
    "shape": lambda tiny, batches: (
        weave(tiny()),
        [{k: v.flatten()[None] for k, v in b.items()} for b in batches()],
        0,
        True,
    ),
    "seed": lambda tiny, batches: (weave(tiny()), batches(), 1, True),
    "gradient": lambda tiny, batches: (weave(tiny()), batches(), 0, False),
    "model": lambda tiny, batches: (weave(tiny(seed=1)), batches(), 0, True),
    "dtype": lambda tiny, batches: (weave(tiny(dtype=torch.bfloat16)), batches(), 0, True),
    "rewritten": lambda tiny, batches: (rewritten(tiny()), batches(), 0, True),
    "heads": lambda tiny, batches: (weave(tiny(num_attention_heads=2, num_key_value_heads=1)), batches(), 0, True),
    "rope": lambda tiny, batches: (
        weave(tiny(rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
        batches(),
        0,
        True,
    ),
    "epsilon": lambda tiny, batches: (weave(tiny(rms_norm_eps=0.1)), batches(), 0, True),
}


def rewritten(model: nn.Module) -> nn.Module:
    """The model with one site on a grid."""
    apply(weave(model), [Step.of("rtn")], at="layers.1.*.up_proj")
    return model


@pytest.mark.parametrize("what", CHANGES)
def test_the_address_changes_with(what: str, tiny: Any, batches: Any) -> None:
    """Another model (its values or what its configuration computes with them), data or seed has another address."""
    model, data, seed, gradient = CHANGES[what](tiny, batches)
    assert key(model, data, seed, gradient) != key(weave(tiny()), batches(), 0, True)


def test_the_address_is_stable(tiny: Any, batches: Any) -> None:
    """The same content has the same address, whatever the order of a batch's entries."""
    turned = [dict(reversed(b.items())) for b in batches()]
    assert key(weave(tiny()), turned, 0, True) == key(weave(tiny()), batches(), 0, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("at", ["matrix", "plain"])
def test_values_that_are_not_finite_stop_the_run(
    at: str, gradient: bool, value: float, family: str, tiny: Any, batches: Any, tmp_path: Path
) -> None:
    """NumericError with a site's name, and no index that a later run would trust."""
    model = weave(tiny(family))
    target = (
        next(e.w for n, e in expressions(model).items() if "1" in n)
        if at == "matrix"
        else next(t for n, t in plain_tensors(model).items() if "1" in n and t.is_floating_point())
    )
    target.data.reshape(-1)[3] = value
    with pytest.raises(NumericError) as e:
        collect(model, batches(), tmp_path, gradient=gradient)
    assert any(str(e.value.where).startswith(n.removesuffix(".weight")) for n in places(model))
    assert not list(tmp_path.rglob("index.json"))


@pytest.mark.parametrize("pad", [False, True])
def test_replay_is_the_direct_forward(pad: bool, family: str, tiny: Any, batches: Any, run: Any) -> None:
    """Block by block, the output is that of one call, bit for bit, for every batch."""
    model, data = weave(tiny(family, layers=3)), batches(pad=pad)
    walker = Walker(model, data)
    for i in range(len(walker.blocks)):
        walker.step(i)
    assert len(walker.blocks) == 3
    assert all(torch.equal(out, run(model, b)) for out, b in zip(walker.finish(), data, strict=True))


def test_replay_of_the_reference_model(ref_lm: Path) -> None:
    """The shipped model, batches of different lengths."""
    from weft.store import load

    model = load(ref_lm)
    data = [{"input_ids": torch.arange(n)[None] % 4096 + 2} for n in (7, 33)]
    walker = Walker(model, data)
    for i in range(len(walker.blocks)):
        walker.step(i)
    with torch.no_grad():
        assert all(torch.equal(out, model(**b).logits) for out, b in zip(walker.finish(), data, strict=True))


def test_the_walker_leaves_the_model_alone(family: str, tiny: Any, batches: Any, run: Any, tmp_path: Path) -> None:
    """No hook, replaced forward, gradient or trainable flag stays behind."""
    model, data = weave(tiny(family)), batches()
    before = run(model, data[0])
    collect(model, data, tmp_path)
    for m in model.modules():
        assert "forward" not in m.__dict__ and not m._forward_hooks and not m._forward_pre_hooks
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert torch.equal(run(model, data[0]), before)


def test_a_model_that_cannot_be_replayed_is_refused(tiny: Any, batches: Any) -> None:
    """Blocks that pass something on beside the hidden state give ConflictError, not wrong sums."""
    model = weave(tiny())
    memory: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        memory.append(args[0])

    def mix(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + memory.pop(0) * len(memory) if memory else out

    model.model.layers[0].register_forward_pre_hook(remember)
    model.model.norm.register_forward_hook(mix)
    with pytest.raises(ConflictError):
        Walker(model, batches())


def test_cost_is_the_kl_of_small_errors(ref_lm: Path, tmp_path: Path) -> None:
    """Rounding the reference model to 8 and 6 bits costs what the evidence predicts, within 15 %."""
    from transformers import AutoTokenizer

    from weft.lab.corpora import HELD_OUT, python_source
    from weft.learn.data import encode
    from weft.model import fork, site
    from weft.store import load

    tokenizer = AutoTokenizer.from_pretrained(ref_lm)
    rows = [
        e.input_ids for e in encode(python_source(HELD_OUT, 60_000), tokenizer, length=128) if len(e.input_ids) == 128
    ][:12]
    data = [{"input_ids": torch.tensor(rows[i : i + 6])} for i in range(0, len(rows), 6)]
    model = load(ref_lm)
    stats = collect(model, data, tmp_path)
    evidence = stats.evidence(list(places(model)))
    for bits in (8, 6):
        other = fork(model)
        apply(other, [Step.of("rtn", bits=bits)])
        predicted = sum(site(model, n, evidence=evidence[n]).cost(e) for n, e in expressions(other).items())
        goal, total = objective(model), 0.0
        for b in data:
            with torch.no_grad():
                total += float(
                    goal.distance(
                        goal.vectors(forward(other, b), b).double(), goal.vectors(forward(model, b), b).double()
                    ).sum()
                )
        measured = total / sum(b["input_ids"].numel() for b in data)
        assert predicted == pytest.approx(measured, rel=0.15), bits
