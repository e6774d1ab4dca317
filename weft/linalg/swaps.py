"""Improve a mask: let kept and pruned entries of a row trade places as long as the output's error falls."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ENTRIES = 1 << 20
"""Entries of a weight that are worked on at a time; rows do not depend on each other."""
FRONT = 32
"""Kept and pruned entries of a row, best alone first, among which the best pair is looked for."""

Pair = tuple[Float[Tensor, "m"], Int[Tensor, "m"], Int[Tensor, "m"]]


def swapped(
    w: Float[Tensor, "m n"], gram: Float[Tensor, "n n"], mask: Bool[Tensor, "m n"], pattern: str, limit: int
) -> Bool[Tensor, "m n"]:
    """The mask after at most `limit` swaps a row, each of which lowers the row's error e G eᵀ, e = w where the mask is not set.

    To prune i and keep p instead changes it by 2 w_i c_i + w_i² G_ii - 2 w_p c_p + w_p² G_pp - 2 w_i w_p G_ip, c = e G. Each step
    takes the best pair of a row (N:M: within M columns), of the `FRONT` on both sides that are best without the last
    term; a row without one that lowers its error is done. In float64.
    """
    out, gram = mask.clone(), gram.double()
    step = max(1, ENTRIES // max(1, w.shape[1]))
    for i in range(0, w.shape[0], step):
        rows = slice(i, i + step)
        _descend(w[rows].double(), gram, out[rows], 0 if pattern == "row" else int(pattern.split(":")[1]), limit)
    return out


def _descend(
    w: Float[Tensor, "m n"], gram: Float[Tensor, "n n"], mask: Bool[Tensor, "m n"], of: int, limit: int
) -> None:
    """Swap in place, in the rows that can still gain."""
    left = torch.arange(len(w), device=w.device)
    alone, here, pull = w.square() * gram.diagonal(), mask.clone(), 2 * w * ((w * ~mask) @ gram)
    for _ in range(limit):
        cost = torch.where(here, alone + pull, alone - pull)
        change, old, new = _within(w, gram, cost, here, of) if of else _anywhere(w, gram, cost, here)
        gain = change < 0
        if not bool(gain.all()):
            left, w, alone, here, pull = (t[gain] for t in (left, w, alone, here, pull))
            old, new = old[gain], new[gain]
        if not len(left):
            return
        at = torch.arange(len(left), device=w.device)
        by = w[at, old, None] * gram[old] - w[at, new, None] * gram[new]
        pull += 2 * w * by
        here[at, old], here[at, new] = False, True
        mask[left, old], mask[left, new] = False, True


def _anywhere(w: Tensor, gram: Tensor, cost: Tensor, mask: Bool[Tensor, "m n"]) -> Pair:
    """Of each row: the change by the best pair of the front, which entry goes, and which comes."""
    width = min(FRONT, w.shape[1])
    out, i = cost.masked_fill(~mask, torch.inf).topk(width, largest=False)
    back, p = cost.masked_fill(mask, torch.inf).topk(width, largest=False)
    both = 2 * w.gather(1, i)[:, :, None] * w.gather(1, p)[:, None, :] * gram[i[:, :, None], p[:, None, :]]
    change, best = (out[:, :, None] + back[:, None, :] - both).flatten(1).min(1)
    return change, i.gather(1, best[:, None] // width)[:, 0], p.gather(1, best[:, None] % width)[:, 0]


def _within(w: Tensor, gram: Tensor, cost: Tensor, mask: Bool[Tensor, "m n"], of: int) -> Pair:
    """The same of all pairs within `of` columns."""
    m, n = w.shape
    groups = torch.arange(n, device=w.device).view(-1, of)
    near = gram[groups[:, :, None], groups[:, None, :]]  # [n/of of of]
    out, back = (cost.masked_fill(no, torch.inf).view(m, -1, of) for no in (~mask, mask))
    cells = w.view(m, -1, of)
    both = 2 * cells[..., :, None] * cells[..., None, :] * near
    change, best = (out[..., :, None] + back[..., None, :] - both).flatten(1).min(1)
    start = best // (of * of) * of
    return change, start + best // of % of, start + best % of
