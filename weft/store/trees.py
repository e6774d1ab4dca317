"""A weft folder's expressions, taps and branches: trees from the manifest, tensors from the files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from weft.error import FormatError, NumericError, WeftError
from weft.expr import Expr, Quantized, build
from weft.grid import grid
from weft.model import Branch, Tap
from weft.model.branch import build_branch
from weft.model.taps import build_tap
from weft.store.tensors import check_finite


def expressions_of(
    sites: Any, content: Mapping[str, Tensor], where: str, shared: Any = None
) -> tuple[dict[str, Expr], dict[str, Tensor], list[WeftError]]:
    """Every site's expression from its tree and its tensors; the tensors of no site; and what cannot be read.

    `shared` says which tensors are others: name to the name under which it is stored. They are one in memory too.
    """
    if not isinstance(sites, dict):
        got, want, fix = type(sites).__name__, "expressions by site", "copy the folder again"
        return {}, {}, [FormatError("a manifest has no sites", where=where, got=got, want=want, fix=fix)]
    terms: dict[str, dict[str, Tensor]] = {name: {} for name in sites}
    plain: dict[str, Tensor] = {}
    more, problems = _shared(shared or {}, content, where)
    nodes: dict[object, Expr] = {}
    for key, t in {**content, **more}.items():
        name, colon, path = key.partition(":")
        if colon and name in terms:
            terms[name][path] = t
        else:
            plain[key] = t
    exprs: dict[str, Expr] = {}
    for name, tree in cast(dict[str, Any], sites).items():
        try:
            exprs[name] = build(tree, lambda p, name=name: _take(terms[name], p, f"{where}: {name}"), nodes=nodes)
        except WeftError as e:
            problems.append(e)
            continue
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
            problems.append(_unread("an expression cannot be read", f"{where}: {name}", e, "an expression"))
            continue
        if terms[name]:
            problems.append(_left("unexpected tensors", f"{where}: {name}", terms[name], "those of its expression"))
    return exprs, plain, problems


def _shared(shared: Any, content: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[WeftError]]:
    """The tensors that are others, under both names and as one parameter if they are floats; and what is wrong with the list."""
    fix = "copy the folder again"
    if not isinstance(shared, dict):
        got, want = type(shared).__name__, "names by name"
        return {}, [FormatError("a list of shared tensors cannot be read", where=where, got=got, want=want, fix=fix)]
    made: dict[str, Tensor] = {}
    problems: list[WeftError] = []
    for name, other in cast(dict[str, Any], shared).items():
        if name in content or not isinstance(other, str) or ":" not in other or other not in content:
            got, want = f"shared with {other}", "a name of its own, of a stored tensor of a weight"
            problems.append(
                FormatError("a shared tensor cannot be read", where=f"{where}: {name}", got=got, want=want, fix=fix)
            )
            continue
        t = made.get(other, content[other])
        one = nn.Parameter(t, requires_grad=False) if t.is_floating_point() and other not in made else t
        made |= {name: one, other: one}
    return made, problems


def _unread(what: str, where: str, e: Exception, want: str) -> FormatError:
    return FormatError(what, where=where, got=f"{type(e).__name__}: {e}", want=want, fix="copy the folder again")


def _left(what: str, where: str, held: Mapping[str, Tensor], want: str) -> FormatError:
    return FormatError(what, where=where, got=sorted(held), want=want, fix="copy the folder again")


def taps_of(
    manifest: Mapping[str, Any], content: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Tap], dict[str, Tensor], list[WeftError]]:
    """Every site's tree without its tap; the taps by site, one object an edge; the other tensors; and what cannot be read."""
    sites: dict[str, Any] = dict(manifest["sites"])
    on: Any = manifest.get("taps", {})
    readers = {n: t.get("tap") for n, t in sites.items() if isinstance(t, dict) and t.get("node") == "Tapped"}
    named = isinstance(on, dict) and all(isinstance(e, str) for e in readers.values())
    if not named or set(on) != set(readers.values()):
        got = f"taps of {_few(on)}; readers of {_few(readers.values())}"
        want, fix = "a tap for every edge that sites read, and no other", "copy the folder again"
        return {}, {}, {}, [FormatError("taps and their readers differ", where=where, got=got, want=want, fix=fix)]
    held: dict[str, dict[str, Tensor]] = {edge: {} for edge in on}
    rest: dict[str, Tensor] = {}
    for key, t in content.items():
        edge, _, path = key.partition(":tap.")
        (held[edge] if path and edge in held else rest)[path if path and edge in held else key] = t
    made: dict[str, Tap] = {}
    problems: list[WeftError] = []
    for edge, tree in cast(dict[str, Any], on).items():
        at = f"{where}: {edge}"
        try:
            made[edge] = build_tap(tree, lambda p, edge=edge: _take(held[edge], p, "its tensors"))
        except WeftError as e:
            problems.append(type(e)(e.what, where=f"{at}: {e.where}", got=e.got, want=e.want, fix=e.fix))
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
            problems.append(_unread("a tap cannot be read", at, e, "a tap"))
        if held[edge] and edge in made:
            problems.append(_left("unexpected tensors", at, held[edge], "those of its tap"))
    bare = {n: t.get("expr") if n in readers else t for n, t in sites.items()}
    return bare, {n: made[e] for n, e in readers.items() if e in made}, rest, problems


