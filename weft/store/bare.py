"""A checkpoint as a model without its class: for work that goes weight by weight and runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from weft.store.audit import Entry


class Bare(nn.Module):
    """Tensors under the names that a checkpoint has: a matrix called weight is a linear layer's, all else a parameter.

    Classes derived from it have the name that the configuration says.
    """

    def __init__(self, said: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
        """`said`: the configuration. Names are none of this class's own, and none lies under another."""
        super().__init__()
        self.said, self.config = said, SimpleNamespace(dtype=None)
        tree: dict[str, Any] = {}
        for name, entry in entries.items():
            *path, leaf = name.split(".")
            at = tree
            for part in path:
                at = at.setdefault(part, {})
            at[leaf] = entry
        _fill(self, tree)

    def configuration(self) -> dict[str, Any]:
        """The configuration, with the dtype that results are stored in where that was said."""
        if (dtype := self.config.dtype) is None:
            return dict(self.said)
        return {k: v for k, v in self.said.items() if k != "torch_dtype"} | {"dtype": str(dtype).removeprefix("torch.")}


def _fill(module: nn.Module, tree: Mapping[str, Any]) -> None:
    """Give a module what lies under it; children numbered from 0 on are a list."""
    numbers = [str(i) for i in range(len(tree))]
    for name in numbers if set(tree) == set(numbers) else tree:
        held = tree[name]
        if isinstance(held, Entry):
            module.register_parameter(name, _empty(held))
            continue
        matrix = held.get("weight")
        if isinstance(matrix, Entry) and len(matrix.shape) == 2:
            child: nn.Module = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        else:
            child = nn.ModuleList() if set(held) == {str(i) for i in range(len(held))} else nn.Module()
        module.add_module(name, child)
        _fill(child, held)


def _empty(entry: Entry) -> nn.Parameter:
    return nn.Parameter(torch.empty(entry.shape, dtype=entry.dtype, device="meta"), requires_grad=False)
