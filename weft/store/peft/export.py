"""Write the adapter of a model as a PEFT folder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from weft.error import ConflictError, WeftError, raise_all
from weft.model import taps
from weft.model.adapted import unnamed
from weft.model.branch import refuse_branches
from weft.store.peft.base import fingerprint_of_base, home_of, must_be_pretrained, without
from weft.store.peft.kind import Found, Kind
from weft.store.peft.kinds import KINDS
from weft.store.peft.settings import CONFIG, TENSORS
from weft.store.peft.vllm import vllm
from weft.store.save import save
from weft.store.swap import may_replace, staged


def export_peft(
    model: nn.Module,
    out: Path | str,
    *,
    base: Path | str | None = None,
    adapter: str | None = None,
    replace: bool = False,
    serving: bool = False,
) -> None:
    """Write the adapter of a model in PEFT's format, as the type that holds it; several LoRAs become their sum.

    `adapter`: one by its name alone, whatever its strength is now; without it all, each at its strength. Terms beside weights
    come first; where there are none, sides (IA3, OFT), then changed norms. `serving`: a LoRA as vLLM loads it.

    PEFT puts the adapter on the pretrained weights. Where the model's own base is another (quantized, compensated),
    `base` names a folder that it is written to, as an ordinary checkpoint without the adapter. The manifest holds the
    fingerprint of what the adapter belongs to.
    Errors: ConflictError, naming every site, for adapters that PEFT has no type for, or cannot have in one folder; for a
    changed base without `base`; for inputs that go through taps; for a model without adapters; for folders that exist.
    """
    kind, found = _kind(model, adapter)
    found.rest.update({n: unnamed(e, lambda f: adapter is not None or not f.on) for n, e in found.rest.items()})
    if not found.branches:
        refuse_branches(model, "a PEFT adapter of weights")
    raise_all(kind.refusals(model, found) + _tapped(model))
    if base is None:
        must_be_pretrained(model, found, out)
    content = kind.write(model, found)
    content = vllm(model, content) if serving else content
    home = str(base if base is not None else home_of(model))
    may_replace(Path(out).resolve(), replace)
    under = model if base is None else without(model, found)
    manifest = {"format": 1, "kind": "peft", "base": home, "base_fingerprint": fingerprint_of_base(under)}
    with staged(Path(out), replace=replace, manifest=manifest) as stage:
        if base is not None:
            save(under, base, replace=replace)
        stage.tensors(TENSORS, content.tensors)
        stage.json(CONFIG, {**content.config, "base_model_name_or_path": home})


def _kind(model: nn.Module, adapter: str | None) -> tuple[Kind, Found]:
    """The type that holds the model's adapter; if none does, the one with the least against it."""
    tried = [(kind, kind.find(model, adapter)) for kind in KINDS.values()]
    held = [(k, f) for k, f in tried if f.pieces or f.branches or f.vectors]
    if not held:
        raise ConflictError(
            "there is no adapter to export",
            where=type(model).__name__,
            got="none" + (f" of the name {adapter}" if adapter else ""),
            want="one",
            fix='weft.apply(model, "lora"), then train',
        )
    first = min(kind.order for kind, _ in held)
    near = [(k, f) for k, f in held if k.order == first]
    return min(near, key=lambda pair: (pair[0].strange(pair[1]), len(pair[0].refusals(model, pair[1]))))


def _tapped(model: nn.Module) -> list[WeftError]:
    """Why an adapter behind taps is none for PEFT, site by site."""
    fix = "take the taps off with weft.untap(model), or save the model with weft.save"
    return [
        ConflictError(
            "PEFT knows no taps", where=name, got=f"an input through {tap.describe()}", want="plain inputs", fix=fix
        )
        for name, tap in taps(model).items()
    ]
