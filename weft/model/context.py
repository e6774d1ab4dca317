"""Virtual tokens that stay near the text they begin as."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from weft.model.virtual import Prompt


class Context(Prompt):
    """A prompt whose vectors are start + shift, of each shift what lies within a ball: shift · min(1, radius / ||shift||)."""

    start: Float[Tensor, "k d"]
    shift: Float[Tensor, "k d"]
    radius: float

    def tokens(self) -> Float[Tensor, "k d"]:
        lengths = self.shift.norm(dim=1, keepdim=True)
        return self.start + self.shift * (self.radius / lengths.clamp(min=self.radius))
