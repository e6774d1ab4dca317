"""compressed-tensors checkpoints: 4- and 8-bit integers, packed, or int8 with int8 tokens, which transformers and vLLM load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor, nn

from weft.error import ConflictError, WeftError, raise_all
from weft.expr import Dense, Expr, Quantized, Sum, valueless
from weft.grid import pack, packed_bytes
from weft.model import Place, Rounding, Tap, expressions, places, plain_tensors, taps
from weft.model.branch import refuse_branches
from weft.store.card import card
from weft.store.library import config_of, library
from weft.store.save import later, may_write, narrow, travel, write_shards
from weft.store.swap import staged
from weft.store.tensors import Later, size_of

BITS = {"int4": 4, "int8": 8}
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@dataclass(frozen=True)
class Scheme:
    """One way of packing: a `config_groups` entry."""

    bits: int
    group: int
    symmetric: bool
    tokens: bool = False
    """Whether inputs are rounded too: int8, one scale a token."""

    @property
    def format(self) -> str:
        """How the weights are written."""
        return "int-quantized" if self.tokens else "pack-quantized"

    def as_json(self, targets: list[str]) -> dict[str, Any]:
        """The entry for these modules."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group or None,
            "dynamic": False,
        }
        return {
            "targets": targets,
            "format": self.format,
            "weights": weights,
            "input_activations": _TOKENS if self.tokens else None,
            "output_activations": None,
        }


def export_compressed(model: nn.Module, out: Path | str, *, replace: bool = False) -> list[str]:
    """Write a compressed-tensors checkpoint of the same values, rounded to the checkpoint's dtype as its readers do.

    Quantized linear layers are packed, plain ones go to `ignore`. Inputs may be rounded to int8 a token where the weight is int8,
    one scale a row. Returns notes: embeddings that are written plain because readers keep them so, what transformers 5 makes
    of zero points, and how readers scale tokens.
    Errors: ConflictError naming every site that the format has no place for, and why, or if nothing is packed.
    """
    if library(model) != "transformers":
        got, fix = f"a model of {library(model)}", 'export with to="hf"'
        raise ConflictError(
            "only transformers reads this format", where=type(model).__name__, got=got, want="its own", fix=fix
        )
    exprs, where = expressions(model), places(model)
    on = taps(model)
    refuse_branches(model, "a compressed-tensors checkpoint")
    problems = [p for n, e in exprs.items() if (p := _refusal(where[n], e) or _tapped(n, e, on.get(n)))]
    raise_all(valueless(exprs) or problems)
    packed = {n: e for n, e in exprs.items() if where[n].kind == "linear" and isinstance(e, Quantized)}
    if not packed:
        got, fix = "no int4 or int8 linear layer", 'export with to="hf"'
        raise ConflictError("nothing here can be packed", where=type(model).__name__, got=got, want="one", fix=fix)
    schemes = {where[n].modules[0]: Scheme(BITS[e.grid], e.group, e.symmetric, n in on) for n, e in packed.items()}
    notes = [_plainly(where[n], e) for n, e in exprs.items() if n not in packed and not isinstance(e, Dense)]
    notes += _zero_points(list(schemes.values()))
    notes += ["int8 tokens: their scale is max|x| / 127.5 in readers, max|x| / 127 in bfloat16 here"] * bool(on)
    body = {"format": 1, "kind": "compressed-tensors", "class": type(model).__name__, "notes": notes}
    content = _content(model, packed)
    may_write(model, out, replace=replace, nbytes=sum(size_of(t) for t in content.values()))
    with staged(Path(out), replace=replace, manifest=body) as stage:
        travel(model, stage, None)
        stage.text("README.md", card(model, "compressed-tensors"))
        config = config_of(model)
        said = quantization_config(schemes, _ignored(model, schemes))
        stage.json("config.json", {**config, "quantization_config": said})
        write_shards(stage, content, "model", {n for n, _ in model.named_buffers()})
    return notes


def _content(model: nn.Module, packed: dict[str, Quantized]) -> dict[str, Tensor | Later]:
    """Every tensor of the checkpoint."""
    made: dict[str, Tensor | Later] = {n: narrow(t) for n, t in plain_tensors(model).items()}
    for name, expr in expressions(model).items():
        place = places(model)[name]
        if name in packed:
            form = _whole if name in taps(model) else _packed
            made |= {f"{place.modules[0]}.{k}": t for k, t in form(packed[name], place.dtype).items()}
        else:
            made[name] = later(expr, place)
    return made


def _plainly(place: Place, expr: Expr) -> str:
    dtype = str(place.dtype).removeprefix("torch.")
    return f"{place.name}: {expr.describe()} is written as {dtype}: readers keep embeddings plain"


def _zero_points(schemes: list[Scheme]) -> list[str]:
    """What transformers 5 with compressed-tensors 0.20 makes of zero points (tests/api/test_compressed.py holds it)."""
    if all(s.symmetric for s in schemes):
        return []
    if len(set(schemes)) > 1:
        return ["zero points and several schemes: transformers 5 cannot load this rightly; vLLM can"]
    return ["zero points: transformers 5 loads this with CompressedTensorsConfig(dequantize=True) only"]


