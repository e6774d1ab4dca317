"""Files become examples: text, JSON, CSV, Parquet and Arrow, one file, a folder of them, or a pattern."""

from __future__ import annotations

import csv
import glob
import io
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from weft.error import FormatError, PathError, WeftError, raise_all
from weft.learn.data import Example, Pair, Response, Text, content, reference
from weft.learn.tables import rows
from weft.learn.text import decode
from weft.learn.turns import chat
from weft.store.files import MAX_JSON, parse_json

_SPLIT = re.compile(r"(train|test|validation|valid|dev)(?=[-_.]|$)")
_FIELDS = (
    "text",
    "prompt",
    "response",
    "completion",
    "messages",
    "conversations",
    "tools",
    "query",
    "positive",
    "task",
    "reference",
)


def read(source: str | Path) -> list[Example]:
    """Examples of a `.txt` file (one text), a `.jsonl`, `.json`, `.csv`, `.parquet` or `.arrow` file (one a record), or of all in a folder.

    A pattern does as well. Records hold `text`, or `prompt` and `response` (or `completion`), or `messages`, or `query` and `positive`,
    and may hold a `task`, and beside a prompt a `reference`. A folder may be one that the datasets library saved. Of several splits one
    has to be chosen: `FOLDER/train-*.parquet`.
    Errors: PathError; FormatError with every bad record (up to ten), for kinds or splits that are mixed and for no example at all;
    ResourceError for Parquet and Arrow without pyarrow.
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
    """The data files at a path, in order. Errors: PathError if there is no file of a known kind; FormatError for several splits."""
    path = Path(source)
    try:
        if source and path.is_dir():
            held = [p for p in sorted(path.rglob("*")) if p.suffix in _READERS and not p.is_dir()]
            return _one_split(path, _tables_alone(path, held))
        if not path.exists() and any(c in source for c in "*?["):
            held = [Path(p) for p in sorted(glob.glob(source, recursive=True)) if Path(p).suffix in _READERS]
            if held:
                return _one_split(path, held)
        got = "no file" if not path.exists() else "no regular file" if not path.is_file() else None
    except OSError as e:
        got = e.strerror
    if got is None and path.suffix in _READERS:
        return [path]
    raise PathError(
        "no data there",
        where=source or "data",
        got=got or f"a file that ends in {path.suffix or 'nothing'}",
        want=f"a folder, a pattern or a file: {', '.join(_READERS)}",
        fix="check the path, or convert the data: .jsonl holds any of it",
    )


def _tables_alone(folder: Path, held: list[Path]) -> list[Path]:
    """Without the notes that the datasets library leaves beside its tables."""
    notes = {"dataset_info.json", "dataset_dict.json", "state.json"}
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    return [p for p in held if p.name not in notes] if saved else held


def _one_split(where: Path, held: list[Path]) -> list[Path]:
    """Files of one split. Errors: FormatError for several: a test set would be trained on."""
    splits = {m[1] for p in held for part in _below(p, where) if (m := _SPLIT.match(part))}
    if len(splits) > 1:
        fix = "give the files of one: a folder of their own, or a pattern as FOLDER/train-*"
        got = ", ".join(sorted(splits))
        raise FormatError("the data has several splits", where=str(where), got=got, want="one split", fix=fix)
    return held


def _below(path: Path, folder: Path) -> tuple[str, ...]:
    """The parts of a path inside a folder; its name alone if it is not there."""
    return path.relative_to(folder).parts if path.is_relative_to(folder) else (path.name,)


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
    held = csv.DictReader(io.StringIO(decode(path)), strict=True)
    try:
        found, names = list(held), list(held.fieldnames or ())
    except csv.Error as e:
        where, fix = f"{path.name} line {held.line_num}", "write it with a CSV library, or as .jsonl"
        want = "cells between commas, and every quote closed"
        raise FormatError("a table cannot be read", where=where, got=str(e), want=want, fix=fix) from e
    if twice := sorted({n for n in names if n in _FIELDS and names.count(n) > 1}):
        got, want, fix = ", ".join(twice), "each column once", "rename one of them"
        raise FormatError("a column is there twice", where=path.name, got=got, want=want, fix=fix)
    return _records(path, [(f"row {i}", partial(_cells, r, f"{path.name} row {i}")) for i, r in enumerate(found, 1)])


def _cells(row: dict[Any, Any], where: str) -> Any:
    """The row. Errors: FormatError for more cells than columns: a comma outside quotes would cut a text."""
    if more := [cell for cell in row.get(None) or () if cell]:
        got, want = f"more cells than columns: {more[0][:40]!r}", "a cell for each column"
        raise FormatError("a row is too long", where=where, got=got, want=want, fix="put texts with commas in quotes")
    return row


def _columns(path: Path) -> list[Example]:
    """Records of a Parquet file, or of an Arrow one, as a stream or a file; columns that no example has are not read."""
    return _records(path, [(f"row {i}", partial(_itself, r)) for i, r in enumerate(rows(path, _FIELDS), 1)])


def _itself(record: Any) -> Any:
    return record


_READERS: dict[str, Any] = {
    ".txt": _text, ".jsonl": _lines, ".json": _array, ".csv": _table, ".parquet": _columns, ".arrow": _columns,
}  # fmt: skip


def _records(path: Path, given: list[tuple[str, Any]]) -> list[Example]:
    made: list[Example] = []
    problems: list[WeftError] = []
    for where, get in given:
        try:
            record = get()
            example = _example(record, f"{path.name} {where}")
            task = record.get("task")
            made.append(_whole(replace(example, task=task) if isinstance(task, str) else example))
        except WeftError as e:
            problems.append(e)
            if len(problems) == 10:
                break
    raise_all(problems)
    return made


def _example(record: Any, where: str) -> Example:
    match record:
        case {"prompt": str(prompt), "response": str(response)} | {"prompt": str(prompt), "completion": str(response)}:
            other = record.get("reference")
            return Response(prompt, response, where, reference=other if isinstance(other, str) else "")
        case {"query": str(query), "positive": str(positive)}:
            return Pair(query, positive, where)
        case {"messages": _} | {"conversations": _} if made := chat(record, where):
            return made
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
        json.dumps([*content(example), example.task, reference(example)], ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        where, got, fix = example.name, f"half a surrogate pair: {e.object[e.start]!a}", "write the character as UTF-8"
        raise FormatError("a record is not text", where=where, got=got, want="whole characters", fix=fix) from None
    return example
