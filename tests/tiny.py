"""Plain random models of two families, and what they give."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 96
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "under",
    "over",
    "mat",
    "hill",
    "tree",
    "red",
    "blue",
    "old",
    ".",
    ",",
    "?",
    "question",
    "answer",
    "yes",
    "no",
    "user",
    "assistant",
]


_MADE: dict[str, nn.Module] = {}


def build_tiny(
    family: str = "llama", *, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32, **changed: Any
) -> nn.Module:
    """A plain random model whose norms and biases are not trivial and not exact in bfloat16: a copy of one that is kept."""
    name = repr((family, seed, layers, dtype, sorted(changed.items())))
    if name not in _MADE:
        _MADE[name] = _built(family, seed, layers, dtype, **changed)
    return copy.deepcopy(_MADE[name])


def _built(family: str, seed: int, layers: int, dtype: torch.dtype, **changed: Any) -> nn.Module:
    import transformers as t

    if family.startswith("llama"):
        given: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": family == "llama-tied",
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
        model: nn.Module = t.LlamaForCausalLM(t.LlamaConfig(**given | changed))
    else:
        given = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
        }
        model = (t.BertForMaskedLM if family == "bert-mlm" else t.BertModel)(t.BertConfig(**given | changed))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            value = torch.randn(p.shape, generator=rng)
            p.copy_(
                value * (p.shape[1] ** -0.5 if p.dim() == 2 else 0.1)
                + (1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0)
            )
    return model.to(dtype).eval()


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state."""
    with torch.no_grad():
        out = model(**batch)
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state


def tokenizer() -> Any:
    """A word tokenizer that fits the tiny models, with end and padding tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<end>", "<pad>", "<unk>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def make_batches(
    count: int = 3, rows: int = 2, length: int = 12, *, pad: bool = True, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Random token ids; with `pad`, the last rows of each batch end early."""
    rng = torch.Generator().manual_seed(1000 + seed)
    made: list[dict[str, Tensor]] = []
    for i in range(count):
        ids = torch.randint(2, VOCAB, (rows, length), generator=rng)
        mask = torch.ones_like(ids)
        if pad:
            mask[-1, length - 1 - i % 5 :] = 0
        made.append({"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask})
    return made
