"""A weft folder's expressions: every site's tree from the manifest, its tensors from the files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from weft.error import FormatError, NumericError, WeftError
from weft.expr import Expr, Quantized, build
from weft.grid import grid
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
            problems.append(
                FormatError(
                    "an expression cannot be read",
                    where=f"{where}: {name}",
                    got=f"{type(e).__name__}: {e}",
                    want="an expression",
                    fix="copy the folder again",
                )
            )
            continue
        if terms[name]:
            problems.append(
                FormatError(
                    "unexpected tensors",
                    where=f"{where}: {name}",
                    got=sorted(terms[name]),
                    want="those of its expression",
                    fix="copy the folder again",
                )
            )
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
