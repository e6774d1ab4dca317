"""Laws of what methods share: the column solver against a plain loop, low-rank factors against an SVD."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from weft.error import NumericError, OptionError
from weft.expr import LowRank
from weft.linalg.columns import inverse_factor, solve
from weft.linalg.lowrank import affordable, roots, truncate, whitened
from weft.linalg.masks import PATTERNS, best, sparse
from weft.linalg.swaps import swapped

from .cases import after, features, group, output_error, randn, rng, weight


def moment(n: int, tokens: int = 256) -> Tensor:
    """The second moment of synthetic inputs."""
    x = features(n, "linalg", tokens)
    return x.T @ x / tokens


@pytest.mark.parametrize(("n", "tokens"), [(1, 9), (12, 256), (30, 8)])
def test_inverse_factor(n: int, tokens: int) -> None:
    """U is upper and Uᵀ U inverts the damped Gram, whatever its rank."""
    gram = moment(n, tokens).double()
    upper, used = inverse_factor(gram, 0.01, "here")
    assert used == 0.01 and torch.equal(upper, upper.triu())
    held = gram + 0.01 * gram.diagonal().mean() * torch.eye(n).double()
    torch.testing.assert_close(upper.T @ upper @ held, torch.eye(n).double(), rtol=0, atol=1e-9)


def plain_solve(w: Tensor, gram: Tensor, damp: float, settle: object) -> Tensor:
    """Optimal brain quantization as its paper says it: settle a column, invert what is left, spread the error."""
    w, h = w.double().clone(), gram.double() + damp * gram.double().diagonal().mean() * torch.eye(len(gram)).double()
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        q = settle(w[:, j], j, slice(0, len(w)))
        w[:, j:] -= ((w[:, j] - q) / inverse[0, 0])[:, None] * inverse[0]
        w[:, j] = q
    return w


@pytest.mark.parametrize("rounds", [True, False])
def test_solve_is_the_plain_loop(rounds: bool) -> None:
    """Blocks, row slices and laziness change nothing; pruned and rounded columns alike; the input stays."""
    w, gram, mask = weight(7, 21, "solve"), moment(21), torch.rand(7, 21, generator=rng("mask")) < 0.5

    def settle(x: Tensor, j: int, rows: slice) -> Tensor:
        return (x / 0.2).round().clamp(-4, 3) * 0.2 if rounds else x * mask[rows, j]

    upper, _ = inverse_factor(gram, 0.01, "here")
    want, before = plain_solve(w, gram, 0.01, settle).float(), w.clone()
    torch.testing.assert_close(solve(w, upper, settle), want, rtol=1e-4, atol=1e-4)
    with mock.patch.multiple("weft.linalg.columns", BLOCK=4, ROWS=40):  # one row at a time
        torch.testing.assert_close(solve(w, upper, settle), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(w, before)


def indefinite(n: int, dip: float) -> Tensor:
    """A symmetric matrix with one eigenvalue of -dip times its mean diagonal."""
    q, _ = torch.linalg.qr(randn(rng("q"), n, n).double())
    lam = torch.ones(n).double()
    lam[0] = 0
    return (q * (lam - torch.eye(n)[0] * dip * (n - 1) / (n + dip))) @ q.T


def test_more_damping_is_declared() -> None:
    """A Gram that its damping does not make definite gets ten times more, and the group says so once."""
    g = group(gram=indefinite(32, 0.05))
    g.inverse_factor(0.01)
    g.inverse_factor(0.01)
    assert g.notes == [("site0", "damping raised from 0.01 to 0.1")]
    calm = group()
    calm.inverse_factor(0.01)
    assert not calm.notes


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_inverted_is_named(bad: float) -> None:
    """A Gram that is not finite, or that no damping saves, stops with the site's name."""
    broken = moment(32)
    broken[3, 5] = bad
    for gram in (broken, -moment(32) + torch.diag(2 * moment(32).diagonal() * torch.linspace(0.1, 3, 32))):
        with pytest.raises(NumericError, match=r"site0\.gram"):
            group(gram=gram).inverse_factor(1e-6)
    with pytest.raises(NumericError, match="there"):
        inverse_factor(broken, 0.01, "there")


