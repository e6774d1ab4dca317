"""Examples to learn from, and how files become them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Plain text: every token is a target."""

    text: str
    name: str = ""


@dataclass(frozen=True)
class Response:
    """A prompt and its response: only the response's tokens are targets."""

    prompt: str
    response: str
    name: str = ""


@dataclass(frozen=True)
class Pair:
    """Two texts that belong together, for retrieval."""

    query: str
    positive: str
    name: str = ""


Example = Text | Response | Pair
