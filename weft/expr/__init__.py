"""The algebra: weights as expressions. Pure tensors; knows no model, no file, no method."""

from weft.expr.base import CHUNK, NODES, Expr, Field, Promises, fields, product, tensors
from weft.expr.nodes import Dense, Diagonal, LowRank, Quantized, spread
from weft.expr.sparse import NM, Masked
from weft.expr.tree import Normal, Product, Sum, build, fork, normal, spec, stack, terms_of, total

__all__ = [
    "CHUNK", "NM", "NODES", "Dense", "Diagonal", "Expr", "Field", "LowRank", "Masked", "Normal", "Product", "Promises",
    "Quantized", "Sum", "build", "fields", "fork", "normal", "product", "spec", "spread", "stack", "tensors", "terms_of", "total",
]  # fmt: skip
