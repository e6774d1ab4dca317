"""A side network: a narrow transformer that reads a frozen one's hidden states, so that no gradient enters the frozen one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as f

from weft.error import ConflictError, ShapeError
from weft.model.branch import Branch, Call
from weft.model.virtual import table_of, virtual_tokens

if TYPE_CHECKING:  # it takes longer to import than a small merge
    from transformers.cache_utils import DynamicLayer

_MARK = "weft_side"
"""Where a cache says which of its layers are whose side network's."""


class Side(Branch):
    """A side network of l blocks, and the mix that the head reads.

    s_i = U_i gelu(D_i norm(h_i)) of the embeddings h_0 and the output h_i of block i. g_0 = s_0, then
    g_i = block_i(c_i g_(i-1) + (1 - c_i) s_i), c_i = sigmoid(mix_i), each block attention and a network with gelu behind norms, both
    added to what they read. The output is keep · h + (1 - keep) W norm(g_l). Norms divide by the root mean square. With a cache, the
    keys and values of the side stand in it behind the model's.
    """

    squeeze: Float[Tensor, "p q d"]
    lift: Float[Tensor, "p k q"]
    mix: Float[Tensor, "l"]
    reads: Float[Tensor, "l three k k"]
    writes: Float[Tensor, "l k k"]
    inner: Float[Tensor, "l e k"]
    outer: Float[Tensor, "l k e"]
    widen: Float[Tensor, "d k"]
    keep: Float[Tensor, ""]
    heads: int
    causal: bool

    def check(self, model: nn.Module) -> None:
        table_of(model, self.key, self.at, "side network")
        config = cast(Any, model).config
        states, _, d = self.squeeze.shape
        got = (states, len(self.mix), d, self.reads.shape[1])
        want = (config.num_hidden_layers + 1, config.num_hidden_layers, config.hidden_size, 3)
        if got != want or self.heads < 1 or self.lift.shape[1] % self.heads:
            shown, fix = f"{want[1]} blocks, states of {want[2]}, a width of whole heads", "make it for this model"
            raise ShapeError("a side network does not fit", where=self.key, got=self.describe(), want=shown, fix=fix)

    def forward(self, host: nn.Module, call: Call, given: dict[str, Any]) -> Any:
        asked = given.get("output_hidden_states")
        asked = getattr(cast(Any, host).config, "output_hidden_states", False) if asked is None else asked
        self._may_run(given, asked)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._something_else_trains(host, given)):
            out = call({**given, "output_hidden_states": True})
        states = cast("tuple[Tensor, ...]", getattr(out, "hidden_states", None) or ())
        if len(states) != len(self.squeeze):
            self._refuse("states of blocks are missing", f"{len(states)} states", f"{len(self.squeeze)} states by name")
        last: Tensor = out.last_hidden_state
        side = self._run([h.detach() for h in states], self._caches(getattr(out, "past_key_values", None)), given)
        keep = self.keep.to(last.dtype)
        out.last_hidden_state = keep * last + (1 - keep) * f.linear(side, self.widen.to(side.dtype))
        out.hidden_states = (
            (*states[:-1], out.last_hidden_state if states[-1] is last else states[-1]) if asked else None
        )
        if getattr(out, "pooler_output", None) is not None:
            out.pooler_output = cast(Any, host).pooler(out.last_hidden_state)
        return out

    def _run(self, states: list[Tensor], caches: list[DynamicLayer] | None, given: dict[str, Any]) -> Tensor:
        """The side's last state, normalized."""
        seen = self._seen(given, states[0], caches[0].get_seq_length() if caches else 0)
        small = [self._small(h, i) for i, h in enumerate(states)]
        g = small[0]
        for i, s in enumerate(small[1:]):
            c = torch.sigmoid(self.mix[i]).to(g.dtype)
            g = c * g + (1 - c) * s
            g = g + self._attended(_normed(g), i, caches, seen)
            g = g + _through(f.gelu(_through(_normed(g), self.inner[i])), self.outer[i])
        return _normed(g)

    def _small(self, h: Tensor, i: int) -> Tensor:
        """A state of the model in the side's width."""
        return _through(f.gelu(_through(_normed(h), self.squeeze[i])), self.lift[i])

    def _attended(self, x: Tensor, i: int, caches: list[DynamicLayer] | None, seen: Tensor | None) -> Tensor:
        """What the attention of block i gives."""
        q, k, v = (_through(x, w).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in self.reads[i])
        if caches is not None:
            k, v = caches[i].update(k, v)
        made = f.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return _through(made.transpose(1, 2).flatten(2), self.writes[i])

    def _seen(self, given: dict[str, Any], x: Tensor, past: int) -> Bool[Tensor, "b 1 t s"] | None:
        """Which positions each one sees: itself, and of those that are no padding the earlier ones, or all. None: everything."""
        rows, length = x.shape[:2]
        mask: Tensor | None = given.get("attention_mask")
        if mask is None and not self.causal:
            return None
        whole = torch.ones(length, past + length, dtype=torch.bool, device=x.device)
        self_, seen = whole.tril(past) & whole.triu(past), (whole.tril(past) if self.causal else whole)[None, None]
        if mask is not None:
            seen = seen & mask[:, None, None, -(past + length) :].to(x.device).bool() | self_
        return seen.expand(rows, -1, -1, -1)

    def _caches(self, cache: Any) -> list[DynamicLayer] | None:
        """The side's own layers of a cache, which are added to one that has none."""
        if cache is None:
            return None
        from transformers.cache_utils import DynamicLayer

        held = vars(cache).setdefault(_MARK, {})
        if self.key not in held:
            held[self.key] = len(cache.layers)
            cache.layers.extend(DynamicLayer() for _ in self.mix)
        return cache.layers[held[self.key] : held[self.key] + len(self.mix)]

    def _something_else_trains(self, host: nn.Module, given: dict[str, Any]) -> bool:
        """Whether gradients are wanted of anything that the host computes with."""
        own = {id(p) for p in self.parameters()}
        return any(p.requires_grad and id(p) not in own for p in host.parameters()) or any(
            isinstance(t, Tensor) and t.requires_grad for t in given.values()
        )

    def _may_run(self, given: dict[str, Any], asked: Any) -> None:
        """Errors: ConflictError for other caches, for one that was filled without the side, for packed texts, and for chosen states."""
        from transformers import DynamicCache

        cache, mask, positions = (given.get(n) for n in ("past_key_values", "attention_mask", "position_ids"))
        if not isinstance(cache, DynamicCache | None):
            self._refuse("a side network does not go into this cache", type(cache).__name__, "a DynamicCache")
        strange = 0 if cache is None or self.key in vars(cache).get(_MARK, {}) else cache.get_seq_length()
        if cache is not None and strange > virtual_tokens(cache):
            self._refuse("a cache was made without this branch", f"{strange} tokens", "an empty cache")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            self._refuse("a side network does not go with this mask", "no row of numbers a text", "a mask of tokens")
        if mask is None and positions is not None and bool((positions.diff(dim=-1) != 1).any()):
            got = "positions that do not follow one another, and no mask"
            self._refuse("packed texts are not kept apart by a side network", got, "one text a row")
        if not isinstance(asked, bool):
            self._refuse("states are asked for by number", repr(asked), "output_hidden_states=True")

    def _refuse(self, what: str, got: str, want: str) -> NoReturn:
        fix = "call the model as weft.generate and weft.train do; or take the branch off with weft.unbranch(model)"
        raise ConflictError(what, where=self.key, got=got, want=want, fix=fix)

    def describe(self) -> str:
        return f"Side({self.lift.shape[1]}, {len(self.mix)} blocks)"


def _normed(x: Tensor) -> Tensor:
    return f.rms_norm(x, x.shape[-1:], eps=1e-6)


def _through(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer that computes in the input's dtype."""
    return f.linear(x, weight.to(x.dtype))
