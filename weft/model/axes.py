"""The axes of a model, from its family's description: what writes and reads each, and what it does not admit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import nn

from weft.error import ConflictError
from weft.model.axis import KINDS, Axis, Norm, Part
from weft.model.families import FAMILIES, Attention, Family, Feed, Stack
from weft.model.weave import expression, places


def axes(model: nn.Module) -> dict[str, Axis]:
    """The axes of a woven model by name. Errors: ConflictError for a family that no table describes."""
    return {a.name: a for a in _Axes(model).all()}


def layers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The sites that make keys and values, and those that read the inside of feed-forward parts: name and `key`, `value` or `down`.

    A weight that makes queries, keys and values at once is both. Errors: as `axes`.
    """
    return _Axes(model).layers()


def parts(model: nn.Module) -> Iterator[tuple[str, Attention | Feed]]:
    """Every attention and feed-forward part, with the path of its block. Errors: as `axes`."""
    seen = _Axes(model)
    for stack in seen.family.stacks:
        yield from ((block, part) for block in seen.blocks(stack) for part in stack.parts)


def family(model: nn.Module) -> Family:
    """The description of a model's family. Errors: ConflictError with those that have one."""
    config: Any = getattr(model, "config", None)
    name = str(getattr(config, "model_type", type(model).__name__))
    name += " gated" if getattr(config, "is_gated_act", False) else ""
    if name not in FAMILIES:
        raise ConflictError(
            "nothing is known of this family's axes",
            where=type(model).__name__,
            got=name,
            want=", ".join(FAMILIES),
            fix="describe it in weft/model/families.py",
        )
    return FAMILIES[name]


