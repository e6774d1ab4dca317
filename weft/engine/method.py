"""@method turns one typed function into a method: options, schema, fingerprint, claim. The file is all there is."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from weft.error import NumericError, OptionError
from weft.expr import Expr, Quantized, tensors
from weft.model import MATRIX, TAGS, Group, Sources
from weft.store.tensors import finite

Kind = Literal[
    "rewrite", "transport", "relax", "schedule", "recipe", "merge", "search", "objective", "optimizer",
    "branch", "cut", "select", "cache", "decode", "route", "law", "probe",
]  # fmt: skip
REWRITES: tuple[Kind, ...] = ("rewrite", "relax")
"""What makes expressions of expressions; what a relax method makes trains, and is hardened afterwards."""
Per = Literal["site", "input"]
Need = Literal[
    "gram", "most", "influence", "base", "evaluate", "disturb", "relative", "fisher", "outliers", "text", "data", "reference",
]  # fmt: skip
"""Evidence of inputs; texts of a branch; batches of a probe; of a cut, the influence of blocks; of a merge, the base; of a search, what it
asks the bench; of an objective, the references of prompts."""
Drop = Literal["zeros"]
T = TypeVar("T")
Each = T | tuple[T, ...]
"""An option of a merge that every member may have a value of its own for, in the order of the call (`Sources.each`)."""


@dataclass(frozen=True)
class Beats:
    """A claim small enough for a unit test: on synthetic sites the method's output error is below the baseline's.

    `start` is a method applied first to both; None starts from the pretrained weight.
    """

    baseline: str
    start: str | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    start_options: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Asks:
    """Evidence that some values of an option need; it stands in the option's `Annotated`."""

    need: Need
    values: frozenset[Any]


@dataclass(frozen=True)
class Proof:
    """A paper's claim and how it is tried."""

    claim: str
    paper: str
    tried: Callable[..., Any]
    """`(lab) -> Claim`"""

    @property
    def fingerprint(self) -> str:
        """Hash of how it is tried: editing that invalidates this proof alone."""
        return hashlib.blake2b(inspect.getsource(self.tried).encode(), digest_size=16).hexdigest()


