"""Laws of the algebra, for every node and for trees of them."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import struct
from collections.abc import Callable
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.error import ShapeError
from weft.expr import (
    NM,
    NODES,
    SIDES,
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
    between,
    build,
    fields,
    fork,
    normal,
    spec,
    stack,
    tensors,
    total,
)
from weft.expr.base import written
from weft.expr.cayley import Cayley
from weft.expr.entrywise import Entrywise
from weft.grid import GRIDS

from .cases import (
    EXPRS,
    KINDS,
    chain,
    documented,
    instances,
    lowrank,
    nodes_in,
    randn,
    rng,
    snapshot,
    tensor_fields,
    trainable,
)


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for the order of float32 sums."""
    assert a.shape == b.shape and a.dtype == b.dtype
    if not b.numel():
        return
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max().clamp(min=1)))


def inputs(e: Expr, *lead: int) -> Tensor:
    """Inputs of the expression's width."""
    return randn(rng("x", e.shape, lead), *lead, e.shape[1])


def narrow() -> mock._patch_dict:
    """A context in which no more than 16 entries are made dense at a time."""
    return mock.patch.multiple("weft.expr.base", CHUNK=16)


def bits_of(row: list[int], width: int, count: int) -> list[int]:
    """`count` little-endian fields of `width` bits from a row of bytes."""
    word = int.from_bytes(bytes(row), "little")
    return [(word >> (width * i)) & (2**width - 1) for i in range(count)]


def float8(code: int) -> float:
    """What a byte means as a float of 4 exponent and 3 mantissa bits."""
    sign, e, f = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    return sign * ((8 + f) * 2.0 ** (e - 10) if e else f * 2.0**-9)


def scales_of(row: list[int], how: str, groups: int) -> tuple[Tensor, int]:
    """The scales at the front of these bytes, as float32, and how many bytes they take."""
    if how == "bf16":
        return torch.tensor(
            [struct.unpack("<f", bytes([0, 0, *row[2 * k : 2 * k + 2]]))[0] for k in range(groups)]
        ), 2 * groups
    if how == "e8m0":
        return torch.tensor([2.0 ** (c - 127) for c in row[:groups]]), groups
    codes = [float8(c) if how == "e4m3" else float(c) for c in row[4 : 4 + groups]]
    return torch.tensor(codes) / torch.tensor(struct.unpack("<f", bytes(row[:4]))), 4 + groups


