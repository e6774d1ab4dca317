"""Low-rank adapters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from weft.engine import Asks, Group, method
from weft.expr import Expr, LowRank, total
from weft.expr.weightnorm import WeightNorm
from weft.linalg.lowrank import truncate
from weft.linalg.starts import by_turns, inputs, oriented, orthonormal, seen, weighed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


TAKEN = ("pissa", "olora", "corda", "corda_last")
"""Starts that a frozen term takes away again."""


@method(kind="rewrite", rows="P057 P323", paper="2106.09685")
def lora(
    g: Group,
    *,
    rank: Annotated[int, Field(ge=1, le=4096, description="rank of the adapter")] = 8,
    alpha: Annotated[
        float, Field(gt=0, le=1e6, description="what the product is multiplied by, before `scaling`")
    ] = 1.0,
    scaling: Annotated[
        Literal["constant", "rank", "root"],
        Field(
            description="constant: by alpha. rank: by alpha / rank, as in LoRA. root: by alpha / sqrt(rank), as in rsLoRA"
        ),
    ] = "constant",
    init: Annotated[
        Literal["zero", "eva", "pissa", "olora", "corda", "corda_last", "loftq", "lq"],
        Field(
            description="zero: B = 0, A random. eva: A along the inputs. pissa: the weight's largest singular directions. olora: its QR "
            "decomposition. corda, corda_last: its largest and smallest on the inputs. loftq: what rounding lost; lq: by its effect"
        ),
        Asks("gram", frozenset({"eva", "corda", "corda_last", "lq"})),
    ] = "zero",
    magnitude: Annotated[
        bool, Field(description="train the lengths of the rows apart from their directions, as in DoRA")
    ] = False,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add a trainable term s B A in float32, s of `alpha` and `scaling`; but for loftq and lq it changes nothing until it is trained.

    zero: B = 0 and A uniform in ±sqrt(3 / n). eva (arXiv 2410.07170): A the leading eigenvectors of E[x xᵀ] instead.
    Of the weight W: pissa (arXiv 2404.02948) starts with s B A its best rank-r approximation; corda (arXiv 2406.05223) with the part
    U S Vᵀ C⁻¹ of the r largest singular values of W C = U S Vᵀ, C = E[x xᵀ], to go on from what the data uses, and corda_last with
    the r smallest, to keep it; olora (arXiv 2406.01775) with the first r columns and rows of W = Q R as B and A. A frozen term
    `adapter:NAME-start` takes it away again, so that the base stays as it is, packed or not; both are a LoRA of rank 2 r for other tools.
    loftq (arXiv 2310.08659) changes the base, and starts nearer to the pretrained W0: s B A is the best rank-r approximation of W0 less
    the base, the base is rounded anew on its grid to W0 - s B A, by turns while the error falls, five at most. lq (arXiv 2311.12023)
    weighs the error by E[x xᵀ] and the weights of the rows, but for rounding. A base without a grid stays; one that lost nothing starts
    as by zero.
    magnitude (DoRA, arXiv 2402.09353): the value is g[i] v[i] / ||v[i]|| of rows v of the base with the adapter; g = ||v|| is trained too.

    Departures: s is 1 unless told, and its place the learning rate (LoRA; rsLoRA, arXiv 2312.03732); ranks are the same everywhere (EVA);
    C has 1 % of its mean diagonal added, and B and A have like lengths (CorDA); groups may take new scales when they are rounded
    anew (LoftQ); the data's weights are those of the evidence, and every weight keeps its grid (LQ-LoRA).
    """
    s = alpha / {"constant": 1, "rank": rank, "root": math.sqrt(rank)}[scaling]
    role = f"adapter:{name}"
    base, first = _first(g, init, rank, s)
    if first is None:
        m, n = g.now.shape
        a = (torch.rand(rank, n, generator=g.rng(f"lora {name}")) * 2 - 1) * math.sqrt(3 / n)
        first = LowRank(torch.zeros(m, rank), a)
    terms = {"base": base, role: LowRank(nn.Parameter(first.b.clone()), nn.Parameter(first.a.clone()), s)}
    if init in TAKEN:
        terms[f"{role}-start"] = first.rebuild(scale=-s)
    made = total(terms)
    if not magnitude:
        return made
    apart = WeightNorm.of(made)
    return apart.rebuild(g=nn.Parameter(apart.g))


def _first(g: Group, init: str, rank: int, s: float) -> tuple[Expr, LowRank | None]:
    """The base, and the factors that the adapter starts with; None for those of zero."""
    if init in ("loftq", "lq"):
        return _repaired(g, init == "lq", rank, s)
    if init == "zero":
        return g.now, None
    if init == "eva":
        a = inputs(g.gram(), rank)
        return g.now, LowRank(torch.zeros(g.now.shape[0], len(a)), a)
    w = g.now.dense().detach()
    if init == "olora":
        return g.now, orthonormal(w, rank)
    if init == "pissa":
        return g.now, truncate(w / s, rank, torch.float32)
    return g.now, oriented(w / s, g.gram(), rank, last=init == "corda_last")


