"""Where an adapter of LoRA starts, by its `init`, against float64 computations and PEFT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.engine import Group, get
from weft.engine.run import Step
from weft.error import NumericError, OptionError
from weft.expr import Dense, Expr, LowRank, Quantized, terms_of
from weft.linalg.sparse import evened, grid_of

from .cases import STARTS, after, features, group, output_error, reached, snapshot

TAKEN = ("pissa", "olora", "corda", "corda_last")
REPAIRED = ("loftq", "lq")
ROLE = "adapter:default"


def lora(init: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """A step that starts so."""
    return "lora", {"rank": 4, "alpha": 3.0, "init": init, **options}


def pair(expr: Expr) -> LowRank:
    """The adapter, which alone is trained."""
    terms = terms_of(expr)
    mine = terms[ROLE]
    assert isinstance(mine, LowRank) and mine.b.requires_grad and mine.a.requires_grad
    assert all(t.frozen() for r, t in terms.items() if r not in (ROLE, "adapter:mine"))
    return mine


def value(e: Expr) -> Tensor:
    """In float64."""
    return e.dense().detach().double()


@pytest.mark.parametrize("init", ["eva", *TAKEN])
@pytest.mark.parametrize("start", STARTS)
def test_it_starts_where_the_weight_is(start: str, init: str) -> None:
    """Whatever the base is made of: to the bit with B = 0, else but for rounding; the base keeps every bit."""
    g = group(start)
    for s, e in zip(g, after(g, lora(init)), strict=True):
        pair(e)
        assert snapshot(terms_of(e)["base"]) == snapshot(evened(terms_of(s.now)["base"]))
        if init == "eva":
            assert torch.equal(e.dense(), s.now.dense().float())
        else:
            torch.testing.assert_close(value(e), value(s.now), rtol=0, atol=1e-6 * float(value(s.now).abs().max()))


@pytest.mark.parametrize("init", [*TAKEN, *REPAIRED, "eva"])
@pytest.mark.parametrize("rank", [1, 40])
def test_any_rank_fits(init: str, rank: int) -> None:
    """One, and more than a weight has."""
    for e in after(group("quantized", (3, 1, 24)), lora(init, rank=rank)):
        assert pair(e).a.shape[0] <= min(rank, 32) and bool(torch.isfinite(e.dense()).all())


def test_eva_starts_along_the_inputs() -> None:
    """A: the right singular vectors of the inputs with the largest values. B: zero."""
    mine = pair(after(group(), lora("eva"))[0])
    v = torch.linalg.svd(features(32, 0).double())[2][:4]
    torch.testing.assert_close((mine.a.double() @ v.T).abs(), torch.eye(4).double(), rtol=0, atol=1e-5)
    assert not bool(mine.b.any())


def test_olora_is_pefts() -> None:
    """The same factors, scale and base as PEFT's OLoRA."""
    peft = pytest.importorskip("peft")
    g = group(rows=(24,))
    theirs = nn.Sequential(nn.Linear(32, 24, bias=False))
    theirs[0].weight.data = g.now.dense().clone()
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="olora", target_modules=["0"])
    layer = peft.get_peft_model(theirs, config).base_model.model[0]
    e = after(g, lora("olora", alpha=6.0, scaling="rank"))[0]
    mine = pair(e)
    assert mine.scale == layer.scaling["default"] == 1.5
    torch.testing.assert_close(mine.b.data, layer.lora_B["default"].weight.data, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.a.data, layer.lora_A["default"].weight.data, rtol=0, atol=1e-5)
    left = value(e) - value(mine)
    torch.testing.assert_close(left.float(), layer.base_layer.weight.data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [(24,), (48,)])