@dataclass
class Method:
    """A registered method: what `@method` makes of a function."""

    fn: Callable[..., Any]
    kind: Kind
    rows: tuple[str, ...]
    paper: str
    needs: frozenset[Need]
    per: Per
    whole: bool
    rowwise: bool
    taps: bool
    drops: tuple[Drop, ...]
    beats: Beats | None
    on: tuple[str, ...]
    moves: str
    """The kind of transform that a transport gives: scale, permute, rotate, select."""
    options: type[BaseModel]
    members: int | None = None
    """How many models a merge takes; None: any number."""
    signed: bool = False
    """Whether weights of members may be negative."""
    adds: bool = False
    """Whether a merge leaves the base's expression and adds terms to it, even where all are plain matrices."""
    uses: tuple[str, ...] = ()
    """The methods that a recipe's steps may be."""
    proofs: dict[str, Proof] = field(default_factory=dict[str, "Proof"])
    """What it claims, by the name of the proof: the method's own, or with what it is a case of behind a dot."""

    @property
    def name(self) -> str:
        """The function's name, which is the file's."""
        return self.fn.__name__

    @property
    def verb(self) -> str:
        """The folder the file lies in."""
        return self.fn.__module__.split(".")[-2]

    @property
    def sites(self) -> tuple[str, ...]:
        """The tags of the sites that a rewrite goes to."""
        return self.on or MATRIX

    @property
    def doc(self) -> str:
        """The function's docstring, which its command shows; lists show the first line of the file's."""
        return inspect.getdoc(self.fn) or ""

    def bind(self, given: dict[str, Any]) -> dict[str, Any]:
        """Every option by name, defaults filled in. Errors: OptionError for unknown, ill-typed and out-of-range options, all at once."""
        try:
            return self.options(**given).model_dump()
        except ValidationError as e:
            bad: dict[str, str] = {}
            for p in e.errors():
                name = str(p["loc"][0])
                bad[name] = f"{bad[name]}; or {p['msg']}" if name in bad else p["msg"]
            raise OptionError(
                f"{self.name} cannot take these options",
                where=f"{self.name}: {', '.join(bad)}",
                got=", ".join(f"{k}={given.get(k)!r}" for k in bad),
                want="; ".join(f"{k}: {v}" for k, v in bad.items()),
                fix=f"options: {', '.join(self.options.model_fields) or 'none'} (weft {self.name} --help)",
            ) from None

    def asks(self, options: Mapping[str, Any]) -> frozenset[Need]:
        """The evidence that it needs with these options: always, and for the values that they have."""
        return self.needs.union(a.need for name, a in self.asked() if options[name] in a.values)

    def asked(self) -> list[tuple[str, Asks]]:
        """The options of which some values need evidence."""
        return [(n, a) for n, f in self.options.model_fields.items() for a in f.metadata if isinstance(a, Asks)]

    def __call__(self, *args: Any, **given: Any) -> Any:
        """Run the function with checked options. Errors: OptionError; NumericError naming the site where a rewrite or merge broke down."""
        options = self.bind(given)
        if self.kind == "merge":
            sources: Sources = args[0]
            merged = self.fn(sources, **options)
            _finite(sources.name, merged)
            return merged
        if self.kind not in REWRITES:
            return self.fn(*args, **options)
        group: Group = args[0]
        try:
            with torch.no_grad():  # what a weight trains is a start like any other
                made = self.fn(*args, **options)
        except torch.linalg.LinAlgError as e:  # pyright: ignore[reportPrivateImportUsage]
            problem = _broken(group.name, str(e))
            raise problem from e
        exprs = [s.now for s in made] if isinstance(made, Group) else made if isinstance(made, list) else [made]
        for site, expr in zip(group, exprs, strict=True):
            _finite(site.name, expr, site.now)
        return made

    def claim(self, text: str, *, of: str = "", paper: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Attach the proof of the paper's claim: a function `(lab) -> Claim`.

        of: where the method has several papers' mechanisms as its options, the name of one, with its `paper`.
        """

        def attach(fn: Callable[..., Any]) -> Callable[..., Any]:
            self.proofs[f"{self.name}.{of}" if of else self.name] = Proof(text, paper or self.paper, fn)
            return fn

        return attach

    def fingerprint(self) -> str:
        """Hash of the file without claims and docstrings, and of a recipe's steps: editing the rest invalidates steps and proofs."""
        from weft.engine.registry import get

        file = inspect.getfile(self.fn)
        now = os.stat(file)
        each = [_hash(file, now.st_mtime_ns, now.st_size), *(get(name).fingerprint() for name in self.uses)]
        return each[0] if not self.uses else hashlib.blake2b("".join(each).encode(), digest_size=16).hexdigest()


@functools.cache
def _hash(file: str, _changed: int, _size: int) -> str:
    return hashlib.blake2b(_working(Path(file).read_text("utf8")).encode(), digest_size=16).hexdigest()


def _working(text: str) -> str:
    """The lines of a method's file that its results depend on, without the papers that it names."""
    tree = ast.parse(text)
    silent: list[ast.stmt] = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and any(map(_is_claim, n.decorator_list))
    ]
    first = [n.decorator_list[0].lineno for n in silent if isinstance(n, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            silent.append(node.body[0])
            first.append(node.body[0].lineno)
    gone = {i for start, n in zip(first, silent, strict=True) for i in range(start, (n.end_lineno or start) + 1)}
    kept = "\n".join(line for i, line in enumerate(text.splitlines(), 1) if i not in gone and line.strip())
    return re.sub(r'\b(?:rows|paper)="[^"]*",? ?', "", kept)


def _is_claim(decorator: ast.expr) -> bool:
    return (
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr == Method.claim.__name__
    )


def _finite(where: str, made: Expr, before: Expr | None = None) -> None:
    """Check the tensors that a method made, and the scales inside packed rows; those that were written since are. Errors: NumericError."""
    held = {id(t) for t in tensors(before).values()} if before is not None else set[int]()
    fresh = [
        (path, t) for path, t in tensors(made).items() if id(t) not in held and t.is_floating_point() and not t.is_meta
    ]
    fresh += [("a scale", node.scales()) for node in made.modules() if isinstance(node, Quantized)]
    for path, t in fresh:
        if not finite(t):
            problem = _broken(where, f"NaN or infinity in {path} of {made.describe()}")
            raise problem


def _broken(where: str, got: str) -> NumericError:
    return NumericError(
        "a method gave what is not finite",
        where=where,
        got=got,
        want="finite weights",
        fix="look for NaN, infinite or huge values in the weight and its evidence, or leave the site out",
    )


METHODS: dict[str, Method] = {}


def method(
    *,
    kind: Kind,
    rows: str = "",
    paper: str = "",
    needs: set[Need] | frozenset[Need] = frozenset(),
    per: Per = "site",
    whole: bool = False,
    rowwise: bool = False,
    taps: bool = False,
    drops: tuple[Drop, ...] = (),
    beats: Beats | None = None,
    on: tuple[str, ...] = (),
    members: int | None = None,
    signed: bool = False,
    adds: bool = False,
    uses: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Method]:
    """Register a function as a method. Keyword-only parameters, `Annotated[type, Field(...)]`, are its options.

    rows: what it implements of the catalogue of papers, if anything. paper: its arXiv number, if it has one. needs: evidence; of a search
    with any, what it asks of the bench, its fourth argument; a probe with data has batches as its second argument. What only some
    values of an option need stands with it (`Asks`). per: what a group holds. whole: whether it folds all terms of a weight (True) or
    rewrites the base term and leaves adapters standing (False). rowwise: each row's result depends on that row alone, so that a very
    large weight may be rewritten in slices.
    taps: it works on what weights read, per="input", and returns the group (`g.rounded`, `g.turned`) rather than expressions.
    drops: promises that it need not keep: "zeros" if it may fill what a zero pattern left out. on: the kinds of axes that a
    transport goes to; the tags of the sites that a rewrite goes to (`weft.model.TAGS`), all of them unless told: weights by default.
    A merge may need a base (`needs={"base"}`), take only so many `members`, and take `signed` weights. uses: the methods that steps of a
    recipe may be.
    Errors: OptionError for a promise or a tag that is none.
    """

    checked: list[tuple[str, tuple[str, ...], Any]] = [("drops", drops, typing.get_args(Drop))]
    for field_, names, known in [*checked, *([("on", on, TAGS)] if kind in REWRITES else [])]:
        if unknown := sorted(set(names) - set(known)):
            want, fix = ", ".join(known), "use these names"
            raise OptionError("a method declares an unknown name", where=field_, got=unknown, want=want, fix=fix)

    def wrap(fn: Callable[..., Any]) -> Method:
        hints = typing.get_type_hints(fn, include_extras=True)
        parameters = inspect.signature(fn).parameters.values()
        given: dict[str, Any] = {p.name: (hints[p.name], p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        options = create_model(f"{fn.__name__}_options", __config__=config, **given)
        moves = str(hints["return"].kind) if kind == "transport" else ""
        held = (per, whole, rowwise, taps, drops, beats, on, moves, options, members, signed, adds, uses)
        made = Method(fn, kind, tuple(rows.split()), paper, frozenset(needs), *held)
        METHODS[made.name] = made
        return made

    return wrap
