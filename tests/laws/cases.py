"""What the laws run on: random expressions of every kind, and synthetic sites with log-normal feature scales."""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.engine import Evidence, Group, Method, Site, get, names
from weft.engine.run import Step, rewritten
from weft.expr import (
    NM,
    NODES,
    Basis,
    Blocks,
    Codebook,
    Dense,
    Diagonal,
    Expr,
    Hadamard,
    Kronecker,
    LowRank,
    Masked,
    Permutation,
    Product,
    Quantized,
    Routed,
    Signs,
    SparseDelta,
    Sum,
    build,
    fields,
    spec,
    tensors,
    terms_of,
)  # fmt: skip
from weft.expr.cayley import Cayley
from weft.expr.entrywise import Entrywise
from weft.expr.gated import Gated
from weft.expr.named import Named
from weft.expr.weightnorm import WeightNorm
from weft.grid import GRIDS, SCALES, grid
from weft.linalg.grids import minmax, nearest
from weft.model.taps import tap_spec, tap_tensors

Rng = torch.Generator
SHAPES = ((5, 7), (1, 9), (16, 8), (12, 40))
"""Odd, a single row, tall, wide; columns are rounded up where a node needs multiples."""


PLACES = [(name, s) for name, spec in GRIDS.items() for s in (True, False) if s or spec.levels is None]
"""Every grid, and every integer grid also with zero points."""


def rng(*salt: object) -> Rng:
    """A generator of its own for every salt."""
    return torch.Generator().manual_seed(zlib.crc32(repr(salt).encode()))


def randn(g: Rng, *shape: int) -> Tensor:
    """Normal entries."""
    return torch.randn(*shape, generator=g)


# ---------------------------------------------------------------------------------------------------------------- nodes


def dense(m: int, n: int, g: Rng, dtype: torch.dtype = torch.float32) -> Expr:
    return Dense(randn(g, m, n).to(dtype))


def lowrank(m: int, n: int, g: Rng, dtype: torch.dtype = torch.float32, rank: int = 2, scale: float = 1.0) -> Expr:
    return LowRank(randn(g, m, rank).to(dtype), randn(g, rank, n).to(dtype), scale)


def diagonal(m: int, n: int, g: Rng) -> Expr:
    return Diagonal(randn(g, n) + 3)


