"""Vectors at the outputs of single attention heads, before they are mixed: added to them, or scaling them."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.error import ConflictError, ShapeError
from weft.model.axes import parts
from weft.model.branch import Branch, Call
from weft.model.families import Attention
from weft.model.weave import expression, places

Edit = Literal["offset", "scale"]


class Heads(Branch):
    """Edits the outputs z of some heads, e features each, that its host mixes: z + v (offset), or z (1 + v) (scale).

    `heads` has their numbers, such as `0 3 5`. A penalty w adds w sign(v) to the gradient of v: that of w |v| in the loss.
    """

    vectors: Float[Tensor, "k e"]
    heads: str
    edit: str
    penalty: float

    @property
    def numbers_of_heads(self) -> list[int]:
        """Which heads."""
        return [int(n) for n in self.heads.split()]

    def check(self, model: nn.Module) -> None:
        hosts = head_hosts(model)
        if self.at not in hosts or self.edit not in get_args(Edit):
            want, fix = f"{', '.join(get_args(Edit))} at {', '.join(list(hosts)[:2])}", "make it for this model"
            raise ConflictError("no heads' outputs are here", where=self.key, got=self.edit, want=want, fix=fix)
        count, size = hosts[self.at]
        known = {str(i): i for i in range(count)}
        chosen = [known.get(n, -1) for n in self.heads.split()]
        if -1 in chosen or len(set(chosen)) < len(chosen) or self.vectors.shape != (len(chosen), size):
            got, want = f"{list(self.vectors.shape)} for {self.heads}", f"{size} features for some of {count} heads"
            raise ShapeError("vectors do not fit the heads", where=self.key, got=got, want=want, fix="make them for it")

    def forward(self, host: nn.Module, call: Call, given: dict[str, Any]) -> Any:
        name = next(iter(given))
        z: Tensor = given[name]
        v = cast(Tensor, _Penalized.apply(self.vectors, self.penalty)) if self.penalty else self.vectors
        whole = v.new_zeros(z.shape[-1] // v.shape[1], v.shape[1])
        at = torch.tensor(self.numbers_of_heads, device=v.device)
        wide = whole.index_copy(0, at, v).flatten().to(z.dtype)
        return call({**given, name: z + wide if self.edit == "offset" else z * (1 + wide)})

    def describe(self) -> str:
        return f"Heads({self.heads}, {self.edit})"


class _Penalized(torch.autograd.Function):
    """A tensor, whose gradient has that of an L1 penalty."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.weight = weight
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (v,) = ctx.saved_tensors
        return grads[0] + ctx.weight * v.sign(), None


def head_hosts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The modules that mix heads, in the model's order: how many heads, and features of each.

    Errors: ConflictError for a family that no table describes.
    """
    count = int(cast(Any, model).config.num_attention_heads)
    owner = {path: p for p in places(model).values() for path in p.modules}
    mixers = [f"{block}.{part.o}" for block, part in parts(model) if isinstance(part, Attention)]
    return {m: (count, expression(model, owner[m]).shape[1] // count) for m in mixers}
