"""From a config to an empty model on `meta`, and each tensor of a checkpoint into its place; all checked on paper first."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from weft.error import FormatError, WeftError, raise_all
from weft.model import take_apart
from weft.store.audit import Entry
from weft.store.bare import Bare
from weft.store.checkpoint import nearest, read_object
from weft.store.library import library, maker, remember

_COUNT = re.compile(r"(num|n)_.*(layers?|heads|experts)|n_(layer|head|embd)|(hidden|intermediate|vocab)_size|d_model")
_LAYERS, _MOST, _BUFFERS = 10_000, 1 << 40, 1 << 30


def skeleton(folder: Path, count: int, changes: Mapping[str, Any] | None = None) -> nn.Module:
    """The model's class on `meta`, from config.json and `changes` to it, for a checkpoint of `count` tensors.

    Errors: FormatError for a class that is not transformers', diffusers' or weft's own, a configuration that makes no model, and for one
    whose model would be far larger than the checkpoint.
    """
    where = f"{folder.name}/config.json"
    said = {**_numbered(read_object(folder / "config.json")), **(changes or {})}
    name, make = maker(said, where)
    raise_all(list(_numbers(said, where, count)))
    try:
        model = _empty(make, count)
    except Exception as e:
        raise FormatError(
            "a configuration makes no model",
            where=where,
            got=e.got if isinstance(e, FormatError) else f"{type(e).__name__}: {e}",
            want=f"a configuration of {name} that fits its checkpoint of {count} tensors",
            fix="copy the file again",
        ) from e
    remember(model, folder)
    take_apart(model)
    return model


def _numbered(value: Any) -> Any:
    """A configuration with transformers' words for numbers that JSON lacks as numbers."""
    if isinstance(value, list):
        return [_numbered(v) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {k: _numbered(v) for k, v in value.items()}


def _empty(make: Callable[[], nn.Module], count: int) -> nn.Module:
    """The model without memory: first all on `meta`, to see that it is no larger than it may be, then with its buffers."""
    from accelerate import init_empty_weights

    with _bounded(count), init_empty_weights(include_buffers=True):
        trial = make()
    size = sum(b.numel() * b.element_size() for b in trial.buffers())
    if size > _BUFFERS:
        raise FormatError(
            "a model is too large",
            where="config.json",
            got=f"tables of {size:,} bytes",
            want="less",
            fix="copy the file again",
        )
    with init_empty_weights(include_buffers=False):
        return make()


@contextmanager
def _bounded(count: int) -> Generator[None]:
    """Stop a model's construction when it has far more parameters or modules than the checkpoint has tensors."""
    made = {"parameters": 0, "modules": 0}
    most = {"parameters": 4 * count + 256, "modules": 32 * count + 2048}

    def note(kind: str) -> None:
        made[kind] += 1
        if made[kind] > most[kind]:
            raise FormatError(
                "a model is too large",
                where="config.json",
                got=f"more than {most[kind]} {kind}",
                want="less",
                fix="copy the file again",
            )

    hooks = [
        register_module_parameter_registration_hook(lambda *_: note("parameters")),
        register_module_module_registration_hook(lambda *_: note("modules")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _numbers(value: Any, where: str, count: int, at: str = "") -> Generator[WeftError]:
    """Numbers of a configuration that no model has: counts that are truth values or negative, more layers than tensors."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        path = f"{at}.{key}" if at else str(key)
        if isinstance(item, dict | list):
            yield from _numbers(item, where, count, path)
        elif isinstance(key, str) and isinstance(item, int):
            wrong = _COUNT.fullmatch(key) and (isinstance(item, bool) or item < 0)
            if wrong or ("layer" in key and item > count + _LAYERS) or item >= _MOST:
                want, fix = f"a number that fits a checkpoint of {count} tensors", "copy the file again"
                yield FormatError(
                    "a configuration makes no model", where=f"{where}: {path}", got=item, want=want, fix=fix
                )


def names(model: nn.Module, entries: Iterable[str], where: str) -> dict[str, str]:
    """A checkpoint's names to the model's, by transformers' own table: older names, and the base model's prefix.

    A model of diffusers has one name for each.

    Errors: FormatError for two names of one tensor.
    """
    from transformers.core_model_loading import rename_source_key

    want, prefix = model.state_dict(keep_vars=True), getattr(model, "base_model_prefix", "") or None
    steps = _renamings(model)
    made = {n: rename_source_key(n, steps, [], prefix, want)[0] for n in entries}
    first = {new: old for old, new in made.items()}
    if twice := [old for old, new in made.items() if first[new] != old]:
        got, want_ = f"{twice[0]} and {first[made[twice[0]]]}", f"one of them, for {made[twice[0]]}"
        raise FormatError("two names of one tensor", where=where, got=got, want=want_, fix="copy the model again")
    return made


def names_on_disk(model: nn.Module, named: Iterable[str]) -> dict[str, str]:
    """The model's names to those that checkpoints of its class use."""
    if isinstance(model, Bare):
        return {n: n for n in named}
    from transformers.core_model_loading import PrefixChange, apply_renamings

    steps = [s.reverse_transform() for s in reversed(_renamings(model, old=False)) if not isinstance(s, PrefixChange)]
    return {n: apply_renamings(n, steps) for n in named}


def _renamings(model: nn.Module, *, old: bool = True) -> list[Any]:
    if library(model) != "transformers":
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    steps: list[Any] = get_model_conversion_mapping(cast(Any, model), add_legacy=old)
    return [s for s in steps if not isinstance(s, WeightConverter)]


def misfits(model: nn.Module, held: Mapping[str, Entry], where: str) -> list[WeftError]:
    """Every way in which tensors on paper, by the model's names, are not those of a model: missing, unexpected, ill-shaped, ill-typed."""
    want: dict[str, Tensor] = model.state_dict(keep_vars=True)
    loose = {n for n, _ in model.named_buffers()} - set(want)
    shared = tied(model)
    problems: list[WeftError] = []
    for name in sorted(set(held) - set(want) - loose):
        fix = "take the checkpoint of this model, or import it with --drop"
        got = f"{list(held[name].shape)}{nearest(name, set(want) - set(held))}"
        problems.append(
            FormatError("unexpected tensor", where=f"{where}: {name}", got=got, want="no such tensor", fix=fix)
        )
    for name, slot in want.items():
        entry = held.get(name)
        if entry is None and name in shared:
            continue
        problem = _misfit(slot, entry, f"{where}: {name}", set(held) - set(want))
        problems += [problem] if problem is not None else []
    return problems


def _misfit(slot: Tensor, entry: Entry | None, where: str, spare: set[str]) -> FormatError | None:
    """Why a checkpoint's tensor (None: it has none) cannot take a place of the model."""
    fix = "the checkpoint is of another model"
    if entry is None:
        got = f"nothing{nearest(where.rpartition(': ')[2], spare)}"
        fix = "take the checkpoint of this model, or import it with --init"
        return FormatError("missing tensor", where=where, got=got, want=list(slot.shape), fix=fix)
    if entry.shape != tuple(slot.shape):
        got, want = list(entry.shape), list(slot.shape)
        return FormatError("a tensor has another shape", where=where, got=got, want=want, fix=fix)
    if entry.dtype.is_floating_point != slot.is_floating_point():
        got, want, fix = str(entry.dtype), str(slot.dtype), "weft reads no other tool's codes"
        return FormatError("a tensor has another type", where=where, got=got, want=want, fix=fix)
    return None


def tied(model: nn.Module, *, always: bool = False) -> dict[str, str]:
    """Names of weights that share another's value, to that other's name; `always`: also those that only could."""
    if not always and hasattr(model, "get_expanded_tied_weights_keys"):
        return dict(cast(Any, model).get_expanded_tied_weights_keys(all_submodels=True))  # those of parts, too
    keys = getattr(model, "_tied_weights_keys", None) or {}
    if not always and not getattr(model.config, "tie_word_embeddings", False):
        return {}
    return dict(keys) if isinstance(keys, Mapping) else dict.fromkeys(keys, "")


def assign(model: nn.Module, content: Mapping[str, Tensor]) -> list[WeftError]:
    """Put tensors in their places, by the model's names, as they are (mapped).

    Returns what is wrong with their values: tied weights that were stored twice and differ.
    """
    want = set(model.state_dict(keep_vars=True))
    problems = list(_untied(model, content))
    for name, value in content.items():
        if name in want:
            put(model, name, value)
    return problems


def _untied(model: nn.Module, content: Mapping[str, Tensor]) -> Generator[WeftError]:
    for name, first in tied(model).items():
        if name in content and first in content and not torch.equal(content[name], content[first]):
            yield FormatError(
                "tied weights were stored twice and differ",
                where=name,
                got=f"other values than {first}",
                want="one value, as tie_word_embeddings says",
                fix="import it with --tie to keep the first, with --untie to keep both",
            )


def assign_plain(model: nn.Module, content: Mapping[str, Tensor], compute: torch.dtype, where: str) -> list[WeftError]:
    """Put a weft folder's plain tensors in their places, tied ones once, in the compute dtype. Returns every mismatch."""
    want = {n: t for n, t in model.state_dict(keep_vars=True).items() if ".expr." not in f".{n}"}
    problems: list[WeftError] = []
    alike: dict[int, list[str]] = {}
    for n, t in want.items():
        alike.setdefault(id(t), []).append(n)
    expected = {group[0] for group in alike.values()}
    for name in sorted(set(content) ^ expected):
        got = f"{'found' if name in content else 'nothing'}{nearest(name, (set(content) ^ expected) - {name})}"
        want_, fix = "the model's tensors", "copy the folder again"
        problems.append(
            FormatError("a tensor is missing or unexpected", where=f"{where}: {name}", got=got, want=want_, fix=fix)
        )
    for name in set(content) & set(want):
        value = content[name].to(compute) if content[name].is_floating_point() else content[name]
        if value.shape != want[name].shape:
            got, fix = list(value.shape), "copy the folder again"
            problems.append(
                FormatError(
                    "a tensor has another shape",
                    where=f"{where}: {name}",
                    got=got,
                    want=list(want[name].shape),
                    fix=fix,
                )
            )
        else:
            shared = nn.Parameter(value, requires_grad=False) if isinstance(want[name], nn.Parameter) else value
            for other in alike[id(want[name])]:
                put(model, other, shared)
    return problems


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Make a tensor the parameter or buffer of this name."""
    path, _, leaf = name.rpartition(".")
    module = cast(Any, model.get_submodule(path))
    if leaf in module._parameters:
        module._parameters[leaf] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )
    else:
        module._buffers[leaf] = value