def quantized(
    m: int, n: int, g: Rng, name: str = "int4", group: int = 5, symmetric: bool = True, scale: str = "bf16"
) -> Expr:
    groups, spec = -(-n // (group or n)), grid(name)
    numbers = torch.tensor([i for i, v in enumerate(spec.levels or range(spec.count)) if math.isfinite(v)])
    codes = numbers[torch.randint(0, len(numbers), (m, n), generator=g)].to(torch.uint8)
    scales = randn(g, m, groups).abs() + 0.1
    zeros = None if symmetric else torch.randint(0, spec.count, (m, groups), generator=g).to(torch.uint8)
    return Quantized.encode(codes, scales, zeros, grid=name, group=group, scale=scale)


def masked(m: int, n: int, g: Rng, kept: Callable[..., Expr] = dense) -> Expr:
    k = n // 2 + 1
    mask = torch.zeros(m, n, dtype=torch.bool).scatter_(1, torch.rand(m, n, generator=g).argsort(1)[:, :k], True)
    return Masked.of(torch.ones(m, n), mask).rebuild(kept=kept(m, k, g))


def uneven(m: int, n: int, g: Rng) -> Expr:
    return Masked.of(randn(g, m, n), torch.rand(m, n, generator=g) < 0.6)


def nm(m: int, n: int, g: Rng, keep: int = 2, of: int = 4, kept: Callable[..., Expr] = dense) -> Expr:
    n = -(-n // of) * of
    chosen = torch.rand(m, n // of, of, generator=g).argsort(2)[..., :keep]
    mask = torch.zeros(m, n // of, of, dtype=torch.bool).scatter_(2, chosen, True).view(m, n)
    return NM.of(torch.ones(m, n), mask, keep, of).rebuild(kept=kept(m, n * keep // of, g))


def codebook(m: int, n: int, g: Rng, books: int = 1, entries: int = 16, d: int = 1) -> Expr:
    codes = torch.randint(0, entries, (m, -(-n // d), books), generator=g)
    return Codebook.of(codes, randn(g, books, entries, d), n)


def delta(m: int, n: int, g: Rng, dtype: torch.dtype = torch.float32) -> Expr:
    return SparseDelta.of(randn(g, m, n).to(dtype), torch.rand(m, n, generator=g) < 0.2)


def kronecker(m: int, n: int, g: Rng) -> Expr:
    p, q = (next(k for k in (3, 2, 1) if size % k == 0) for size in (m, n))
    return Kronecker(randn(g, p, q), randn(g, m // p, n // q))


def blocks(m: int, n: int, g: Rng, kept: Callable[..., Expr] = dense) -> Expr:
    count = next(k for k in (4, 3, 1) if m % k == 0)
    return Blocks(kept(m, -(-n // count), g), count)


def basis(m: int, n: int, g: Rng, kind: str = "random") -> Expr:
    return Basis(randn(g, 6), kind, 3, m, n, 0.5)


def permutation(m: int, n: int, g: Rng) -> Expr:
    return Permutation(torch.randperm(n, generator=g).int())


def rotation(m: int, n: int, g: Rng, block: int = 0) -> Expr:
    return Hadamard.of(randn(g, n).sign(), block)


def rotated(m: int, n: int, g: Rng) -> Expr:
    return Product(permutation(m, m, g), rotation(m, m, g), compensated(m, n, g), rotation(n, n, g), diagonal(n, n, g))


def vera(m: int, n: int, g: Rng) -> Expr:
    down, up = (Basis(torch.ones(1), "random", seed, *size) for seed, size in ((1, (3, n)), (2, (m, 3))))
    return Product(diagonal(m, m, g), up, diagonal(3, 3, g), down)


def compensated(m: int, n: int, g: Rng) -> Expr:
    half = lowrank(m, n, g, torch.bfloat16)
    return Sum({"base": quantized(m, n, g), "compensation": half, "adapter:a-1": lowrank(m, n, g, rank=3)})


def between(m: int, n: int, g: Rng) -> Expr:
    return Product(diagonal(m, m, g), compensated(m, n, g), diagonal(n, n, g))


def nested(m: int, n: int, g: Rng) -> Expr:
    inner = Sum({"base": masked(m, n, g, kept=quantized), "compensation": lowrank(m, n, g)})
    return Sum({"base": inner, "compensation": lowrank(m, n, g, rank=1), "adapter:x": dense(m, n, g, torch.bfloat16)})


def chain(m: int, n: int, g: Rng) -> Expr:
    return Product(quantized(m, 6, g), lowrank(6, n, g), masked(n, n, g))


def named(m: int, n: int, g: Rng, on: bool = True) -> Expr:
    left, right = Named(diagonal(m, m, g), "a", on), Named(permutation(n, n, g), "b", on)
    return Product(left, compensated(m, n, g), right, Named(diagonal(n, n, g), "b", not on))


def _grids() -> dict[str, Callable[[int, int, Rng], Expr]]:
    groups, scales = (5, 0, 3, 8), list(SCALES)
    kinds = [(name, groups[i % 4], s, scales[i % 4 if s else 0]) for i, (name, s) in enumerate(PLACES)]
    kinds += [
        ("fp4", 16, True, "e4m3"),
        ("fp4", 32, True, "e8m0"),
        ("nf4", 4, True, "uint8"),
        ("int4", 4, False, "uint8"),
    ]
    return {
        f"{name}{'' if s else '-zero'}-g{group}{'' if scale == 'bf16' else f'-{scale}'}": lambda m, n, g, a=(name, group, s, scale): (
            quantized(m, n, g, *a)
        )
        for name, group, s, scale in kinds
    }


def routed(m: int, n: int, g: Rng, top: int = 2, expert: Callable[..., Expr] = lowrank) -> Expr:
    return Routed(randn(g, 4, n), [expert(m, n, g) for _ in range(4)], top)


Maker = Callable[[int, int, Rng], Expr]
ROUTED: dict[str, Maker] = {
    "routed": routed,
    "routed-one": lambda m, n, g: routed(m, n, g, 1),
    "routed-all-quantized": lambda m, n, g: routed(m, n, g, 4, quantized),
    "routed-diagonal": lambda m, n, g: routed(n, n, g, 3, diagonal),
    "routed-added": lambda m, n, g: Sum({"base": quantized(m, n, g), "adapter:mix": routed(m, n, g)}),
    "routed-within": lambda m, n, g: Product(diagonal(m, m, g), routed(m, n, g), permutation(n, n, g)),
    "routed-nested": lambda m, n, g: routed(m, n, g, 2, routed),
}
"""What depends on the input, and so is no matrix."""
EXPRS: dict[str, Maker] = {
    "dense": dense,
    "dense-bf16": lambda m, n, g: dense(m, n, g, torch.bfloat16),
    "lowrank": lowrank,
    "lowrank-scaled": lambda m, n, g: lowrank(m, n, g, scale=-0.3),
    "lowrank-bf16": lambda m, n, g: lowrank(m, n, g, torch.bfloat16),
    "diagonal": diagonal,
    **_grids(),
    "codebook": codebook,
    "codebook-vector": lambda m, n, g: codebook(m, n, g, 1, 300, 3),
    "codebook-additive": lambda m, n, g: codebook(m, n, g, 2, 33, 4),
    "delta": delta,
    "delta-bf16": lambda m, n, g: delta(m, n, g, torch.bfloat16),
    "delta-added": lambda m, n, g: Sum({"base": quantized(m, n, g), "adapter:sparse": delta(m, n, g)}),
    "kronecker": kronecker,
    "kronecker-scaled": lambda m, n, g: kronecker(m, n, g).rebuild(scale=-0.3),
    "kronecker-added": lambda m, n, g: Sum({"base": dense(m, n, g), "adapter:k": kronecker(m, n, g)}),
    "kronecker-product": lambda m, n, g: Product(kronecker(m, 6, g), lowrank(6, n, g)),
    "entrywise": lambda m, n, g: Entrywise([lowrank(m, n, g), lowrank(m, n, g, rank=1)]),
    "entrywise-masked": lambda m, n, g: Entrywise([masked(m, n, g), quantized(m, n, g), uneven(m, n, g)]),
    "entrywise-added": lambda m, n, g: Sum(
        {"base": quantized(m, n, g), "adapter:e": Entrywise([lowrank(m, n, g), dense(m, n, g, torch.bfloat16)])}
    ),
    "blocks": blocks,
    "blocks-quantized": lambda m, n, g: blocks(m, n, g, quantized),
    "blocks-scaled": lambda m, n, g: Product(diagonal(m, m, g), blocks(m, n, g)),
    "basis-random": basis,
    "basis-cosine": lambda m, n, g: basis(m, n, g, "cosine"),
    "basis-fourier": lambda m, n, g: basis(m, n, g, "fourier"),
    "basis-drawn": lambda m, n, g: basis(m, n, g, "fourier_mt19937"),
    "basis-fastfood": lambda m, n, g: basis(m, n, g, "fastfood"),
    "basis-vera": vera,
    "permutation": permutation,
    "permutation-side": lambda m, n, g: Product(quantized(m, n, g), permutation(m, n, g)),
    "hadamard": rotation,
    "hadamard-blocks": lambda m, n, g: rotation(m, -(-n // 2) * 2, g, 2),
    "rotated": rotated,
    "masked": masked,
    "masked-uneven": uneven,
    "masked-quantized": lambda m, n, g: masked(m, n, g, kept=quantized),
    "masked-masked": lambda m, n, g: masked(m, n, g, kept=masked),
    "2:4": nm,
    "4:8-bf16": lambda m, n, g: nm(m, n, g, 4, 8, kept=lambda *a: dense(*a, torch.bfloat16)),
    "1:3": lambda m, n, g: nm(m, n, g, 1, 3),
    "2:4-quantized": lambda m, n, g: nm(m, n, g, kept=quantized),
    "sum": compensated,
    "sum-nested": nested,
    "product": between,
    "product-thin": lambda m, n, g: Product(diagonal(m, m, g), lowrank(m, n, g)),
    "product-chain": chain,
    "named": named,
    "named-off": lambda m, n, g: named(m, n, g, on=False),
}


MAKERS: dict[str, Maker] = {
    "Cayley": lambda m, n, g: Cayley(0.5 * randn(g, -(-n // 4), 6), 4),
    "Cosines": lambda m, n, g: NODES["Cosines"](
        randn(g, 5), *(torch.randint(0, size, (5,), generator=g).int() for size in (m, n)), m, n, 0.5
    ),
    "Named": lambda m, n, g: Named(diagonal(m, m, g), "a"),
    "Gated": lambda m, n, g: Gated(randn(g, 1), lowrank(m, n, g)),
    "SoftQuantized": lambda m, n, g: NODES["SoftQuantized"](randn(g, m, n), randn(g, m, -(-n // 5)), 3, 5),
    "Signs": lambda m, n, g: Signs.of(randn(g, m, n).sign() * (torch.rand(m, n, generator=g) < 0.1), randn(g, 1)),
}
"""How to make a random instance of a node whose annotations do not say it, such as one of packed bytes."""


def drawn(cls: type[Expr], m: int, n: int, g: Rng) -> Expr:
    """A random instance by the annotations alone: normal tensors, dense children, plain values called m and n or by default."""
    sizes = {"m": m, "n": n}
    values: dict[str, Any] = {}
    for f in fields(cls):
        if f.kind == "tensor":
            assert "float32" in f.type.dtypes, f"{cls.__name__}.{f.name} is packed: give {cls.__name__} a row in MAKERS"
            values[f.name] = randn(g, *(sizes.get(d, 3) for d in f.dims))
        elif f.kind == "child":
            values[f.name] = dense(m, n, g)
        elif f.kind == "children":
            some = {"one": dense(m, n, g), "two": lowrank(m, n, g)}
            values[f.name] = some if f.named else list(some.values())
        elif f.name in sizes:
            values[f.name] = sizes[f.name]
        else:
            assert f.name in vars(cls), (
                f"what {cls.__name__}.{f.name} may be is not said: give {cls.__name__} a row in MAKERS"
            )
    return cls(**values)


def _alone_and_among_others(name: str, make: Maker) -> dict[str, Maker]:
    """Three kinds of expression that hold a node: alone, as a term on a quantized base, and behind a diagonal."""

    def added(m: int, n: int, g: Rng) -> Expr:
        new = make(m, n, g)
        return Sum({"base": quantized(*new.shape, g), "adapter:new": new})

    def scaled(m: int, n: int, g: Rng) -> Expr:
        new = make(m, n, g)
        return Product(diagonal(new.shape[0], new.shape[0], g), new)

    return {name: make, f"{name}-added": added, f"{name}-scaled": scaled}


_known = {type(make(*SHAPES[0], rng("known"))) for make in (*EXPRS.values(), *ROUTED.values())}
for _cls in [c for c in NODES.values() if c not in _known]:
    EXPRS |= _alone_and_among_others(_cls.__name__, MAKERS.get(_cls.__name__, functools.partial(drawn, _cls)))
EXPRS["lengths-off"] = lambda m, n, g: WeightNorm(randn(g, m), compensated(m, n, g), on=False)


KINDS = {**EXPRS, **ROUTED}


@functools.cache
def _document() -> dict[str, Any]:
    """The names that the reader in the document defines."""
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text("utf8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(code, "files.md", "exec"), space)
    return space


def documented(e: Expr) -> Tensor:
    """The value as the reader in docs/files.md makes it from what is saved."""
    held = {k: t.detach().float() if t.dtype == torch.bfloat16 else t.detach() for k, t in tensors(e).items()}
    return torch.as_tensor(_document()["value"](spec(e), lambda path: held[path].numpy()))


def documented_output(e: Expr, x: Tensor) -> Tensor:
    """What the reader in docs/files.md makes of inputs [t n]."""
    held = {k: t.detach().float() if t.dtype == torch.bfloat16 else t.detach() for k, t in tensors(e).items()}
    return torch.as_tensor(_document()["output"](spec(e), lambda path: held[path].numpy(), x.numpy()))


def instances(kind: str) -> Iterator[Expr]:
    """One random expression of the kind a shape."""
    for m, n in SHAPES:
        yield KINDS[kind](m, n, rng(kind, m, n))


def nodes_in(expr: Expr) -> set[str]:
    """Names of all node classes in the tree."""
    return {type(expr).__name__}.union(*(nodes_in(kid) for kid in expr.kids()))


def trainable(expr: Expr) -> Expr:
    """The same tree with every floating tensor a trainable copy."""
    held = {
        k: nn.Parameter(t.detach().float().clone()) if t.is_floating_point() else t for k, t in tensors(expr).items()
    }
    return build(spec(expr), held.__getitem__)


def tensor_fields(cls: type[Expr]) -> list[str]:
    """Names of a node's tensor fields."""
    return [f.name for f in fields(cls) if f.kind == "tensor"]


def snapshot(expr: Expr) -> dict[str, tuple[Any, ...]]:
    """Every tensor's exact content, dtype and whether it is trainable, with the tree's structure."""
    seen: dict[str, tuple[Any, ...]] = {
        k: (
            t.dtype,
            tuple(t.shape),
            t.requires_grad,
            t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
        for k, t in tensors(expr).items()
    }
    return {**seen, "": (repr(spec(expr)),)}


# ------------------------------------------------------------------------------------------------------------- rewrites

REWRITES = [name for name in names() if get(name).kind == "rewrite"]
MERGES = [name for name in names() if get(name).kind == "merge"]
SEARCHES = [name for name in names() if get(name).kind == "search"]


def features(n: int, salt: object, tokens: int = 256) -> Tensor:
    """Inputs [t n] whose features are correlated and have log-normal scales."""
    g = rng("features", n, salt)
    mix = torch.eye(n) + 0.6 * randn(g, n, n) / n**0.5
    return (randn(g, tokens, n) @ mix) * (1.2 * randn(g, n)).exp()


def weight(m: int, n: int, salt: object) -> Tensor:
    """A weight [m n] with rows of different size and some heavy entries."""
    g = rng("weight", m, n, salt)
    return randn(g, m, n) * (0.4 * randn(g, m, 1)).exp() / n**0.5 * (1 + 2 * (torch.rand(m, n, generator=g) > 0.98))


def _quantized(w: Tensor) -> Expr:
    return get("rtn")(lone(Dense(w)), bits=4, group=16)


def _pattern(w: Tensor, pattern: str) -> Expr:
    return get("magnitude")(lone(Dense(w)), pattern=pattern)


def _adapted(w: Tensor) -> Expr:
    g = rng("adapter", *w.shape)
    pair = (nn.Parameter(0.02 * randn(g, w.shape[0], 2)), nn.Parameter(0.02 * randn(g, 2, w.shape[1])))
    return Sum(
        {"base": _quantized(w), "compensation": lowrank(*w.shape, g, torch.bfloat16), "adapter:mine": LowRank(*pair)}
    )


STARTS: dict[str, Callable[[Tensor], Expr]] = {
    "dense": lambda w: Dense(w.clone()),
    "dense-bf16": lambda w: Dense(w.bfloat16()),
    "quantized": _quantized,
    "masked": lambda w: _pattern(w, "row"),
    "2:4": lambda w: _pattern(w, "2:4"),
    "2:4-quantized": lambda w: get("rtn")(lone(_pattern(w, "2:4")), bits=4, group=8),
    "sum": _adapted,
    "delta": lambda w: SparseDelta.of(w, w.abs() > w.abs().median()),
    "blocks": lambda w: Blocks(Dense(w[:, : w.shape[1] // _count(w)].clone()), _count(w)),
    "codebook": lambda w: codebook(*w.shape, rng("codebook", *w.shape), 2, 16, 4),
    "nvfp4": lambda w: (fit := minmax(w, "fp4", 16, True, "e4m3")).encode(nearest(w, fit)),
    "rotated": lambda w: Product(_quantized(w), rotation(0, w.shape[1], rng("signs"))),
}


def _count(w: Tensor) -> int:
    return next(k for k in (4, 3, 1) if w.shape[0] % k == 0 and w.shape[1] % k == 0)


def lone(now: Expr) -> Group:
    """A group of one site without evidence."""
    return Group((Site("alone", "linear", now, lambda: now.dense()),))


def group(
    start: str = "dense",
    rows: Sequence[int] = (24, 1, 17),
    n: int = 32,
    *,
    gram: Tensor | None = None,
    salt: object = 0,
) -> Group:
    """Sites that read one input, each starting from the node family `start`."""
    x = features(n, salt)
    gram = x.T @ x / len(x) if gram is None else gram
    sites: list[Site] = []
    for i, m in enumerate(rows):
        w, weights = weight(m, n, (salt, i)), torch.rand(m, generator=rng("rows", m, i)) + 0.5
        sites.append(
            Site(f"site{i}", "linear", STARTS[start](w), lambda w=w: w.clone(), (evidence(gram, weights, x),), seed=3)
        )
    return Group(tuple(sites))


def evidence(gram: Tensor, weights: Tensor, x: Tensor) -> Evidence:
    """What inputs x and this Gram say."""
    return Evidence(gram, weights, len(x), x.mean(0), x.abs().mean(0), x.abs().amax(0) * bool(gram.any()))


def reached(g: Group, *steps: str | tuple[str, dict[str, Any]]) -> Group:
    """The group after these steps, as the engine runs them, with its taps."""
    return rewritten(g, [Step.of(s) if isinstance(s, str) else Step.of(s[0], **s[1]) for s in steps])


def after(g: Group, *steps: str | tuple[str, dict[str, Any]]) -> list[Expr]:
    """The group's expressions after these steps."""
    return [s.now for s in reached(g, *steps)]


def marks(g: Group) -> list[tuple[Any, ...]]:
    """Every site's exact content, expression and tap."""
    taps = [{} if s.tap is None else {"": tap_spec(s.tap), **tap_tensors(s.tap)} for s in g]
    return [
        (snapshot(s.now), {k: getattr(t, "tolist", lambda t=t: t)() for k, t in tap.items()})
        for s, tap in zip(g, taps, strict=True)
    ]


def output_error(g: Group, made: Sequence[Expr]) -> float:
    """Σ over sites of tr(E G Eᵀ) for E = value - pretrained, in float64."""
    gaps = [
        (e.dense().double() - s.source().double(), s.evidence[0].gram.double()) for s, e in zip(g, made, strict=True)
    ]
    return sum(float(((gap @ gram) * gap).sum()) for gap, gram in gaps)


def base(expr: Expr) -> Expr:
    """The base term."""
    return terms_of(expr)["base"]


def options(method: Method) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Every option with values over its range and values outside it, from the method's own schema."""
    for name, field in method.options.model_json_schema()["properties"].items():
        field = field.get("anyOf", [field])[0]  # one for all members, or one a member
        if "enum" in field:
            yield name, field["enum"], ["no such choice"]
        elif field["type"] == "boolean":
            yield name, [True, False], ["yes", 1]
        elif field["type"] == "string":
            yield name, ["a", "Z9_-"], ["", "two words", "dot.dot", 3]
        else:
            whole = field["type"] == "integer"
            unit = 1 if whole else 1e-6
            low = field["minimum"] if "minimum" in field else field["exclusiveMinimum"] + unit
            high = field["maximum"] if "maximum" in field else field["exclusiveMaximum"] - unit
            middle = (low + min(high, 64)) // 2 if whole else (low + high) / 2
            yield name, [low, middle, high], [low - unit, high + unit, "3", None, float("nan")]


ROUNDS = {"iters": 8, "steps": 4}
"""What methods call the number of their rounds, and how many are a few."""


def rounds(method: Method) -> dict[str, int]:
    """A few rounds, of a method that goes in rounds."""
    return {name: few for name, few in ROUNDS.items() if name in method.options.model_fields}


def better(method: Method) -> list[tuple[str, str]]:
    """Options whose schema says which way is better."""
    properties = method.options.model_json_schema()["properties"]
    return [(name, field["better"]) for name, field in properties.items() if "better" in field]
