"""Examples to learn from, and how they become tokens with targets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from weft.error import FormatError, OptionError
from weft.learn.tokenizer import behind, opening

IGNORE = -100


@dataclass(frozen=True)
class Text:
    """Plain text: every token is a target."""

    text: str
    name: str = ""
    task: str = ""


@dataclass(frozen=True)
class Response:
    """A prompt and its response: only the response's tokens, and the end, are targets."""

    prompt: str
    response: str
    name: str = ""
    task: str = ""
    reference: str = ""
    """The same prompt in the words that an objective holds other words to."""


@dataclass(frozen=True)
class Chat:
    """A conversation of (role, content): only the assistant's turns are targets."""

    messages: tuple[tuple[str, str], ...]
    name: str = ""
    task: str = ""
    more: tuple[str, ...] = ()
    """What each turn holds besides, such as tool_calls, as JSON for the template; empty where none does."""
    tools: str = ""
    """The tools that there are, as JSON."""


@dataclass(frozen=True)
class Pair:
    """Two texts that belong together, for retrieval."""

    query: str
    positive: str
    name: str = ""
    task: str = ""


Example = Text | Response | Chat | Pair
"""Each has the `name` of where it is from, and may have that of a `task`."""


@dataclass(frozen=True)
class Encoded:
    """Token ids [t] and, for each position, its own id where it is a target, else -100."""

    input_ids: list[int]
    labels: list[int]
    task: str = ""
    reference: Encoded | None = None
    """The same targets behind the prompt's reference, where there is one."""


def content(example: Example) -> list[Any]:
    """What there is to learn from an example: all but where it is from, its task, and other words for its prompt."""
    return [getattr(example, f.name) for f in fields(example) if f.name not in ("name", "task", "reference")]


