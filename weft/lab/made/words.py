"""Tokenizers of whole words, for generated tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"


def tokenizer(words: Sequence[str], *, length: int) -> Any:
    """One token a word, words apart by spaces; padding is 0, the end 1, and it is put after every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate([PAD, END, UNKNOWN, *words])}
    plain = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    plain.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, vocab[END])])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=length
    )
