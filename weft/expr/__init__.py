"""The algebra: weights as expressions. Pure tensors; knows no model, no file, no method.

The folder is the list of nodes: every class of Expr in a file of it is one, by being there.
"""

from importlib import import_module
from pkgutil import iter_modules

from weft.expr.base import CHUNK, NODES, Expr, Promises, identity, tensors
from weft.expr.basis import Basis
from weft.expr.fields import Field, fields
from weft.expr.generated import Hadamard, Permutation, hadamard
from weft.expr.nodes import Dense, Diagonal, LowRank, Quantized, spread
from weft.expr.products import product
from weft.expr.routed import Routed
from weft.expr.signs import Signs
from weft.expr.sparse import NM, Masked
from weft.expr.structured import Blocks, Codebook, Kronecker, SparseDelta
from weft.expr.tree import (
    SIDES,
    Normal,
    Product,
    Sum,
    between,
    build,
    dense_copy,
    fork,
    normal,
    spec,
    stack,
    terms_of,
    total,
    unfrozen,
    valueless,
)

__all__ = [
    "CHUNK", "NM", "NODES", "SIDES", "Basis", "Blocks", "Codebook", "Dense", "Diagonal", "Expr", "Field", "Hadamard", "Kronecker",
    "LowRank", "Masked", "Normal", "Permutation", "Product", "Promises", "Quantized", "Routed", "Signs", "SparseDelta", "Sum", "between",
    "build", "dense_copy", "fields", "fork", "hadamard", "identity", "normal", "product", "spec", "spread", "stack", "tensors", "terms_of",
    "total", "unfrozen", "valueless",
]  # fmt: skip

for _found in iter_modules(__path__):
    if not _found.name.startswith("_"):
        import_module(f"{__name__}.{_found.name}")


def __getattr__(name: str) -> type[Expr]:
    """A node that is not named above."""
    if name not in NODES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return NODES[name]
