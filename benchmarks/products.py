"""Time and resident bytes of every kind of expression beside torch's dense linear layer, in one run.

    python benchmarks/products.py [--size 2048] [--rounds 5] [--threads 1 2] [--markdown FILE]

Each is a weight [size size] times 1, 4, 16 and 256 rows of inputs, in float32 and bfloat16: the time as a ratio of medians to
`F.linear` with a dense weight of the inputs' dtype, the two timed in turns (on one thread by the process's own clock), each
over twelve weights, as a model has them: they come from memory and not from the processor's caches; then
the bytes that the expression holds with what its products have made of it (layouts, copies), as a ratio to that dense
weight's. The last line is a woven layer in speed mode, whose dense copy is any expression's. Sizes below 2048 are a first look.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.expr import (
    NM,
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
    SparseDelta,
    Sum,
)  # fmt: skip
from weft.grid import grid
from weft.model import mode, set_expressions, weave

ROWS, DTYPES = (1, 4, 16, 256), (torch.float32, torch.bfloat16)
Make = Callable[[int], Expr]
Act = Callable[[Tensor], Tensor]


def quantized(n: int, name: str, group: int, symmetric: bool = True, scale: str = "bf16", m: int = 0) -> Expr:
    """Random codes."""
    spec, m, groups = grid(name), m or n, -(-n // (group or n))
    codes = torch.tensor([i for i, v in enumerate(spec.levels or range(spec.count)) if math.isfinite(v)])
    drawn = codes[torch.randint(0, len(codes), (m, n))].to(torch.uint8)
    zeros = None if symmetric else torch.randint(0, spec.count, (m, groups)).to(torch.uint8)
    return Quantized.encode(drawn, torch.rand(m, groups) + 0.1, zeros, grid=name, group=group, scale=scale)


def lowrank(n: int, rank: int = 16) -> Expr:
    """Thin factors in bfloat16."""
    return LowRank(torch.randn(n, rank).bfloat16(), torch.randn(rank, n).bfloat16())


def delta(n: int, density: float) -> Expr:
    """A few random entries."""
    return SparseDelta.of(torch.randn(n, n), torch.rand(n, n) < density)


def half(n: int, kept: Callable[[int, int], Expr]) -> Expr:
    """2:4 of what `kept(rows, columns)` makes."""
    mask = torch.zeros(n, n // 4, 4, dtype=torch.bool).scatter_(2, torch.rand(n, n // 4, 4).argsort(2)[..., :2], True)
    return NM.of(torch.ones(n, n), mask.view(n, n), 2, 4).rebuild(kept=kept(n, n // 2))


def masked(n: int) -> Expr:
    """Half of every row, quantized."""
    mask = torch.zeros(n, n, dtype=torch.bool).scatter_(1, torch.rand(n, n).argsort(1)[:, : n // 2], True)
    return Masked.of(torch.ones(n, n), mask).rebuild(kept=quantized(n // 2, "int4", 64, m=n))


def codebook(n: int, books: int, entries: int, d: int) -> Expr:
    """Random codes and entries."""
    return Codebook.of(torch.randint(0, entries, (n, n // d, books)), torch.randn(books, entries, d), n)


KINDS: dict[str, Make] = {
    "dense float32": lambda n: Dense(torch.randn(n, n)),
    "dense bfloat16": lambda n: Dense(torch.randn(n, n).bfloat16()),
    **{f"int{b} g64": lambda n, b=b: quantized(n, f"int{b}", 64) for b in (2, 3, 4)},
    "int4 g64 asymmetric": lambda n: quantized(n, "int4", 64, False),
    "int4 g64, 8-bit scales": lambda n: quantized(n, "int4", 64, scale="uint8"),
    "int8 channel": lambda n: quantized(n, "int8", 0),
    "int8 g64": lambda n: quantized(n, "int8", 64),
    "sign g64": lambda n: quantized(n, "sign", 64),
    "ternary g64": lambda n: quantized(n, "ternary", 64),
    "nf4 g64": lambda n: quantized(n, "nf4", 64),
    "fp4 g16 e4m3": lambda n: quantized(n, "fp4", 16, scale="e4m3"),
    "fp6_e2m3 g32 e8m0": lambda n: quantized(n, "fp6_e2m3", 32, scale="e8m0"),
    "fp8_e4m3 channel": lambda n: quantized(n, "fp8_e4m3", 0),
    "int4 g64 + low-rank 16": lambda n: Sum({"base": quantized(n, "int4", 64), "compensation": lowrank(n)}),
    "low-rank 16": lowrank,
    "codebook 256 x 4": lambda n: codebook(n, 1, 256, 4),
    "codebook 2 of 256 x 8": lambda n: codebook(n, 2, 256, 8),
    "sparse delta 1 %": lambda n: delta(n, 0.01),
    "sparse delta 0.1 %": lambda n: delta(n, 0.001),
    "2:4 bfloat16": lambda n: half(n, lambda m, k: Dense(torch.randn(m, k).bfloat16())),
    "2:4 int4 g64": lambda n: half(n, lambda m, k: quantized(k, "int4", 64, m=m)),
    "50 % int4 g64": masked,
    "kronecker": lambda n: Kronecker(torch.randn(n // 32, n // 32), torch.randn(32, 32)),
    "8 blocks": lambda n: Blocks(Dense(torch.randn(n, n // 8)), 8),
    "diagonal": lambda n: Diagonal(torch.randn(n)),
    "permutation": lambda n: Permutation(torch.randperm(n).int()),
    "hadamard": lambda n: Hadamard.of(torch.randn(n).sign(), 0),
    "cosine basis 64": lambda n: Basis(torch.randn(64), "cosine", 0, n, n),
    "int4 g64 · hadamard": lambda n: Product(quantized(n, "int4", 64), Hadamard.of(torch.randn(n).sign(), 0)),
}
WEIGHTS = 12
"""Together more than the caches hold."""


def clock() -> float:
    """Seconds of this process on one thread, which others on the machine do not lengthen; else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(acts: Sequence[Act], x: Tensor) -> float:
    """Seconds of one product after the other."""
    begun = clock()
    for act in acts:
        act(x)
    return clock() - begun


