"""Save a woven model: an ordinary checkpoint where every weight is plain, else a weft folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.expr import Dense, spec, tensors
from weft.model import expressions, plain_tensors
from weft.store.files import write_json, write_tensors
from weft.store.swap import staged

FORMAT = 1
SHARD = 2 << 30
_TRAVEL = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "spiece.model",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "1_Pooling/config.json",
)  # fmt: skip


def save(
    model: nn.Module,
    out: Path | str,
    *,
    tokenizer: Any = None,
    replace: bool = False,
    manifest: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
) -> None:
    """Write a model folder, whole or not at all.

    If every expression is a plain matrix the folder is an ordinary Hugging Face checkpoint. Otherwise `weft-*.safetensors`
    hold the terms and `weft.json` their expressions, and transformers refuses the folder rather than misread it.
    The tokenizer, chat template and generation config of the source travel along. `files`: further texts by name.
    Errors: ConflictError if `out` exists and is not to be replaced.
    """
    exprs = expressions(model)
    plain = all(isinstance(e, Dense) for e in exprs.values())
    content = stored(model)
    body = {
        "format": FORMAT,
        "kind": "plain" if plain else "weft",
        "class": type(model).__name__,
        "sites": {} if plain else {name: spec(e) for name, e in exprs.items()},
        "bytes": sum(t.numel() * t.element_size() for t in content.values()),
        "base": base(model),
        **(manifest or {}),
    }
    with staged(Path(out), replace=replace, manifest=body) as stage:
        travel(model, stage, tokenizer)
        for name, text in (files or {}).items():
            (stage / name).write_text(text, "utf8")
        config: dict[str, Any] = cast(Any, model).config.to_dict()
        config.pop("_name_or_path", None)
        if not plain:
            config["quantization_config"] = {"quant_method": "weft", "format": FORMAT}
        write_json(stage / "config.json", {**config, "architectures": [type(model).__name__]})
        write_shards(stage, content, "model" if plain else "weft")


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that `save` writes, by its name in the file: what a budget counts."""
    exprs = expressions(model)
    plain = all(isinstance(e, Dense) for e in exprs.values())
    made: dict[str, Tensor] = {}
    for name, expr in exprs.items():
        made |= {name if plain else f"{name}:{path}": t.detach() for path, t in tensors(expr).items()}
    return made | {name: narrow(t) for name, t in plain_tensors(model).items()}


def nbytes(model: nn.Module) -> int:
    """Tensor bytes that the saved model takes."""
    return sum(t.numel() * t.element_size() for t in stored(model).values())


def narrow(t: Tensor) -> Tensor:
    """The same values in bfloat16 where that loses nothing, else as they are."""
    small = t.detach().to(torch.bfloat16) if t.is_floating_point() and t.element_size() > 2 else t.detach()
    return small if torch.equal(small.to(t.dtype), t.detach()) else t.detach()


def base(model: nn.Module) -> dict[str, str] | None:
    """Where the pretrained weights came from."""
    return model.__dict__.get("_weft_base")


def write_shards(stage: Path, content: dict[str, Tensor], stem: str) -> None:
    """Write tensors to one file, or to shards of at most `SHARD` bytes and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, t in content.items():
        held = sum(x.numel() * x.element_size() for x in shards[-1].values())
        if shards[-1] and held + t.numel() * t.element_size() > SHARD:
            shards.append({})
        shards[-1][name] = t
    if len(shards) == 1:
        write_tensors(stage / f"{stem}.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(stage / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in content.values())
    write_json(stage / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def travel(model: nn.Module, stage: Path, tokenizer: Any) -> None:
    """Copy what belongs to a model besides its weights: tokenizer, chat template, generation config."""
    source = model.__dict__.get("_weft_source")
    if source is not None:
        for pattern in _TRAVEL:
            for path in sorted(Path(source).glob(pattern)):
                if path.is_file():
                    (stage / path.relative_to(source)).parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, stage / path.relative_to(source))
    elif getattr(model, "generation_config", None) is not None:
        write_json(stage / "generation_config.json", cast(Any, model).generation_config.to_dict())
    if tokenizer is not None:
        tokenizer.save_pretrained(stage)
