"""A mixture of experts: which of them see a row of inputs depends on the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import Expr
from weft.expr.tree import no_value


class Routed(Expr):
    """Experts chosen by each row of inputs. y = Σ p[i] experts[i](x) over the `top` largest p[i], p = softmax(router x).

    The weights are those of the softmax over all experts, in float32 at least, so that the router learns with `top` 1 too; of
    equal ones the lower number is taken. There is no one value: `dense` and `rows` are refused, and so is what asks for them.
    """

    routes = True

    router: Float[Tensor, "e n"]
    experts: Sequence[Expr]
    top: int

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.experts[0].shape

    def check(self) -> None:
        count, n = self.router.shape
        shapes = [e.shape for e in self.kids()]
        if len(set(shapes)) != 1 or len(shapes) != count or shapes[0][1] != n:
            got, want = ", ".join(str(list(s)) for s in shapes), f"{count} of one shape, with {n} columns"
            fix = "a row of the router for every expert"
            raise ShapeError("these experts do not fit", where="Routed.experts", got=got, want=want, fix=fix)
        if not 1 <= self.top <= count:
            want, fix = f"1 to {count}", "choose another"
            raise ShapeError("Routed.top does not fit", where="Routed.top", got=self.top, want=want, fix=fix)

    def dense(self) -> Float[Tensor, "m n"]:
        self._refuse()

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        problem = no_value("Routed", {"it": self})
        raise problem

    def route(self, x: Float[Tensor, "t n"]) -> tuple[Float[Tensor, "t k"], Int[Tensor, "t k"]]:
        """The weights and numbers of every row's experts."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            share = F.linear(x.to(wide), self.router.to(wide)).softmax(-1)
        share, order = share.sort(dim=-1, descending=True, stable=True)
        return share[:, : self.top], order[:, : self.top]

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        flat = x.reshape(-1, x.shape[-1])
        share, chosen = self.route(flat)
        y = x.new_zeros(len(flat), self.shape[0])
        for i, expert in enumerate(self.experts):
            row, place = (chosen == i).nonzero(as_tuple=True)
            part = expert(flat[row]) * share[row, place].unsqueeze(1).to(x.dtype)
            y = y.index_add(0, row, part.to(y.dtype))
        return y.view(*x.shape[:-1], self.shape[0])

    def describe(self) -> str:
        kinds = ", ".join(dict.fromkeys(e.describe() for e in self.kids()))
        return f"{self.top} of {len(self.experts)} routed({kinds})"
