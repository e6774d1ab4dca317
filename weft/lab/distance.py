"""Batches of text, and a model's distance to the original on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from weft.error import NumericError
from weft.learn.tokenizer import behind, opening
from weft.stats import Objective, forward
from weft.store.cache import Cache, key

ROWS = 128
"""Distributions that are compared at a time."""
REFERENCE_BYTES = 1 << 30
"""At most this much of the original's output is kept (on disk) to compare with."""


class Distance:
    """Distance to the original on fixed batches, whose outputs of the original are kept on disk."""

    def __init__(
        self, original: nn.Module, batches: Sequence[Mapping[str, Tensor]], goal: Objective, cache: Cache, name: str
    ) -> None:
        self.goal = goal
        self.batches: list[Mapping[str, Tensor]] = []
        self.held: list[Tensor] = []
        used = 0
        for i, batch in enumerate(batches):
            made = cache.tensors(
                "reference", key(name, i), lambda batch=batch: {"out": self._vectors(original, batch)}
            )["out"]
            if self.batches and used + made.nbytes > REFERENCE_BYTES:
                break
            used += made.nbytes
            self.batches.append(batch)
            self.held.append(made)

    def _vectors(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self.goal.vectors(forward(model, batch), batch).float()

    def part(self, share: float, draw: int) -> Distance:
        """The same on a share of the sequences, one at least, which `draw` picks: one number, one choice."""
        if share >= 1:
            return self
        sizes = [_rows(b) for b in self.batches]
        count = max(1, round(share * sum(sizes)))
        drawn = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(draw))[:count]
        made, start = copy(self), 0
        picked: list[tuple[Mapping[str, Tensor], Tensor]] = []
        for batch, ref, size in zip(self.batches, self.held, sizes, strict=True):
            rows = drawn[(drawn >= start) & (drawn < start + size)].sort()[0] - start
            start += size
            if len(rows):
                parts = ref.split(self._units(batch, ref))
                picked.append(({k: v[rows] for k, v in batch.items()}, torch.cat([parts[i] for i in rows.tolist()])))
        joined = list(_joined(picked, max(sizes), pad=self.goal.embeds))
        made.batches, made.held = [b for b, _ in joined], [ref for _, ref in joined]
        return made

    def _units(self, batch: Mapping[str, Tensor], ref: Tensor) -> list[int]:
        """Rows of the output that belong to each sequence of a batch."""
        rows = _rows(batch)
        kept = "attention_mask" in batch and len(ref) == int(batch["attention_mask"].sum())
        return batch["attention_mask"].sum(1).tolist() if kept else [len(ref) // rows] * rows

    def documents(self, model: nn.Module) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
        """The mean distance of each window or text, and its units (tokens or texts). Errors: NumericError."""
        values: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        for batch, ref in zip(self.batches, self.held, strict=True):
            out = self._vectors(model, batch)
            each = torch.cat(
                [self.goal.distance(a, b).double() for a, b in zip(out.split(ROWS), ref.split(ROWS), strict=True)]
            )
            rows = (
                each.view(_rows(batch), -1) if "attention_mask" not in batch or self.goal.embeds else each.unsqueeze(1)
            )
            values.append(rows.mean(1).numpy())
            weights.append(np.full(len(rows), rows.shape[1], dtype=np.float64))
        made = np.concatenate(values)
        if not np.isfinite(made).all():
            raise NumericError(
                "the model's output is not finite",
                where=type(model).__name__,
                got="NaN or infinity",
                want="numbers",
                fix="compress less",
            )
        return made, np.concatenate(weights)

    def __call__(self, model: nn.Module) -> float:
        """The mean distance of a unit."""
        values, weights = self.documents(model)
        return float((values * weights).sum() / weights.sum())


def _joined(
    parts: Sequence[tuple[Mapping[str, Tensor], Tensor]], most: int, *, pad: bool
) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    """Batches after each other as one, in lots of `most` rows, where they have one shape; with `pad`, texts of any length."""
    lot: list[tuple[Mapping[str, Tensor], Tensor]] = []
    for part in parts:
        if lot and (sum(_rows(b) for b, _ in lot) + _rows(part[0]) > most or not (pad or _alike(lot[0][0], part[0]))):
            yield _lot(lot)
            lot = []
        lot.append(part)
    if lot:
        yield _lot(lot)


def _alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return {k: v.shape[1:] for k, v in a.items()} == {k: v.shape[1:] for k, v in b.items()}


def _lot(parts: Sequence[tuple[Mapping[str, Tensor], Tensor]]) -> tuple[Mapping[str, Tensor], Tensor]:
    made: dict[str, Tensor] = {}
    for k in parts[0][0]:
        rows = [b[k] for b, _ in parts]
        if any(r.shape[1:] != rows[0].shape[1:] for r in rows):
            width = max(r.shape[1] for r in rows)
            rows = [F.pad(r, (0, width - r.shape[1])) for r in rows]
        made[k] = torch.cat(rows)
    return made, torch.cat([ref for _, ref in parts])


def _rows(batch: Mapping[str, Tensor]) -> int:
    """Sequences, texts or images of a batch."""
    return len(next(iter(batch.values())))


LOGITS = 1 << 26
"""Logits that a batch of windows gives at most (256 MiB in float32)."""


def classes(model: nn.Module) -> int:
    """Width of a model's output distribution, as its configuration says; 0 where it has none."""
    return int(getattr(getattr(model, "config", None), "vocab_size", 0) or 0)


def fewer(batch: int, length: int, classes: int) -> int:
    """As many of `batch` windows as give no more than `LOGITS`, but one."""
    return max(1, min(batch, LOGITS // (length * max(1, classes))))


def windows(
    texts: Sequence[str], tokenizer: Any, *, length: int, tokens: int, batch: int = 8, classes: int = 0
) -> list[dict[str, Tensor]]:
    """Batches of whole windows of `length` tokens, cut from the texts in order until about `tokens` are there.

    Each begins as the tokenizer begins a text. `classes`: the model's, where it has more than its tokenizer has words.
    """
    batch = fewer(batch, length, max(classes, len(tokenizer)))
    ids: list[int] = []
    lead, end = opening(tokenizer), tokenizer.eos_token_id
    for text in texts:
        ids += behind(tokenizer, text, lead) + ([end] if end is not None else [])
        if len(ids) >= tokens:
            break
    room = max(1, length - len(lead))
    count = max(1, min(len(ids) // room, tokens // length))
    rows = torch.tensor(ids[: count * room]).view(count, -1)
    rows = torch.cat([torch.tensor(lead, dtype=rows.dtype).expand(count, -1), rows], 1)
    return [{"input_ids": r} for r in rows.split(batch)]


def padded(
    texts: Sequence[str], tokenizer: Any, *, length: int, tokens: int, batch: int = 16, sort: bool = True
) -> list[dict[str, Tensor]]:
    """Batches of whole texts, padded, until about `tokens` are there; texts of like length together unless told not to `sort`."""
    encoded: list[list[int]] = []
    used = 0
    for text in texts:
        encoded.append(tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"])
        used += len(encoded[-1])
        if used >= tokens:
            break
    if sort:
        encoded.sort(key=len)
    made: list[dict[str, Tensor]] = []
    for i in range(0, len(encoded), batch):
        part = encoded[i : i + batch]
        width = max(map(len, part))
        ids = torch.full((len(part), width), tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for j, row in enumerate(part):
            ids[j, : len(row)], mask[j, : len(row)] = torch.tensor(row), 1
        made.append({"input_ids": ids, "attention_mask": mask})
    return made
