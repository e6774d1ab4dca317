"""The base that an adapter belongs to: its fingerprint, and a model without its adapters."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from weft.error import ConflictError
from weft.expr import Dense, Expr
from weft.model import Place, first_vectors, fork, places, set_expressions, unbranch
from weft.model.weave import Original
from weft.store.peft.kind import Found

_SAMPLES = 64


def fingerprint_of_base(model: nn.Module) -> str:
    """Hash of the pretrained weights that an adapter is made for, 32 hex digits: each one's name, dtype, shape and 64 values.

    The values stand at evenly spaced places; with them go the class and what shapes do not tell. Errors: those of reading
    the weights.
    """
    config = getattr(model, "config", None)
    shown = {k: getattr(config, k, None) for k in ("model_type", "num_attention_heads", "num_key_value_heads")}
    word = hashlib.blake2b(json.dumps([type(model).__name__, shown], sort_keys=True).encode(), digest_size=16)
    for name, place in places(model).items():
        value = place.original().detach()
        word.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        count = min(_SAMPLES, value.numel())
        at = torch.arange(count, device=value.device) * (value.numel() - 1) // max(1, count - 1)
        word.update(value.reshape(-1)[at].cpu().view(torch.uint8).numpy().tobytes())
    return word.hexdigest()


def home_of(model: nn.Module) -> str:
    """Where the pretrained weights are: the folder or hub id."""
    known = model.__dict__.get("_weft_base") or {}
    return known.get("path") or getattr(model.config, "_name_or_path", "")


def without(model: nn.Module, found: Found) -> nn.Module:
    """A second model whose pretrained, plain weights are today's values in the checkpoint's dtype, the adapter left out."""
    plain = fork(model)
    unbranch(plain)
    for name, expr in found.rest.items():
        value = torch.cat([part.dense().detach().to(places(plain)[name].dtype) for part in expr.slices()])
        set_expressions(plain, {name: Dense(value)})
        places(plain)[name].original = Original(value.detach)
    for name in found.vectors:
        p = plain.get_parameter(name)
        p.data = first_vectors(model)[name]().to(p).clone()
    return plain


def must_be_pretrained(model: nn.Module, found: Found, out: Path | str) -> None:
    """Refuse a model that is not its pretrained one without the adapter. Errors: ConflictError."""
    known = places(model)
    changed = [n for n, e in found.rest.items() if not _unchanged(e, known[n])]
    changed += [
        n
        for n, first in first_vectors(model).items()
        if n not in found.vectors and not torch.equal(first().to(p := model.get_parameter(n)), p)
    ]
    if changed:
        raise ConflictError(
            "the adapter was made for other weights than the pretrained ones",
            where=", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else ""),
            got=f"{len(changed)} sites whose base was rewritten; PEFT would put the adapter on the pretrained weights",
            want="a pretrained base, or a folder to write this base to",
            fix=f'weft.export(model, {str(out)!r}, to="peft", base="FOLDER") writes this base to FOLDER',
        )


def _unchanged(expr: Expr, place: Place) -> bool:
    if not isinstance(expr, Dense):
        return False
    was = place.original().to(expr.w.device)
    return expr.w is was or (expr.w.dtype == was.dtype and torch.equal(expr.w, was))
