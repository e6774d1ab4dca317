"""Reading on with weights that learn from what was read: after each chunk what is trainable takes a few steps on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.error import ConflictError, OptionError
from weft.learn.settings import Reading
from weft.learn.suits import writes
from weft.learn.trainer import diverged, trainable
from weft.stats.walker import forward


class Reader:
    """A language model that reads or writes one long text through a window, and learns each chunk once it has been predicted.

    What a chunk taught outlasts the window: it is in what is trainable of the model, which this reader alone should hold (a fork). The
    loss of a chunk is that of its tokens given the window before it; each of `epochs` steps of AdamW goes down its gradient, of norm
    1 at most. Temp-Lora (2401.11504), with anything trainable. Deterministic for a seed on one machine.
    """

    def __init__(self, model: nn.Module, how: Reading, *, start: int) -> None:
        """`start`: the token before the first. Errors: OptionError if nothing is trainable; ConflictError if it is no language model."""
        if not writes(model):
            got, fix = type(model).__name__, "read with a model that writes text"
            raise ConflictError("this model predicts no text", where="model", got=got, want="a language model", fix=fix)
        if not (free := trainable(model)):
            got, fix = "a frozen model", 'weft.apply(model, "lora") first'
            raise OptionError("nothing is trainable", where="model", got=got, want="an adapter", fix=fix)
        self.model, self.how = model.eval(), how
        self.seen = torch.tensor([start])
        """The tokens of the window."""
        self._free = list(free.values())
        self._moves = torch.optim.AdamW(self._free, lr=how.lr, weight_decay=0.0)
        self._draws = 0

    def read(self, ids: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
        """Nats of each token, predicted before it was learnt. Errors: OptionError for what is no text; NumericError where it diverged."""
        if ids.dim() != 1 or ids.is_floating_point() or not len(ids):
            got, fix = f"{ids.dtype} {list(ids.shape)}", "give one text's token ids"
            raise OptionError("these are no tokens", where="ids", got=got, want="integers [t]", fix=fix)
        return torch.cat([self._taken(part) for part in ids.split(self.how.chunk)])

    def write(self, tokens: int, **how: Any) -> Int[Tensor, " t"]:
        """Go on with so many tokens, fewer where the text ends, learning as they come; `how` is told `generate`."""
        made: list[Tensor] = []
        while tokens > 0:
            count = min(tokens, self.how.chunk)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.how.seed + self._draws)
                seen = self.seen[None].to(self._device)
                given = {"attention_mask": torch.ones_like(seen), "max_new_tokens": count, **how}
                new = cast(Any, self.model).generate(seen, **given)[0, seen.shape[1] :].cpu()
            self._draws += 1
            made.append(new)
            if len(new):
                self._taken(new)
            if len(new) < count:
                break
            tokens -= count
        return torch.cat(made) if made else torch.zeros(0, dtype=torch.long)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _taken(self, chunk: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
        """The chunk's nats, before it is learnt."""
        with torch.no_grad():
            nats = self._nats(chunk)
        for loss in self._losses(chunk):
            if not math.isfinite(loss.item()):
                problem = diverged("a chunk that was read", f"a loss of {loss.item()}")
                raise problem
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._free, 1.0)
            self._moves.step()
            self._moves.zero_grad()
        self.seen = torch.cat([self.seen, chunk.cpu()])[-self.how.window :]
        return nats.cpu()

    def _losses(self, chunk: Int[Tensor, " t"]) -> Iterator[Float[Tensor, ""]]:
        for _ in range(self.how.epochs):
            with torch.enable_grad():
                yield self._nats(chunk).mean()

    def _nats(self, chunk: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
        """-log p of each token of the chunk, given the window and what of the chunk stands before it."""
        ids = torch.cat([self.seen, chunk.cpu()])[None].to(self._device)
        logits = forward(self.model, {"input_ids": ids})[0, -len(chunk) - 1 : -1]
        return F.cross_entropy(logits.float(), ids[0, -len(chunk) :], reduction="none")
