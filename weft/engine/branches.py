"""Run methods that add a branch to a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.engine.registry import get
from weft.engine.run import Change, Step
from weft.error import ConflictError, OptionError
from weft.model import Branch, add_branch, must_be_whole, own_keys, places, table_of, trunk
from weft.stats import Batch


@dataclass(frozen=True)
class Trunk:
    """A model as a method sees it that adds a branch to its transformer: where that is, its embeddings, its keys and values."""

    model: nn.Module
    seed: int = 0
    batches: Sequence[Batch] = ()
    """Texts as tokens, for a method that needs them."""
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """What was done otherwise than asked: where, and what."""

    @property
    def at(self) -> str:
        """The path of the transformer, under any head."""
        return trunk(self.model)

    def rng(self, salt: str) -> torch.Generator:
        """A generator that depends on the seed and `salt` only."""
        word = hashlib.blake2b(f"{self.seed}/{salt}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(word, "little"))

    def fallback(self, text: str) -> None:
        """Declare that something was done otherwise than asked; never do so in silence."""
        self.notes.append((type(self.model).__name__, text))

    def sampled(self, count: int, salt: str) -> Int[Tensor, "k"]:
        """Tokens of the vocabulary, each as likely as any other. Errors: ConflictError for a model that reads no tokens."""
        return torch.randint(self._table().num_embeddings, (count,), generator=self.rng(salt))

    def examples(self, count: int, salt: str) -> Int[Tensor, "k"]:
        """The first so many tokens of the texts; where they are fewer the rest is drawn, which is declared."""
        rows = [b["input_ids"][b["attention_mask"].bool() if "attention_mask" in b else ...] for b in self.batches]
        held = torch.cat([torch.zeros(0, dtype=torch.long), *(r.flatten().cpu() for r in rows)])[:count]
        if len(held) < count:
            self.fallback(f"{count - len(held)} of {count} tokens are drawn, for the data has no more")
        return torch.cat([held, self.sampled(count - len(held), salt)])

    def embedded(self, ids: Int[Tensor, "k"]) -> Float[Tensor, "k d"]:
        """These tokens as the transformer reads them, in float32."""
        with torch.no_grad():
            return self._table()(ids.to(self._table().weight.device)).float()

    def attended(self, ids: Int[Tensor, "k"]) -> tuple[Float[Tensor, "l h k d"], Float[Tensor, "l h k e"]]:
        """Every layer's keys and values for this text, in float32. Errors: ConflictError for layers that are not alike or keep none."""
        held = own_keys(self.model, self.at, ids[None])
        keys, values = ([pair[i][0].float() for pair in held] for i in (0, 1))
        if len({t.shape for t in keys}) > 1 or len({t.shape for t in values}) > 1 or keys[0].shape[1] < len(ids):
            got = f"layers that keep {sorted({tuple(k.shape) for k in keys})} of {len(ids)} tokens"
            want, fix = "layers that are alike and keep them all", "take a shorter prefix, or prompt"
            where = type(self.model).__name__
            raise ConflictError("this model takes no such prefix", where=where, got=got, want=want, fix=fix)
        return torch.stack(keys), torch.stack(values)

    def _table(self) -> nn.Embedding:
        return table_of(self.model, type(self.model).__name__, self.at)


def run(
    model: nn.Module, step: Step, *, seed: int = 0, batches: Sequence[Batch] = ()
) -> tuple[list[Change], list[tuple[str, str]]]:
    """Add the branch that a method makes, or all of several, in place: what changed, and the declared fallbacks.

    `batches`: texts, for a method that needs them.
    Errors: those of method and branch; ConflictError if parameters are spread over processes.
    """
    places(model)
    must_be_whole(model.named_parameters())
    method = get(step.method)
    if method.kind != "branch":
        want, fix = "a branch", "weft methods shows kinds"
        raise OptionError("this method adds no branch", where=method.name, got=method.kind, want=want, fix=fix)
    seen = Trunk(model, seed, batches)
    made: Branch | list[Branch] = method(seen, **dict(step.options))
    added = made if isinstance(made, list) else [made]
    add_branch(model, *added)
    return [Change(b.key, "nothing", b.describe(), b.nbytes(), None) for b in added], seen.notes