def _repaired(g: Group, by_data: bool, rank: int, s: float) -> tuple[Expr, LowRank | None]:
    """The base rounded anew, and s B A for what it lost."""
    target = g.original - (g.site.beside.dense().float() if g.site.beside is not None else 0)
    gram = g.gram() if by_data else None
    if float((target - g.now.dense().float()).norm()) <= 1e-6 * float(target.norm()):
        g.fallback("the base lost nothing: the adapter starts at zero")
        return g.now, None
    if gram is None:
        base, term = by_turns(g.now, target, lambda e: truncate(e, rank, torch.float32), lambda e: float(e.norm()))
    else:
        rows = torch.stack([e.weight.double() for e in g.site.evidence]).sum(0)
        base, term = by_turns(g.now, target, lambda e: weighed(e, rows, g.roots(), rank), lambda e: seen(e, rows, gram))
    return base, LowRank(term.b / math.sqrt(s), term.a / math.sqrt(s))


@lora.claim("at rank 16 reaches at least 80 % of what rank 64 gains on a shifted domain, after the same steps")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("lora", {"rank": 16})], baseline=[("lora", {"rank": 64})], share=0.8)


@lora.claim(
    "with alpha / sqrt(rank) rank 64 gains more than with alpha / rank, alpha 8", of="rslora", paper="2312.03732"
)
def rslora(lab: Lab) -> Claim:
    ours, baseline = ({"rank": 64, "alpha": 8.0, "scaling": scaling} for scaling in ("root", "rank"))
    return lab.tune(ours=[("lora", ours)], baseline=[("lora", baseline)], share=1.0)


@lora.claim("trained with magnitudes apart, rank 4 gains more", of="dora", paper="2402.09353")
def dora(lab: Lab) -> Claim:
    return lab.tune(ours=[("lora", {"rank": 4, "magnitude": True})], baseline=[("lora", {"rank": 4})], share=1.0)


@lora.claim(
    "started from the largest singular directions, rank 16 gains more after the same steps",
    of="pissa",
    paper="2404.02948",
)
def pissa(lab: Lab) -> Claim:
    return lab.tune(ours=[("lora", {"rank": 16, "init": "pissa"})], baseline=[("lora", {"rank": 16})], share=1.0)


@lora.claim(
    "started from the QR decomposition, rank 16 gains more after the same steps", of="olora", paper="2406.01775"
)
def olora(lab: Lab) -> Claim:
    return lab.tune(ours=[("lora", {"rank": 16, "init": "olora"})], baseline=[("lora", {"rank": 16})], share=1.0)


@lora.claim(
    "with A started from the main directions of the inputs, rank 16 gains more after the same steps",
    of="eva",
    paper="2410.07170",
)
def eva(lab: Lab) -> Claim:
    return lab.tune(ours=[("lora", {"rank": 16, "init": "eva"})], baseline=[("lora", {"rank": 16})], share=1.0)


@lora.claim(
    "started from the largest directions on calibration texts, rank 16 gains more after the same steps",
    of="corda",
    paper="2406.05223",
)
def corda(lab: Lab) -> Claim:
    return lab.tune(ours=[("lora", {"rank": 16, "init": "corda"})], baseline=[("lora", {"rank": 16})], share=1.0)


@lora.claim(
    "started from the smallest directions on calibration texts, rank 16 gains more after the same steps",
    of="corda_last",
    paper="2406.05223",
)
def corda_last(lab: Lab) -> Claim:
    return lab.tune(ours=[("lora", {"rank": 16, "init": "corda_last"})], baseline=[("lora", {"rank": 16})], share=1.0)


@lora.claim("on a 3-bit base, started from what rounding lost, rank 16 gains more", of="loftq", paper="2310.08659")
def loftq(lab: Lab) -> Claim:
    start, ours, zero = ("rtn", {"bits": 3}), ("lora", {"rank": 16, "init": "loftq"}), ("lora", {"rank": 16})
    return lab.tune(ours=[start, ours], baseline=[start, zero], share=1.0)


@lora.claim(
    "on a 3-bit base, started from what outputs lost, rank 16 gains more than from what weights lost",
    of="lq",
    paper="2311.12023",
)
def lq(lab: Lab) -> Claim:
    start = ("rtn", {"bits": 3})
    ours, baseline = (("lora", {"rank": 16, "init": init}) for init in ("lq", "loftq"))
    return lab.only("ref-lm").tune(ours=[start, ours], baseline=[start, baseline], share=1.0)


@lora.claim(
    "on a base of NF4 reaches at least 90 % of what it gains on the dense base, both counted from the dense model",
    of="qlora",
    paper="2305.14314",
)
def qlora(lab: Lab) -> Claim:
    adapter = ("lora", {"rank": 16})
    return lab.tune(ours=[("nf4", {"double": True}), adapter], baseline=[adapter], share=0.9)


@lora.claim(
    "learnt from each chunk after it was read, a temporary adapter of rank 16 makes long texts more predictable",
    of="temporary",
    paper="2401.11504",
)
def temporary(lab: Lab) -> Claim:
    return lab.read(ours=[("lora", {"rank": 16})])
