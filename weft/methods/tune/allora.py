"""Adam whose rate for each row of an adapter falls as the row's update grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from weft.engine import method
from weft.linalg.moments import adam

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="optimizer", rows="P140", paper="2410.09692")
def allora(
    params: Mapping[str, nn.Parameter],
    lr: float,
    *,
    most: Annotated[
        float, Field(gt=0, le=1e4, description="rate of a row of B that adds nothing yet, over that of A")
    ] = 10.0,
) -> torch.optim.Optimizer:
    """Move row i of B, in every low-rank term B A, at 1 / sqrt(||(B A)_i|| + 1 / most²) times the rate: fast off zero, then slower.

    All else moves as by Adam. Departures: the row's step has the factor rather than its gradient, whose scale Adam takes out;
    the factor of B A itself, which the paper does away with, is not counted, and dropout is left to the model.
    """
    pairs = {p: a for n, p in params.items() if (a := params.get(f"{n[:-1]}a")) is not None and _fits(n, p, a)}
    return _ALLoRA(list(params.values()), pairs, lr, most)


def _fits(name: str, b: Tensor, a: Tensor) -> bool:
    """Whether these are the two factors of a low-rank term."""
    return name.endswith(".b") and b.dim() == a.dim() == 2 and b.shape[1] == a.shape[0]


class _ALLoRA(torch.optim.Optimizer):
    def __init__(
        self, params: list[nn.Parameter], pairs: dict[nn.Parameter, nn.Parameter], lr: float, most: float
    ) -> None:
        super().__init__(params, {"lr": lr, "most": most})
        self.pairs = pairs

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        sizes = {b: _row_norms(b, a) for b, a in self.pairs.items()}  # before either factor moves
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                step = adam(self.state[p], p.grad)
                if p in sizes:
                    step *= (sizes[p] + group["most"] ** -2).rsqrt().unsqueeze(1)
                p.add_(step, alpha=-group["lr"])
        return loss


def _row_norms(b: Float[Tensor, "m r"], a: Float[Tensor, "r n"]) -> Float[Tensor, "m"]:
    """The lengths of the rows of b a, which is not made."""
    return ((b @ (a @ a.mT)) * b).sum(1).clamp(min=0).sqrt()


@allora.claim("rank 16 gains more after the same steps, at the best of the same rates")
def claim(lab: Lab) -> Claim:
    adapter = ("lora", {"rank": 16})
    return lab.tune(ours=[adapter, ("allora", {})], baseline=[adapter], share=1.0)
