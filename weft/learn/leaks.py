"""Held-out data that was trained on scores nothing: examples of it that the training data holds, whole or nearly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from weft.error import ConflictError
from weft.learn.data import Chat, Example, content

GRAM = 13
"""Words of a passage; long enough that two texts share one by copying."""
SHARE = 0.8
"""An example most of whose passages are trained on is trained on."""
COMMON = (3, 0.01)
"""Passages in more training examples than this, and than this share of them, are left out."""
_WORD = re.compile(r"\w+|[^\w\s]")


def refuse_leaks(train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Refuse held-out examples that are in the training data: all of them, or at least 80 % of their passages of 13 words.

    Words are compared without case and spaces. Passages that many training examples share, as instructions are, tell nothing.
    Errors: ConflictError that tells how many, and which first.
    """
    asked = [_words(e) for e in held_out]
    wanted = {p for words in asked for p in _passages(words)}
    whole, seen = set[int](), Counter[int]()
    for words in map(_words, train):
        whole.add(hash(words))
        seen.update(wanted.intersection(_passages(words)))
    common = {p for p, n in seen.items() if n > max(COMMON[0], COMMON[1] * len(train))}

    def is_leaked(words: tuple[str, ...]) -> bool:
        own = set(_passages(words)) - common
        return hash(words) in whole or (bool(own) and len(own & seen.keys()) >= SHARE * len(own))

    leaked = [e for e, words in zip(held_out, asked, strict=True) if is_leaked(words)]
    if leaked:
        names = ", ".join(e.name or "unnamed" for e in leaked[:3])
        raise ConflictError(
            "held-out data is in the training data",
            where=f"{names}{', ...' if len(leaked) > 3 else ''}",
            got=f"{len(leaked)} of {len(held_out)} examples",
            want="data that was not trained on",
            fix="take them out of one of the two",
        )


def _words(example: Example) -> tuple[str, ...]:
    if isinstance(example, Chat):
        texts = [content for _, content in example.messages]
    else:
        texts = content(example)
    return tuple(_WORD.findall(" ".join(texts).lower()))


def _passages(words: Sequence[str]) -> Iterator[int]:
    """Hashes of every 13 words in a row."""
    return (hash(tuple(words[i : i + GRAM])) for i in range(len(words) - GRAM + 1))
