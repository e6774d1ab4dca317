"""Take whole blocks out of a model's stack: what is left is the model that its configuration, with fewer blocks, makes."""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.error import ConflictError, OptionError, WeftError, raise_all
from weft.model.blocks import blocks
from weft.model.branch import refuse_branches
from weft.model.sharded import must_be_whole
from weft.model.weave import Place, first_vectors, places, plain_tensors, weave

PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""What configurations call a list with one entry a block."""
_COUNT, _FIRST = "num_hidden_layers", "max_window_layers"
_OWN = frozenset(vars(nn.Module()))


def stack_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and blocks of the stack that blocks can be taken out of.

    Errors: ConflictError for models of several stacks (an encoder and a decoder, two towers) or of several configurations, for blocks
    that are used twice and for a configuration that does not count the blocks or lists something else of each; for branches and for
    parameters that are spread over processes. OptionError for a model with no stack.
    """
    refuse_branches(model, "taking blocks out")
    must_be_whole(model.named_parameters())
    path, stack = blocks(model)
    config: Any = getattr(model, "config", None)
    held: Mapping[str, Any] = vars(config) if config is not None else {}
    lists = [k for k, v in held.items() if isinstance(v, list | tuple) and v and ("layer" in k or "block" in k)]
    known = {getattr(config, "attribute_map", {}).get(k, k) for k in PER_BLOCK}
    strange = [k for k in lists if k not in known or len(held[k]) != len(stack)]
    count = getattr(config, _COUNT, None)
    if getattr(config, "is_encoder_decoder", False):
        got = "an encoder and a decoder"
    elif count != len(stack):
        got = f"{len(stack)} blocks in {path}, and {_COUNT} {count} in the configuration"
    elif len({id(b) for b in stack}) != len(stack):
        got = f"blocks of {path} that are used more than once"
    elif any(vars(m).get("config", config) is not config for m in model.modules()):
        got = "parts with a configuration of their own"
    elif strange:
        got = f"{strange[0]} {held[strange[0]]} in the configuration"
    else:
        return path, stack
    want, fix = f"one stack of blocks of their own, as many as {_COUNT}", "prune by channels, heads or weights"
    where = type(model).__name__
    raise ConflictError("blocks cannot be taken out of this model", where=where, got=got, want=want, fix=fix)


def cut(model: nn.Module, gone: Collection[int]) -> None:
    """Take these blocks out, in place: a smaller model of the same class, the blocks that stay numbered anew.

    What the model then is, its configuration says, so that other tools read it. Two empty models, made of the configuration before
    and after, show what a block's number means to it: where a block would be made otherwise in its new place, the cut is refused.
    The pretrained values of the weights that stay are known as long as the model is in memory.
    Errors, before anything changes: those of `stack_of`; OptionError for blocks that are none, and for all of them;
    ConflictError naming what would be another.
    """
    path, stack = stack_of(model)
    count = len(stack)
    if not set(gone) < set(range(count)):
        got, want = sorted(set(gone)), f"some of 0 to {count - 1}, not all"
        raise OptionError("these blocks cannot be taken out", where=path, got=got, want=want, fix="keep one at least")
    kept = [i for i in range(count) if i not in set(gone)]
    plan = _Plan(path, {i: j for j, i in enumerate(kept)})
    numbers = plan.numbers(model)
    if len(kept) == count:
        return
    for name, value in numbers.items():
        module, _, key = name.rpartition(".")
        setattr(model.get_submodule(module), key, value)
    config: Any = cast(Any, model).config
    for key, value in plan.configured(config).items():
        setattr(config, key, value)
    sites, vectors = plan.sites(model), first_vectors(model)
    left = {new: was for name, was in vectors.items() if (new := plan.moved(name)) is not None}
    for held, now in ((places(model), sites), (vectors, left)):
        cast(dict[str, Any], held).clear()
        cast(dict[str, Any], held).update(now)
    staying = [stack[i] for i in kept]
    del stack[:]
    stack.extend(staying)
    cast(Any, model)._weft_base = None


