"""What is computed from an expression's tensors and kept beside them: never saved, never copied, never stale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class _Source:
    """A tensor where it was found, as it was then."""

    held: Mapping[str, Tensor | None]
    name: str
    tensor: Tensor
    address: int
    version: int

    def same(self) -> bool:
        t = self.tensor
        same = self.held.get(self.name) is t and t.data_ptr() == self.address and _version(t) == self.version
        return same and not t.requires_grad


class Derived:
    """Tensors made of those of some expressions; good while these are the same ones, unwritten and frozen."""

    def __init__(self, trees: Iterable[nn.Module], value: tuple[Tensor, ...]) -> None:
        self.trees, self.value = tuple(trees), value
        self._sources = [
            _Source(held, name, t, t.data_ptr(), _version(t))
            for tree in self.trees
            for module in tree.modules()
            for held in (module._parameters, module._buffers)  # pyright: ignore[reportPrivateUsage]
            for name, t in held.items()
            if t is not None
        ]

    def good(self) -> bool:
        """Whether the value is still what would be made now."""
        return all(s.same() for s in self._sources)


def _version(t: Tensor) -> int:
    """How often a tensor was written in place; tensors of inference mode do not count."""
    return 0 if t.is_inference() else t._version
