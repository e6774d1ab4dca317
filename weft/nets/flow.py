"""A small diffusion transformer that learns a velocity field, for images of a few classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from weft.error import OptionError


class FlowTransformerConfig(PretrainedConfig):
    """Sizes of a `FlowTransformer`."""

    model_type = "weft-flow"

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        num_channels: int = 1,
        num_classes: int = 10,
        hidden_size: int = 64,
        intermediate_size: int = 256,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        **others: Any,
    ) -> None:
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.num_classes, self.hidden_size, self.intermediate_size = num_classes, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(**others)


@dataclass
class FlowOutput(ModelOutput):
    """What a `FlowTransformer` gives."""

    sample: Float[Tensor, "b c h w"] | None = None


class FlowBlock(nn.Module):
    """Attention and a feed-forward part, whose norms and results are scaled and moved by the condition (adaLN-Zero)."""

    def __init__(self, config: FlowTransformerConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.modulation = nn.Linear(d, 6 * d)
        self.norm1, self.norm2 = (nn.LayerNorm(d, elementwise_affine=False) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(d, config.intermediate_size), nn.Linear(config.intermediate_size, d)

    def forward(self, hidden_states: Float[Tensor, "b t d"], condition: Float[Tensor, "b d"]) -> Float[Tensor, "b t d"]:
        """The next hidden state."""
        move1, scale1, gate1, move2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, -1)
        hidden_states = hidden_states + gate1 * self._attend(self.norm1(hidden_states) * (1 + scale1) + move1)
        inner = nn.functional.gelu(self.fc1(self.norm2(hidden_states) * (1 + scale2) + move2))
        return hidden_states + gate2 * self.fc2(inner)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FlowTransformer(PreTrainedModel):
    """Given (1 - t) x + t e, where e is Gaussian noise, the time t and the class of the image x: an estimate of e - x.

    A diffusion transformer (Peebles & Xie 2023) of a rectified flow (Liu et al. 2022). Errors: OptionError for sizes that do not fit.
    """

    config_class = FlowTransformerConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: FlowTransformerConfig) -> None:
        super().__init__(config)
        _fits(config)
        d, side = config.hidden_size, config.image_size // config.patch_size
        size = config.num_channels * config.patch_size**2
        self.patches = nn.Linear(size, d)
        self.positions = nn.Parameter(torch.empty(1, side * side, d))
        self.time1, self.time2 = nn.Linear(d, d), nn.Linear(d, d)
        self.classes = nn.Embedding(config.num_classes, d)
        self.layers = nn.ModuleList(FlowBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(d, elementwise_affine=False)
        self.modulation, self.output = nn.Linear(d, 2 * d), nn.Linear(d, size)
        self.post_init()

    def forward(
        self, pixel_values: Float[Tensor, "b c h w"], timestep: Float[Tensor, "b"], class_labels: Int[Tensor, "b"]
    ) -> FlowOutput:
        """The velocity at these points, times (0: image, 1: noise) and classes."""
        p = self.config.patch_size
        cut = pixel_values.unfold(2, p, p).unfold(3, p, p)  # b c rows columns p p
        rows, columns = cut.shape[2:4]
        hidden = self.patches(cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)) + self.positions
        time = self.time2(nn.functional.silu(self.time1(_waves(timestep, self.config.hidden_size))))
        condition = nn.functional.silu(time + self.classes(class_labels))
        for layer in self.layers:
            hidden = layer(hidden, condition)
        move, scale = self.modulation(condition).unsqueeze(1).chunk(2, -1)
        made = self.output(self.norm(hidden) * (1 + scale) + move).view(len(hidden), rows, columns, -1, p, p)
        return FlowOutput(sample=made.permute(0, 3, 1, 4, 2, 5).reshape(pixel_values.shape))

    def _init_weights(self, module: nn.Module) -> None:
        """Xavier's for layers; zeros for modulations and the output, so that every block begins as the identity."""
        from transformers import initialization as init

        if isinstance(module, nn.Linear):
            still = module in {self.output, self.modulation, *(b.modulation for b in self.layers)}
            (init.zeros_ if still else init.xavier_uniform_)(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
        elif module is self:
            init.normal_(self.positions, std=0.1)


def _fits(config: FlowTransformerConfig) -> None:
    """Refuse an image that is not made of whole patches, and a width that heads, or sines and cosines, cannot share."""
    for what, size, by in (
        ("image_size", config.image_size, config.patch_size),
        ("hidden_size", config.hidden_size, config.num_attention_heads),
        ("hidden_size", config.hidden_size, 2),
    ):
        if by < 1 or size % by:
            got, want = f"{size}, in parts of {by}", "whole parts"
            raise OptionError("sizes do not fit", where=what, got=got, want=want, fix="change one of them")


def _waves(time: Float[Tensor, "b"], size: int) -> Float[Tensor, "b d"]:
    """Sines and cosines of 1000 t at periods from 2 pi to 20,000 pi."""
    rates = torch.exp(-math.log(1e4) / (size // 2) * torch.arange(size // 2, device=time.device))
    angles = 1000 * time.unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
