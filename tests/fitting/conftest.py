"""A tiny language model on disk, and settings that fit it in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.fitting.settings import Settings

SMALL = Settings(
    seeds=2, tokens=512, select_tokens=256, test_tokens=512, length=32, bits=(2, 3, 4, 8), groups=(0, 32), tries=1,
    tune_steps=4, tune_batch=2, lr=1e-2,
)  # fmt: skip


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory, ref_lm: Path) -> Path:
    """A random Llama of two blocks with the reference model's tokenizer."""
    import torch
    import transformers as t

    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = t.LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(3)
    model.save_pretrained(folder)
    t.AutoTokenizer.from_pretrained(ref_lm).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short texts as a data file."""
    import json

    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n\n\n" * 8}) for i in range(60)))
    return path


@pytest.fixture(scope="session")
def small() -> Settings:
    """Settings for the tiny model."""
    return SMALL
