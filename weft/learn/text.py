"""Text files of data, read within limits: what is no text is named by file and line."""

from __future__ import annotations

from pathlib import Path

from weft.error import FormatError, PathError
from weft.store.files import unreadable

LONGEST = 16 << 20
"""Bytes that one line may have: more is no text that somebody wrote, and it would be one example."""


def decode(path: Path, longest: int = LONGEST) -> str:
    """A UTF-8 file's text, every line end a newline. Errors: PathError; FormatError naming the line that is no text."""
    if not path.is_file():
        where, fix = str(path), "remove it, or mend the link"
        raise PathError("a file cannot be read", where=where, got="no regular file", want="a data file", fix=fix)
    try:
        with path.open("rb") as f:
            lines = iter(lambda: f.readline(longest + 1), b"")
            text = "".join(_line(raw, f"{path.name} line {i}", longest) for i, raw in enumerate(lines, 1))
    except OSError as e:
        problem = unreadable(path, e, "a data file")
        raise problem from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _line(raw: bytes, where: str, longest: int) -> str:
    if len(raw) > longest:
        problem = f"more than {longest} bytes in one line"
    elif b"\0" in raw:
        problem = "a zero byte"
    else:
        try:
            return raw.decode()
        except UnicodeDecodeError as e:
            problem = str(e)
    raise FormatError(
        "a file is not text",
        where=where,
        got=problem,
        want=f"UTF-8, at most {longest} bytes a line",
        fix="convert the file, or break long lines into records",
    )
