"""An invertible adapter: embeddings go through a coupling of their halves, the last states back through its inverse."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as f

from weft.error import ConflictError, ShapeError
from weft.model.branch import Branch, Call
from weft.model.virtual import table_of


class Invertible(Branch):
    """A(e) = [y1, y2] of e = [e1, e2]: y1 = e1 + up_0 relu(down_0 e2), y2 = e2 + up_1 relu(down_1 y1).

    The host runs on A(embedded x); where a head reads its last states h, it reads A⁻¹(h) instead.
    """

    down: Float[Tensor, "two k c"]
    up: Float[Tensor, "two c k"]
    back: bool

    def check(self, model: nn.Module) -> None:
        d = table_of(model, self.key, self.at, "invertible adapter").embedding_dim
        if self.down.shape[0] != 2 or 2 * self.down.shape[2] != d:
            got, want = list(self.down.shape), f"[2 k {d / 2:g}]"
            fix = "make it for this model; an odd width has no halves"
            raise ShapeError("a coupling does not fit", where=self.key, got=got, want=want, fix=fix)
        if self.back and getattr(cast(Any, model).config, "hidden_size", d) != d:
            got, want, fix = "states of another width than embeddings", "one width", "adapt the weights: lora"
            raise ConflictError("the inverse has no place", where=self.key, got=got, want=want, fix=fix)

    def forward(self, host: nn.Module, call: Call, given: dict[str, Any]) -> Any:
        rest = dict(given)
        ids, x = rest.pop("input_ids", None), rest.get("inputs_embeds")
        x = cast(Any, host).get_input_embeddings()(ids) if x is None else x
        out = call({**rest, "inputs_embeds": self.through(x)})
        if not self.back:
            return out
        last: Tensor | None = getattr(out, "last_hidden_state", None)
        if last is None:
            fix = "call the model as weft.generate and weft.train do"
            raise ConflictError("an output has no names", where=self.key, got="a tuple", want="states", fix=fix)
        out.last_hidden_state = self.returned(last)
        states: tuple[Tensor, ...] | None = getattr(out, "hidden_states", None)
        if states and states[-1] is last:
            out.hidden_states = (*states[:-1], out.last_hidden_state)
        return out

    def through(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """A(x)."""
        one, two = x.chunk(2, -1)
        one = one + self._moved(two, 0)
        return torch.cat([one, two + self._moved(one, 1)], -1)

    def returned(self, y: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """A⁻¹(y)."""
        one, two = y.chunk(2, -1)
        two = two - self._moved(one, 1)
        return torch.cat([one - self._moved(two, 0), two], -1)

    def _moved(self, x: Tensor, i: int) -> Tensor:
        return f.linear(f.relu(f.linear(x, self.down[i].to(x.dtype))), self.up[i].to(x.dtype)).to(x.dtype)

    def describe(self) -> str:
        return f"Invertible({self.down.shape[1]})"