@dataclass(frozen=True)
class _Plan:
    """Blocks of a stack, old number to new."""

    path: str
    kept: Mapping[int, int]

    def moved(self, name: str) -> str | None:
        """What a module or tensor is called afterwards; None if it goes."""
        if not name.startswith(f"{self.path}."):
            return name
        i, dot, rest = name[len(self.path) + 1 :].partition(".")
        return f"{self.path}.{self.kept[int(i)]}{dot}{rest}" if int(i) in self.kept else None

    def configured(self, config: Any) -> dict[str, Any]:
        """What changes in the configuration."""
        made: dict[str, Any] = {_COUNT: len(self.kept)}
        for key in PER_BLOCK:
            if isinstance(held := vars(config).get(config.attribute_map.get(key, key)), list | tuple):
                made[key] = type(held)(v for i, v in enumerate(cast(list[Any], held)) if i in self.kept)
        first = vars(config).get(_FIRST)
        if isinstance(first, int) and first < getattr(config, _COUNT):
            made[_FIRST] = sum(i < first for i in self.kept)
        return made

    def sites(self, model: nn.Module) -> dict[str, Place]:
        """The sites that are left, by their names afterwards."""
        made: dict[str, Place] = {}
        for name, place in places(model).items():
            modules = tuple(m for path in place.modules if (m := self.moved(path)) is not None)
            if modules:
                new = self.moved(name) or f"{modules[0]}.weight"
                made[new] = replace(place, name=new, modules=modules)
        return made

    def numbers(self, model: nn.Module) -> dict[str, int]:
        """The attributes that number the blocks that stay, or count them, by their paths before.

        Errors: ConflictError for all in which the model would not be what its new configuration makes.
        """
        config: Any = cast(Any, model).config
        smaller = copy.deepcopy(config)
        for key, value in self.configured(config).items():
            setattr(smaller, key, value)
        before, after = (_empty(model, c) for c in (config, smaller))
        got, want = _layout(model, self), _layout(after)
        names = sorted(n for n in {*got, *want} if got.get(n) != want.get(n))
        raise_all([_refusal(model, n, got.get(n, "nothing"), want.get(n, "nothing")) for n in names])
        made: dict[str, int] = {}
        problems: list[WeftError] = []
        for old, new in ((n, self.moved(n)) for n, _ in before.named_modules()):
            for key, was, now in (
                _changed(before.get_submodule(old), after.get_submodule(new)) if new is not None else ()
            ):
                if type(was) is int and (was, now) == self.number(old, getattr(config, _COUNT)):
                    made[f"{old}.{key}"] = now
                else:
                    problems.append(_refusal(model, f"{old}.{key}", _shown(was), _shown(now)))
        raise_all(problems)
        return made

    def number(self, name: str, count: int) -> tuple[int, int]:
        """The number of the block that a module belongs to, before and after; outside the stack, how many blocks there are."""
        if not name.startswith(f"{self.path}."):
            return count, len(self.kept)
        i = int(name[len(self.path) + 1 :].partition(".")[0])
        return i, self.kept[i]


def _refusal(model: nn.Module, name: str, got: str, want: str) -> ConflictError:
    return ConflictError(
        "a model of fewer blocks would be another",
        where=f"{type(model).__name__}: {name}",
        got=got,
        want=f"{want}, as its configuration then makes it",
        fix="take other blocks out, or prune by channels, heads or weights",
    )


def _empty(model: nn.Module, config: Any) -> nn.Module:
    """A woven model of this class without memory for weights; its buffers are there. Errors: ConflictError if it cannot be made."""
    from accelerate import init_empty_weights

    state = torch.random.get_rng_state()
    try:
        with init_empty_weights(include_buffers=False):
            made = cast(Any, type(model))(copy.deepcopy(config))
        made.tie_weights()
        return weave(made)
    except Exception as e:  # whatever a class says to a configuration that it is not made for
        problem = _refusal(model, "config", f"{type(e).__name__}: {e}", "a model")
        raise problem from e
    finally:
        torch.random.set_rng_state(state)


def _layout(model: nn.Module, plan: _Plan | None = None) -> dict[str, str]:
    """What a checkpoint and a configuration have to agree on: classes of modules, shapes and uses of weights, other tensors."""
    sites = plan.sites(model) if plan is not None else places(model)
    made = {n: type(m).__name__ for n, m in model.named_modules() if not {"expr", "tap"} & set(n.split("."))}
    made |= {n: str(list(t.shape)) for n, t in plain_tensors(model).items()}
    if plan is not None:
        made = {new: what for n, what in made.items() if (new := plan.moved(n)) is not None}
    return made | {n: f"{list(p.shape)}, of {' and '.join(p.modules)}" for n, p in sites.items()}


def _changed(a: nn.Module, b: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """What two modules of one class differ in besides their parameters: attributes, and values of buffers."""
    mine, theirs = ({k: v for k, v in vars(m).items() if k not in _OWN and not k.startswith("_weft")} for m in (a, b))
    for m, held in ((a, mine), (b, theirs)):
        held |= dict(m.named_buffers(recurse=False))
    for key in sorted(set(mine) | set(theirs)):
        was, now = mine.get(key), theirs.get(key)
        if not _alike(was, now):
            yield key, was, now


def _alike(a: Any, b: Any) -> bool:
    """Whether two values say the same; of what is no plain value, whether they are of one kind."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and (a.device.type == "meta" or torch.equal(a, b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(v, b[k]) for k, v in a.items())
    plain = isinstance(a, bool | int | float | str | bytes | set | frozenset | types.FunctionType | torch.dtype | None)
    return not plain or a == b


def _shown(value: Any) -> str:
    return "other values" if isinstance(value, Tensor) else str(value)[:80]
