"""ref-seq2seq: a T5 that reverses or sorts short rows of letters."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.lab.made.recipe import Recipe, bits
from weft.lab.made.words import tokenizer
from weft.lab.metrics import Scores

TASKS = ("reverse", "sort")
LETTERS = string.ascii_lowercase[:16]
SHORT, LONG = 3, 7
"""Letters of a row."""
BATCH = 96
HELD_OUT = 400


class Seq2Seq(Recipe):
    """T5ForConditionalGeneration; a row of letters is held out if its hash says so, whatever is to be done with it."""

    name = "ref-seq2seq"
    about = (
        f"A small T5ForConditionalGeneration for a generated task: `reverse` or `sort`, then {SHORT} to {LONG} of "
        f"{len(LETTERS)} letters, words apart by spaces; it answers with the letters in that order."
    )
    steps = 1500
    rate = 3e-3
    metric = "bits per token of the answer"
    limit = 0.5

    def model(self) -> nn.Module:
        """Two blocks of width 64 on each side."""
        from transformers import T5Config, T5ForConditionalGeneration

        config: Any = T5Config(
            vocab_size=32, d_model=64, d_kv=16, d_ff=192, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
            relative_attention_num_buckets=16, relative_attention_max_distance=16, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        config.decoder_start_token_id = 0
        return T5ForConditionalGeneration(config)

    def loss(self, model: Any, rng: torch.Generator) -> Tensor:
        """Cross-entropy of the answers' tokens."""
        batch, labels = self._encode([_example(rng, held_out=False) for _ in range(BATCH)])
        return nn.functional.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten(), ignore_index=0)

    def batches(self, seed: int = 0) -> list[dict[str, Tensor]]:
        """512 training examples, answers given to the decoder."""
        rng = torch.Generator().manual_seed(seed)
        return [self._encode([_example(rng, held_out=False) for _ in range(64)])[0] for _ in range(8)]

    @cached_property
    def _test(self) -> list[tuple[str, str]]:
        rng = torch.Generator().manual_seed(0)
        return [_example(rng, held_out=True) for _ in range(HELD_OUT)]

    def score(self, model: Any) -> Scores:
        """Mean bits of each held-out answer's tokens, its end included, given those before; and how many they are."""
        batch, labels = self._encode(self._test)
        with torch.no_grad():
            logits = model(**batch).logits
        kept = labels != 0
        made = torch.zeros(labels.shape, dtype=torch.float64)
        made[kept] = torch.from_numpy(bits(logits[kept], labels[kept]))
        count = kept.sum(1).double()
        return (made.sum(1) / count).numpy(), count.numpy()

    def facts(self, model: nn.Module) -> Mapping[str, float]:
        """The share of held-out answers that greedy generation gets wholly right."""
        return {"exact match": float(self.exact(model).mean())}

    def exact(self, model: Any) -> np.ndarray:
        """Whether greedy generation gives each held-out answer."""
        batch, labels = self._encode(self._test)
        given = {k: v for k, v in batch.items() if k != "decoder_input_ids"}
        with torch.no_grad():
            made = model.generate(**given, max_new_tokens=LONG + 2, do_sample=False, num_beams=1)[:, 1:]
        width = max(made.shape[1], labels.shape[1])
        made, labels = (nn.functional.pad(t, (0, width - t.shape[1])) for t in (made, labels))
        return (made == labels).all(1).double().numpy()

    def words(self) -> Any:
        """One token a letter and a task."""
        return self._words

    @cached_property
    def _words(self) -> Any:
        return tokenizer([*TASKS, *LETTERS], length=LONG + 2)

    def _encode(self, examples: list[tuple[str, str]]) -> tuple[dict[str, Tensor], Tensor]:
        """What the model is given, and what it should answer, padded with zeros."""
        given, wanted = (
            self._words([e[i] for e in examples], padding=True, return_tensors="pt", return_token_type_ids=False)
            for i in (0, 1)
        )
        labels = wanted["input_ids"]
        shifted = nn.functional.pad(labels[:, :-1], (1, 0))
        return {**given, "decoder_input_ids": shifted}, labels


def _example(rng: torch.Generator, *, held_out: bool) -> tuple[str, str]:
    """A question and its answer, from rows that are held out or from the others."""
    while True:
        size = int(torch.randint(SHORT, LONG + 1, (), generator=rng))
        row = "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (size,), generator=rng).tolist())
        if (hashlib.blake2b(row.encode(), digest_size=1).digest()[0] < 26) == held_out:
            break
    task = TASKS[int(torch.randint(len(TASKS), (), generator=rng))]
    answer = row[::-1] if task == "reverse" else "".join(sorted(row))
    return " ".join([task, *row]), " ".join(answer)


RECIPE = Seq2Seq()