@pytest.mark.parametrize("rank", [1, 3, 9, 100])
def test_factors_are_the_best(rank: int) -> None:
    """truncate is the best in the Frobenius norm; whitened in the norm of the outputs, where weight space is not."""
    error, gram = weight(9, 14, "svd"), moment(14).double()

    def missed(made: Tensor, by: Tensor) -> float:
        gap = (error - made).double()
        return float((gap @ by * gap).sum())

    eye = torch.eye(14).double()
    to, back = roots(gram)
    plain, ours = truncate(error, rank), whitened(error, to, back, rank)
    assert plain.promises().rank == ours.promises().rank == min(rank, 9)
    for made, by, root in ((plain, eye, eye), (ours, gram, to)):
        s = torch.linalg.svdvals(error.double() @ root)
        size = float(s.square().sum())
        assert missed(made.dense(), by) == pytest.approx(float(s[rank:].square().sum()), rel=0.01, abs=1e-3 * size)
    if rank < 9:
        assert missed(ours.dense(), gram) < missed(plain.dense(), gram)
    torch.testing.assert_close(to @ to.T, gram, rtol=1e-6, atol=1e-6 * float(gram.max()))


def test_roots_of_flat_grams() -> None:
    """Directions without energy are left out of the inverse; no energy at all gives identities."""
    gram = moment(20, 5).double()
    to, back = roots(gram)
    torch.testing.assert_close(to @ back @ gram, gram, rtol=1e-4, atol=1e-4 * float(gram.max()))
    assert all(torch.equal(r, torch.eye(20).double()) for r in roots(torch.zeros(20, 20)))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.8, 1.0])
def test_ranks_fit_the_share(share: float) -> None:
    """Both factors hold at most the share of the entries, or rank 1; one more rank would not fit; 0 where rank 1 saves nothing."""
    for m, n in ((24, 32), (7, 5), (1, 40), (2, 3), (2, 2)):
        r = affordable(m, n, share)
        assert (r == 0) == (m + n > m * n)
        assert r <= 1 or r * (m + n) <= share * m * n
        assert r == 0 or (r + 1) * (m + n) > share * m * n


@pytest.mark.parametrize("keep", [0.2, 0.8])
def test_svd_llm_reaches_the_least_error(keep: float) -> None:
    """Its output error is the tail of the singular values of W L, L the Cholesky factor of the Gram, which no factors can beat."""
    g = group(rows=(24, 17), n=32, salt="svd_llm")
    factor = torch.linalg.cholesky(g.gram())
    tail = sum(
        float(torch.linalg.svdvals(s.original.double() @ factor)[affordable(*s.now.shape, keep) :].square().sum())
        for s in g
    )
    made = after(g, ("svd_llm", {"keep": keep}))
    assert output_error(g, made) == pytest.approx(tail, rel=0.01)
    for s, e in zip(g, made, strict=True):
        assert isinstance(e, LowRank) and e.nbytes() <= keep * 2 * s.now.shape[0] * s.now.shape[1]
    lone = group(rows=(1,))
    assert after(lone, "svd_llm") == [lone.now] and lone.notes == [("site0", "no rank makes it smaller: left as it is")]


