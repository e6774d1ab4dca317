"""Conversations in the forms that data hold them in."""

from __future__ import annotations

import json
from typing import Any

from weft.error import FormatError
from weft.learn.data import Chat
from weft.store.files import parse_json

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
"""What ShareGPT calls them."""


def chat(record: dict[str, Any], where: str) -> Chat | None:
    """The conversation of a record with `messages` or `conversations`; None for turns that are no such thing.

    Turns hold `role` and `content`, or ShareGPT's `from` and `value`. A content may be a list of parts of text, or missing where there is
    something else, such as `tool_calls`: all that a turn holds besides, and the record's `tools`, is for the template.
    Errors: FormatError for parts that are no text, for tools that are no JSON, and for a `weight`, which no template says.
    """
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        return None
    said, more = list[tuple[str, str]](), list[str]()
    for turn in turns:
        held = _there(turn)
        role, text = (held.pop(a, held.pop(b, None)) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(role, str) or not role or (text is None and not held):
            return None
        if (weight := held.pop("weight", 1)) != 1:
            got, want, fix = f"weight {weight}", "1", "leave it out, or mark parts with {% generation %}"
            raise FormatError("a turn has a weight", where=where, got=got, want=want, fix=fix)
        said.append((_ROLES.get(role, role), _text(text, where)))
        more.append(json.dumps(held) if held else "")
    tools = record.get("tools") or []
    tools = parse_json(tools.encode(), f"{where}, tools") if isinstance(tools, str) else tools
    return Chat(
        tuple(said), where, more=tuple(more) if any(more) else (), tools=json.dumps(_there(tools)) if tools else ""
    )


def _there(value: Any) -> Any:
    """A value without the fields that hold nothing: tables fill in what other rows have."""
    if isinstance(value, dict):
        return {k: _there(v) for k, v in value.items() if v is not None}
    return [_there(v) for v in value] if isinstance(value, list) else value


def _text(content: Any, where: str) -> str:
    """A content, or the texts of its parts. Errors: FormatError for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in parts]
    if not all(isinstance(t, str) for t in texts):
        got = sorted({str(p.get("type")) if isinstance(p, dict) else type(p).__name__ for p in parts})
        raise FormatError("a turn is no text", where=where, got=got, want="text", fix="leave out images and sounds")
    return "".join(t for t in texts if t)
