"""Taps: what they do to an activation, who shares them, and that a model with taps lives as any other does."""

from __future__ import annotations

import copy
import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.engine.propagate import propagate
from weft.engine.run import Step, apply, group_of, relative_error
from weft.engine.run import run as run_chain
from weft.error import ConflictError, NumericError, OptionError, ShapeError
from weft.expr import Dense, Hadamard, LowRank, Quantized, Sum, terms_of
from weft.grid import GRIDS
from weft.linalg.grids import minmax, nearest, rounded
from weft.model import (
    Rounding,
    Tap,
    expressions,
    fingerprint,
    fork,
    match,
    places,
    set_taps,
    site,
    taps,
    untap,
    unweave,
    weave,
)  # fmt: skip
from weft.model import taps as on
from weft.model.taps import _LAST
from weft.stats import Edges, Walker, collect, readers

from . import zoo

TURN, TOKEN = Step.of("online_hadamard"), Step.of("act_quant")
CHAINS: dict[str, tuple[Step, ...]] = {
    "turned": (TURN,),
    "tokens": (TOKEN,),
    "mxfp4": (Step.of("act_quant", grid="fp4", group=32, scale="e8m0"),),
    "nvfp4": (Step.of("act_quant", grid="fp4", group=16, scale="e4m3"),),
    "tensors": (Step.of("act_quant", grid="fp8_e4m3", per="tensor"),),
    "turned tokens": (TURN, Step.of("act_quant", grid="int4")),
    "w8a8": (TOKEN, Step.of("rtn", bits=8, group=0)),
    "w4a4": (TURN, Step.of("rtn", bits=4, group=0), Step.of("act_quant", grid="int4")),
}
every = pytest.mark.parametrize("kind", CHAINS)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    """Tokens of very different size, one of zeros, with an outlier feature."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=rng) * torch.randn(*shape[:-1], 1, generator=rng).exp()
    x[..., 0] *= 30
    x[0] = 0
    return x


def as_weight(x: Tensor, grid: str, group: int = 0, scale: str = "bf16") -> Tensor:
    """The values of the node that rounds these tokens as a weight."""
    fit = minmax(x, grid, group, True, scale)
    return fit.encode(nearest(x, fit)).dense()


def tapped(kind: str, tiny: Any, family: str = "llama") -> Any:
    """A tiny model with these taps on every linear layer but the head."""
    model = weave(tiny(family))
    apply(model, CHAINS[kind], at="all-linear")
    return model


# ------------------------------------------------------------------------------------------------------------ the values


@pytest.mark.parametrize("scale", ["bf16", "e8m0", "e4m3", "uint8"])
@pytest.mark.parametrize("group", [0, 5, 16, 32, 100])
@pytest.mark.parametrize("grid", GRIDS)
def test_tokens_are_rounded_as_the_rows_of_a_weight(grid: str, group: int, scale: str) -> None:
    """Bit for bit what the node of the same grid holds, whatever the shape of the batch."""
    x, tap = inputs(3, 7, 33), Tap((), Rounding(grid, "token", group, scale))
    assert torch.equal(tap(x), as_weight(x.view(-1, 33), grid, group, scale).view(x.shape))


@pytest.mark.parametrize("grid", GRIDS)
def test_tensors_are_rounded_under_one_scale(grid: str) -> None:
    """Dynamic: that of all that is read at once. Static: the one that was given, beyond which values are cut off."""
    x = inputs(3, 7, 33)
    assert torch.equal(Tap((), Rounding(grid, "tensor"))(x), as_weight(x.view(1, -1), grid).view(x.shape))
    reach = float(x.abs().max())
    still = Rounding.static(grid, reach)
    if grid != "sign":  # its scale is a mean, not a range
        assert torch.equal(Tap((), still)(x), as_weight(x.view(1, -1), grid).view(x.shape))
    assert torch.equal(still(2 * x.clamp(min=0)).amax(), still(x.abs()).amax())
    assert torch.equal(still(x[:1, :2]), still(x)[:1, :2])  # it depends on no other token


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", ["int8", "int4", "fp8_e4m3"])
def test_the_inputs_dtype_is_kept(grid: str, dtype: torch.dtype) -> None:
    """What comes out is the float32 result, rounded once to the dtype."""
    x = inputs(5, 16).to(dtype)
    made = Tap((), Rounding(grid))(x)
    assert made.dtype == dtype and torch.equal(made, as_weight(x.float(), grid).to(dtype))


@pytest.mark.parametrize(
    "rounding", [Rounding("int8"), Rounding("fp4", "token", 16, "e4m3"), Rounding("int8", "tensor")]
)
def test_what_is_not_finite_stays_visible(rounding: Rounding) -> None:
    """NaN and infinity do not become numbers; with a scale of its own another token is as it was; no token is none."""
    for bad in (float("nan"), float("inf")):
        x = inputs(4, 32)
        want = rounding(x.clone())
        x[2, 3] = bad
        made = Tap((), rounding)(x)
        assert not torch.isfinite(made[2, 3])
        assert rounding.per != "token" or torch.equal(made[[0, 1, 3]], want[[0, 1, 3]])
    assert Tap((), rounding)(torch.empty(0, 32)).shape == (0, 32)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("block", [1, 4, 32])
def test_turns_are_orthogonal_and_undone(block: int, signs: bool) -> None:
    """tap(x) = x Hᵀ, `back` is its inverse, and so it is for two turns."""
    rng = torch.Generator().manual_seed(1)
    one, two = (Hadamard.of(torch.randn(32, generator=rng).sign() if signs else torch.ones(32), b) for b in (block, 8))
    x = torch.randn(5, 32, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(Tap((one,))(x), x @ one.dense().double().T, rtol=1e-6, atol=1e-6)
    both = Tap((one, two))
    torch.testing.assert_close(both(x), x @ one.dense().double().T @ two.dense().double().T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both.back(both.turned(x)), x, rtol=1e-12, atol=1e-12)


def test_gradients_go_straight_through_roundings_and_back_through_turns() -> None:
    """d tap(x) = d(H x): exact for a turn, as if nothing were rounded for a rounding, cut off or not."""
    h, weigh = Hadamard.of(torch.randn(32).sign()), torch.randn(5, 32)
    for rounding in (None, Rounding("int4"), Rounding("fp4", "token", 16, "e4m3"), Rounding.static("int4", 0.01)):
        x = torch.randn(5, 32, requires_grad=True)
        (Tap((h,), rounding)(x) * weigh).sum().backward()
        torch.testing.assert_close(x.grad, weigh @ h.dense(), rtol=1e-5, atol=1e-5)
        x.grad = None
        tap = Tap((h,), rounding)
        for _ in range(2):  # the same input again, after its first graph is gone
            (tap(x) * weigh).sum().backward()
        torch.testing.assert_close(x.grad, 2 * weigh @ h.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"grid": "int99"}, OptionError), ({"grid": "int8", "per": "row"}, OptionError), ({"grid": "int8", "scale": "f8"}, OptionError),
        ({"grid": "int8", "group": -1}, ShapeError), ({"grid": "int8", "group": True}, ShapeError), ({"grid": 8}, ShapeError),
        ({"grid": "int8", "per": "tensor", "group": 4}, ShapeError), ({"grid": "int8", "per": "static"}, ShapeError),
        ({"grid": "int8", "data": torch.zeros(2, dtype=torch.uint8)}, ShapeError),
        ({"grid": "int8", "per": "static", "data": torch.zeros(2)}, ShapeError),
        ({"grid": "int8", "per": "static", "data": torch.zeros(2, dtype=torch.uint8)}, NumericError),
        ({"grid": "int8", "per": "static", "data": torch.tensor([192, 127], dtype=torch.uint8)}, NumericError),
    ],
)  # fmt: skip
def test_what_is_no_rounding_is_refused(given: dict[str, Any], error: type[Exception]) -> None:
    """Unknown names, granularities without a meaning, scales that are none."""
    with pytest.raises(error):
        Rounding(**given)


def test_what_is_no_tap_is_refused() -> None:
    """Turns are Hadamard nodes of one size."""
    one, two = Hadamard.of(torch.ones(8)), Hadamard.of(torch.ones(16))
    for turn in ((Dense(torch.eye(8)),), (one, two)):
        with pytest.raises(ShapeError, match="no tap"):
            Tap(turn)


# ------------------------------------------------------------------------------------------------------------- the edges


def test_readers_of_one_input_share_one_tap(tiny: Any) -> None:
    """q, k and v; gate and up; and no others."""
    model = tapped("w8a8", tiny)
    shared = [
        {n.split(".")[-2] for n in group} for _, group in itertools.groupby(taps(model), lambda n: id(taps(model)[n]))
    ]
    assert shared == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}] * 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral", "deepseek", "mamba2"])
def test_turned_models_compute_the_same(name: str) -> None:
    """Every linear layer of every kind of model reads turned inputs, and the output stays."""
    model = weave(zoo.build(name))
    with torch.no_grad():
        want = zoo.output(model, zoo.batch(name))
        _, notes = apply(model, [TURN], at=[n for n in match(model, "all-linear") if model_allows(model, n)])
        made = zoo.output(model, zoo.batch(name))
    assert len(taps(model)) >= 4 and not notes
    torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(made, want)


def model_allows(model: nn.Module, name: str) -> bool:
    """Whether a site is a linear layer's alone."""
    place = places(model)[name]
    return not any(isinstance(model.get_submodule(p), nn.Embedding) for p in place.modules)


