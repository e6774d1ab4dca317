"""Experts taken apart: transformers stacks the experts of a layer in one tensor; checkpoints, and weft, have a matrix each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_ROLES = ("gate", "up", "down")


class ApartExperts(nn.Module):
    """Experts as Linear layers in children named `0`, `1`, ...; the computation is that of the stacked ones."""

    roles: Mapping[str, str]
    """The names of the layers that take part: gate, up, down."""
    num_experts: int

    def forward(
        self, hidden_states: Float[Tensor, "t h"], top_k_index: Int[Tensor, "t k"], top_k_weights: Float[Tensor, "t k"]
    ) -> Float[Tensor, "t h"]:
        out = torch.zeros_like(hidden_states)
        for i in top_k_index.unique().tolist():
            if i >= self.num_experts:
                continue
            expert = self.get_submodule(str(i))
            gate, up, down = (cast(nn.Module, getattr(expert, self.roles[r])) for r in _ROLES)
            token, slot = torch.where(top_k_index == i)
            x = hidden_states[token]
            y = down(cast(Any, self)._apply_gate(torch.cat([gate(x), up(x)], -1))) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


@functools.cache
def _apart(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a kind of experts, taken apart: still an instance of it."""
    return type(kind.__name__, (ApartExperts, kind), {"__module__": __name__, "stacked": kind})


def take_apart(model: nn.Module) -> None:
    """Give every experts module whose checkpoints hold a matrix an expert such matrices, in place, over the same storage."""
    for module, names in _stacked(model):
        gate_up, down = cast(nn.Parameter, module.gate_up_proj), cast(nn.Parameter, module.down_proj)
        del module.gate_up_proj, module.down_proj
        module.__class__ = _apart(type(module))
        cast(Any, module).roles = names
        half = gate_up.shape[1] // 2
        for i in range(len(gate_up)):
            parts = {"gate": gate_up[i, :half], "up": gate_up[i, half:], "down": down[i]}
            expert = nn.Module()
            for role, weight in parts.items():
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                layer.weight = nn.Parameter(weight.detach(), requires_grad=gate_up.requires_grad)
                expert.add_module(names[role], layer)
            module.add_module(str(i), expert)


def put_together(model: nn.Module) -> None:
    """Stack what `take_apart` took apart, in place."""
    for module in [m for m in model.modules() if isinstance(m, ApartExperts)]:
        experts = [cast(Any, module.get_submodule(str(i))) for i in range(module.num_experts)]
        for i in range(module.num_experts):
            delattr(module, str(i))
        weights = [[getattr(e, module.roles[r]).weight.detach() for r in _ROLES] for e in experts]
        stacked = {
            "gate_up_proj": torch.stack([torch.cat([gate, up]) for gate, up, _ in weights]),
            "down_proj": torch.stack([down for *_, down in weights]),
        }
        del module.roles
        module.__class__ = cast(Any, type(module)).stacked
        for name, value in stacked.items():
            module.register_parameter(name, nn.Parameter(value))


def _stacked(model: nn.Module) -> list[tuple[nn.Module, dict[str, str]]]:
    """Experts that are stacked in the usual way ([gate; up], down, no bias), with the names of their layers in checkpoints."""
    found = [
        m
        for m in model.modules()
        if {"gate_up_proj", "down_proj"} == {n for n, _ in m.named_parameters(recurse=False)}
        and all(getattr(m, k, None) is v for k, v in _USUAL.items())
    ]
    names = _names(model) if found else None
    return [(m, names) for m in found] if names is not None else []


_USUAL = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def _names(model: nn.Module) -> dict[str, str] | None:
    """The names that checkpoints of this class give an expert's layers, from transformers' own table; None without one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    made: dict[str, str] = {}
    for step in get_model_conversion_mapping(cast(Any, model), add_legacy=False):
        if not isinstance(step, WeightConverter) or not step.target_patterns[0].endswith(
            ("experts.gate_up_proj", "experts.down_proj")
        ):
            continue
        leaves = [p.split(".")[-2] for p in step.source_patterns if p.endswith(".weight") and ".experts.*." in p]
        roles = ("down",) if step.target_patterns[0].endswith("down_proj") else ("gate", "up")
        made |= dict(zip(roles, leaves, strict=False)) if len(leaves) == len(roles) else {}
    return made if set(made) == set(_ROLES) else None
