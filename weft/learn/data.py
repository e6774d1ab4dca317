"""Examples to learn from: how files become them, and how they become tokens with targets."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from weft.error import FormatError, PathError, WeftError, raise_all
from weft.store.files import parse_json

IGNORE = -100


@dataclass(frozen=True)
class Text:
    """Plain text: every token is a target."""

    text: str
    name: str = ""


@dataclass(frozen=True)
class Response:
    """A prompt and its response: only the response's tokens, and the end, are targets."""

    prompt: str
    response: str
    name: str = ""


@dataclass(frozen=True)
class Chat:
    """A conversation of (role, content): only the assistant's turns are targets."""

    messages: tuple[tuple[str, str], ...]
    name: str = ""


@dataclass(frozen=True)
class Pair:
    """Two texts that belong together, for retrieval."""

    query: str
    positive: str
    name: str = ""


Example = Text | Response | Chat | Pair


@dataclass(frozen=True)
class Encoded:
    """Token ids [t] and, for each position, its own id where it is a target, else -100."""

    input_ids: list[int]
    labels: list[int]


def read(source: str | Path) -> list[Example]:
    """Examples of a `.txt` file (one text), a `.jsonl`, `.json` or `.csv` file (one a record), or a folder of such files.

    Records hold `text`, or `prompt` and `response`, or `messages`, or `query` and `positive`.
    Errors: PathError; FormatError with every bad record (up to ten) and for kinds that are mixed.
    """
    path = Path(source)
    if path.is_dir():
        found, problems = list[Example](), list[WeftError]()
        for p in sorted(path.rglob("*")):
            if p.suffix in _READERS and p.is_file():
                try:
                    found += _READERS[p.suffix](p)
                except WeftError as e:
                    problems.append(e)
        raise_all(problems)
    elif path.suffix in _READERS and path.is_file():
        found = _READERS[path.suffix](path)
    else:
        raise PathError(
            "no data there",
            where=str(source),
            got="nothing readable",
            want=f"a folder or a file: {', '.join(_READERS)}",
            fix="check the path",
        )
    kinds = sorted({type(e).__name__ for e in found})
    if len(kinds) != 1:
        raise FormatError(
            "data must be of one kind",
            where=str(source),
            got=", ".join(kinds) or "no examples",
            want="one kind of record",
            fix="split the file",
        )
    return found


def _text(path: Path) -> list[Example]:
    return [Text(_decode(path), path.name)]


