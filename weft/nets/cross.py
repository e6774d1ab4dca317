"""A click-through model: embeddings of categories, layers that cross them, and a perceptron beside these."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput


class CrossNetworkConfig(PretrainedConfig):
    """Sizes of a `CrossNetwork`."""

    model_type = "weft-cross"

    def __init__(
        self,
        vocab_size: int = 1000,
        num_fields: int = 8,
        embedding_size: int = 16,
        num_cross_layers: int = 3,
        intermediate_size: int = 128,
        num_deep_layers: int = 2,
        **others: Any,
    ) -> None:
        self.vocab_size, self.num_fields, self.embedding_size = vocab_size, num_fields, embedding_size
        self.num_cross_layers = num_cross_layers
        self.intermediate_size, self.num_deep_layers = intermediate_size, num_deep_layers
        super().__init__(**others)


@dataclass
class CrossOutput(ModelOutput):
    """What a `CrossNetwork` gives."""

    logits: Float[Tensor, "b 2"] | None = None


class CrossLayer(nn.Module):
    """x0 * (W x + b) + x: one more degree of products of features."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, hidden_states: Float[Tensor, "b d"], first: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """The next hidden state."""
        return first * self.linear(hidden_states) + hidden_states


class CrossNetwork(PreTrainedModel):
    """Logits of no click and of a click, from one category of each field: DCN-V2 (Wang et al. 2021), its two parts side by side.

    All fields' categories are rows of one table, each field's after those of the field before.
    """

    config_class = CrossNetworkConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: CrossNetworkConfig) -> None:
        super().__init__(config)
        size, wide = config.num_fields * config.embedding_size, config.intermediate_size
        self.categories = nn.Embedding(config.vocab_size, config.embedding_size)
        self.cross = nn.ModuleList(CrossLayer(size) for _ in range(config.num_cross_layers))
        widths = [size, *[wide] * config.num_deep_layers]
        self.deep = nn.Sequential(*(part for n, m in pairwise(widths) for part in (nn.Linear(n, m), nn.ReLU())))
        self.classifier = nn.Linear(size + widths[-1], 2)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of categories."""
        return self.categories

    def forward(self, input_ids: Int[Tensor, "b f"]) -> CrossOutput:
        """The logits of impressions with these categories."""
        first = self.categories(input_ids).flatten(1)
        hidden = first
        for layer in self.cross:
            hidden = layer(hidden, first)
        return CrossOutput(logits=self.classifier(torch.cat([hidden, self.deep(first)], 1)))

    def _init_weights(self, module: nn.Module) -> None:
        """Xavier's for layers, small values for embeddings."""
        from transformers import initialization as init

        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
