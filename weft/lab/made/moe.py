"""ref-moe: a mixture of experts upcycled from ref-lm (Komatsuzaki et al. 2022) and trained on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from weft import store
from weft.lab.distance import windows
from weft.lab.made.recipe import REF_LM, Recipe, pick
from weft.lab.metrics import Scores, bits_per_byte, texts_of
from weft.lab.tasks import task
from weft.model import unweave

EXPERTS, ACTIVE = 4, 2
NOISE = 0.1
"""Standard deviation of what is added to each copy of a feed-forward matrix, in that of its entries."""
OFFSETS = (0.6, 0.2, -0.2, -0.6)
"""What a new router's logits are on average, in another order in every layer; around that they have about unit variance."""
LENGTH, BATCH = 128, 4
DOCUMENTS = 16


class Moe(Recipe):
    """MixtralForCausalLM: each feed-forward part of ref-lm four times with noise, two of them a token, and a new router.

    Routers begin with unequal experts and nothing balances them, so that routing is skewed.
    """

    name = "ref-moe"
    about = (
        "A MixtralForCausalLM upcycled from ref-lm: every feed-forward part became four noisy copies of which each token "
        "takes two; routers began with unequal experts, and all was trained on installed packages' Python source without a "
        "loss that balances them."
    )
    steps = 240
    rate = 4e-4
    metric = "bits per byte"
    limit = 2.0

    def model(self) -> nn.Module:
        """ref-lm's weights in Mixtral's places."""
        from transformers import MixtralConfig, MixtralForCausalLM

        lm: Any = unweave(store.load(REF_LM))
        same = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id",
            "eos_token_id", "pad_token_id",
        )  # fmt: skip
        given = {k: getattr(lm.config, k) for k in same}
        made: Any = MixtralForCausalLM(
            MixtralConfig(**given, num_local_experts=EXPERTS, num_experts_per_tok=ACTIVE, sliding_window=None)
        )
        made.load_state_dict({k: v for k, v in lm.state_dict().items() if ".mlp." not in k}, strict=False)
        for old, new, mean in zip(lm.model.layers, made.model.layers, self._means(lm), strict=True):
            both = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
            new.mlp.experts.gate_up_proj.data = _copies(both)
            new.mlp.experts.down_proj.data = _copies(old.mlp.down_proj.weight)
            new.mlp.gate.weight.data = _router(mean)
        return made

    def _means(self, lm: Any) -> list[Tensor]:
        """The mean of what each feed-forward part of ref-lm reads."""
        seen: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Tensor]) -> None:
            seen.append(args[0].flatten(0, 1).mean(0))

        hooks = [layer.mlp.register_forward_pre_hook(see) for layer in lm.model.layers]
        with torch.no_grad():
            lm(**self.batches()[0], use_cache=False)
        for h in hooks:
            h.remove()
        return seen

    def loss(self, model: Any, rng: torch.Generator) -> Tensor:
        """Cross-entropy of the next token."""
        rows = self._rows[pick(rng, BATCH, len(self._rows))]
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    @cached_property
    def _rows(self) -> Tensor:
        """Training windows [k t]."""
        cut = windows(texts_of(task("python").train), self.words(), length=LENGTH, tokens=1 << 60)
        return torch.cat([b["input_ids"] for b in cut])

    def batches(self, seed: int = 0) -> list[dict[str, Tensor]]:
        """4,096 tokens of other Python source than it was trained on."""
        return windows(texts_of(task("python", seed=seed).calibration), self.words(), length=LENGTH, tokens=4096)

    def score(self, model: nn.Module) -> Scores:
        """Bits per byte of held-out documents, as ref-lm is scored."""
        return bits_per_byte(model, self.words(), texts_of(task("python").test)[:DOCUMENTS])

    def facts(self, model: nn.Module) -> Mapping[str, float | list[float]]:
        """ref-lm's own score on the same documents, and how evenly tokens are spread over experts."""
        values, weights = self.score(store.load(REF_LM))
        base = float((values * weights).sum() / weights.sum())
        return {"bits per byte of ref-lm": base, "routing entropy of each layer in bits, of 2": self.entropies(model)}

    def entropies(self, model: nn.Module) -> list[float]:
        """Entropy in bits of the experts' shares of tokens, layer by layer."""
        shares = torch.zeros(len(model.model.layers), EXPERTS, dtype=torch.float64)  # type: ignore[union-attr]
        with torch.no_grad():
            for batch in self.batches():
                routers = model(**batch, output_router_logits=True, use_cache=False).router_logits
                for i, logits in enumerate(routers):
                    chosen = logits.topk(ACTIVE, dim=-1).indices.flatten()
                    shares[i] += torch.bincount(chosen, minlength=EXPERTS)
        return (torch.special.entr(shares / shares.sum(1, keepdim=True)).sum(1) / torch.tensor(2.0).log()).tolist()

    def words(self) -> Any:
        """ref-lm's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(REF_LM)


def _router(mean: Tensor) -> Tensor:
    """A random router [e n] whose logits at this mean input are `OFFSETS` in some order."""
    gate = torch.randn(EXPERTS, len(mean)) / len(mean) ** 0.5
    offsets = torch.tensor(OFFSETS)[torch.randperm(EXPERTS)]
    return gate + (offsets - gate @ mean).outer(mean) / mean.square().sum()


def _copies(weight: Tensor) -> Tensor:
    """Noisy copies [e m n] of a matrix."""
    copies = weight.detach().float().expand(EXPERTS, *weight.shape)
    return copies + NOISE * copies.std() * torch.randn(copies.shape)


RECIPE = Moe()