def test_without_token_ids_every_site_has_its_own_tap() -> None:
    """Which is declared, and computes the same."""
    model = weave(zoo.build("vit"))
    assert readers(model) is None
    want = zoo.output(model, zoo.batch("vit")).detach()
    _, notes = apply(model, [TURN], at="all-linear")
    assert [where for where, _ in notes] == ["ViTForImageClassification"]
    assert len({id(t) for t in taps(model).values()}) == len(taps(model))
    torch.testing.assert_close(zoo.output(model, zoo.batch("vit")), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", ["model.embed_tokens", "lm_head", "*"])
def test_embeddings_and_what_is_tied_to_them_have_no_taps(at: str, tiny: Any) -> None:
    """They are refused by name before anything changes."""
    model = weave(tiny("llama-tied" if at == "lm_head" else "llama"))
    mark = fingerprint(model)
    with pytest.raises((ConflictError, OptionError), match=r"embed_tokens|lm_head"):
        apply(model, [TOKEN], at=at)
    assert fingerprint(model) == mark and not taps(model)


def test_convolutions_have_no_taps() -> None:
    """Their patches overlap."""
    model = weave(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ConflictError, match="patches"):
        apply(model, [TOKEN])


def test_a_turn_of_another_size_is_refused(tiny: Any) -> None:
    """Before any tap is put on."""
    model = weave(tiny())
    tap = Tap((Hadamard.of(torch.ones(32)),))
    names = match(model, ["*.0.self_attn.q_proj", "*.0.mlp.down_proj"])
    with pytest.raises(ShapeError, match=r"down_proj"):
        set_taps(model, dict.fromkeys(names, tap))
    assert not taps(model)


def test_a_tap_computes_once_for_all_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the input is the same tensor and unchanged; and it keeps neither alive."""
    calls: list[int] = []
    fit = Rounding.fit
    monkeypatch.setattr(Rounding, "fit", lambda self, rows: calls.append(1) or fit(self, rows))
    for tap in (Tap((), Rounding("int8")), Tap((Hadamard.of(torch.ones(32)),), Rounding("fp4"))):
        calls.clear()
        x = inputs(4, 32)
        assert tap(x) is tap(x) and len(calls) == 1
        old = tap(x).clone()
        x.mul_(2)
        assert torch.equal(tap(x), 2 * old) and len(calls) == 2
        assert torch.equal(tap(x.clone()), 2 * old) and len(calls) == 3
        y = x.clone().requires_grad_()
        with torch.no_grad():
            assert not tap(y).requires_grad
        assert tap(y).requires_grad
        with torch.inference_mode():
            z = inputs(4, 32)
            assert torch.equal(tap(z), tap(z))
        tap(x)
        assert tap in _LAST
        del x
        gc.collect()
        assert tap not in _LAST


def test_evidence_is_that_of_what_is_read(tiny: Any, batches: Any, tmp_path: Path) -> None:
    """The Gram of a tapped site is that of the tapped input, and sites that share a tap share it."""
    model = tapped("turned tokens", tiny)
    name = "model.layers.1.mlp.gate_proj.weight"
    seen: list[Tensor] = []
    module = model.get_submodule(name.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda m, a: seen.append(m.tap(a[0])[m.keep]))
    with torch.no_grad():
        for b in batches():
            module.keep = b["attention_mask"].bool()
            model(**b)
    hook.remove()
    stats = collect(model, batches(), tmp_path)
    e, x = stats.evidence([name])[name][0], torch.cat(seen).double()
    torch.testing.assert_close(e.gram.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-5)
    assert e.most is not None and torch.equal(e.most.double(), x.abs().amax(0))
    assert any({"gate_proj", "up_proj"} == {n.split(".")[-2] for n in g} for g in stats.groups)
    assert stats.folder != collect(weave(tiny()), batches(), tmp_path).folder
    edges = Edges()
    Walker(model, batches()).step(0, edges)
    assert len(edges.sums) == 4


def test_a_measured_scale_covers_the_calibration_data(tiny: Any, batches: Any, run: Any, tmp_path: Path) -> None:
    """It is that of the largest entry any reader was given: nothing of the data is cut off."""
    model, data = weave(tiny()), batches(pad=False)
    stats = collect(model, data, tmp_path)
    apply(model, [Step.of("act_quant_static")], at="all-linear", stats=stats)
    for name, tap in taps(model).items():
        reach = stats.evidence([name])[name][0].most
        assert tap.round is not None and reach is not None
        assert float(tap.round._static()) == pytest.approx(float(reach.max()) / 127, rel=2**-8)
    first = model.get_submodule(next(iter(taps(model))).removesuffix(".weight"))
    gaps: list[float] = []
    first.register_forward_pre_hook(lambda m, a: gaps.append(float((m.tap(a[0]) - a[0]).abs().max())))
    for batch in data:
        run(model, batch)
    step = float(first.tap.round._static())
    assert 0 < max(gaps) <= step * (0.5 + 127 * 2**-8)  # half a step, and what the scale lost in bfloat16 at the end
    with pytest.raises(OptionError, match="calibration"):
        apply(weave(tiny()), [Step.of("act_quant_static")], at="all-linear")


# --------------------------------------------------------------------------------------------------------- the life cycle


@every
def test_a_tapped_model_is_saved_loaded_copied_and_forked(kind: str, tiny: Any, batches: Any, tmp_path: Path) -> None:
    """Bit for bit, with one object an edge; a copy does not change the first."""
    model, batch = tapped(kind, tiny), batches(1)[0]
    want, mark, told = zoo.output(model, batch), fingerprint(model), [r.input for r in weft.show(model)]
    weft.save(model, tmp_path / "out")
    loaded = weft.load(tmp_path / "out")
    for other in (loaded, copy.deepcopy(model), fork(model), fork(loaded)):
        assert torch.equal(zoo.output(other, batch), want) and fingerprint(other) == mark
        assert [r.input for r in weft.show(other)] == told
        assert len({id(t) for t in taps(other).values()}) == 8 and not set(taps(other).values()) & set(
            () if other is model else taps(model).values()
        )
    other = fork(model)
    untap(other)
    other.to(torch.bfloat16)
    assert torch.equal(zoo.output(model, batch), want) and fingerprint(model) == mark
    assert weft.verify(tmp_path / "out") == []
    assert fingerprint(model) != fingerprint(weave(tiny()))


@every
def test_another_dtype_changes_no_tap(kind: str, tiny: Any, batches: Any) -> None:
    """Signs and measured scales are bytes; a half-precision model computes nearly the same."""
    model, batch = tapped(kind, tiny), batches(1)[0]
    want = [t.describe() for t in taps(model).values()]
    before = {n: [b.clone() for b in t.buffers()] for n, t in taps(model).items()}
    model.to(torch.bfloat16)
    assert [t.describe() for t in taps(model).values()] == want
    assert all(torch.equal(a, b) for n, t in taps(model).items() for a, b in zip(before[n], t.buffers(), strict=True))
    assert zoo.output(model, batch).dtype == torch.bfloat16


@every
def test_an_adapter_trains_behind_taps(kind: str, tiny: Any, batches: Any, tmp_path: Path) -> None:
    """A few steps lower the loss, move the adapter alone, and come back from disk."""
    model, batch = tapped(kind, tiny), batches(1)[0]
    mark = {n: t.describe() for n, t in taps(model).items()}
    apply(model, [Step.of("lora", rank=2)], at="all-linear")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"]).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] and {n: t.describe() for n, t in taps(model).items()} == mark
    model.requires_grad_(False)
    weft.save(model, tmp_path / "out")
    assert torch.equal(zoo.output(weft.load(tmp_path / "out"), batch), zoo.output(model, batch))


def test_turns_fold_into_plain_weights(tiny: Any, batches: Any, run: Any, tmp_path: Path) -> None:
    """Unweave, untap and an ordinary checkpoint give the first function again; so does reading `.weight`."""
    want, batch = run(tiny(), batches(1)[0]), batches(1)[0]
    plain = {n: p.detach() for n, p in tiny().named_parameters()}
    models = [tapped("turned", tiny) for _ in range(3)]
    for name in taps(models[0]):
        module = models[0].get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(module.weight.detach() + 0, plain[name], rtol=1e-5, atol=1e-5)
    untap(models[0])
    assert not taps(models[0]) and all(isinstance(e, Dense) for e in expressions(models[0]).values())
    weft.export(models[1], tmp_path / "hf")
    for model in (models[0], unweave(models[2]), weft.load(tmp_path / "hf")):
        torch.testing.assert_close(run(model, batch), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(unweave(tapped("w4a4", tiny), original=True), batch), want)


@pytest.mark.parametrize("base", ["rtn", "magnitude", "nf4"])
def test_what_is_no_plain_weight_keeps_its_codes_behind_a_turn(base: str, tiny: Any, batches: Any, run: Any) -> None:
    """It turns its input back, its trained adapter is turned with it, and taking the tap off leaves the function too."""
    model, batch = weave(tiny()), batches(1)[0]
    apply(model, [Step.of(base), Step.of("lora", rank=2)], at="all-linear")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("adapter:default.b"):
                p.normal_(generator=torch.Generator().manual_seed(2), std=0.1)
    want, before = run(model, batch), expressions(model)
    apply(model, [TURN], at="all-linear")
    torch.testing.assert_close(run(model, batch), want, rtol=1e-4, atol=1e-4)
    for name in taps(model):
        now = terms_of(expressions(model)[name])
        kept = {id(b) for b in terms_of(before[name])["base"].buffers()}
        assert kept <= {id(b) for b in now["base"].buffers()} and isinstance(now["adapter:default"], LowRank)
        assert now["adapter:default"].a.requires_grad
    untap(model)
    torch.testing.assert_close(run(model, batch), want, rtol=1e-4, atol=1e-4)


def test_roundings_end_when_they_are_taken_off(tiny: Any, batches: Any, run: Any) -> None:
    """At the sites that are named; the others keep theirs."""
    model, plain = tapped("tokens", tiny), weave(tiny())
    assert untap(model, "*.mlp.*") == [n for n in places(model) if ".mlp." in n] and len(taps(model)) == 8
    untap(model)
    assert torch.equal(run(model, batches(1)[0]), run(plain, batches(1)[0])) and fingerprint(model) == fingerprint(
        plain
    )


@pytest.mark.parametrize("kind", [k for k in CHAINS if k != "turned"])
def test_plain_formats_refuse_roundings_by_name(kind: str, tiny: Any, tmp_path: Path) -> None:
    """With the reason, and nothing is changed or written."""
    model = tapped(kind, tiny)
    mark = fingerprint(model)
    for act in (lambda: unweave(model), lambda: weft.export(model, tmp_path / "hf")):
        with pytest.raises(ConflictError, match=r"rounds activations(.|\n)*layers.0.self_attn.q_proj"):
            act()
    if kind != "w8a8":  # which it has a place for
        with pytest.raises(ConflictError, match=r"q_proj"):
            weft.export(model, tmp_path / "ct", to="compressed-tensors")
    apply(model, [Step.of("lora", rank=1)], at="*.q_proj")
    with pytest.raises(ConflictError, match=r"PEFT knows no taps"):
        weft.export(model, tmp_path / "peft", to="peft")
    assert not list(tmp_path.iterdir()) and len(taps(model)) == 14 and mark


@pytest.mark.parametrize("to", ["dense", "grid"])
def test_merging_keeps_taps(to: Any, tiny: Any, batches: Any, run: Any) -> None:
    """Terms are folded in the coordinates behind the turn."""
    model, batch = tapped("w4a4", tiny), batches(1)[0]
    apply(model, [Step.of("lora", rank=2)], at="all-linear")
    want, before = run(model, batch), taps(model)
    weft.merge(model, to=to)
    assert taps(model) == before
    assert not any(isinstance(e, Sum) for e in expressions(model).values())
    torch.testing.assert_close(run(model, batch), want, rtol=1e-3, atol=1e-3)


def test_methods_after_a_turn_see_turned_weights(tiny: Any, batches: Any, tmp_path: Path) -> None:
    """In one chain and from new evidence alike: the pretrained value, the Gram and the error are those behind the tap."""
    one, two = weave(tiny()), weave(tiny())
    chain = [Step.of("gptq", bits=3, group=16)]
    first, _ = apply(one, [TURN, *chain], at="all-linear", stats=collect(one, batches(), tmp_path))
    apply(two, [TURN], at="all-linear", stats=collect(two, batches(), tmp_path))
    second, _ = apply(two, chain, at="all-linear", stats=collect(two, batches(), tmp_path))
    for a, b in zip(first, second, strict=True):
        assert a.name == b.name and a.after == b.after and a.error == pytest.approx(b.error, rel=0.05) and a.error < 0.5


def test_a_tapped_model_is_compressed_block_by_block(tiny: Any, batches: Any, tmp_path: Path) -> None:
    """Behind its own errors, from what its sites read; the taps stay."""
    model = tapped("turned tokens", tiny)
    stats, before = collect(model, batches(), tmp_path), taps(model)
    chain = (Step.of("gptq", bits=4, group=16),)
    propagate(model, dict.fromkeys(match(model, "all-linear"), chain), stats, batches())
    assert taps(model) == before
    for name in taps(model):
        assert expressions(model)[name].describe() == "int4[g16]"
        now = site(model, name, evidence=stats.evidence([name])[name])
        assert (relative_error(now, now.now) or 1) < 0.3


def test_chains_for_weights_alone_refuse_taps(tiny: Any) -> None:
    """What would drop the taps that a chain makes says so."""
    model = weave(tiny())
    with pytest.raises(OptionError, match="act_quant"):
        run_chain(group_of(model, match(model, "*.0.*.q_proj"), None), CHAINS["w8a8"])


def test_a_second_rounding_takes_the_place_of_the_first(tiny: Any) -> None:
    """As another width of a weight does; the turn stays."""
    model = tapped("turned tokens", tiny)
    apply(model, [Step.of("act_quant", grid="fp8_e4m3")], at="all-linear")
    assert {t.describe() for t in taps(model).values()} == {
        "Hadamard(32), fp8_e4m3[token]",
        "Hadamard(16), fp8_e4m3[token]",
    }


def test_a_turn_behind_a_measured_scale_is_refused(tiny: Any, batches: Any, tmp_path: Path) -> None:
    """The scale was measured without it."""
    model = weave(tiny())
    stats = collect(model, batches(), tmp_path)
    apply(model, [Step.of("act_quant_static")], at="all-linear", stats=stats)
    with pytest.raises(ConflictError, match="measured scale"):
        apply(model, [TURN], at="all-linear")
    with pytest.raises(OptionError, match="one method after the other"):
        apply(weave(tiny()), [TURN, Step.of("act_quant_static")], at="all-linear", stats=stats)


def test_a_quantized_weight_may_be_shared_by_tied_layers() -> None:
    """Two linear layers of one weight have one tap."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    x = torch.randn(3, 16)
    want = model(x).detach()
    woven = weave(model)
    apply(woven, [TURN])
    assert woven[0].tap is woven[2].tap is not None and len(on(woven)) == 1
    torch.testing.assert_close(woven(x), want, rtol=1e-5, atol=1e-5)


def test_rounded_is_what_the_node_holds() -> None:
    """`rounded` skips the packing and nothing else."""
    w = inputs(6, 40)
    for name, group, scale in itertools.product(("int3", "nf4", "fp4", "ternary"), (0, 7), ("bf16", "e8m0", "e4m3")):
        fit = minmax(w, name, group, True, scale)
        made = fit.encode(nearest(w, fit))
        assert isinstance(made, Quantized) and torch.equal(rounded(w, fit), made.dense())