def reference(example: Example) -> str:
    """The reference of an example's prompt; empty where it has none."""
    return example.reference if isinstance(example, Response) else ""


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash of every example, in order."""
    word = hashlib.blake2b(digest_size=16)
    for e in examples:
        more = [e.task] * bool(e.task) + [{"reference": reference(e)}] * bool(reference(e))
        word.update(json.dumps([type(e).__name__, *content(e), *more]).encode())
    return word.hexdigest()


def encode(examples: Sequence[Example], tokenizer: Any, *, length: int) -> list[Encoded]:
    """Tokens and targets of language-model examples, at most `length` tokens each.

    Texts and prompts begin as the tokenizer begins them, chats as its template does. Long plain texts are cut into windows, each of
    which begins so; a long prompt or chat loses its start, so that the response stays.
    Errors: FormatError if no token at all is a target, or if the examples are pairs; OptionError for a length below 2.
    """
    if length < 2:
        want, fix = "at least 2: a token and the one after it", "raise it"
        raise OptionError("examples this short have no target", where="length", got=length, want=want, fix=fix)
    lead = opening(tokenizer)
    made = [replace(e, task=example.task) for example in examples for e in _encode(example, tokenizer, length, lead)]
    made = [e for e in made if any(label != IGNORE for label in e.labels[1:])]
    if not made:
        raise FormatError(
            "no token is a target",
            where=_span(examples),
            got=f"{len(examples)} examples",
            want="at least one response or text token",
            fix="fill in the responses, or raise the length",
        )
    return made


def _span(examples: Sequence[Example]) -> str:
    """Where examples are: from the first one's place to the last one's."""
    return " to ".join(dict.fromkeys(e.name for e in (*examples[:1], *examples[-1:]) if e.name)) or "training data"


def _encode(example: Example, tokenizer: Any, length: int, lead: list[int]) -> list[Encoded]:
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    room = max(1, length - len(lead))

    if isinstance(example, Text):
        ids = behind(tokenizer, example.text, lead) + end
        parts = [ids[i : i + room] for i in range(0, len(ids), room)]
        return [Encoded(lead + p, [IGNORE] * len(lead) + p) for p in parts if len(lead + p) > 1]
    if isinstance(example, Response):
        answer = behind(tokenizer, example.response, lead)
        if not answer:
            return []
        target = (answer + end)[:room]

        def after(text: str) -> Encoded:
            prompt = behind(tokenizer, text, lead)[-(room - len(target)) :] if len(target) < room else []
            return Encoded(lead + prompt + target, [IGNORE] * len(lead + prompt) + target)

        made, other = after(example.prompt), after(example.reference or example.prompt)
        if (len(made.labels) > len(target)) != (len(other.labels) > len(target)):
            want, fix = (
                "a prompt and a reference of at least one token each",
                "fill in both, or leave the reference out",
            )
            what, got = "a prompt is empty, or its reference", f"{example.prompt!r} and {example.reference!r}"
            raise FormatError(what, where=_span([example]), got=got, want=want, fix=fix)
        return [replace(made, reference=other) if example.reference else made]
    if isinstance(example, Chat):
        return _chat(example, tokenizer, length, lead)
    raise FormatError(
        "pairs do not train a language model",
        where=_span([example]),
        got="query and positive",
        want="text, responses or messages",
        fix="use an embedding model",
    )


_MARKS = re.compile(r"\{%-?\s*generation\b")
_MARK = "mark the assistant's part in the template with {% generation %}, or give prompt and response records"


def _chat(example: Chat, tokenizer: Any, length: int, lead: list[int]) -> list[Encoded]:
    """What the template marks as generated is a target. Where it marks nothing: render the conversation up to each of the assistant's
    turns, and with it, and what it adds is one.

    Where a template rewrites earlier turns, as those do that leave out what was thought, what follows is a row of its own: every
    turn is a target once, behind the conversation as it was when that turn was written.
    """
    if ("tool_calls" in "".join(example.more) or example.tools) and render(example, tokenizer) == render(
        replace(example, more=(), tools=""), tokenizer
    ):
        what, got, want = "the chat template leaves tools out", "the same tokens without them", "a template with tools"
        fix = "use a tokenizer whose template has them, or give prompt and response records"
        raise FormatError(what, where=_span([example]), got=got, want=want, fix=fix)
    if _MARKS.search(str(tokenizer.chat_template)):
        whole = render(example, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
        ids, marks = whole["input_ids"], whole["assistant_masks"]
        return [_cut(Encoded(ids, [i if m else IGNORE for i, m in zip(ids, marks, strict=True)]), length, lead)]
    made, ids, labels = list[Encoded](), list[int](), list[int]()
    for i in (i for i, (role, _) in enumerate(example.messages) if role == "assistant"):
        asked, whole = render(example, tokenizer, i, add_generation_prompt=True), render(example, tokenizer, i + 1)
        if whole[: len(asked)] != asked:
            what, where, want = (
                "this chat template asks for other turns than it renders",
                _span([example]),
                "one beginning",
            )
            at = max(0, len(asked) - 8)
            got = f"{tokenizer.decode(asked[at:])!r}, then {tokenizer.decode(whole[at : at + 8])!r}"
            raise FormatError(what, where=where, got=got, want=want, fix=_MARK)
        if asked[: len(ids)] != ids:
            made.append(Encoded(ids, labels))
            labels = [IGNORE] * len(asked)
        labels = labels + [IGNORE] * (len(asked) - len(labels)) + whole[len(asked) :]
        ids = whole
    return [_cut(e, length, lead) for e in (*made, Encoded(ids, labels))]


def _cut(e: Encoded, length: int, lead: list[int]) -> Encoded:
    """The last tokens, behind the opening if there is one."""
    if len(e.input_ids) <= length:
        return e
    kept = len(lead) if e.input_ids[: len(lead)] == lead else 0
    ids, labels = (row[:kept] + row[kept:][kept - length :] for row in (e.input_ids, e.labels))
    return Encoded(ids, labels)


def render(example: Chat, tokenizer: Any, count: int | None = None, *, tokenize: bool = True, **how: Any) -> Any:
    """The first `count` turns in the tokenizer's chat template, as tokens or as text.

    Errors: FormatError if there is no template, or if it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise FormatError(
            "this tokenizer has no chat template",
            where=_span([example]),
            got="none",
            want="a chat template",
            fix="give prompt and response records",
        )
    more = example.more or [""] * len(example.messages)
    turns = [
        {"role": r, "content": c, **(json.loads(m) if m else {})}
        for (r, c), m in zip(example.messages[:count], more[:count], strict=True)
    ]
    try:
        tools = json.loads(example.tools) if example.tools else None
        return tokenizer.apply_chat_template(turns, tools, tokenize=tokenize, **{"return_dict": False, **how})
    except Exception as e:  # a template is a program of its own
        raise FormatError(
            "the chat template refuses this conversation",
            where=_span([example]),
            got=f"{type(e).__name__}: {e}",
            want="roles and turns as the model's template expects them",
            fix="mend the record, or give prompt and response records",
        ) from e
