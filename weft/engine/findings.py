"""What a probe finds out about a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Findings:
    """A sentence on the model, and the same numbers of every site."""

    says: str
    sites: Mapping[str, Mapping[str, float]]

    def as_json(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)
