"""A tiny random model of every kind of architecture, a batch for each, and how its own library reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from weft import nets

VOCAB = 96
SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CAUSAL: dict[str, Any] = {"vocab_size": VOCAB, "num_key_value_heads": 2, **SIZE}
HEADS: dict[str, Any] = {**CAUSAL, "head_dim": 8}
MAMBA: dict[str, Any] = {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8}
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4, **SIZE}
T5 = t.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
WHISPER = t.WhisperConfig(
    vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10, max_target_positions=16, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
)  # fmt: skip
BART = t.BartConfig(
    vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
EUROBERT = t.EuroBertConfig(**CAUSAL, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=3)
GEMMA = t.Gemma3TextConfig(**HEADS, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
CLIP = t.CLIPConfig(
    text_config={"vocab_size": VOCAB, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **SIZE},
    vision_config=IMAGE,
    projection_dim=16,
)  # fmt: skip
BAMBA = t.BambaConfig(
    **CAUSAL, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_expand=2, mamba_n_groups=1, mamba_chunk_size=8
)  # fmt: skip
DEEPSEEK = t.DeepseekV3Config(
    **{**CAUSAL, "num_key_value_heads": 4}, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1, first_k_dense_replace=1,
    n_shared_experts=1,
)  # fmt: skip
QWEN_MOE = t.Qwen3MoeConfig(**HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
RESNET = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)

PICTURES: dict[str, Any] = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "norm_num_groups": 4}
UNET: dict[str, Any] = {**PICTURES, "layers_per_block": 1, "block_out_channels": (8, 16), "attention_head_dim": 4}
DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
CROSS_DOWN, CROSS_UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
DIT: dict[str, Any] = {
    **PICTURES, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 2, "num_embeds_ada_norm": 10
}  # fmt: skip
FLOW = nets.FlowTransformerConfig(num_channels=3, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
CROSS = nets.CrossNetworkConfig(vocab_size=VOCAB, num_fields=7, embedding_size=8, intermediate_size=48)


def diffusion(name: str, **config: Any) -> nn.Module:
    """A model of diffusers, where it is installed."""
    library = pytest.importorskip("diffusers", reason="diffusers is not installed (it is in the test extra)")
    return getattr(library, name)(**config)


def awake(model: nn.Module) -> nn.Module:
    """The model with other values wherever all are zeros, which would hide what is before them."""
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**CAUSAL)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**HEADS)),
    "gemma3": lambda: t.Gemma3ForCausalLM(GEMMA),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **SIZE)),
    "eurobert": lambda: t.EuroBertForMaskedLM(EUROBERT),
    "t5": lambda: t.T5ForConditionalGeneration(T5),
    "bart": lambda: t.BartForConditionalGeneration(BART),
    "whisper": lambda: t.WhisperForConditionalGeneration(WHISPER),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE, num_labels=5)),
    "clip": lambda: t.CLIPModel(CLIP),
    "resnet": lambda: t.ResNetForImageClassification(RESNET),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**CAUSAL, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": lambda: t.Qwen3MoeForCausalLM(QWEN_MOE),
    "deepseek": lambda: t.DeepseekV3ForCausalLM(DEEPSEEK),
    "mamba2": lambda: t.Mamba2ForCausalLM(
        t.Mamba2Config(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, **MAMBA)
    ),
    "bamba": lambda: t.BambaForCausalLM(BAMBA),
    "unet": lambda: diffusion("UNet2DModel", down_block_types=DOWN, up_block_types=UP, **UNET),
    "unet-text": lambda: diffusion(
        "UNet2DConditionModel", down_block_types=CROSS_DOWN, up_block_types=CROSS_UP, cross_attention_dim=12, **UNET
    ),
    "dit": lambda: diffusion("DiTTransformer2DModel", **DIT),
    "flow": lambda: awake(nets.FlowTransformer(FLOW)),
    "cross": lambda: nets.CrossNetwork(CROSS),
}
DIFFUSION = ("unet", "unet-text", "dit")
OWN = ("flow", "cross")
"""Those whose classes are weft's own."""
GENERATE = [n for n in MODELS if n not in ("bert", "eurobert", "vit", "clip", "resnet", *OWN, *DIFFUSION)]


def build(name: str) -> nn.Module:
    """The model, the same every time."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batch(name: str) -> dict[str, Tensor]:
    """Two inputs."""
    rng = torch.Generator().manual_seed(1)
    ids, images = torch.randint(3, VOCAB, (2, 7), generator=rng), torch.randn(2, 3, 16, 16, generator=rng)
    match name:
        case "t5" | "bart":
            return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        case "whisper":
            return {"input_features": torch.randn(2, 8, 20, generator=rng), "decoder_input_ids": ids[:, :5]}
        case "vit":
            return {"pixel_values": images}
        case "resnet":
            return {"pixel_values": torch.randn(2, 3, 32, 32, generator=rng)}
        case "unet":
            return {"sample": images[..., :8, :8], "timestep": torch.tensor([3, 500])}
        case "unet-text":
            text = torch.randn(2, 4, 12, generator=rng)
            return {"sample": images[..., :8, :8], "timestep": torch.tensor([3, 500]), "encoder_hidden_states": text}
        case "dit":
            labels = torch.tensor([1, 7])
            return {"hidden_states": images[..., :8, :8], "timestep": torch.tensor([3, 500]), "class_labels": labels}
        case "flow":
            labels, times = torch.tensor([1, 7]), torch.tensor([0.1, 0.9])
            return {"pixel_values": images[..., :8, :8], "timestep": times, "class_labels": labels}
        case "clip":
            return {"input_ids": torch.cat([ids, torch.full((2, 1), 2)], 1), "pixel_values": images}
        case _:
            return {"input_ids": ids}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The main output."""
    made = model(**inputs)
    if "sample" in made:
        return made.sample
    return made.logits_per_image if "logits_per_image" in made else made.logits


def read(name: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A folder as the model's own library reads it, in float32, and what it misses there."""
    dtype = {"torch_dtype" if name in DIFFUSION else "dtype": torch.float32}
    return type(build(name)).from_pretrained(folder, output_loading_info=True, **dtype)
