"""Adapters as a PEFT LoRA folder: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.error import ConflictError, WeftError, raise_all
from weft.expr import Dense, Expr, LowRank, terms_of, total
from weft.expr.gated import Gated, settled
from weft.expr.weightnorm import WeightNorm
from weft.model import expressions, first_vectors, fork, name_of, places, set_expressions, taps
from weft.model.branch import refuse_branches
from weft.model.weave import Original
from weft.store.lora import CONFIG, TENSORS, key
from weft.store.save import save
from weft.store.swap import may_replace, staged

_SAMPLES = 64


def export_peft(
    model: nn.Module,
    out: Path | str,
    *,
    base: Path | str | None = None,
    adapter: str | None = None,
    replace: bool = False,
) -> None:
    """Write the adapter terms as one PEFT LoRA adapter whose value is theirs; several adapters become their sum.

    `adapter`: one of them alone, whatever its strength is now; without it all, each at its strength.

    PEFT adds the adapter to the pretrained weights. Where the model's own base is another (quantized, compensated),
    `base` names a folder that it is written to, as an ordinary checkpoint without the adapters. The manifest holds the
    fingerprint of what the adapter belongs to.
    Errors: ConflictError, naming every site, for adapters that are no LoRA of a linear layer; for a changed base
    without `base`; for inputs that go through taps, and branches; for a model without adapters; for folders that exist.
    """
    adapters = {n: a for n, e in expressions(model).items() if (a := _adapters(e, adapter))}
    if not adapters:
        raise ConflictError(
            "there is no adapter to export",
            where=type(model).__name__,
            got="no adapter term" + (f" of the name {adapter}" if adapter else ""),
            want="one",
            fix='weft.apply(model, "lora"), then train',
        )
    refuse_branches(model, "a PEFT LoRA")
    raise_all([p for n, terms in adapters.items() for p in _no_lora(model, n, terms)] + _tapped(model))
    if base is None:
        _same_base(model, out)
    home = str(base if base is not None else _home(model))
    pairs = {places(model)[n].modules[0]: _pair(list(t.values())) for n, t in adapters.items()}
    content = {key(p, half): t for p, pair in pairs.items() for half, t in (("B", pair.b), ("A", pair.a))}
    may_replace(Path(out).resolve(), replace)
    under = model if base is None else without_adapters(model)
    manifest = {"format": 1, "kind": "peft", "base": home, "base_fingerprint": fingerprint_of_base(under)}
    with staged(Path(out), replace=replace, manifest=manifest) as stage:
        if base is not None:
            save(under, base, replace=replace)
        stage.tensors(TENSORS, content)
        stage.json(CONFIG, config(model, pairs, home))


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


def _home(model: nn.Module) -> str:
    """Where the pretrained weights are: the folder or hub id."""
    known = model.__dict__.get("_weft_base") or {}
    return known.get("path") or getattr(model.config, "_name_or_path", "")


def config(model: nn.Module, pairs: Mapping[str, LowRank], home: str) -> dict[str, Any]:
    """adapter_config.json of these adapters by module: alpha / r is each one's scale."""
    ranks = {path: pair.a.shape[0] for path, pair in pairs.items()}
    alphas = {path: pair.scale * ranks[path] for path, pair in pairs.items()}
    r, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    causal = type(model).__name__.endswith("ForCausalLM")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": home,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {path: own for path, own in ranks.items() if own != r},
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def without_adapters(model: nn.Module) -> nn.Module:
    """A second model whose pretrained, plain weights are today's values in the checkpoint's dtype, adapter terms left out."""
    plain = fork(model)
    for name, expr in expressions(plain).items():
        rest = {r: t for r, t in terms_of(expr).items() if not r.startswith("adapter:")}
        value = torch.cat([part.dense().detach().to(places(plain)[name].dtype) for part in total(rest).slices()])
        set_expressions(plain, {name: Dense(value)})
        places(plain)[name].original = Original(value.detach)
    return plain


def _adapters(expr: Expr, only: str | None = None) -> dict[str, Expr]:
    """The adapter terms of a weight at their strengths; those of one adapter at full strength."""
    if isinstance(expr, WeightNorm) and (held := _adapters(expr.v, only)):
        return {next(iter(held)): expr}
    terms = {r: t for r, t in terms_of(expr).items() if name_of(r) is not None}
    if only is None:
        return {r: settled(t) for r, t in terms.items()}
    return {r: settled(t.kept if isinstance(t, Gated) else t) for r, t in terms.items() if name_of(r) == only}


def _no_lora(model: nn.Module, name: str, terms: dict[str, Expr]) -> list[WeftError]:
    """Why these adapters of a site cannot be LoRA."""
    place = places(model)[name]
    reasons = [f"{role} is {t.describe()}" for role, t in terms.items() if not isinstance(t, LowRank)]
    if not place.linear or len(place.modules) > 1:
        reasons.append(f"the weight is {'tied' if len(place.modules) > 1 else 'an ' + place.kind}")
    fix = 'merge it into the weights (weft.merge), or export with to="hf"'
    return [
        ConflictError(
            "this adapter cannot be a PEFT LoRA", where=name, got=r, want="a LowRank term on one linear layer", fix=fix
        )
        for r in reasons
    ]


def _tapped(model: nn.Module) -> list[WeftError]:
    """Why an adapter behind taps is none for PEFT, site by site."""
    fix = "take the taps off with weft.untap(model), or save the model with weft.save"
    return [
        ConflictError(
            "PEFT knows no taps", where=name, got=f"an input through {tap.describe()}", want="plain inputs", fix=fix
        )
        for name, tap in taps(model).items()
    ]


def _same_base(model: nn.Module, out: Path | str) -> None:
    """Refuse a model whose base terms are not the pretrained weights."""
    changed = [n for n, e in expressions(model).items() if not _unchanged(e, places(model)[n].original)]
    changed += [
        n for n, first in first_vectors(model).items() if not torch.equal(first().to(p := model.get_parameter(n)), p)
    ]
    if changed:
        raise ConflictError(
            "the adapter was made for other weights than the pretrained ones",
            where=", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else ""),
            got=f"{len(changed)} sites whose base was rewritten; PEFT would add the adapter to the pretrained weights",
            want="a pretrained base, or a folder to write this base to",
            fix=f'weft.export(model, {str(out)!r}, to="peft", base="FOLDER") writes this base to FOLDER',
        )


def _unchanged(expr: Expr, original: Any) -> bool:
    rest = {r: t for r, t in terms_of(expr).items() if not r.startswith("adapter:")}
    base = rest.get("base")
    if list(rest) != ["base"] or not isinstance(base, Dense):
        return False
    was = original().to(base.w.device)
    return base.w is was or (base.w.dtype == was.dtype and torch.equal(base.w, was))


def _pair(terms: list[Expr]) -> LowRank:
    """A sum of low-rank terms as one: their factors side by side, under the first one's scale."""
    low = [t for t in terms if isinstance(t, LowRank)]
    scale = low[0].scale or 1.0
    b = [t.b.detach() if t.scale == scale else t.b.detach().float() * (t.scale / scale) for t in low]
    return LowRank(torch.cat(b, 1), torch.cat([t.a.detach() for t in low]), scale)
