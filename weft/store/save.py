"""Save a woven model: an ordinary checkpoint where every weight is plain, else a weft folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.error import ConflictError, raise_all
from weft.expr import Dense, Expr, identity, spec, tensors, valueless
from weft.model import Place, Tap, branches, expressions, first_vectors, places, plain_tensors, taps
from weft.model.branch import branch_spec, branch_tensors, refuse_branches
from weft.model.parts import Take, laid
from weft.model.taps import refuse_roundings, tap_spec, tap_tensors
from weft.progress import Progress, Silent
from weft.store.assign import names_on_disk
from weft.store.card import card
from weft.store.files import must_be_text
from weft.store.library import config_of, stem_of
from weft.store.swap import Stage, may_replace, room, staged
from weft.store.tensors import Content, Later, size_of

FORMAT = 1
SHARD = 2 << 30
WORDS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model")
"""What a tokenizer is made of."""
_TRAVEL = (
    *WORDS, "chat_template*", "additional_chat_templates/*.jinja", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
)  # fmt: skip


def save(
    model: nn.Module,
    out: Path | str,
    *,
    tokenizer: Any = None,
    replace: bool = False,
    keep: bool = False,
    dense: bool = False,
    manifest: Mapping[str, Any] | None = None,
    files: Mapping[str, str | Path] | None = None,
    values: Mapping[str, Later] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model folder, whole or not at all, with one tensor in memory at a time.

    If every expression is a plain matrix and there is no branch, or with `dense`, the folder is an ordinary checkpoint of the model's
    library.
    Otherwise `weft-*.safetensors` hold the terms and `weft.json` their expressions, and transformers refuses the folder rather than
    misread it. The tokenizer, chat template and generation config of the source travel along. `files`: further texts, or files to copy,
    by name. `keep`: what else a replaced folder holds stays. `values`: sites whose plain values [m n] are made when they are written, and
    are not what the model says; a run that is killed is gone on with. Errors: ConflictError if `out` exists and is not to be replaced or,
    `dense`, for a weight whose value depends on the input or whose input is rounded, and for branches; NumericError for one that is not
    finite; ResourceError for a full disk; PathError.
    """
    if dense:
        refuse_roundings(taps(model), "a plain checkpoint")
        refuse_branches(model, "a plain checkpoint")
    plain = dense or _plain(model)
    content: dict[str, Tensor | Later] = dict(_dense(model) if dense else stored(model))
    for name, value in (values or {}).items():
        content[name if plain else f"{name}:w"] = _laid(value, places(model)[name]) if plain else value
    if plain:
        known = names_on_disk(model, content)
        content = {known[n]: t for n, t in content.items()}
    total = sum(size_of(t) for t in content.values())
    body = {
        "format": FORMAT,
        "kind": "plain" if plain else "weft",
        "class": type(model).__name__,
        **({"sites": {}} if plain else trees(model)),
        **({"shared": others} if not plain and (others := shared(model)) else {}),
        **({"vectors": sorted(changed)} if not plain and (changed := first_vectors(model)) else {}),
        "bytes": total,
        "base": base(model),
        **(manifest or {}),
    }
    may_write(model, out, replace=replace, keep=keep, nbytes=total)
    with (
        (progress or Silent()).bar("save", total) as step,
        staged(Path(out), replace=replace, manifest=body, keep=keep, step=step, resume=values is not None) as stage,
    ):
        travel(model, stage, tokenizer)
        for name, held in {"README.md": card(model, "plain" if plain else "weft"), **(files or {})}.items():
            stage.put(name, held)
        config = config_of(model)
        if not plain:
            config["quantization_config"] = {"quant_method": "weft", "format": FORMAT}
        stage.json("config.json", config)
        write_shards(stage, content, stem_of(model) if plain else "weft", {n for n, _ in model.named_buffers()})


