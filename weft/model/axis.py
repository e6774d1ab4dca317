"""Axis: an index space that several weights share. Part: where it lies in one of them."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("scale", "permute", "rotate", "select")


@dataclass(frozen=True)
class Part:
    """Where an axis lies in a tensor: along `dim`, from `start`, as [blocks copies within unit]; blocks and within are the axis's."""

    name: str
    """A site, whose dimensions are outputs and inputs, or a plain parameter."""
    dim: int
    start: int = 0
    copies: int = 1
    """How often each block stands there: the query heads of a key head."""
    unit: int = 1
    """Neighbours that are one index of the axis: the features of a head."""
    offset: float = 0.0
    """What the model adds to the stored value: 1 in Gemma's norms."""


@dataclass(frozen=True)
class Norm:
    """A norm: its module, the columns that read it, and what it adds to its stored weight."""

    name: str
    readers: tuple[Part, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class Axis:
    """An index space: what writes it, what reads it, and what it does not admit.

    residual: the stream between blocks. norm: what a norm gives its readers. value: the features that values bring to the
    output projection. score: those in which queries meet keys. heads: the key heads, with the queries they serve. feed: the
    inner features of a feed-forward part.
    """

    name: str
    kind: str
    size: int
    writers: tuple[Part, ...]
    readers: tuple[Part, ...]
    riders: tuple[Part, ...] = ()
    """What keeps the order of the axis but neither scales nor turns with it: gates, norms on the stream."""
    blocks: int = 1
    refused: dict[str, str] = field(default_factory=dict[str, str])
    """Why, by kind of transform; what is not here is admitted."""
    pairs: bool = False
    """Indices i and i + half of a block must keep one scale: position rotates them together."""
    centred: bool = False
    """A rotation must keep the vector of ones: norms subtract the mean."""
    norms: tuple[Norm, ...] = ()
    """What must be folded into its readers before a rotation."""
    width: tuple[str, ...] = ()
    """Where the configuration holds its size."""

    def admits(self, kind: str) -> bool:
        """Whether such a transform leaves the model's output as it is (select: gives a smaller model)."""
        return kind not in self.refused