def quantization_config(packed: dict[str, Scheme], ignore: list[str]) -> dict[str, Any]:
    """What config.json says: one scheme targets every Linear, several name their modules."""
    schemes = list(dict.fromkeys(packed.values()))
    targets = {s: ["Linear"] if len(schemes) == 1 else [p for p, t in packed.items() if t == s] for s in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": schemes[0].format if len({s.format for s in schemes}) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {f"group_{i}": s.as_json(targets[s]) for i, s in enumerate(schemes)},
    }


def _whole(expr: Quantized, dtype: torch.dtype) -> dict[str, Later]:
    """A weight as int8 codes [m n] and scales [m 1], each when it is written."""
    return {
        "weight": Later(torch.int8, expr.shape, lambda _: (expr.codes().short() - 128).to(torch.int8)),
        "weight_scale": Later(dtype, (expr.shape[0], 1), lambda _: expr.scales().to(dtype)),
    }


def _packed(expr: Quantized, dtype: torch.dtype) -> dict[str, Later]:
    """What `tensors_of` makes, each when it is written."""
    (m, _), g, bits = expr.shape, expr.scales().shape[1], BITS[expr.grid]
    forms = {
        "weight_packed": (torch.int32, (m, -(-packed_bytes(expr.n, bits) // 4))),
        "weight_scale": (dtype, (m, g)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (-(-packed_bytes(m, bits) // 4), g)),
    }
    if expr.symmetric:
        del forms["weight_zero_point"]
    return {k: Later(kind, shape, lambda _, k=k: tensors_of(expr, dtype)[k]) for k, (kind, shape) in forms.items()}


def tensors_of(expr: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of one packed weight [m n]: codes [m words], scales [m g], shape, and zero points [words g] if it has them."""
    bits = BITS[expr.grid]
    made = {
        "weight_packed": _words(expr.data[:, : packed_bytes(expr.n, bits)]),
        "weight_scale": expr.scales().to(dtype),
        "weight_shape": torch.tensor(expr.shape, dtype=torch.int64),
    }
    zeros = expr.zeros()
    if isinstance(zeros, Tensor):  # packed down the rows
        made["weight_zero_point"] = _words(pack(zeros.to(torch.uint8).T.contiguous(), bits)).T.contiguous()
    return made


def _words(data: UInt8[Tensor, "m bytes"]) -> Int32[Tensor, "m words"]:
    """Bytes as little-endian words, filled up with zeros: in both layouts element i is bits [i b, (i+1) b)."""
    padded = torch.nn.functional.pad(data, (0, -data.shape[1] % 4))
    return padded.flatten().clone().view(torch.int32).view(len(data), -1)


def _ignored(model: nn.Module, packed: dict[str, Scheme]) -> list[str]:
    linear = [
        p for place in places(model).values() for p in place.modules if isinstance(model.get_submodule(p), nn.Linear)
    ]
    return [p for p in linear if p not in packed]


def _tapped(name: str, expr: Expr, tap: Tap | None) -> WeftError | None:
    """Why the format has no place for this tap; None where it has."""
    if tap is None:
        return None
    known = isinstance(expr, Quantized) and expr.grid == "int8" and expr.symmetric and not expr.group
    if known and tap.describe() == Rounding("int8").describe():
        return None
    return ConflictError(
        "compressed-tensors cannot hold what this weight reads",
        where=name,
        got=f"{expr.describe()} on {tap.describe()}",
        want="plain inputs, or int8[channel] on int8[token]",
        fix="take the tap off with weft.untap(model), or save the model with weft.save",
    )


def _refusal(place: Place, expr: Expr) -> WeftError | None:
    """Why the format has no place for this expression; None where it has."""
    if place.kind != "linear" or isinstance(expr, Dense):
        return None
    reason, fix = _reason(place, expr)
    if not reason:
        return None
    return ConflictError(
        "compressed-tensors cannot hold this weight",
        where=place.name,
        got=f"{expr.describe()}: {reason}",
        want="int4 or int8, or a plain matrix",
        fix=fix,
    )


def _reason(place: Place, expr: Expr) -> tuple[str, str]:
    dense = 'quantize it with int4 or int8, or export with to="hf"'
    if isinstance(expr, Sum):
        return "the format holds one term a weight", 'weft.merge(model, to="grid") makes it one'
    if not isinstance(expr, Quantized):
        return "the format holds neither zero patterns nor factors", dense
    if expr.grid not in BITS:
        return "its readers agree on 4 and 8 bits only", dense
    if expr.group and expr.n % expr.group:
        return f"the groups do not divide {expr.n} columns", "quantize with a group that does, or group=0"
    if len(place.modules) > 1:
        return "the weight is tied", dense
    if not torch.equal(expr.scales().to(place.dtype).float(), expr.scales()):
        return f"the scales do not fit the checkpoint's {place.dtype}", dense
    return "", ""
