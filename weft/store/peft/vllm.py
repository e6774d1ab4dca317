"""A LoRA as servers load it: one rank, no scale of its own, linear layers of blocks alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from weft.error import ConflictError, WeftError, raise_all
from weft.model import output_sites
from weft.store.peft.kind import Written
from weft.store.peft.layers import layers
from weft.store.peft.lora import DOWN, UP, LoraSettings
from weft.store.peft.settings import key, some

_MOST = 512
"""The largest rank that vLLM has room for."""
_KEPT = ("peft_type", "task_type", "inference_mode", "target_modules")


def vllm(model: nn.Module, content: Written) -> Written:
    """The same adapter under the rules of vLLM, which has neither ranks nor alphas by name.

    All have the largest rank, filled up with zeros; alpha is the rank, the scale is in B, in float32. Errors: ConflictError
    for another type, magnitudes, experts, layers that are stored transposed or lie outside the blocks, and ranks above 512.
    """
    raise_all(_refusals(model, content))
    s = LoraSettings.model_validate({**content.config, "inference_mode": True})
    paths: list[str] = content.config["target_modules"]
    most = max(s.rank(path) for path in paths)
    made: dict[str, Tensor] = {}
    for path in paths:
        a, b, scale = content.tensors[key(path, DOWN)], content.tensors[key(path, UP)], s.scale(path)
        b = b if scale == 1 else (b.to(torch.promote_types(b.dtype, torch.float32)) * scale)
        made[key(path, DOWN)] = pad(a, (0, 0, 0, most - len(a)))
        made[key(path, UP)] = pad(b, (0, most - b.shape[1]))
    return Written(made, {k: content.config[k] for k in _KEPT} | {"r": most, "lora_alpha": most, "bias": "none"})


def _refusals(model: nn.Module, content: Written) -> list[WeftError]:
    """Why vLLM would not load this."""
    config: Mapping[str, Any] = content.config
    if config["peft_type"] != "LORA":
        return [_no("adapter_config.json", config["peft_type"], "LORA")]
    known, heads = layers(model), output_sites(model)
    ats = [known[path] for path in config["target_modules"]]
    problems = [_no(name, "stacked experts", "linear layers") for name in config["target_parameters"] or []]
    problems += [
        _no(at.path, "a weight that is stored transposed", "linear layers") for at in ats if at.kind == "conv1d"
    ]
    outside = [at.path for at in ats if at.sites[0] in heads or not any(p.isdecimal() for p in at.path.split("."))]
    problems += some(outside, lambda path: _no(path, "a layer outside the blocks", "linear layers of the blocks"))
    if config["use_dora"]:
        problems.append(_no("use_dora", "rows of given lengths (DoRA)", "plain sums"))
    ranks = {at.path: content.tensors[key(at.path, DOWN)].shape[0] for at in ats}
    return problems + some(
        [path for path, r in ranks.items() if r > _MOST],
        lambda path: _no(path, f"rank {ranks[path]}", f"at most {_MOST}"),
    )


def _no(where: str, got: object, want: str) -> ConflictError:
    fix = 'export with to="peft" for PEFT itself, or merge it (weft.merge) and export with to="hf"'
    return ConflictError("vLLM does not load this adapter", where=where, got=got, want=want, fix=fix)