@pytest.mark.parametrize("init", ["corda", "corda_last"])
def test_corda_starts_from_directions_on_the_inputs(init: str, rows: tuple[int, ...]) -> None:
    """U S Vᵀ C⁻¹ of an SVD of W C, of the four largest or smallest values; B and A have like lengths."""
    g = group(rows=rows)
    mine = pair(after(g, lora(init))[0])
    gram = g.gram()
    c = gram + 0.01 * gram.diagonal().mean() * torch.eye(32)
    u, s, v = torch.linalg.svd(value(g.now) @ c, full_matrices=False)
    some = slice(-4, None) if init == "corda_last" else slice(4)
    want = u[:, some] * s[some] @ v[some] @ torch.linalg.inv(c)
    torch.testing.assert_close(value(mine), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    torch.testing.assert_close(mine.b.norm(dim=0), mine.a.norm(dim=1))


def best(error: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank."""
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("start", ["quantized", "2:4-quantized", "nvfp4", "masked", "codebook"])
def test_loftq_starts_from_what_the_base_lost(start: str) -> None:
    """The adapter is the best approximation of the error of the base beside it, and together they err less than with the old base."""
    g = group(start, (24, 17))
    for s, e in zip(g, after(g, lora("loftq")), strict=True):
        w, base = s.original.double(), terms_of(e)["base"]
        want = best(w - value(base), 4)
        torch.testing.assert_close(value(pair(e)), want, rtol=0, atol=1e-5 * float(want.abs().max()))
        before = w - value(s.now)
        left, old = (w - value(e)).norm(), (before - best(before, 4)).norm()
        held, grid = grid_of(s.now), grid_of(base)
        if held is None:
            assert base is s.now and float(left) == pytest.approx(float(old), rel=1e-4)
            continue
        assert float(left) < 0.97 * float(old) and grid is not None
        assert (grid.grid, grid.group, grid.symmetric, grid.scale) == (
            held.grid,
            held.group,
            held.symmetric,
            held.scale,
        )
        assert base.nbytes() == s.now.nbytes() and base.promises() == s.now.promises()


def test_lq_weighs_the_error_by_the_data() -> None:
    """The adapter minimizes Σ_i weight_i ||(error)_i R||²; that sum is less than from loftq."""
    g = group("quantized", (24, 17))
    pairs = zip(g, after(g, lora("lq")), after(g, lora("loftq")), strict=True)
    for s, e, plain in pairs:
        w, base, rows = s.original.double(), terms_of(e)["base"], s.evidence[0].weight.double().sqrt()[:, None]
        lam, q = torch.linalg.eigh(g.gram())
        root = q * lam.clamp(min=0).sqrt() @ q.T
        want = best(rows * (w - value(base)) @ root, 4)
        mine = rows * value(pair(e)) @ root
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-4 * float(want.abs().max()))
        cost = [float((rows * (w - value(x)) @ root).square().sum()) for x in (e, plain)]
        assert cost[0] < 0.8 * cost[1]


@pytest.mark.parametrize("init", REPAIRED)
def test_what_compensates_is_counted_once(init: str) -> None:
    """Beside a compensation the adapter repairs what that leaves, and it stays."""
    g = group("dense", (24, 17))
    repaired = reached(g, ("rtn", {"bits": 3}), ("eora", {"rank": 2}))
    made = after(repaired, lora(init))
    with torch.no_grad():
        assert output_error(g, made) < 0.5 * output_error(g, [s.now for s in repaired])
    for s, e in zip(repaired, made, strict=True):
        assert snapshot(terms_of(e)["compensation"]) == snapshot(terms_of(s.now)["compensation"])


@pytest.mark.parametrize("init", REPAIRED)
def test_what_lost_nothing_starts_at_zero(init: str) -> None:
    """And says so."""
    g = group("dense", (24,))
    e = after(g, lora(init))[0]
    assert g.notes and not bool(pair(e).b.any()) and bool(pair(e).a.any())
    assert isinstance(terms_of(e)["base"], Dense)


@pytest.mark.parametrize("init", [*TAKEN, *REPAIRED, "eva"])
def test_magnitudes_start_as_they_are(init: str) -> None:
    """Trained apart, they change no value."""
    g = group("quantized", (24,))
    plain, apart = (after(g, lora(init, magnitude=m))[0] for m in (False, True))
    torch.testing.assert_close(value(apart), value(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["eva", "corda", "corda_last", "lq"])
def test_evidence_is_asked_for(init: str) -> None:
    """By these starts alone: none and broken ones are refused with the site's name, and no inputs at all are declared."""
    assert Step.of("lora", init=init).needs == {"gram"} and not Step.of("lora", init="pissa").needs
    g = group("quantized", (24,))
    bare = Group((replace(g.site, evidence=()),))
    with pytest.raises(OptionError, match="site0"):
        after(bare, lora(init))
    after(bare, lora("loftq"))
    broken = replace(g.site.evidence[0], gram=torch.full((32, 32), float("nan")))
    with pytest.raises(NumericError, match=r"site0\.gram"):
        after(Group((replace(g.site, evidence=(broken,)),)), lora(init))
    unseen = group("quantized", (24,), gram=torch.zeros(32, 32))
    assert bool(torch.isfinite(after(unseen, lora(init))[0].dense()).all()) and unseen.notes


def test_the_base_stays_packed() -> None:
    """Rounded anew it is still a quantized node, whatever bits it has."""
    for bits in (2, 3, 8):
        g = reached(group("dense", (24,)), ("rtn", {"bits": bits, "symmetric": False, "group": 8}))
        made = terms_of(after(g, lora("loftq"))[0])["base"]
        assert isinstance(made, Quantized) and made.grid == f"int{bits}" and not made.symmetric


def test_every_start_is_tried() -> None:
    """This file knows them all."""
    options = get("lora").options.model_json_schema()["properties"]["init"]["enum"]
    assert set(options) == {"zero", "eva", *TAKEN, *REPAIRED}


def test_block_lora_is_what_its_blocks_become() -> None:
    """Trained by Adam, one stored block times their number goes where separate blocks with one A do: all blocks stay equal."""
    g = group(rows=(24,))
    mine = pair(after(g, ("block_lora", {"rank": 3, "blocks": 4}))[0])
    apart, down = [nn.Parameter(torch.zeros(24, 3)) for _ in range(4)], nn.Parameter(mine.a.detach().clone())
    x, goal = features(32, 1)[:20], torch.randn(20, 24, generator=torch.Generator().manual_seed(0))
    moves = [torch.optim.Adam(list(ps), lr=0.01) for ps in ((mine.b, mine.a), (*apart, down))]
    for _ in range(30):
        for move, delta in zip(moves, (mine.dense(), torch.stack(apart).sum(0) @ down), strict=True):
            move.zero_grad()
            (x @ delta.T - goal).square().mean().backward()
            move.step()
    assert all(torch.equal(b, apart[0]) for b in apart)
    torch.testing.assert_close(mine.dense().detach(), (torch.stack(apart).sum(0) @ down).detach(), rtol=1e-3, atol=1e-4)
    assert float(mine.dense().detach().abs().max()) > 0.1


def test_block_lora_is_lora_with_another_scale() -> None:
    """alpha = blocks: the same node, but for what A is drawn from."""
    g = group("quantized", (24,))
    ours, plain = (
        after(g, step)[0] for step in (("block_lora", {"rank": 3, "blocks": 4}), ("lora", {"rank": 3, "alpha": 4.0}))
    )
    assert pair(ours).scale == pair(plain).scale == 4 and pair(ours).a.shape == pair(plain).a.shape
    assert not bool(pair(ours).b.any())
