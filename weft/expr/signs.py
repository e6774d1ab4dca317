"""A sparse node whose entries are all of one size, plus or minus, with their places as gaps."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import Expr, Promises
from weft.grid import pack, packed_bytes, unpack

SKIP = 255
"""A gap that ends in no entry."""


class Signs(Expr):
    """A few entries of one size; the rest is zero. value at places[k] = -scale where bit k of `signs` is set, else scale.

    Places are i n + j, ascending: a gap g below 255 means g zeros and then an entry, 255 means as many zeros and no entry. The last gap
    ends at place m n, behind the matrix.
    """

    scale: Float[Tensor, "one"]
    gaps: UInt8[Tensor, "k"]
    signs: UInt8[Tensor, "bytes"]
    m: int
    n: int

    @classmethod
    def of(cls, signs: Float[Tensor, "m n"], scale: Float[Tensor, ""]) -> Signs:
        """`scale` times these signs, of which zeros are not stored."""
        flat = signs.flatten()
        at = flat.nonzero()[:, 0]
        zeros = at.diff(prepend=at.new_tensor([-1]), append=at.new_tensor([len(flat)])) - 1
        skips = zeros // SKIP
        gaps = torch.full((len(zeros) + int(skips.sum()),), SKIP, dtype=torch.uint8, device=flat.device)
        gaps[torch.arange(len(zeros), device=at.device) + skips.cumsum(0)] = (zeros % SKIP).to(torch.uint8)
        bits = (flat[at] < 0).to(torch.uint8)[None]
        return cls(scale.reshape(1), gaps, pack(bits, 1)[0] if len(at) else bits[0], *signs.shape)

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.m, self.n

    def check(self) -> None:
        if self.gaps.device.type == "meta":
            return
        ends, whole = self._ends().tolist()[-1:], self.m * self.n
        closed = ends == [whole] and int(self.gaps[-1]) < SKIP
        count = int((self.gaps < SKIP).sum()) - 1
        wrong = [
            ("scale", f"{len(self.scale)} numbers", "one", len(self.scale) == 1),
            ("gaps", f"gaps that end at {ends}", f"at {whole}, in no skip", closed),
            (
                "signs",
                f"{len(self.signs)} bytes",
                f"a bit for each of {count} entries",
                not closed or len(self.signs) == packed_bytes(count, 1),
            ),
        ]
        for name, got, want, good in wrong:
            if not good:
                raise ShapeError(
                    f"Signs.{name} does not fit",
                    where=f"Signs.{name}",
                    got=got,
                    want=want,
                    fix="build it with Signs.of",
                )

    def _ends(self) -> Int[Tensor, "k"]:
        """The place that every gap goes up to."""
        return (self.gaps.long() + (self.gaps < SKIP)).cumsum(0) - 1

    def _put(self, values: Tensor) -> Tensor:
        """One value a gap at its place [m n]; those of gaps that end in no entry go nowhere."""
        nowhere = self.m * self.n
        at = torch.where(self.gaps < SKIP, self._ends(), nowhere)
        return values.new_zeros(nowhere + 1).index_put((at,), values)[:nowhere].view(self.shape)

    def dense(self) -> Float[Tensor, "m n"]:
        scale = self.scale.to(torch.promote_types(self.scale.dtype, torch.float32))
        bits = unpack(torch.cat([self.signs, self.signs.new_zeros(1)])[None], 1, 8 * len(self.signs) + 1)[0]
        rank = ((self.gaps < SKIP).cumsum(0) - 1).clamp(min=0)
        return self._put(scale * (1 - 2 * bits[rank].to(scale.dtype)))

    def promises(self) -> Promises:
        return Promises(zeros=True, levels=3)

    def mask(self) -> Bool[Tensor, "m n"]:
        return self._put(torch.ones_like(self.gaps, dtype=torch.bool))

    def describe(self) -> str:
        return f"Signs({(int((self.gaps < SKIP).sum()) - 1) / max(1, self.m * self.n):.2%})"
