"""Batches: in what order examples come, how rows are packed with them, and the tensors of a batch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from weft.learn.data import IGNORE, Encoded, Pair

Row = tuple[Encoded, ...]
"""Examples that lie in one row of a batch; one, unless rows are packed."""
_WINDOW = 64
"""Batches whose examples are sorted by length together."""
_REFERENCE = "reference_"
"""How the tensors of a batch behind its references are called."""


class Ordered(Dataset[Any]):
    """Every step's items, one step after another, so that an index says all: step k of b items has those from k b to (k + 1) b."""

    def __init__(self, items: Sequence[Any], order: Int[np.ndarray, " n"]) -> None:
        self.items, self.order = items, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> Any:
        return self.items[self.order[i]]


def order(
    count: int, steps: int, batch: int, seed: int, lengths: Sequence[int] | None = None
) -> Int[np.ndarray, "steps*batch"]:
    """Which of `count` items come when: all of them in a new random order, again and again, to `steps` batches.

    With `lengths`, of every 64 batches the items are sorted by length, so that those of a batch are alike, and the batches shuffled.
    """
    total, rng = steps * batch, np.random.default_rng(seed)
    drawn = np.concatenate([rng.permutation(count) for _ in range(-(-total // count))])[:total]
    if lengths is None:
        return drawn
    long = np.asarray(lengths)
    made: list[Int[np.ndarray, "k b"]] = []
    for start in range(0, total, _WINDOW * batch):
        part = drawn[start : start + _WINDOW * batch]
        rows = part[np.argsort(long[part], kind="stable")].reshape(-1, batch)
        made.append(rows[rng.permutation(len(rows))])
    return np.concatenate(made).ravel()


def packed(examples: Sequence[Encoded], length: int) -> list[Row]:
    """Rows of at most `length` tokens that hold every example once: the longest first, each where it leaves the least room."""
    rooms: list[int] = []
    of: dict[int, list[list[Encoded]]] = {}
    made: list[list[Encoded]] = []
    for e in sorted(examples, key=lambda e: -len(e.input_ids)):
        at = bisect_left(rooms, len(e.input_ids))
        if at < len(rooms):
            room = rooms[at]
            row = of[room].pop()
            if not of[room]:
                del of[room], rooms[at]
        else:
            room, row = length, list[Encoded]()
            made.append(row)
        row.append(e)
        left = room - len(e.input_ids)
        if left not in of:
            of[left] = []
            insort(rooms, left)
        of[left].append(row)
    return [tuple(row) for row in made]


class Collate:
    """Tensors of a batch, and how many tokens it has: ids and labels, padded on the right, with a mask, or in packed rows positions.

    Positions begin anew with each example, and no mask goes with them: transformers makes one in which examples do not see each other.
    Pairs are tokenized here, the two of a pair beside each other. Where there are `tasks`, each example's is its number there. With
    `references`, the same targets behind the prompts' references, or the prompts where they have none.
    """

    def __init__(
        self, tokenizer: Any, length: int, *, pack: bool = False, tasks: Sequence[str] = (), references: bool = False
    ) -> None:
        self.tokenizer, self.length, self.pack, self.tasks = tokenizer, length, pack, tasks
        self.references = references
        self.pad: int = getattr(tokenizer, "pad_token_id", None) or 0

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        made = self._batch(items)
        if self.tasks:
            first = (i if isinstance(i, Pair) else i[0] for i in items)
            made["tasks"] = torch.tensor([self.tasks.index(e.task) for e in first])
        if self.references:
            other = self._batch([(e.reference or e,) for (e,) in items])
            made |= {f"{_REFERENCE}{k}": other[k] for k in ("input_ids", "attention_mask", "labels")}
        return made

    def _batch(self, items: Sequence[Any]) -> dict[str, Tensor]:
        if isinstance(items[0], Pair):
            texts = [t for i in items for t in (i.query, i.positive)]
            made = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
            return {
                "tokens": made["attention_mask"].sum()[None],
                **{k: made[k] for k in ("input_ids", "attention_mask")},
            }
        rows: Sequence[Row] = items
        width = self.length if self.pack else max(sum(len(e.input_ids) for e in row) for row in rows)
        ids = _filled([[t for e in row for t in e.input_ids] for row in rows], width, self.pad)
        labels = _filled([[t for e in row for t in (IGNORE, *e.labels[1:])] for row in rows], width, IGNORE)
        count = torch.tensor([sum(len(e.input_ids) for row in rows for e in row)])
        made = {"input_ids": ids, "labels": labels, "tokens": count}
        if self.pack:
            starts = [[p for e in row for p in range(len(e.input_ids))] for row in rows]
            positions = [row + list(range(width - len(row))) for row in starts]
            return {**made, "position_ids": torch.tensor(positions)}
        mask = _filled([[1] * len(e.input_ids) for row in rows for e in row], width, 0)
        return {**made, "attention_mask": mask}


def _filled(rows: Sequence[list[int]], width: int, fill: int) -> Int[Tensor, "b t"]:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model is called with."""
    return {k: v for k, v in batch.items() if k not in ("labels", "tokens", "tasks") and not k.startswith(_REFERENCE)}


def references(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch behind the prompts' references, where it has them; else itself."""
    held = {k.removeprefix(_REFERENCE): v for k, v in batch.items() if k.startswith(_REFERENCE)}
    return held or dict(batch)