def may_write(model: nn.Module, out: Path | str, *, replace: bool, nbytes: int, keep: bool = False) -> None:
    """Refuse before any work a place that cannot take the result. Errors: ConflictError, ResourceError."""
    must_be_text(Path(out))
    place, source = Path(out).resolve(), model.__dict__.get("_weft_source")
    may_replace(place, replace, keep)
    room(place, nbytes)
    read = Path(source).resolve() if source is not None else None
    if (
        read is not None
        and read != place
        and (place.is_relative_to(read) or (place.exists() and read.is_relative_to(place)))
    ):
        raise ConflictError(
            "the output and the model that it is made from lie in one another",
            where=str(place),
            got=str(read),
            want="a folder of its own",
            fix="choose another folder",
        )


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that `save` writes, by its name in the file: what a budget counts."""
    exprs, others = expressions(model), shared(model)
    if _plain(model):
        made = {n: places(model)[n].stored(tensors(e)["w"].detach()) for n, e in exprs.items()}
    else:
        made = {n: t.detach() for n, t in _named(exprs).items() if n not in others}
    made |= {f"{edge}:tap.{path}": t for edge, tap in edges(model).items() for path, t in tap_tensors(tap).items()}
    made |= {n: t.detach() for n, t in branch_tensors(model).items()}
    return made | {name: narrow(t) for name, t in plain_tensors(model).items()}


def _named(exprs: Mapping[str, Expr]) -> dict[str, Tensor]:
    """Every tensor of every site, by its name in a weft folder."""
    return {f"{name}:{path}": t for name, e in exprs.items() for path, t in tensors(e).items()}


def shared(model: nn.Module) -> dict[str, str]:
    """The tensors of sites that are another one: name to the first name of the same storage, under which it is saved."""
    named = _named(expressions(model))
    first: dict[object, str] = {}
    return {n: other for n, t in named.items() if (other := first.setdefault(identity(t), n)) != n}


def _plain(model: nn.Module) -> bool:
    """Whether an ordinary checkpoint holds the model as it is."""
    return all(isinstance(e, Dense) for e in expressions(model).values()) and not taps(model) and not branches(model)


def edges(model: nn.Module) -> dict[str, Tap]:
    """Every tap once, by the first site that reads through it."""
    first = {id(tap): name for name, tap in reversed(taps(model).items())}
    return {name: tap for name, tap in taps(model).items() if first[id(tap)] == name}


def trees(model: nn.Module) -> dict[str, Any]:
    """What a manifest says of sites, taps and branches, without their tensors."""
    first = {id(tap): name for name, tap in edges(model).items()}
    made = {name: spec(e) for name, e in expressions(model).items()}
    for name, tap in taps(model).items():
        made[name] = {"node": "Tapped", "tap": first[id(tap)], "expr": made[name]}
    on = {name: tap_spec(tap) for name, tap in edges(model).items()}
    added = [branch_spec(b) for b in branches(model)]
    return {"sites": made, **({"taps": on} if on else {}), **({"branches": added} if added else {})}


def _dense(model: nn.Module) -> Content:
    """An ordinary checkpoint's tensors, weights in their checkpoint's dtype. Errors: ConflictError for those without a value."""
    raise_all(valueless(expressions(model)))
    on = taps(model)
    made = {n: later(e, places(model)[n], on.get(n)) for n, e in expressions(model).items()}
    return {**made, **{name: narrow(t) for name, t in plain_tensors(model).items()}}


def later(expr: Expr, place: Place, tap: Tap | None = None) -> Later:
    """An expression's value as its checkpoint holds it, turns folded in, made slice by slice when it is written."""
    back = (tap or Tap()).back

    def make(take: Take | None) -> Tensor:
        return place.stored(laid((back(p.dense().detach()) for p in expr.slices()), expr.shape, place.dtype, take))

    return Later(place.dtype, place.shape, make, slices=place.kind != "conv1d")


def _laid(value: Later, place: Place) -> Later:
    """A matrix as its checkpoint holds it."""
    slices = value.slices and place.kind != "conv1d"
    return Later(value.dtype, place.shape, lambda take: place.stored(value.make(take)), value.about, slices)


def nbytes(model: nn.Module) -> int:
    """Tensor bytes that the saved model takes."""
    return sum(size_of(t) for t in stored(model).values())


def narrow(t: Tensor) -> Tensor:
    """The same values in bfloat16 where that loses nothing, else as they are."""
    small = t.detach().to(torch.bfloat16) if t.is_floating_point() and t.element_size() > 2 else t.detach()
    return small if torch.equal(small.to(t.dtype), t.detach()) else t.detach()


def base(model: nn.Module) -> dict[str, str] | None:
    """Where the pretrained weights came from."""
    return model.__dict__.get("_weft_base")


def write_shards(stage: Stage, content: Content, stem: str, loose: set[str] | None = None) -> None:
    """Write tensors to one file, or to shards of at most `SHARD` bytes and their index."""
    shards: list[dict[str, Tensor | Later]] = [{}]
    held = 0
    for name, t in content.items():
        if shards[-1] and held + size_of(t) > SHARD:
            shards.append({})
            held = 0
        shards[-1][name] = t
        held += size_of(t)
    if len(shards) == 1:
        stage.tensors(f"{stem}.safetensors", shards[0], loose or ())
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        stage.tensors(file, shard, loose or ())
        weight_map |= dict.fromkeys(shard, file)
    total = sum(size_of(t) for t in content.values())
    stage.json(f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def travelling(folder: Path, patterns: Sequence[str] = _TRAVEL) -> dict[str, Path]:
    """The files of a model's folder that belong to it besides weights and configuration, by name."""
    found = [p for pattern in patterns for p in sorted(folder.glob(pattern)) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p for p in found}


def travel(model: nn.Module, stage: Stage, tokenizer: Any) -> None:
    """Copy what belongs to a model besides its weights: tokenizer, chat template, generation config."""
    source = model.__dict__.get("_weft_source")
    if source is not None:
        for name, path in travelling(Path(source)).items():
            stage.copy(path, name)
    elif getattr(model, "generation_config", None) is not None:
        stage.json("generation_config.json", cast(Any, model).generation_config.to_dict())
    if tokenizer is not None:
        tokenizer.save_pretrained(stage.path)