def lost(w: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """Each row's e G eᵀ, e what the mask leaves out, in float64."""
    e = (w * ~mask).double()
    return ((e @ gram.double()) * e).sum(1)


def plain_swaps(w: Tensor, gram: Tensor, mask: Tensor, of: int, limit: int) -> Tensor:
    """Try every pair of every row (within `of` columns), and take the best as long as it lowers the row's error."""
    mask = mask.clone()
    for row, held in zip(w, mask, strict=True):
        for _ in range(limit):
            tried = []
            for i in held.nonzero().flatten().tolist():
                for p in (~held).nonzero().flatten().tolist():
                    if i // of == p // of:
                        swap = held.clone()
                        swap[i], swap[p] = False, True
                        tried.append((float(lost(row[None], gram, swap[None])), swap))
            least, swap = min(tried, key=lambda t: t[0])
            if not least < float(lost(row[None], gram, held[None])):
                break
            held.copy_(swap)
    return mask


@pytest.mark.parametrize("pattern", PATTERNS)
def test_swaps_are_the_plain_loop(pattern: str) -> None:
    """Where the front holds all entries, the mask is that of trying every pair, after one swap, three, and all."""
    w, gram = weight(5, 16, "swaps"), moment(16)
    start = best(w.abs(), pattern, 0.5, "here")
    of = 16 if pattern == "row" else int(pattern[-1])
    for limit in (1, 3, 100):
        made = swapped(w, gram, start, pattern, limit)
        assert torch.equal(made, plain_swaps(w, gram, start, of, limit))
    assert not torch.equal(made, start)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("front", [1, 4, 32])
def test_swaps_never_hurt(pattern: str, front: int) -> None:
    """No row loses more than before, with a narrow front too; counts stay, a row changes by the swaps allowed, slices change nothing."""
    w, gram = weight(40, 64, "swaps"), moment(64)
    start = best(w.abs() * gram.diagonal().sqrt(), pattern, 0.5, "here")
    before, of = start.clone(), 64 if pattern == "row" else int(pattern[-1])
    with mock.patch.multiple("weft.linalg.swaps", FRONT=front):
        for limit in (1, 5, 200):
            made = swapped(w, gram, start, pattern, limit)
            assert bool((lost(w, gram, made) <= lost(w, gram, start) * (1 + 1e-12)).all())
            assert torch.equal(made.view(40, -1, of).sum(2), start.view(40, -1, of).sum(2))
            assert int((made != start).sum(1).max()) <= 2 * limit
            with mock.patch.multiple("weft.linalg.swaps", ENTRIES=3 * 64):
                assert torch.equal(swapped(w, gram, start, pattern, limit), made)
    assert float(lost(w, gram, made).sum()) < 0.95 * float(lost(w, gram, start).sum())
    assert torch.equal(start, before)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("share", [0.0, 0.33, 0.99])
def test_masks_keep_the_best(pattern: str, share: float) -> None:
    """No dropped score is above a kept one of its row or block; counts are exact; `sparse` has that value."""
    score = randn(rng("score"), 5, 16).abs()
    mask = best(score, pattern, share, "here")
    keep, of = (16 - int(share * 16), 16) if pattern == "row" else map(int, pattern.split(":"))
    kept, cells = mask.view(5, -1, of), score.view(5, -1, of)
    assert bool((kept.sum(2) == keep).all())
    assert bool((cells.masked_fill(~kept, torch.inf).amin(2) >= cells.masked_fill(kept, -1).amax(2)).all())
    assert torch.equal(sparse(score, mask, pattern).dense(), score * mask)


def test_patterns_must_fit() -> None:
    """N:M on columns that M does not divide names the site."""
    with pytest.raises(OptionError, match="up_proj"):
        best(torch.ones(2, 10), "2:4", 0.5, "up_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "tiny", "wide"])
def test_a_limit_is_what_sorting_finds(kind: str, dtype: torch.dtype) -> None:
    """At every rank, of parts of any sizes, of either sign."""
    from weft.linalg.votes import limit

    g = torch.Generator().manual_seed(3)
    x = torch.randn(37, 11, generator=g, dtype=dtype)
    x = {
        "random": x,
        "ties": x.round(decimals=0),
        "zeros": x * (x > 1),
        "tiny": x * 1e-40,
        "wide": x * 10.0 ** torch.randint(-30, 30, x.shape, generator=g),
    }[kind]
    sizes = x.abs().flatten().sort(descending=True).values
    for rank in (1, 2, 17, 200, x.numel() - 1, x.numel()):
        assert limit(lambda: x.split(10), rank) == float(sizes[rank - 1])