class _Axes:
    """Reads a family's description against a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.family, self.places = model, family(model), places(model)
        self.config = cast(Any, model).config
        self.plain = dict(model.named_parameters())
        self.modules = dict(model.named_modules())
        self.owner = {path: name for name, p in self.places.items() for path in p.modules}
        self.inner = cast(Any, model).base_model is model and cast(Any, model).get_output_embeddings() is None
        self.heads = int(self.config.num_attention_heads)
        self.key_heads = int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    def all(self) -> Iterator[Axis]:
        for stack in self.family.stacks:
            for block in self.blocks(stack):
                for part in stack.parts:
                    yield from self.attention(block, part) if isinstance(part, Attention) else self.feed(block, part)
        norms = list(self.norms())
        yield from (self.norm_axis(n) for n in norms)
        yield self.residual(norms)

    def layers(self) -> Iterator[tuple[str, str]]:
        parts = [(b, p) for s in self.family.stacks for b in self.blocks(s) for p in s.parts]
        for block, part in parts:
            held = {"key": part.k, "value": part.v} if isinstance(part, Attention) else {"down": part.down}
            for tag, name in held.items():
                paths = self.every(f"{block}.{name.partition('[')[0]}")
                yield from ((self.owner[p], tag) for p in paths if p in self.owner)

    def path(self, name: str) -> str:
        """The module's path: a base model has no prefix."""
        prefix = getattr(self.model, "base_model_prefix", "")
        return name.removeprefix(f"{prefix}.") if self.inner else name

    def blocks(self, stack: Stack) -> list[str]:
        path = self.path(stack.blocks)
        held = self.modules.get(path)
        return [f"{path}.{i}" for i in range(len(cast(nn.ModuleList, held)))] if held is not None else []

    def lies(self, path: str, dim: int, copies: int = 1, unit: int = 1) -> tuple[Part, ...]:
        """Where an axis lies in a module's weight and, of its outputs, in its bias; nothing for a module that is not there."""
        found = re.fullmatch(r"(.+)\[(\d)/(\d)\]", path)
        path, piece, of = (found[1], int(found[2]), int(found[3])) if found else (path, 0, 1)
        if path in self.owner:
            name = self.owner[path]
            rows = expression(self.model, self.places[name]).shape[0]
        elif f"{path}.weight" in self.plain:
            name, rows = f"{path}.weight", len(self.plain[f"{path}.weight"])
        elif path in self.plain:
            return (Part(path, self.plain[path].dim() - 1),)
        else:
            return ()
        start = piece * rows // of if dim == 0 else 0
        made = (Part(name, dim, start, copies, unit),)
        return (
            (*made, Part(f"{path}.bias", 0, start, copies, unit)) if dim == 0 and f"{path}.bias" in self.plain else made
        )

    def norm(self, path: str) -> tuple[Part, ...]:
        """A norm's weight and bias."""
        weight = (Part(f"{path}.weight", 0, offset=self.family.offset),) if f"{path}.weight" in self.plain else ()
        return (*weight, Part(f"{path}.bias", 0)) if f"{path}.bias" in self.plain else weight

    def columns(self, block: str, part: Attention | Feed) -> list[str]:
        """The modules that read the part's norm."""
        if isinstance(part, Attention):
            return [f"{block}.{n}" for n in ((part.q,) if part.memory else (part.q, part.k, part.v))]
        return [p for n in (part.up, part.gate, part.router) if n for p in self.every(f"{block}.{n}")]

    def every(self, path: str) -> list[str]:
        """The path, or one for every expert."""
        before, star, after = path.partition("*")
        held = self.modules.get(before.rstrip("."))
        count = int(getattr(held, "num_experts", 0)) if star else 0
        return [f"{before}{i}{after}" for i in range(count)] if star else [path]

    def attention(self, block: str, part: Attention) -> Iterator[Axis]:
        q, k, v, o = (f"{block}.{n}" for n in (part.q, part.k, part.v, part.o))
        if not all(self.lies(p, 0) for p in (q, k, v, o)):
            return
        groups, at = self.heads // self.key_heads, v.partition("[")[0].rpartition(".")[0]
        width = expression(self.model, self.places[self.owner[o]]).shape[1] // self.heads
        each, scored = self.key_heads * width, self.family.scores and self.family.scores.split(".")[0] in at
        yield Axis(
            f"{at}.value", "value", each, self.lies(v, 0), self.lies(o, 1, groups), blocks=self.key_heads,
            refused={"select": "every head has the same width"},
        )  # fmt: skip
        refused = {"select": "every head has the same width"}
        if self.family.rope:
            refused |= _refuse(("permute", "rotate"), "position rotates fixed pairs of features")
        if part.q_norm:
            writers, readers = (self.norm(f"{block}.{n}") for n in (part.q_norm, part.k_norm))
            refused |= {
                "permute": "every head shares one norm",
                "rotate": "a norm with weights stands before the scores",
            }
            yield Axis(f"{at}.score", "score", width, writers, readers, refused=refused, pairs=self.family.rope)
        else:
            yield Axis(
                f"{at}.score", "score", each, self.lies(q, 0, groups), self.lies(k, 0), blocks=self.key_heads, refused=refused,
                pairs=self.family.rope,
            )  # fmt: skip
        refused = _refuse(("scale", "rotate"), "the softmax is taken a head at a time")
        if scored:
            refused |= _refuse(("permute", "select"), "layers share one table of scores by head")
        elif getattr(self.config, "head_dim", None) is None:
            refused["select"] = "the configuration derives a head's width from the number of heads"
        yield Axis(
            f"{at}.heads", "heads", self.key_heads,
            (*self.lies(q, 0, unit=groups * width), *self.lies(k, 0, unit=width), *self.lies(v, 0, unit=width)),
            self.lies(o, 1, unit=groups * width), refused=refused, width=("num_key_value_heads", "num_attention_heads"),
        )  # fmt: skip

    def feed(self, block: str, part: Feed) -> Iterator[Axis]:
        act = next(
            (
                str(getattr(self.config, n))
                for n in ("hidden_act", "activation_function", "dense_act_fn")
                if hasattr(self.config, n)
            ),
            "",
        )
        refused = {"rotate": "an activation function acts on each feature"}
        if not part.gate and act != "relu":
            refused["scale"] = f"the activation function {act} is not linear"
        gates = self.every(f"{block}.{part.gate}") if part.gate else []
        for i, (up, down) in enumerate(zip(*(self.every(f"{block}.{n}") for n in (part.up, part.down)), strict=True)):
            if down in self.owner and up in self.owner:
                size = expression(self.model, self.places[self.owner[down]]).shape[1]
                riders = self.lies(gates[i], 0) if gates else ()
                name = down.rpartition(".")[0]
                yield Axis(
                    name,
                    "feed",
                    size,
                    self.lies(up, 0),
                    self.lies(down, 1),
                    riders,
                    refused=refused,
                    width=(self.family.inner,),
                )

    def norms(self) -> Iterator[Norm]:
        """The norms before a reader, in order."""
        family = self.family
        if family.post:
            return
        memory = [
            f"{b}.{n}" for s in family.stacks for b in self.blocks(s) for p in s.parts
            if isinstance(p, Attention) and p.memory for n in (p.k, p.v)
        ]  # fmt: skip
        for i, stack in enumerate(family.stacks):
            for block in self.blocks(stack):
                for part in stack.parts:
                    yield self.read(f"{block}.{part.norm}", self.columns(block, part))
            if stack.final:
                last = i == len(family.stacks) - 1
                yield self.read(self.path(stack.final), [self.path(h) for h in family.heads] if last else memory)

    def read(self, norm: str, readers: Sequence[str]) -> Norm:
        return Norm(norm, _once(p for r in readers for p in self.lies(r.partition("[")[0], 1)), self.family.offset)

    def norm_axis(self, norm: Norm) -> Axis:
        refused = _refuse(("permute", "rotate", "select"), "its order is that of the residual axis")
        tied = [p.name for p in norm.readers if p.name in self.places and len(self.places[p.name].modules) > 1]
        if tied:
            refused["scale"] = f"{tied[0]} is tied: it is read elsewhere too"
        if not norm.readers:
            refused["scale"] = "its output is the model's"
        writers = self.norm(norm.name)
        return Axis(norm.name, "norm", len(self.plain[writers[0].name]), writers, norm.readers, refused=refused)

    def residual(self, norms: Sequence[Norm]) -> Axis:
        family, writers, readers, riders = self.family, list[Part](), list[Part](), list[Part]()
        for name in map(self.path, family.inputs):
            lookup = self.owner.get(name) is not None and self.places[self.owner[name]].kind == "embedding"
            (riders if name.endswith("LayerNorm") else writers).extend(
                self.norm(name) if name.endswith("LayerNorm") else self.lies(name, 1 if lookup else 0)
            )
        for stack in family.stacks:
            for block in self.blocks(stack):
                for part in stack.parts:
                    ends = [part.o] if isinstance(part, Attention) else [part.down]
                    writers += [p for n in ends for e in self.every(f"{block}.{n}") for p in self.lies(e, 0)]
                    read = [
                        *self.columns(block, part),
                        *([f"{block}.{n}" for n in (part.k, part.v)] if isinstance(part, Attention) else []),
                    ]
                    readers += [p for r in read for p in self.lies(r.partition("[")[0], 1)]
                    riders += [p for n in (part.norm, part.after) if n for p in self.norm(f"{block}.{n}")]
            riders += self.norm(self.path(stack.final)) if stack.final else ()
        readers += [p for h in family.heads for p in self.lies(self.path(h), 1)]
        for name in family.mapped[:1]:
            readers += self.lies(name, 1)
            writers += self.lies(name, 0)
            riders += self.norm(family.mapped[1]) if name in self.owner else ()
        known = _once((*writers, *readers))
        size = next(p for p in known if p.name in self.places)
        width = expression(self.model, self.places[size.name]).shape[size.dim]
        return Axis(
            "residual", "residual", width, _once(writers), tuple(p for p in _once(readers) if p not in writers), _once(riders),
            refused=self.stream(known), centred=family.centred, norms=tuple(norms),
        )  # fmt: skip

    def stream(self, known: Sequence[Part]) -> dict[str, str]:
        """What the stream does not admit, and why."""
        family = self.family
        if self.inner:
            return _refuse(KINDS, "the stream is the model's output")
        held = {p.name for p in known}
        if strange := [n for n in self.places if n not in held and not (family.scores and family.scores in n)]:
            return _refuse(KINDS, f"{strange[0]} is not in the description of the family")
        refused = _refuse(("scale", "select"), "norms measure the whole stream")
        if family.post or any(p.after for s in family.stacks for p in s.parts):
            refused["rotate"] = "norms with weights stand on the stream"
        elif family.always_tied:
            refused["rotate"] = "the last norm cannot be folded into a head that is always tied"
        return refused


def _refuse(kinds: Sequence[str], why: str) -> dict[str, str]:
    return dict.fromkeys(kinds, why)


def _once(parts: Any) -> tuple[Part, ...]:
    """Each part once: tied weights, and fused ones, lie in one tensor."""
    return tuple(dict.fromkeys(parts))
