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

from weft.error import FormatError, OptionError, PathError, WeftError, raise_all
from weft.learn.text import decode
from weft.store.files import MAX_JSON, parse_json

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
    Errors: PathError; FormatError with every bad record (up to ten), for kinds that are mixed and for no example at all.
    """
    found, problems = list[Example](), list[WeftError]()
    for path in _files(str(source)):
        try:
            found += _READERS[path.suffix](path)
        except WeftError as e:
            problems.append(e)
    raise_all(problems)
    kinds = sorted({type(e).__name__ for e in found})
    if not kinds:
        raise FormatError(
            "the data is empty",
            where=str(source),
            got="no text and no record",
            want="at least one example",
            fix="check the path and what is there",
        )
    if len(kinds) > 1:
        raise FormatError(
            "data must be of one kind",
            where=str(source),
            got=", ".join(kinds),
            want="one kind of record",
            fix="split the file",
        )
    return found


def _files(source: str) -> list[Path]:
    """The data files at a path, in order. Errors: PathError if it is neither a folder nor a file of a known kind."""
    path = Path(source)
    try:
        if source and path.is_dir():
            return [p for p in sorted(path.rglob("*")) if p.suffix in _READERS and not p.is_dir()]
        got = "no file" if not path.exists() else "no regular file" if not path.is_file() else None
    except OSError as e:
        got = e.strerror
    if got is None and path.suffix in _READERS:
        return [path]
    raise PathError(
        "no data there",
        where=source or "data",
        got=got or f"a file that ends in {path.suffix or 'nothing'}",
        want=f"a folder or a file: {', '.join(_READERS)}",
        fix="check the path, or convert the data: .jsonl holds any of it",
    )


def _text(path: Path) -> list[Example]:
    text = decode(path)
    return [Text(text, path.name)] if text.strip() else []


def _lines(path: Path) -> list[Example]:
    lines = [(i, line) for i, line in enumerate(decode(path).split("\n"), 1) if line.strip()]
    return _records(
        path,
        [(f"line {i}", lambda line=line, i=i: parse_json(line.encode(), f"{path.name} line {i}")) for i, line in lines],
    )


def _array(path: Path) -> list[Example]:
    if path.is_file() and (size := path.stat().st_size) > MAX_JSON:
        got, want, fix = f"{size} bytes", f"at most {MAX_JSON}", "use .jsonl: one record a line"
        raise FormatError("a JSON data file is too large", where=path.name, got=got, want=want, fix=fix)
    table = parse_json(decode(path, MAX_JSON).encode(), path.name)
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
    rows = csv.DictReader(io.StringIO(decode(path)))
    return _records(path, [(f"row {i}", partial(_itself, r)) for i, r in enumerate(rows, 1)])


def _itself(record: Any) -> Any:
    return record


_READERS: dict[str, Any] = {".txt": _text, ".jsonl": _lines, ".json": _array, ".csv": _table}


def _records(path: Path, rows: list[tuple[str, Any]]) -> list[Example]:
    made: list[Example] = []
    problems: list[WeftError] = []
    for where, get in rows:
        try:
            made.append(_whole(_example(get(), f"{path.name} {where}")))
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


def _whole(example: Example) -> Example:
    """The example. Errors: FormatError for half a character, as `\\ud800` in JSON is one: no tokenizer takes it."""
    try:
        json.dumps(astuple(example)[:-1], ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        where, got, fix = example.name, f"half a surrogate pair: {e.object[e.start]!a}", "write the character as UTF-8"
        raise FormatError("a record is not text", where=where, got=got, want="whole characters", fix=fix) from None
    return example


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash of every example, in order."""
    word = hashlib.blake2b(digest_size=16)
    for e in examples:
        word.update(json.dumps([type(e).__name__, *astuple(e)[:-1]]).encode())
    return word.hexdigest()


def encode(examples: Sequence[Example], tokenizer: Any, *, length: int) -> list[Encoded]:
    """Tokens and targets of language-model examples, at most `length` tokens each.

    Long plain texts are cut into windows; a long prompt loses its start, so that the response stays.
    Errors: FormatError if no token at all is a target, or if the examples are pairs; OptionError for a length below 2.
    """
    if length < 2:
        want, fix = "at least 2: a token and the one after it", "raise it"
        raise OptionError("examples this short have no target", where="length", got=length, want=want, fix=fix)
    made = [e for example in examples for e in _encode(example, tokenizer, length)]
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
        where=_span([example]),
        got="query and positive",
        want="text, responses or messages",
        fix="use an embedding model",
    )


def _chat(example: Chat, tokenizer: Any, length: int) -> Encoded:
    """Render ever longer beginnings of the conversation; what an assistant's turn adds is a target."""
    ids: list[int] = []
    labels: list[int] = []
    for i, (role, _) in enumerate(example.messages):
        if role == "assistant":
            asked = render(example, tokenizer, i, add_generation_prompt=True)
            labels += [IGNORE] * (len(asked) - len(ids))
            ids = list(asked)
        whole = render(example, tokenizer, i + 1)
        if list(whole[: len(ids)]) != ids:
            raise FormatError(
                "this chat template rewrites earlier turns",
                where=_span([example]),
                got="another beginning",
                want="a template that only appends",
                fix="give prompt and response records",
            )
        labels += whole[len(ids) :] if role == "assistant" else [IGNORE] * (len(whole) - len(ids))
        ids = list(whole)
    return Encoded(ids[-length:], labels[-length:])


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
    turns = [{"role": r, "content": c} for r, c in example.messages[:count]]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=tokenize, return_dict=False, **how)
    except Exception as e:  # a template is a program of its own
        raise FormatError(
            "the chat template refuses this conversation",
            where=_span([example]),
            got=f"{type(e).__name__}: {e}",
            want="roles and turns as the model's template expects them",
            fix="mend the record, or give prompt and response records",
        ) from e