def _decode(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        raise FormatError(
            "a file is not text", where=path.name, got=str(e), want="UTF-8", fix="convert the file"
        ) from None


def _lines(path: Path) -> list[Example]:
    lines = [(i, line) for i, line in enumerate(_decode(path).split("\n"), 1) if line.strip()]
    return _records(
        path,
        [(f"line {i}", lambda line=line, i=i: parse_json(line.encode(), f"{path.name} line {i}")) for i, line in lines],
    )


def _array(path: Path) -> list[Example]:
    table = parse_json(_decode(path).encode(), path.name)
    if not isinstance(table, list):
        raise FormatError(
            "a JSON data file holds a list",
            where=path.name,
            got=type(table).__name__,
            want="a list of records",
            fix="use .jsonl for one record a line",
        )
    return _records(path, [(f"record {i}", partial(_itself, r)) for i, r in enumerate(table, 1)])


def _table(path: Path) -> list[Example]:
    csv.field_size_limit(1 << 30)
    rows = csv.DictReader(io.StringIO(_decode(path)))
    return _records(path, [(f"row {i}", partial(_itself, r)) for i, r in enumerate(rows, 1)])


def _itself(record: Any) -> Any:
    return record


_READERS: dict[str, Any] = {".txt": _text, ".jsonl": _lines, ".json": _array, ".csv": _table}


def _records(path: Path, rows: list[tuple[str, Any]]) -> list[Example]:
    made: list[Example] = []
    problems: list[WeftError] = []
    for where, get in rows:
        try:
            made.append(_example(get(), f"{path.name} {where}"))
        except WeftError as e:
            problems.append(e)
            if len(problems) == 10:
                break
    raise_all(problems)
    return made


def _example(record: Any, where: str) -> Example:
    match record:
        case {"prompt": str(prompt), "response": str(response)}:
            return Response(prompt, response, where)
        case {"query": str(query), "positive": str(positive)}:
            return Pair(query, positive, where)
        case {"messages": [*turns]} if turns and all(
            isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
        ):
            return Chat(tuple((t["role"], t["content"]) for t in turns), where)
        case {"text": str(text)}:
            return Text(text, where)
        case _:
            got = sorted(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise FormatError(
                "a record cannot be used",
                where=where,
                got=got,
                want="text, or prompt and response, or messages, or query and positive (all strings)",
                fix="rename the fields",
            )


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash of every example, in order."""
    word = hashlib.blake2b(digest_size=16)
    for e in examples:
        word.update(json.dumps([type(e).__name__, *astuple(e)[:-1]]).encode())
    return word.hexdigest()


def encode(examples: Sequence[Example], tokenizer: Any, *, length: int) -> list[Encoded]:
    """Tokens and targets of language-model examples, at most `length` tokens each.

    Long plain texts are cut into windows; a long prompt loses its start, so that the response stays.
    Errors: FormatError if no token at all is a target, or if the examples are pairs.
    """
    made = [e for example in examples for e in _encode(example, tokenizer, length)]
    made = [e for e in made if any(label != IGNORE for label in e.labels[1:])]
    if not made:
        raise FormatError(
            "no token is a target",
            where="training data",
            got=f"{len(examples)} examples",
            want="at least one response or text token",
            fix="fill in the responses, or raise the length",
        )
    return made


def _encode(example: Example, tokenizer: Any, length: int) -> list[Encoded]:
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    if isinstance(example, Text):
        all_ids = ids(example.text) + end
        parts = [all_ids[i : i + length] for i in range(0, len(all_ids), length)]
        return [Encoded(p, p) for p in parts if len(p) > 1]
    if isinstance(example, Response):
        answer = ids(example.response)
        if not answer:
            return []
        target = (answer + end)[:length]
        prompt = ids(example.prompt)[-(length - len(target)) :] if len(target) < length else []
        return [Encoded(prompt + target, [IGNORE] * len(prompt) + target)]
    if isinstance(example, Chat):
        return [_chat(example, tokenizer, length)]
    raise FormatError(
        "pairs do not train a language model",
        where=example.name,
        got="query and positive",
        want="text, responses or messages",
        fix="use an embedding model",
    )


def _chat(example: Chat, tokenizer: Any, length: int) -> Encoded:
    """Render ever longer beginnings of the conversation; what an assistant's turn adds is a target."""
    turns = [{"role": r, "content": c} for r, c in example.messages]
    if not tokenizer.chat_template:
        raise FormatError(
            "this tokenizer has no chat template",
            where=example.name,
            got="none",
            want="a chat template",
            fix="give prompt and response records",
        )
    ids: list[int] = []
    labels: list[int] = []
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            asked = tokenizer.apply_chat_template(
                turns[:i], tokenize=True, add_generation_prompt=True, return_dict=False
            )
            labels += [IGNORE] * (len(asked) - len(ids))
            ids = list(asked)
        whole = tokenizer.apply_chat_template(turns[: i + 1], tokenize=True, return_dict=False)
        if list(whole[: len(ids)]) != ids:
            raise FormatError(
                "this chat template rewrites earlier turns",
                where=example.name,
                got="another beginning",
                want="a template that only appends",
                fix="give prompt and response records",
            )
        labels += whole[len(ids) :] if turn["role"] == "assistant" else [IGNORE] * (len(whole) - len(ids))
        ids = list(whole)
    return Encoded(ids[-length:], labels[-length:])
