"""ref-dlm: a masked diffusion language model, ref-lm made to look both ways and trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from weft import store
from weft.error import ResourceError
from weft.lab.distance import windows
from weft.lab.made.recipe import REF_LM, Recipe, pick
from weft.lab.metrics import Scores, bits_per_byte, texts_of
from weft.lab.tasks import task
from weft.model import unweave

LENGTH, BATCH = 128, 4
DOCUMENTS = 16
DRAWS = 4
"""Sets of hidden tokens that each held-out window is scored with."""


class Dlm(Recipe):
    """EuroBertForMaskedLM, which is Llama without a causal mask: tokens are hidden at a rate t of 0 to 1, and all that are
    hidden are predicted at once (LLaDA, Nie et al. 2025).

    As ref-lm did, each position predicts the token after it, so that what ref-lm knows is kept (DiffuLLaMA, Gong et al. 2024).
    """

    name = "ref-dlm"
    about = (
        "A masked diffusion language model: an EuroBertForMaskedLM with ref-lm's weights, trained on installed packages' Python "
        "source to fill in tokens that are hidden at any rate, looking both ways. Position i predicts token i + 1; hidden tokens "
        "read `<|mask|>`."
    )
    steps = 200
    rate = 1e-3
    metric = "bits per byte, upper bound"
    limit = 2.7

    def model(self) -> nn.Module:
        """ref-lm's weights, and a row more in the embedding for hidden tokens. Errors: ResourceError."""
        try:
            from transformers import EuroBertConfig, EuroBertForMaskedLM
        except ImportError as e:
            what, got, fix = "this model needs a newer transformers", "no EuroBERT", "pip install -U transformers"
            raise ResourceError(what, where=self.name, got=got, want="EuroBertForMaskedLM", fix=fix) from e
        lm: Any = unweave(store.load(REF_LM))
        same = (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id",
        )  # fmt: skip
        given = {k: getattr(lm.config, k) for k in same}
        made = EuroBertForMaskedLM(EuroBertConfig(**given, vocab_size=self.hidden + 1, mask_token_id=self.hidden))
        held = {k: v.float() for k, v in lm.state_dict().items() if "lm_head" not in k and "embed_tokens" not in k}
        made.load_state_dict(held, strict=False)
        table = lm.get_input_embeddings().weight.float()
        made.get_input_embeddings().weight.data = torch.cat([table, table.mean(0, keepdim=True)])
        made.tie_weights()
        return made

    def loss(self, model: Any, rng: torch.Generator) -> Tensor:
        """The bound's integrand in nats a token: cross-entropy of hidden tokens, each sequence's divided by its rate t."""
        rows = self._rows[pick(rng, BATCH, len(self._rows))]
        rate = ((torch.arange(BATCH) + torch.rand((), generator=rng)) / BATCH).clamp(min=1e-2)
        hide = torch.rand(BATCH, LENGTH, generator=rng) < rate.unsqueeze(1)
        return (nats(model, rows, hide, self.hidden) / rate.unsqueeze(1)).mean()

    @cached_property
    def hidden(self) -> int:
        """The token that stands for those that are hidden."""
        return self.words().mask_token_id

    @cached_property
    def _rows(self) -> Int[Tensor, "k t+1"]:
        """Training windows."""
        cut = windows(texts_of(task("python").train), self.words(), length=LENGTH + 1, tokens=1 << 60)
        return torch.cat([b["input_ids"] for b in cut])

    def batches(self, seed: int = 0) -> list[dict[str, Tensor]]:
        """4,096 tokens of other Python source than it was trained on, hidden at rates of 0 to 1."""
        texts, rng = texts_of(task("python", seed=seed).calibration), torch.Generator().manual_seed(seed)
        made: list[dict[str, Tensor]] = []
        for batch in windows(texts, self.words(), length=LENGTH, tokens=4096):
            ids = batch["input_ids"]
            hide = torch.rand(ids.shape, generator=rng) < torch.rand(len(ids), 1, generator=rng)
            made.append({"input_ids": ids.masked_fill(hide, self.hidden)})
        return made

    def score(self, model: nn.Module) -> Scores:
        """An upper bound of each held-out document's bits per byte, and its bytes: the mean over `DRAWS` numbers of hidden tokens."""
        texts, words = texts_of(task("python").test)[:DOCUMENTS], self.words()
        made, rng = np.zeros(len(texts)), torch.Generator().manual_seed(0)
        for k, text in enumerate(texts):
            ids = [words.eos_token_id, *words(text, add_special_tokens=False, verbose=False)["input_ids"]]
            for at in range(0, len(ids) - 1, LENGTH):
                made[k] += bound(model, torch.tensor(ids[at : at + LENGTH + 1]), self.hidden, rng)
        size = np.array([len(t.encode()) for t in texts], dtype=np.float64)
        return made / size, size

    def facts(self, model: nn.Module) -> Mapping[str, float]:
        """The same documents' bits per byte by how frequent tokens are alone, and by ref-lm, which knows what is on the left."""
        texts, words = texts_of(task("python").test)[:DOCUMENTS], self.words()
        counts = torch.bincount(self._rows.flatten(), minlength=self.hidden).double() + 1
        bits = -(counts / counts.sum()).log2()
        ids = [i for t in texts for i in words(t, add_special_tokens=False, verbose=False)["input_ids"]]
        values, weights = bits_per_byte(store.load(REF_LM), words, texts)
        alone = float(bits[torch.tensor(ids)].sum()) / float(weights.sum())
        return {
            "bits per byte of token frequencies": alone,
            "bits per byte of ref-lm": float((values * weights).sum() / weights.sum()),
        }

    def words(self) -> Any:
        """ref-lm's tokenizer, with one token more."""
        return self._words

    @cached_property
    def _words(self) -> Any:
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(REF_LM)
        words.add_special_tokens({"mask_token": "<|mask|>"})
        return words


def nats(model: Any, rows: Int[Tensor, "b t+1"], hide: Bool[Tensor, "b t"], hidden: int) -> Float[Tensor, "b t"]:
    """-ln p of each hidden token given those that are not; zero where a token is not hidden. The first token is given."""
    seen = torch.cat([rows[:, :1], rows[:, 1:].masked_fill(hide, hidden)], 1)
    logits = model(input_ids=seen).logits[:, :-1].float()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return each.masked_fill(~hide, 0)


def bound(model: Any, row: Int[Tensor, "t+1"], hidden: int, rng: torch.Generator) -> float:
    """An estimate, right on average, of an upper bound of a row's bits after its first token.

    E over l = 1 ... t and sets of l tokens of t / l times the bits of those tokens given the others: the mean over all orders
    of what the row costs token by token in that order. l is drawn from `DRAWS` equal parts of its range.
    """
    size = len(row) - 1
    part = (torch.arange(DRAWS) + torch.rand(DRAWS, generator=rng)) / DRAWS
    count = (part * size).long().clamp(max=size - 1) + 1
    place = torch.rand(DRAWS, size, generator=rng).argsort(1).argsort(1)
    hide = place < count.unsqueeze(1)
    with torch.no_grad():
        each = nats(model, row.expand(DRAWS, -1), hide, hidden).double().sum(1)
    return float((each * size / count).mean()) / math.log(2)


RECIPE = Dlm()
