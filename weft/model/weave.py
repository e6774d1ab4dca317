"""Weave: give each matrix of a model an expression, in place; unweave: give it plain weights again."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from weft.error import ConflictError, OptionError, ShapeError, raise_all
from weft.expr import Dense, Expr, spec, tensors, valueless
from weft.expr.base import own, written
from weft.model.branch import branch_spec, branch_tensors, branches, inside_branches, refuse_branches, unbranch
from weft.model.devices import device_of, on
from weft.model.experts import put_together, take_apart
from weft.model.layers import PLAIN, layer
from weft.model.overrides import METHODS
from weft.model.sharded import must_be_whole
from weft.model.site import Kind
from weft.model.taps import Tap, refuse_roundings, tap_spec, tap_tensors

Model = TypeVar("Model", bound=nn.Module)
Source = Callable[[], Tensor]


class Original:
    """The pretrained value of a weight: a handle that is never copied with the model."""

    def __init__(self, read: Source) -> None:
        self.read = read

    def __call__(self) -> Tensor:
        return self.read()

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        return self


@dataclass
class Place:
    """Where a site lives: the modules that use it (several when tied) and its pretrained value."""

    name: str
    kind: Kind
    modules: tuple[str, ...]
    original: Original
    dtype: torch.dtype
    """The dtype it had in the checkpoint."""

    shape: tuple[int, ...]
    """The shape that the module's weight and its checkpoint have."""

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer's, whichever way round it is stored."""
        return self.kind in ("linear", "conv1d")

    def stored(self, value: Tensor) -> Tensor:
        """The value [m n] as the module and its checkpoint hold it."""
        return value.T if self.kind == "conv1d" else value.reshape(self.shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix [m n]: outputs by inputs; of a convolution, inputs times its kernel."""
        return weight.T if self.kind == "conv1d" else weight.flatten(1)


def weave(model: Model) -> Model:
    """Give every linear layer, convolution (of one group) and embedding an expression, in place; values and ties stay as they are.

    The module keeps its class's behaviour (still an `nn.Linear`); the model class keeps its name. Stacked experts become Linear
    layers, one a matrix. Other parameters (norms, biases, convolutions in groups, what is tied to them) stay plain and are
    saved as they are. Everything is frozen: what trains is chosen by a method such as `lora`. Errors: ConflictError if the
    model is woven.
    """
    if is_woven(model):
        raise ConflictError(
            "this model is woven already",
            where=type(model).__name__,
            got="a woven model",
            want="a plain one",
            fix="use it as it is",
        )
    take_apart(model)
    model.requires_grad_(False)
    plain = {id(p) for m in model.modules() if layer(m) is None for p in m.parameters(recurse=False)}
    places: dict[str, Place] = {}
    shared: dict[int, tuple[Place, Expr]] = {}
    for path, module in list(model.named_modules()):
        weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
        if (found := layer(module)) is None or id(weight) in plain:
            continue
        woven, kind = found
        if weight is None:
            raise ShapeError(
                "a module has no weight",
                where=path,
                got="None",
                want="a parameter",
                fix="load the model's weights first",
            )
        del module._parameters["weight"]  # pyright: ignore[reportPrivateUsage]
        if id(weight) not in shared:
            name = f"{path}.weight" if path else "weight"
            place = Place(name, kind, (), Original(weight.detach), weight.dtype, tuple(weight.shape))
            matrix = weight if kind in ("linear", "embedding") else place.matrix(weight.detach())
            place.original = Original(matrix.detach)
            places[name], shared[id(weight)] = place, (place, Dense(matrix))
        place, expr = shared[id(weight)]
        place.modules += (path,)
        slot = cast(Any, module)
        slot.__class__, slot.compute, slot.stored, slot.expr, slot.tap = woven, weight.dtype, place.stored, expr, None
    cast(Any, model)._weft, cast(Any, model)._weft_vectors = places, {}
    for name, method in METHODS.items():
        if hasattr(model, name):
            object.__setattr__(model, name, partial(method, model))  # unpickled, a bound method would be the class's
    return model


def unweave(model: Model, *, original: bool = False) -> Model:
    """Plain weights again, in place: today's values, or the pretrained ones, in the dtype that the model computes in.

    Turns of inputs are folded into the weights. Errors, before anything changes: ConflictError naming weights whose value depends
    on the input, those whose input is rounded, and branches; none of it if `original`, where they are taken off.
    """
    if not original:
        raise_all(valueless(expressions(model)))
        refuse_roundings(taps(model), "a plain model")
        refuse_branches(model, "a plain model")
    unbranch(model)
    for place in places(model).values():
        tap = tap_at(model, place) or Tap()
        value = place.original() if original else tap.back(expression(model, place).dense())
        value = value.to(cast(torch.dtype, model.get_submodule(place.modules[0]).compute))
        weight = nn.Parameter(place.stored(value.detach()).contiguous(), requires_grad=value.is_floating_point())
        for path in place.modules:
            module = model.get_submodule(path)
            module.__class__ = PLAIN[type(module)]
            del module.expr, module.tap, module.compute, module.stored
            module.__dict__.pop("speed", None)
            module.register_parameter("weight", weight)
    for name, first in first_vectors(model).items() if original else ():
        p = model.get_parameter(name)
        p.data = first().to(p).clone()
    put_together(model)
    del model._weft, model._weft_vectors
    for name in METHODS:
        model.__dict__.pop(name, None)
    return model


def is_woven(model: nn.Module) -> bool:
    """Whether `weave` has been here."""
    return isinstance(model.__dict__.get("_weft"), dict)


def places(model: nn.Module) -> dict[str, Place]:
    """Site name to place, in module order. Errors: ConflictError if the model is not woven."""
    if not is_woven(model):
        raise ConflictError(
            "this model is not woven",
            where=type(model).__name__,
            got="a plain model",
            want="a woven one",
            fix="weft.weave(model)",
        )
    return model.__dict__["_weft"]


def first_vectors(model: nn.Module) -> dict[str, Original]:
    """The pretrained values of the vectors that a method changed, by name; all others have them today."""
    places(model)
    return model.__dict__["_weft_vectors"]


def expression(model: nn.Module, place: Place) -> Expr:
    """The expression at a place. Errors: ConflictError if its parameters are spread over processes."""
    expr = cast(Expr, model.get_submodule(place.modules[0]).expr)
    must_be_whole((f"{place.name}: {path}", t) for path, t in expr.named_parameters())
    return expr


def expressions(model: nn.Module) -> dict[str, Expr]:
    """Site name to expression; a tied weight once, under its first name."""
    return {name: expression(model, place) for name, place in places(model).items()}


def tap_at(model: nn.Module, place: Place) -> Tap | None:
    """What the input of a place goes through first."""
    return cast("Tap | None", model.get_submodule(place.modules[0]).tap)


def taps(model: nn.Module) -> dict[str, Tap]:
    """Site name to tap, of the sites that have one; sites that read one input have the same."""
    return {name: tap for name, place in places(model).items() if (tap := tap_at(model, place)) is not None}


def set_expressions(model: nn.Module, exprs: Mapping[str, Expr]) -> None:
    """Put these expressions in place, on the devices of those that they replace; tied uses share one.

    Errors: OptionError for unknown names, ShapeError for other shapes.
    """
    known = places(model)
    for name, expr in exprs.items():
        if name not in known:
            raise OptionError(
                "no such site", where=name, got=name, want="a site of this model", fix="weft show lists them"
            )
        old = expression(model, known[name])
        if old.shape != expr.shape:
            raise ShapeError(
                "an expression has another shape",
                where=name,
                got=list(expr.shape),
                want=list(old.shape),
                fix="keep the weight's shape",
            )
    for name, expr in exprs.items():
        there = on(expr, device_of(expression(model, known[name])))
        for path in known[name].modules:
            model.get_submodule(path).expr = there


def output_sites(model: nn.Module) -> set[str]:
    """The sites of the output head, where the model has one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    return (
        {n for n, p in places(model).items() if any(model.get_submodule(m) is head for m in p.modules)}
        if head is not None
        else set()
    )


def fork(model: Model) -> Model:
    """A second model over the same frozen storage; what trains, gates of adapters, and plain buffers are copied.

    Errors: ConflictError if parameters are spread over processes.
    """
    must_be_whole(model.named_parameters())
    apart = written(model)
    memo: dict[int, Any] = {id(p): own(p, apart) for p in model.parameters()}
    for tap in taps(model).values() if is_woven(model) else ():
        for b in tap.buffers():
            memo[id(b)] = b.detach()
    return copy.deepcopy(model, memo)


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers that belong to no expression, tap or branch: norms, biases, position tables."""
    inside = {f"{path}.{k}." for place in places(model).values() for path in place.modules for k in ("expr", "tap")}
    prefixes = (*inside, *inside_branches(model))
    made = {k: v for k, v in model.state_dict(keep_vars=True).items() if not k.startswith(prefixes)}
    first = {id(v): k for k, v in reversed(made.items())}
    return {k: v for k, v in made.items() if first[id(v)] == k}


def fingerprint(model: nn.Module) -> str:
    """Hash of every value of a woven model, 32 hex digits."""
    word = hashlib.blake2b(digest_size=16)
    items: dict[str, Tensor] = plain_tensors(model) | branch_tensors(model)
    for branch in branches(model):
        word.update(json.dumps(branch_spec(branch), sort_keys=True).encode())
    for name, expr in expressions(model).items():
        word.update(json.dumps([name, spec(expr)], sort_keys=True).encode())
        items |= {f"{name}:{k}": t for k, t in tensors(expr).items()}
    for name, tap in taps(model).items():
        word.update(json.dumps([name, tap_spec(tap)], sort_keys=True).encode())
        items |= {f"{name}:tap.{k}": t for k, t in tap_tensors(tap).items()}
    for name, t in sorted(items.items()):
        word.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        raw: Any = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if t.numel() else b""
        word.update(memoryview(raw))
    return word.hexdigest()
