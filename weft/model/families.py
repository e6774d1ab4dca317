"""Which weights write and read what, by family of models: the names inside a block, about ten lines a family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Attention:
    """Names inside a block. `q[0/3]` is the first third of the rows of `q`."""

    norm: str
    q: str
    k: str
    v: str
    o: str
    q_norm: str = ""
    k_norm: str = ""
    """Norms of each head's queries and keys."""
    after: str = ""
    """A norm between `o` and the stream."""
    memory: bool = False
    """Keys and values read the encoder's output."""

    @classmethod
    def like(cls, norm: str, pattern: str, names: Sequence[str] = "qkvo", *, memory: bool = False) -> Attention:
        """Where q, k, v and o are named alike."""
        q, k, v, o = (pattern.format(n) for n in names)
        return cls(norm, q, k, v, o, memory=memory)


@dataclass(frozen=True)
class Feed:
    """Names inside a block; `*` in them stands for every expert."""

    norm: str
    up: str
    down: str
    gate: str = ""
    router: str = ""
    after: str = ""


@dataclass(frozen=True)
class Stack:
    """A list of like blocks, and the norm behind them."""

    blocks: str
    parts: tuple[Attention | Feed, ...]
    final: str = ""


@dataclass(frozen=True)
class Family:
    """How the models of a family are put together. Names from the whole model's root."""

    stacks: tuple[Stack, ...]
    inputs: tuple[str, ...]
    """What begins the stream: embeddings, a patch projection, position tables."""
    heads: tuple[str, ...] = ()
    """What reads the last norm's output."""
    centred: bool = False
    """Norms subtract the mean (LayerNorm)."""
    post: bool = False
    """Norms stand behind the sum: their output is the stream."""
    offset: float = 0.0
    """What norms add to their stored weight."""
    rope: bool = False
    """Queries and keys are rotated by position, in pairs (i, i + half)."""
    mapped: tuple[str, ...] = ()
    """A dense layer behind the stream whose output a tied head reads, and its norm."""
    inner: str = "intermediate_size"
    """The configuration's name for the feed-forward width."""
    always_tied: bool = False
    """transformers ties the head to the embedding whatever the configuration says."""
    scores: str = ""
    """A table of attention scores by head, and so why heads have an order."""


_LLAMA = Family(
    (
        Stack(
            "model.layers",
            (
                Attention.like("input_layernorm", "self_attn.{}_proj"),
                Feed("post_attention_layernorm", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"),
            ),
            "model.norm",
        ),
    ),
    ("model.embed_tokens",),
    ("lm_head",),
    rope=True,
)


def _with(family: Family, feed: Feed | None = None, **attention: Any) -> Family:
    """The family with other names in its attention, and another feed-forward part."""
    stack = family.stacks[0]
    first, second = stack.parts
    return replace(family, stacks=(replace(stack, parts=(replace(first, **attention), feed or second)),))


_QK_NORM: dict[str, Any] = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_QWEN3 = _with(_LLAMA, **_QK_NORM)
_GEMMA3 = _with(
    _LLAMA,
    Feed(
        "pre_feedforward_layernorm", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", after="post_feedforward_layernorm"
    ),
    after="post_attention_layernorm",
    **_QK_NORM,
)


def _experts(up: str, down: str, gate: str) -> Feed:
    up, down, gate = (f"mlp.experts.*.{n}" for n in (up, down, gate))
    return Feed("post_attention_layernorm", up, down, gate, router="mlp.gate")


_GPT2 = Family(
    (
        Stack(
            "transformer.h",
            (
                Attention.like("ln_1", "attn.{}", ("c_attn[0/3]", "c_attn[1/3]", "c_attn[2/3]", "c_proj")),
                Feed("ln_2", "mlp.c_fc", "mlp.c_proj"),
            ),
            "transformer.ln_f",
        ),
    ),
    ("transformer.wte", "transformer.wpe"),
    ("lm_head",),
    centred=True,
    inner="n_inner",
)
_BERT = Family(
    (
        Stack(
            "bert.encoder.layer",
            (
                Attention.like(
                    "attention.output.LayerNorm",
                    "attention.{}",
                    ("self.query", "self.key", "self.value", "output.dense"),
                ),
                Feed("output.LayerNorm", "intermediate.dense", "output.dense"),
            ),
        ),
    ),
    tuple(
        f"bert.embeddings.{n}" for n in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
    ),
    ("bert.pooler.dense", "classifier", "qa_outputs", "cls.seq_relationship"),
    centred=True,
    post=True,
    mapped=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
)
_VIT = Family(
    (
        Stack(
            "vit.layers",
            (
                Attention.like("layernorm_before", "attention.{}_proj"),
                Feed("layernorm_after", "mlp.fc1", "mlp.fc2"),
            ),
            "vit.layernorm",
        ),
    ),
    tuple(
        f"vit.embeddings.{n}" for n in ("patch_embeddings.projection", "cls_token", "position_embeddings", "mask_token")
    ),
    ("classifier", "vit.pooler.dense"),
    centred=True,
)
_T5_SELF = Attention.like("layer.0.layer_norm", "layer.0.SelfAttention.{}")
_T5_CROSS = Attention.like("layer.1.layer_norm", "layer.1.EncDecAttention.{}", memory=True)


def _t5(gated: bool) -> Family:
    def feed(i: int) -> Feed:
        at = f"layer.{i}.DenseReluDense"
        up, gate = (f"{at}.wi_1", f"{at}.wi_0") if gated else (f"{at}.wi", "")
        return Feed(f"layer.{i}.layer_norm", up, f"{at}.wo", gate)

    return Family(
        (
            Stack("encoder.block", (_T5_SELF, feed(1)), "encoder.final_layer_norm"),
            Stack("decoder.block", (_T5_SELF, _T5_CROSS, feed(2)), "decoder.final_layer_norm"),
        ),
        ("shared",),
        ("lm_head",),
        inner="d_ff",
        always_tied=True,
        scores="SelfAttention.relative_attention_bias",
    )


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "eurobert"), _LLAMA),
    "qwen3": _QWEN3,
    "gemma3_text": replace(_GEMMA3, offset=1.0),
    "mixtral": _with(_LLAMA, _experts("w3", "w2", "w1")),
    "qwen3_moe": replace(
        _with(_LLAMA, _experts("up_proj", "down_proj", "gate_proj"), **_QK_NORM), inner="moe_intermediate_size"
    ),
    "gpt2": _GPT2,
    "bert": _BERT,
    "vit": _VIT,
    "t5": _t5(gated=False),
    "t5 gated": _t5(gated=True),
}