def decoded(e: Quantized) -> Tensor:
    """A quantized value as its docstring says it: packed codes | scales | packed zero points."""
    spec_, out = GRIDS[e.grid], torch.zeros(e.shape)
    groups, size = -(-e.n // (e.group or e.n)), e.group or e.n
    at = -(-e.n // 5) if e.grid == "ternary" else -(-e.n * spec_.bits // 8)
    for i, row in enumerate(e.data.tolist()):
        codes = bits_of(row[:at], spec_.bits, e.n)
        if e.grid == "ternary":
            codes = [byte // 3**k % 3 for byte in row[:at] for k in range(5)][: e.n]
        scales, width = scales_of(row[at:], e.scale, groups)
        zeros = [2 ** (spec_.bits - 1)] * groups if e.symmetric else bits_of(row[at + width :], spec_.bits, groups)
        for j, code in enumerate(codes):
            level = code - zeros[j // size] if spec_.levels is None else torch.tensor(spec_.levels[code])
            out[i, j] = level * scales[j // size]
    return out


def pattern(e: Masked | NM) -> Tensor:
    """Which entries a sparse node keeps, from its bits or from its pattern numbers."""
    if isinstance(e, Masked):
        return torch.tensor([bits_of(row, 1, e.n) for row in e.bits.tolist()]).bool()
    sets = list(itertools.combinations(range(e.of_every), e.keep))
    width = max(1, (len(sets) - 1).bit_length())
    blocks = [bits_of(row, width, e.shape[1] // e.of_every) for row in e.patterns.tolist()]
    return torch.tensor([[j in sets[number] for number in row for j in range(e.of_every)] for row in blocks])


def looked_up(e: Codebook) -> Tensor:
    """Sums of the books' entries, block by block."""
    books, k, d = e.books.shape
    bits, out = max(1, (k - 1).bit_length()), torch.zeros(e.shape[0], -(-e.n // d) * d).double()
    count = books * -(-e.n // d)
    at = -(-count * min(bits, 8) // 8)
    for i, row in enumerate(e.data.tolist()):
        codes = bits_of(row[:at], min(bits, 8), count)
        if bits > 8:
            codes = [low + 256 * high for low, high in zip(codes, bits_of(row[at:], bits - 8, count), strict=True)]
        for number, code in enumerate(codes):
            block, book = divmod(number, books)
            out[i, block * d : (block + 1) * d] += e.books[book, code].double()
    return out[:, : e.n]


def placed(e: SparseDelta) -> Tensor:
    """Entry after entry at its place."""
    out, entries = torch.zeros(e.shape).double(), iter(zip(e.columns.tolist(), e.values.double(), strict=True))
    for i, count in enumerate(e.counts.tolist()):
        for column, value in itertools.islice(entries, count):
            out[i, column] = value
    return out


def mixed(seed: int, x: int) -> int:
    """A 64-bit hash: SplitMix64's finalizer."""
    z = (x + seed * 0xD1342543DE82EF95 + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def generated(e: Basis) -> Tensor:
    """Σ_k c[k] B_k, entry by entry."""
    m, n = e.shape
    if e.kind == "fastfood":
        return e.scale * mixed_up(e)
    i, j = torch.arange(m).double()[:, None], torch.arange(n).double()[None]
    order = sorted(range(m * n), key=lambda x: mixed(e.seed, x))
    if e.kind == "fourier_mt19937":
        order = torch.randperm(m * n, generator=torch.Generator().manual_seed(e.seed)).tolist()
    out = torch.zeros(m, n).double()
    for k, c in enumerate(e.c.double()):
        p, q = divmod(order[k], n) if e.kind != "random" else (0, 0)
        if e.kind == "random":
            words = [mixed(e.seed, k * m * n + x) >> 40 for x in range(m * n)]
            wave = ((torch.tensor(words).double() + 0.5) / 2**24 - 0.5).view(m, n) * 12**0.5
        elif e.kind == "cosine":
            wave = 2 * torch.cos(math.pi * (i + 0.5) * p / m) * torch.cos(math.pi * (j + 0.5) * q / n)
        else:
            wave = 2**0.5 * torch.cos(2 * math.pi * (p * i / m + q * j / n))
        out += c * wave
    return e.scale * out


def mixed_up(e: Basis) -> Tensor:
    """Block after block of √w H G P H S c, with the matrices written out."""
    width, count = 1 << (len(e.c) - 1).bit_length(), e.m * e.n
    c = F.pad(e.c.detach().double(), (0, width - len(e.c)))
    h, blocks = sylvester(width), -(-count // width)
    made = []
    for block in range(blocks):
        places = [block * width + i for i in range(width)]
        words = torch.tensor([mixed(e.seed, x) >> 40 for x in places]).double()
        signs = torch.tensor([-1.0 if mixed(e.seed, x) & 1 else 1.0 for x in places]).double()
        order = sorted(range(width), key=lambda i: mixed(e.seed, blocks * width + places[i]))
        gains = ((words + 0.5) / 2**24 - 0.5) * 12**0.5
        made.append(width**0.5 * h @ torch.diag(gains) @ torch.eye(width).double()[order] @ h @ torch.diag(signs) @ c)
    return torch.cat(made)[:count].view(e.m, e.n)


def sylvester(size: int) -> Tensor:
    """The orthonormal Hadamard matrix, by the parity of common bits."""
    return (
        torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]).double() / size**0.5
    )


def turned(e: Hadamard) -> Tensor:
    """Sylvester's matrix by the parity of common bits, on the diagonal, and the signs."""
    signs = torch.tensor([1.0 - 2 * b for b in bits_of(e.signs.tolist(), 1, e.n)]).double()
    return torch.block_diag(*[sylvester(e.block)] * (e.n // e.block)) * signs


def rotations(e: Cayley) -> Tensor:
    """(I + Q)(I - Q)⁻¹, block by block, with Q filled in number by number."""
    made = []
    for row in e.q.detach().double():
        q, numbers = torch.zeros(e.block, e.block).double(), iter(row)
        for i, j in itertools.combinations(range(e.block), 2):
            q[i, j] = next(numbers)
            q[j, i] = -q[i, j]
        unit = torch.eye(e.block).double()
        made.append((unit + q) @ torch.linalg.inv(unit - q))
    return torch.block_diag(*made)


MEANINGS: dict[type[Expr], Callable[..., Tensor]] = {
    Codebook: looked_up,
    SparseDelta: placed,
    Basis: generated,
    Hadamard: turned,
    Kronecker: lambda e: e.scale * torch.kron(e.a.detach().double(), e.b.detach().double()),
    Blocks: lambda e: torch.block_diag(*meaning(e.kept).chunk(e.count)),
    Permutation: lambda e: torch.eye(e.shape[0]).double()[e.order.long()],
    Diagonal: lambda e: torch.diag(e.d.detach().double()),
    Cayley: rotations,
    Entrywise: lambda e: torch.stack([meaning(part) for part in e.kids()]).prod(0),
    Dense: lambda e: e.w.detach().double(),
    LowRank: lambda e: e.scale * (e.b.detach().double() @ e.a.detach().double()),
}


def meaning(e: Expr) -> Tensor:
    """The value by definition, in float64, without any code of the node: its own here, or what docs/files.md says."""
    if isinstance(e, Sum):
        return sum(meaning(t) for t in e.named().values())
    if isinstance(e, Product):
        return functools.reduce(torch.matmul, [meaning(f) for f in e.kids()])
    if isinstance(e, Masked | NM):
        return torch.zeros(e.shape).double().masked_scatter(pattern(e), meaning(e.kept))
    if isinstance(e, Quantized):
        return decoded(e).double()
    return MEANINGS.get(type(e), documented)(e).double()


def value_is_the_definition(e: Expr) -> None:
    """dense() is what the docstring says, decoded apart; a quantized leaf to the last bit."""
    if isinstance(e, Quantized):
        assert torch.equal(e.dense(), decoded(e))
    close(e.dense().float(), meaning(e).float())


def the_document_reads_it(e: Expr) -> None:
    """The reader in docs/files.md makes the same value from the saved tree and tensors."""
    close(documented(e).float(), e.dense().float())


def forward_is_the_product(e: Expr) -> None:
    """forward(x) = x denseᵀ, in one piece and in slices, and in x's dtype."""
    x = inputs(e, 2, 3)
    want = F.linear(x, e.dense().float())
    close(e(x), want)
    with narrow():
        close(e(x), want)
    half = e(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))


def rows_are_looked_up(e: Expr) -> None:
    """rows(ids) = dense()[ids], for ids of any shape."""
    ids = torch.randint(0, e.shape[0], (2, 3), generator=rng("ids"))
    close(e.rows(ids), e.dense()[ids])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32,), (3, 32), (64, 32), (4, 40, 32)])
def test_sparse_products_of_few_and_of_many_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The product and both gradients are those of the dense matrix, frozen or not, whichever way is taken; nothing dense is kept."""
    value = randn(rng("sparse"), 24, 32)
    e = SparseDelta.of(value, torch.rand(24, 32, generator=rng("places")) < 0.2)
    e = e.rebuild(values=torch.nn.Parameter(e.values))
    x = randn(rng("inputs"), *shape).to(dtype).requires_grad_()
    y = e(x)
    g = randn(rng("outputs"), *y.shape).to(dtype)
    y.backward(g)
    whole, inputs = e.dense().detach().requires_grad_(), x.detach().to(e.values.dtype).requires_grad_()
    want = torch.nn.functional.linear(inputs, whole)
    want.backward(g.to(want.dtype))
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.to(want.dtype), want, **near)
    torch.testing.assert_close(x.grad.to(want.dtype), inputs.grad, **near)
    torch.testing.assert_close(e.values.grad, whole.grad.flatten()[e.entries()], **near)
    still = e.rebuild(values=e.values.detach())
    torch.testing.assert_close(still(x), y.detach(), **near)
    kept = [t for t in saved(lambda: e(x)) if t.numel() >= 24 * 32 and t.numel() != x.numel()]
    assert not kept


def saved(run: Callable[[], Tensor]) -> list[Tensor]:
    """What a graph keeps for its backward."""
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        run()
    return held


CUT = {
    name
    for name, cls in NODES.items()
    if cls.take is not Expr.take
    or not any(f.dims[:1] == ("m",) or f.kind in ("child", "children") for f in fields(cls))
} - {"SparseDelta"}
"""Nodes whose rows are a node of another kind; of a product only the first factor is cut."""


def a_slice_is_those_rows(e: Expr) -> None:
    """take(rows) = dense()[rows]; a slice of a tensor with rows is a view of it."""
    part = slice(e.shape[0] // 3, e.shape[0] // 3 + 2)
    close(e.take(part).dense(), e.dense()[part])
    ids = torch.tensor([e.shape[0] - 1, 0])
    close(e.take(ids).dense(), e.dense()[ids])
    if not nodes_in(e) & CUT:
        held = {t.untyped_storage().data_ptr() for t in tensors(e).values()}
        assert {t.untyped_storage().data_ptr() for t in tensors(e.take(part)).values()} <= held


def takes_a_linear_map(e: Expr) -> None:
    """Mapped, it is M · value (outputs) or value · M (inputs): in its own numbers, as trainable as before, or by a factor beside it."""
    e = trainable(e)
    for dim, size in enumerate(e.shape):
        by = randn(rng("map", dim, size), size, size)

        def values(t: Tensor, by: Tensor = by, dim: int = dim) -> Tensor:
            return by @ t if dim == 0 else t @ by

        def beside(part: Expr, by: Tensor = by, dim: int = dim) -> Expr:
            return between((Dense(by),), part, ()) if dim == 0 else between((), part, (Dense(by),))

        made, value = e.mapped(dim, values, beside), e.dense().detach()
        close(made.dense().detach(), by @ value if dim == 0 else value @ by)
        assert sum(t.requires_grad for t in made.parameters()) == sum(t.requires_grad for t in e.parameters())


def slices_stack_to_the_whole(e: Expr) -> None:
    """stack(slices) has the value of the whole."""
    with narrow():
        parts = list(e.slices())
    assert len(parts) == 1 + (e.shape[0] - 1) // max(1, 16 // e.shape[1])
    close(stack(parts).dense(), e.dense())


def written_and_read_it_is_the_same(e: Expr) -> None:
    """build(spec, tensors) is bit-exact, through JSON and safetensors bytes."""
    held = safetensors.torch.load(safetensors.torch.save({k: t.contiguous() for k, t in tensors(e).items()}))
    back = build(json.loads(json.dumps(spec(e))), held.__getitem__)
    assert snapshot(back) == snapshot(e)
    assert torch.equal(back(inputs(e, 3)), e(inputs(e, 3)))


def bytes_are_counted(e: Expr) -> None:
    """nbytes is what safetensors stores behind its header."""
    data = safetensors.torch.save({k: t.contiguous() for k, t in tensors(e).items()})
    assert e.nbytes() == len(data) - 8 - int.from_bytes(data[:8], "little")


def no_rows_give_no_rows(e: Expr) -> None:
    """Inputs without a row, as an expert gets that no token chose."""
    for dtype in (torch.float32, torch.bfloat16):
        y = e(torch.zeros(0, e.shape[1], dtype=dtype))
        assert y.shape == (0, e.shape[0]) and y.dtype == dtype


def autocast_costs_its_precision_alone(e: Expr) -> None:
    """A product under autocast is the plain one up to eight roundings to bfloat16: of inputs, weights and what is between."""
    x = inputs(e, 4)
    want = e(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        gap = (e(x).detach().float() - want).abs().max()
    scale = (x.abs() @ e.dense().detach().float().abs().T).max()
    assert float(gap) <= 2**-6 * float(scale)


def inputs_get_the_dense_gradient(e: Expr) -> None:
    """Gradients with respect to x are those of the dense product, also in slices."""
    x, weigh = inputs(e, 4), randn(rng("out"), 4, e.shape[0])
    want = weigh @ e.dense().float()
    for context in (mock.patch.multiple("weft.expr.base", CHUNK=1 << 24), narrow()):
        with context:
            leaf = x.clone().requires_grad_()
            (e(leaf) * weigh).sum().backward()
            close(leaf.grad, want)


def leaves_get_the_dense_gradient(e: Expr) -> None:
    """Gradients of trainable leaves, through forward and through rows, are those of the dense product."""
    floats = [k for k, t in tensors(e).items() if t.is_floating_point()]
    e = trainable(e)
    assert e.frozen() == (not floats)
    x, weigh = inputs(e, 4), randn(rng("out"), 4, e.shape[0])
    ids = torch.arange(4) % e.shape[0]
    pairs = [(e(x) * weigh, (x @ e.dense().T) * weigh), (e.rows(ids) * x, e.dense()[ids] * x)]
    leaves = [p for p in e.parameters() if p.requires_grad]
    assert len(leaves) == len(floats)
    off = any(getattr(node, "on", True) is False for node in e.modules())  # what is off is in no product
    for made, want in pairs if leaves else []:
        grads = (torch.autograd.grad(y.sum(), leaves, allow_unused=off, materialize_grads=off) for y in (made, want))
        for a, b in zip(*grads, strict=True):
            close(a, b)


def frozen_keeps_nothing_dense(e: Expr) -> None:
    """Between forward and backward a frozen expression holds no tensor of m n entries but its own."""
    m, n = e.shape
    if m == 1 and nodes_in(e) & {"Hadamard"}:
        return  # what they make of one row of inputs is as large as the weight
    own = {t.untyped_storage().data_ptr() for t in tensors(e).values()}
    kept: list[tuple[int, int]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append((t.numel(), t.untyped_storage().data_ptr()))
        return t

    x = inputs(e, 3).requires_grad_()
    with mock.patch.multiple("weft.expr.nodes", CHUNK=16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = e(x)
    assert y.requires_grad
    assert not [size for size, at in kept if size == m * n and at not in own]


def promises_hold(e: Expr) -> None:
    """Zeros, N:M, rank and levels are true of the value."""
    told, value = e.promises(), e.dense().float()
    assert told.zeros == (e.mask() is not None)
    if told.zeros:
        assert not bool(value[~e.mask()].any())
    if told.nm:
        assert int((value != 0).view(e.shape[0], -1, told.nm[1]).sum(2).max()) <= told.nm[0]
    if told.rank is not None:
        assert int(torch.linalg.matrix_rank(value.double(), rtol=1e-5)) <= told.rank
    if told.levels is not None:
        for row in value:
            groups = row.split(e.group or e.n) if isinstance(e, Quantized) else [row]
            allowed = told.levels if len(groups) > 1 else told.levels + (told.levels - 1) * (e.shape[1] // 5)
            assert all(len(part.unique()) <= allowed for part in groups)


def casts_spare_bytes(e: Expr) -> None:
    """No dtype cast touches a packed byte, and the cast expression still runs."""
    bytes_ = {k: t.clone() for k, t in tensors(e).items() if not t.is_floating_point()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        made = copy.deepcopy(e).to(dtype)
        assert all(torch.equal(tensors(made)[k], t) for k, t in bytes_.items())
        assert {t.dtype for k, t in tensors(made).items() if k not in bytes_} <= {dtype}
        assert bool(torch.isfinite(made(inputs(e, 2))).all())


def copies_are_equal_and_apart(e: Expr) -> None:
    """deepcopy and state_dict give the same expression over other storage."""
    for made in (copy.deepcopy(e), build(spec(e), {k: t.clone() for k, t in e.state_dict().items()}.__getitem__)):
        assert snapshot(made) == snapshot(e) and made.shape == e.shape
        assert not {t.data_ptr() for t in tensors(made).values()} & {t.data_ptr() for t in tensors(e).values()} - {0}


def forks_part_ways(e: Expr) -> None:
    """A fork shares frozen storage; training, writing or casting one never changes the other."""
    for name, t in tensors(fork(e)).items():
        assert (t.data_ptr() == tensors(e)[name].data_ptr()) == (id(tensors(e)[name]) not in written(e))
    for mine in (e, trainable(e)):
        for one, other in [(mine, fork(mine)), (fork(mine), mine)]:
            before = snapshot(other)
            for p in [p for p in one.parameters() if p.requires_grad or id(p) in written(one)]:
                p.data.add_(1)
            one.to(torch.float64)
            assert snapshot(other) == before


def normal_form_has_the_value(e: Expr) -> None:
    """left (base + terms) right, where there is a normal form, and total of the terms, are worth what the tree is."""
    form = normal(e)
    if not isinstance(e, (Product, *SIDES)) and not any(isinstance(kid, Sum) for kid in e.kids()):
        assert form is not None
    if form is not None:
        value = form.base.dense().float() + sum(t.dense().float() for t in form.terms.values())
        for d in reversed(form.left):
            value = d.dense() @ value
        for d in form.right:
            value = value @ d.dense()
        close(value, e.dense().float())
        assert not isinstance(form.base, Sum | Product)
    close(total({"base": e, "adapter:new": e}).dense(), 2 * e.dense())


LAWS: list[Callable[[Expr], None]] = [
    value_is_the_definition,
    the_document_reads_it,
    forward_is_the_product,
    rows_are_looked_up,
    a_slice_is_those_rows,
    takes_a_linear_map,
    slices_stack_to_the_whole,
    written_and_read_it_is_the_same,
    bytes_are_counted,
    no_rows_give_no_rows,
    autocast_costs_its_precision_alone,
    inputs_get_the_dense_gradient,
    leaves_get_the_dense_gradient,
    frozen_keeps_nothing_dense,
    promises_hold,
    casts_spare_bytes,
    copies_are_equal_and_apart,
    forks_part_ways,
    normal_form_has_the_value,
]


@pytest.mark.parametrize("kind", EXPRS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_node(law: Callable[[Expr], None], kind: str) -> None:
    """Each law, for each kind of expression, over all shapes."""
    for e in instances(kind):
        law(e)


TENSORS = [(kind, f) for kind, cls in NODES.items() for f in tensor_fields(cls)]
PLAIN = [(kind, f.name) for kind, cls in NODES.items() for f in fields(cls) if f.kind != "tensor"]


@functools.cache
def example(node: str) -> Expr:
    """Some instance of the node; never changed."""
    return next(e for kind in KINDS for e in instances(kind) if type(e).__name__ == node)


@pytest.mark.parametrize(("node", "field"), TENSORS)
def test_a_wrong_tensor_is_named(node: str, field: str) -> None:
    """A tensor of another dtype or rank, bytes of another length, or no tensor at all, is refused by its name."""
    e = example(node)
    good = getattr(e, field).detach()
    packed = good.dtype == torch.uint8
    bad = [good.float() if packed else good.to(torch.uint8), good[None], good.tolist(), None]
    for value in [*bad, *([torch.cat([good, good[..., :1]], -1)] if packed else [])]:
        with pytest.raises(ShapeError) as caught:
            e.rebuild(**{field: value})
        assert caught.value.where == f"{node}.{field}"


@pytest.mark.parametrize(("node", "field"), PLAIN)
def test_a_wrong_field_is_named(node: str, field: str) -> None:
    """A child that is no expression, or a plain value of another type, is refused by its name; so is a surplus."""
    e = example(node)
    held = getattr(e, field)
    others = [
        None,
        torch.zeros(2),
        "1.5" if isinstance(held, float) else 1.5,
        *([] if isinstance(held, bool) else [True]),
    ]
    for value in others:
        with pytest.raises(ShapeError) as caught:
            e.rebuild(**{field: value})
        assert caught.value.where == f"{node}.{field}"
    with pytest.raises(ShapeError, match="wrong fields"):
        type(e)(**{f.name: getattr(e, f.name) for f in fields(type(e))}, surplus=1)


@pytest.mark.parametrize("roles", [{}, {"basis"}, {"base", "adapter:"}, {"base", "adapter:a b"}])
def test_sums_refuse_other_roles(roles: set[str]) -> None:
    """A sum has terms, and their roles are base, compensation and adapter:NAME."""
    with pytest.raises(ShapeError):
        Sum({r: lowrank(3, 4, rng()) for r in roles})


def test_shapes_must_agree() -> None:
    """Terms of two shapes make no sum; factors that do not chain make no product; nor do thin ones of two ranks."""
    a, b = lowrank(3, 4, rng()), lowrank(3, 5, rng())
    for make in (
        lambda: Sum({"base": a, "compensation": b}),
        lambda: Product(a, b),
        lambda: LowRank(a.b, b.a[:1]),
        Product,
    ):
        with pytest.raises(ShapeError):
            make()


def test_free_trees_have_no_normal_form() -> None:
    """A product of several cores has none; diagonals around one core do."""
    g = rng("free")
    assert normal(chain(5, 7, g)) is None
    form = normal(Product(Diagonal(randn(g, 5)), Dense(randn(g, 5, 7))))
    assert form is not None and len(form.left) == 1 and not form.right


def test_packed_bytes_are_one_row_major_tensor() -> None:
    """A quantized leaf is one uint8 tensor with a row a row of the weight, so that rows can be sharded."""
    for kind in EXPRS:
        for e in instances(kind):
            if isinstance(e, Quantized):
                assert list(tensors(e)) == ["data"] and e.data.dtype == torch.uint8 and e.data.shape[0] == e.shape[0]
