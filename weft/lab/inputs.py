"""What a model's weights read, seen in one pass over a few batches: Grams, and how heavy the tails of the values are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.model import Evidence, expressions
from weft.stats import Edges, forward
from weft.stats.sums import InputSums
from weft.stats.walker import Batch, observing


def kurtosis(powers: Float[Tensor, " p=5"]) -> float:
    """E[(x - E x)⁴] / E[(x - E x)²]², from the sums of x⁰ to x⁴: 3 for a Gaussian, more for heavier tails."""
    _, a, b, c, d = (powers / powers[0].clamp(min=1)).tolist()
    square = max(b - a * a, 1e-300)
    return (d - 4 * a * c + 6 * a * a * b - 3 * a**4) / square**2


def powers(x: Tensor) -> Float[Tensor, " p=5"]:
    """The sums of x⁰ to x⁴ over all values, in float64."""
    wide = x.double()
    return torch.stack([wide.pow(i).sum() for i in range(5)])


@dataclass
class Tails(InputSums):
    """Sums of one input, and the powers of its values."""

    powers: Float[Tensor, " p=5"] = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))

    def add(self, x: Float[Tensor, "t n"]) -> bool:
        """Add tokens, as `InputSums` does."""
        if not super().add(x):
            return False
        self.powers += powers(x)
        return True

    @property
    def outlier(self) -> float:
        """Largest over median second moment of a feature."""
        square = self.gram.diagonal()
        return float(square.max() / square.median().clamp(min=1e-30))

    @property
    def rank(self) -> float:
        """exp(entropy) of the Gram's normalised eigenvalues, over its width."""
        values = torch.linalg.eigvalsh(self.gram).clamp(min=0)
        share = values / values.sum().clamp(min=1e-300)
        return float(torch.special.entr(share).sum().exp() / len(share))


class Inputs(Edges):
    """What every site but embeddings reads, by input: those that read the same tensor share one, named after the first."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """One pass over the batches, the whole model at once. Errors: NumericError with the site."""
        super().__init__()
        self.tails: dict[str, Tails] = {}
        self.rows = {name: e.shape[0] for name, e in expressions(model).items()}
        for batch in batches:
            mask = batch.get("attention_mask")
            with torch.no_grad(), observing(model, "", self, mask.bool() if mask is not None else None):
                forward(model, batch)
        self.tails = {edge: s for edge, s in self.sums.items() if isinstance(s, Tails) and s.tokens}

    def zero(self, n: int, device: torch.device) -> Tails:
        return Tails.zero(n, device)

    def evidence(self, names: Sequence[str]) -> dict[str, Evidence]:
        """What methods ask for, of sites that share an input, with the same weight for every row."""
        seen = self.tails[self.of[names[0]]]
        count = seen.tokens
        gram, mean, mean_abs = (t.float() for t in (seen.gram / count, seen.total / count, seen.total_abs / count))
        return {n: Evidence(gram, torch.ones(self.rows[n]), count, mean, mean_abs, seen.most.float()) for n in names}
