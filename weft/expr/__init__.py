"""The algebra: weights as expressions. Pure tensors; knows no model, no file, no method."""

from weft.expr.base import CHUNK, NODES, Expr, Field, Promises, fields, tensors
from weft.expr.generated import Basis, Hadamard, Permutation, hadamard
from weft.expr.nodes import Dense, Diagonal, LowRank, Quantized, spread
from weft.expr.products import product
from weft.expr.sparse import NM, Masked
from weft.expr.structured import Blocks, Codebook, Kronecker, SparseDelta
from weft.expr.tree import SIDES, Normal, Product, Sum, build, dense_copy, fork, normal, spec, stack, terms_of, total

__all__ = [
    "CHUNK", "NM", "NODES", "SIDES", "Basis", "Blocks", "Codebook", "Dense", "Diagonal", "Expr", "Field", "Hadamard", "Kronecker",
    "LowRank", "Masked", "Normal", "Permutation", "Product", "Promises", "Quantized", "SparseDelta", "Sum", "build", "dense_copy",
    "fields", "fork", "hadamard", "normal", "product", "spec", "spread", "stack", "tensors", "terms_of", "total",
]  # fmt: skip