def branches_of(
    manifest: Mapping[str, Any], content: Mapping[str, Tensor], where: str
) -> tuple[list[Branch], dict[str, Tensor], list[WeftError]]:
    """Every branch, in order; the tensors of no branch; and what cannot be read."""
    said: Any = manifest.get("branches", [])
    if not isinstance(said, list) or not all(isinstance(b, dict) for b in said):
        got, want, fix = type(said).__name__, "a list of branches", "copy the folder again"
        return [], {}, [FormatError("branches cannot be read", where=where, got=got, want=want, fix=fix)]
    held: dict[str, dict[str, Tensor]] = {f"{b.get('at')}:branch.{b.get('name')}": {} for b in said}
    rest: dict[str, Tensor] = {}
    for key, t in content.items():
        home, _, path = key.rpartition(".")
        if home in held:
            held[home][path] = t
        else:
            rest[key] = t
    made: list[Branch] = []
    problems: list[WeftError] = []
    for tree in cast("list[dict[str, Any]]", said):
        mine = f"{tree.get('at')}:branch.{tree.get('name')}"
        try:
            made.append(build_branch(tree, lambda p, mine=mine: _take(held[mine], p, "its tensors")))
        except WeftError as e:
            problems.append(type(e)(e.what, where=f"{where}: {mine}: {e.where}", got=e.got, want=e.want, fix=e.fix))
    problems += [_left("unexpected tensors", f"{where}: {n}", t, "those of its branch") for n, t in held.items() if t]
    return made, rest, problems


def _few(names: Any) -> str:
    """The first of some names, for people."""
    return ", ".join(sorted(map(str, names))[:3]) or "nothing" if isinstance(names, Iterable) else type(names).__name__


def _take(held: dict[str, Tensor], path: str, where: str) -> Tensor:
    if path not in held:
        raise FormatError("missing tensor", where=where, got="nothing", want=path, fix="copy the folder again")
    return held.pop(path)


def broken(exprs: Mapping[str, Expr]) -> Iterable[WeftError]:
    """Expressions with scales or codes inside packed rows that are not finite."""
    for name, expr in exprs.items():
        try:
            for node in expr.modules():
                if isinstance(node, Quantized):
                    check_finite(node.scales(), f"{name}, scales")
                    if not all(map(math.isfinite, grid(node.grid).levels or ())):
                        check_finite(node.dense(), name)
        except NumericError as e:
            yield e
