"""YAML without surprises: the core schema of YAML 1.2 in plain values, and nothing that names code or points elsewhere.

Unquoted `null`, `~`, `true`, `12`, `012` (twelve), `0o14`, `0x1f`, `1e-4` and `.5` are values; any other scalar is text, `on`,
`12:30` and `2024-01-01` too. Values are made from PyYAML's events; none of its constructors is used.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from weft.error import FormatError, PathError
from weft.store.files import parse_json

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_NUMBER = 64
"""Characters of a number."""

_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_NUMBERS: tuple[tuple[re.Pattern[str], Callable[[str], int | float]], ...] = (
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), partial(int, base=8)),
    (re.compile(r"0x[0-9a-fA-F]+"), partial(int, base=16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda _: math.nan),
)
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that an editor does not show: controls, text direction, half characters, line separators."""


def read_yaml(path: Path) -> Any:
    """The value in a YAML file, or in a JSON file if its name ends so. Errors: PathError, FormatError."""
    try:
        if path.is_file():
            with path.open("rb") as f:
                raw = f.read(MAX_BYTES + 1)
            return _json(raw, path.name) if path.suffix == ".json" else parse_yaml(raw, path.name)
        got = "no ordinary file" if path.exists() else "no such file"
    except OSError as e:
        got = e.strerror or "unreadable"
    raise PathError(
        "a file cannot be read", where=str(path), got=got, want="a YAML or JSON file", fix="check the path"
    ) from None


def parse_yaml(raw: bytes, where: str) -> Any:
    """The value of one YAML document; None for an empty one.

    Errors: FormatError with line and column for what is no YAML, and for what is refused: tags, anchors, aliases, merge keys,
    keys that are no text or come twice, numbers that are not finite, several documents, characters that an editor does not
    show, tabs as indentation, and content beyond the limits above.
    """
    _check_size(raw, where)
    try:
        text = raw.decode("utf8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        before = raw[: e.start].decode("utf8")
        _refuse(before, len(before), where, f"byte 0x{raw[e.start]:02x}", "text in UTF-8")
    if (i := _hidden(text)) is not None:
        _refuse(text, i, where, f"character U+{ord(text[i]):04X}", "characters that an editor shows")
    document = _Document(text, where)
    try:
        return document.whole()
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as e:
        mark: Any = getattr(e, "problem_mark", None)
        index = mark.index if mark else document.events.index
        if text[index : index + 1] == "\t":
            _refuse(text, index, where, "a tab", "spaces: tabs neither indent nor separate")
        _refuse(text, index, where, getattr(e, "problem", None) or str(e), "YAML 1.2")


def _json(raw: bytes, where: str) -> Any:
    """JSON within the same limits of size and depth."""
    _check_size(raw, where)
    value = parse_json(raw, where)
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        level = [c for v in level for c in (v.values() if isinstance(v, dict) else v)]
        depth += 1
    if depth > MAX_DEPTH:
        raise FormatError(
            "a file is nested too deep", where=where, got=depth, want=f"at most {MAX_DEPTH} levels", fix="flatten it"
        )
    return value


def _check_size(raw: bytes, where: str) -> None:
    if len(raw) > MAX_BYTES:
        raise FormatError(
            "a file is too large to be read as text",
            where=where,
            got=f"more than {MAX_BYTES} bytes",
            want=f"at most {MAX_BYTES}",
            fix="check that it is the right file",
        )


def _hidden(text: str) -> int | None:
    """Index of the first character that an editor does not show; tabs and ends of lines aside."""
    rare = re.finditer(r"[^\t\n\r -~]", text)
    return next((m.start() for m in rare if unicodedata.category(m[0]) in _HIDDEN or m[0] in "\ufffe\uffff"), None)


def _refuse(text: str, index: int, name: str, got: str, want: str) -> NoReturn:
    lines = re.split(r"\r\n?|\n", text[:index])
    raise FormatError(
        "a file is not the YAML that weft reads",
        where=f"{name} line {len(lines)}, column {len(lines[-1]) + 1}",
        got=got,
        want=want,
        fix="correct the file there",
    ) from None


class _Document:
    """The events of a text, and the plain values they stand for."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name, self.values = text, name, 0
        self.events: Any = yaml.SafeLoader(text)

    def refuse(self, event: Any, got: str, want: str) -> NoReturn:
        _refuse(self.text, event.start_mark.index, self.name, got, want)

    def whole(self) -> Any:
        """The value of the only document."""
        self.events.get_event()
        start = self.events.get_event()
        if isinstance(start, yaml.StreamEndEvent):
            return None
        if start.version not in (None, (1, 2)) or start.tags:
            self.refuse(start, "a directive", "none, or %YAML 1.2")
        made = self.value(self.events.get_event(), 1)
        self.events.get_event()
        end = self.events.get_event()
        if not isinstance(end, yaml.StreamEndEvent):
            self.refuse(end, "a second document", "one document")
        return made

    def value(self, event: Any, depth: int) -> Any:
        """The value that begins with this event, at this depth."""
        self.values += 1
        if self.values > MAX_VALUES:
            self.refuse(event, f"more than {MAX_VALUES} values", f"at most {MAX_VALUES}")
        if isinstance(event, yaml.AliasEvent):
            self.refuse(event, f"the alias *{event.anchor}", "every value written where it is used")
        if event.anchor is not None:
            self.refuse(event, f"the anchor &{event.anchor}", "every value written where it is used")
        if event.tag is not None:
            self.refuse(event, f"the tag {event.tag}", "plain values without tags")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if depth > MAX_DEPTH:
            self.refuse(event, f"more than {MAX_DEPTH} levels", f"at most {MAX_DEPTH}")
        return self.table(depth) if isinstance(event, yaml.MappingStartEvent) else self.items(depth)

    def items(self, depth: int) -> list[Any]:
        """The rest of a list."""
        made: list[Any] = []
        while not isinstance(event := self.events.get_event(), yaml.SequenceEndEvent):
            made.append(self.value(event, depth + 1))
        return made

    def table(self, depth: int) -> dict[str, Any]:
        """The rest of a table."""
        made: dict[str, Any] = {}
        while not isinstance(event := self.events.get_event(), yaml.MappingEndEvent):
            key = None if isinstance(event, yaml.CollectionStartEvent) else self.value(event, depth + 1)
            if not isinstance(key, str):
                self.refuse(event, "a key that is no text", "text, in quotes where it looks like a number or a word")
            if key == "<<":
                self.refuse(event, "the merge key <<", "every value written where it is used")
            if key in made:
                self.refuse(event, f"the key {key} again", "unique keys")
            made[key] = self.value(self.events.get_event(), depth + 1)
        return made

    def scalar(self, event: Any) -> str | int | float | bool | None:
        """The core schema's value if unquoted, else text."""
        text: str = event.value
        if (i := _hidden(text)) is not None:
            self.refuse(event, f"an escape of U+{ord(text[i]):04X}", "characters that an editor shows")
        quoted = not event.implicit[0]
        if quoted or text in _WORDS:
            return text if quoted else _WORDS[text]
        read = next((read for pattern, read in _NUMBERS if pattern.fullmatch(text)), None)
        if read is None:
            return text
        if len(text) > MAX_NUMBER:
            self.refuse(event, f"a number of {len(text)} characters", f"at most {MAX_NUMBER}")
        number = read(text)
        if not math.isfinite(number):
            self.refuse(event, text, "a finite number")
        return number