def ratio(acts: Sequence[Act], dense: Sequence[Act], x: Tensor, rounds: int) -> float:
    """Median time against the dense products', in turns."""
    timed(acts, x)
    mine, theirs = zip(*[(timed(acts, x), timed(dense, x)) for _ in range(rounds)], strict=True)
    return statistics.median(mine) / statistics.median(theirs)


def size(*held: Tensor) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in held)


def line(acts: Sequence[Act], held: Callable[[], int], n: int, dtype: torch.dtype, rounds: int) -> list[float]:
    """The ratios of time for every number of rows, and of the first one's bytes."""
    weights = [torch.randn(n, n).to(dtype) for _ in acts]
    dense = [lambda x, w=w: F.linear(x, w) for w in weights]
    made = [ratio(acts, dense, torch.randn(rows, n).to(dtype), rounds) for rows in ROWS]
    return [*made, held() / size(weights[0])]


def lines(n: int, rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Every kind's line, float32 then bfloat16; at last a woven layer in speed mode."""
    for name, make in KINDS.items():
        first, made = make(n), list[float]()
        for dtype in DTYPES:
            exprs = [copy.deepcopy(first) for _ in range(WEIGHTS)]
            made += line(exprs, lambda e=exprs[0]: e.nbytes() + size(*e.derived()), n, dtype, rounds)
        yield name, made
    made = []
    for dtype in DTYPES:
        model = weave(nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(WEIGHTS))).to(dtype))
        set_expressions(model, {f"{i}.weight": quantized(n, "int4", 64) for i in range(WEIGHTS)})
        mode(model, "speed")
        made += line(list(model), lambda model=model: mode(model).total // WEIGHTS, n, dtype, rounds)
    yield "int4 g64 in speed mode", made


def main() -> int:
    """Print the table for every number of threads."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--size", type=int, default=2048)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--markdown", type=Path, help="also write the table to this file")
    given, written = options.parse_args(), list[str]()

    def tell(text: str) -> None:
        print(text, flush=True)
        written.append(text)

    columns = [f"{str(d).removeprefix('torch.')} {r}" for d in DTYPES for r in (*ROWS, "bytes")]
    for threads in given.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        begun = time.monotonic()
        tell(
            f"\nthreads: {threads}, weight {given.size} x {given.size}, {torch.backends.cpu.get_cpu_capability()}; ratios to dense\n"
        )
        tell(f"| expression | {' | '.join(columns)} |")
        tell("| --- |" + " ---: |" * len(columns))
        with torch.no_grad():
            for name, made in lines(given.size, given.rounds):
                tell(f"| {name} | {' | '.join(f'{v:.2f}' for v in made)} |")
        print(f"{time.monotonic() - begun:.0f} s")
    if given.markdown is not None:
        given.markdown.write_text("\n".join(written).lstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
