"""Virtual tokens of a transformer: before its embedded input (prompt), or as keys and values of every layer (prefix)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.error import ConflictError, ShapeError
from weft.model.branch import HELD, Branch, Call

if TYPE_CHECKING:  # it takes longer to import than a small merge
    from transformers import Cache, DynamicCache
    from transformers.cache_utils import DynamicLayer

_MARK = "weft_virtual"
"""Where a cache says which branches' tokens it holds, and how many."""
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids"}


def trunk(model: nn.Module) -> str:
    """The path of the transformer under a model's head; the model itself where there is no head."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


class Prompt(Branch):
    """Virtual tokens at the input: the host runs on [vectors, embedded x], and what it gives for the first k is left out.

    Padding, if any on the left, lies between them and the text. With a cache they go in once.
    """

    vectors: Float[Tensor, "k d"]

    def tokens(self) -> Float[Tensor, "k d"]:
        """The virtual tokens."""
        return self.vectors

    def check(self, model: nn.Module) -> None:
        table = table_of(model, self.key, self.at)
        room = getattr(cast(Any, model).config, "max_position_embeddings", None) or 1 << 60
        count, size = self.tokens().shape
        if size != table.embedding_dim or not 0 < count < room:
            want = f"1 to {room - 1} vectors of {table.embedding_dim}"
            fix = "make it for this model; fewer tokens leave room for text"
            raise ShapeError("a prompt does not fit", where=self.key, got=[count, size], want=want, fix=fix)

    def forward(self, host: nn.Module, call: Call, given: dict[str, Any]) -> Any:
        entered, past = _past(self, host, given)
        tokens = self.tokens()
        count = len(tokens)
        wide = _wider(self, host, given, count, past)
        if entered:
            return call(wide)
        x = given.get("inputs_embeds")
        x = cast(Any, host).get_input_embeddings()(wide.pop("input_ids")) if x is None else x
        rows = len(x)
        wide["inputs_embeds"] = torch.cat([tokens.to(x.dtype).expand(rows, -1, -1), x], 1)
        if (positions := wide.get("position_ids")) is not None:
            new = torch.arange(past, past + count, device=positions.device).expand(len(positions), -1)
            wide["position_ids"] = torch.cat([new, positions], 1)
        if (types := given.get("token_type_ids")) is not None:
            wide["token_type_ids"] = torch.cat([types.new_zeros(len(types), count), types], 1)
        out = call(wide)
        _mark(getattr(out, "past_key_values", None), self.key, count)
        return _without(self, host, out, count)

    def describe(self) -> str:
        return f"{type(self).__name__}({len(self.tokens())})"


class Prefix(Branch):
    """Virtual keys and values: every layer's attention has k of them before those of the text.

    They reach it as the first entries of the model's cache, which is made for the call where the caller has none.
    """

    keys: Float[Tensor, "l h k d"]
    values: Float[Tensor, "l h k e"]

    def check(self, model: nn.Module) -> None:
        table_of(model, self.key, self.at)
        layers, _, count, _ = self.keys.shape
        cache = empty_cache(model, self.key)
        least = min(getattr(c, "sliding_window", 1 << 60) for c in cache.layers)
        want = own_keys(model, self.at)
        got = [(tuple(k.shape), tuple(v.shape)) for k, v in zip(self.keys, self.values, strict=True)]
        fits = [((k.shape[1], count, k.shape[3]), (v.shape[1], count, v.shape[3])) for k, v in want]
        if got != fits or not 0 < count < least or layers != len(want):
            shown = f"{len(want)} layers of [heads k size] {fits[:1]}, k from 1 to {least - 1}"
            fix = "make it for this model"
            raise ShapeError("a prefix does not fit", where=self.key, got=list(self.keys.shape), want=shown, fix=fix)

    def forward(self, host: nn.Module, call: Call, given: dict[str, Any]) -> Any:
        if host.training and any(getattr(m, "gradient_checkpointing", False) for m in host.modules()):
            got, fix = "gradient checkpointing, which drops the cache that a prefix is in", "train it without"
            _refuse(self, "a prefix cannot be trained so", got, "kept activations", fix)
        entered, past = _past(self, host, given)
        wide, (rows, length) = _wider(self, host, given, self.keys.shape[2], past), _size(self, given)
        cache, asked = given.get("past_key_values"), given.get("use_cache")
        keep = cache is not None or (getattr(cast(Any, host).config, "use_cache", True) if asked is None else asked)
        if not entered:
            cache = self._filled(host, rows, cache)
        before = cast("DynamicCache", cache).get_seq_length()
        out = call({**wide, "past_key_values": cache})
        if cast("DynamicCache", cache).get_seq_length() < before + length:
            got, fix = "a layer that was given no cache", "take the prefix off with weft.unbranch(model)"
            _refuse(self, "this model did not read its prefix", got, "a model that reads its cache", fix)
        if not keep:
            out.past_key_values = None
        return out

    def _filled(self, host: nn.Module, rows: int, cache: DynamicCache | None) -> DynamicCache:
        """The cache, or a new one, with this prefix for every row."""
        made = _cache(host) if cache is None else cache
        table = cast(Any, host).get_input_embeddings()
        dtype = table.compute if hasattr(table, "compute") else table.weight.dtype
        for i, (k, v) in enumerate(zip(self.keys.to(dtype), self.values.to(dtype), strict=True)):
            made.update(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1), i)
        _mark(made, self.key, self.keys.shape[2])
        return made

    def describe(self) -> str:
        return f"Prefix({self.keys.shape[2]})"


def table_of(model: nn.Module, where: str, at: str, what: str = "virtual tokens") -> nn.Embedding:
    """The input embeddings of a model that can take virtual tokens, or `what`, at this place. Errors: ConflictError with the reason."""
    host, config = model.get_submodule(at), getattr(model, "config", None)
    takes = set(inspect.signature(type(host).forward).parameters)
    missing = {"input_ids", "inputs_embeds", "attention_mask"} - takes
    generates = bool(getattr(model, "can_generate", lambda: False)())
    table = getattr(host, "get_input_embeddings", lambda: None)() if not missing else None
    if at != trunk(model):
        reason = f"{at or 'the model itself'}, which is not its transformer"
    elif getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        reason = "an encoder and a decoder: which of them is meant is not one place"
    elif missing or not isinstance(table, nn.Embedding):
        reason = f"a forward without {', '.join(sorted(missing)) or 'an embedding of tokens'}"
    elif generates and "past_key_values" not in takes:
        reason = "a state that is no cache of keys and values"
    else:
        return table
    want, fix = "a transformer of one stack that reads tokens", "adapt its weights: weft.apply(model, 'lora')"
    raise ConflictError(f"this place takes no {what}", where=where, got=reason, want=want, fix=fix)


def _cache(model: nn.Module) -> DynamicCache:
    """A new cache of the kind that this model has."""
    from transformers import DynamicCache

    return DynamicCache(config=cast(Any, model).config)


def empty_cache(model: nn.Module, where: str) -> DynamicCache:
    """An empty cache for a decoder. Errors: ConflictError for a model whose layers keep something else, or nothing."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = _cache(model)
    kinds = {type(c) for c in cache.layers}
    if kinds - {DynamicLayer, DynamicSlidingWindowLayer} or not getattr(model, "can_generate", lambda: False)():
        got = ", ".join(sorted(k.__name__ for k in kinds)) if kinds - {DynamicLayer} else "no cache: it is no decoder"
        want, fix = "a decoder whose layers all keep keys and values", "use prompt, or adapt the weights"
        raise ConflictError("this model takes no prefix", where=where, got=got, want=want, fix=fix)
    return cache


def own_keys(model: nn.Module, at: str, ids: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Every layer's keys [1 h k d] and values [1 h k e] for these tokens (one, if not given), without the host's branches and dropout.

    Errors: ConflictError for a layer that keeps none of its own.
    """
    host, cache = cast(Any, model.get_submodule(at)), empty_cache(model, at)
    ids = torch.zeros(1, 1, dtype=torch.long) if ids is None else ids
    modes = {m: m.training for m in host.modules()}
    host.eval()
    with torch.no_grad():
        type(host).forward(host, input_ids=ids.to(host.device), past_key_values=cache, use_cache=True)
    for m, training in modes.items():
        m.training = training
    held = cast("list[DynamicLayer]", cache.layers)
    if any(not isinstance(c.keys, Tensor) for c in held):
        got, want, fix = "a layer that shares another's", "keys and values in every layer", "use prompt"
        raise ConflictError("this model takes no prefix", where=at, got=got, want=want, fix=fix)
    return [(cast(Tensor, c.keys), cast(Tensor, c.values)) for c in held]


def _past(branch: Branch, host: nn.Module, given: dict[str, Any]) -> tuple[bool, int]:
    """Whether the branch's tokens are in the cache, and how many others are there that this branch is told of.

    Branches around this one show their tokens to it as text. Errors: ConflictError for a cache of another kind, or of text that
    was read without this branch.
    """
    from transformers import DynamicCache

    cache = given.get("past_key_values")
    if cache is None:
        return False, 0
    if not isinstance(cache, DynamicCache):
        got, fix = type(cache).__name__, "leave cache_implementation out"
        _refuse(branch, "virtual tokens do not go into this cache", got, "a DynamicCache", fix)
    held, length = vars(cache).get(_MARK, {}), cache.get_seq_length()
    entered, virtual = branch.key in held, sum(held.values())
    if length < virtual or (not entered and length != virtual):
        got, fix = f"{length} tokens, {virtual} of them virtual", "begin with an empty cache"
        _refuse(branch, "a cache was made without this branch, or cut", got, "one that was made with it", fix)
    order = cast("list[Branch]", list(cast(Iterable[Any], host.get_submodule(HELD))))
    inner = [b.key for b in order[: next(i for i, b in enumerate(order) if b is branch) + 1]]
    return entered, length - sum(n for key, n in held.items() if key in inner)


def virtual_tokens(cache: Cache) -> int:
    """How many tokens of a cache are virtual."""
    return sum(vars(cache).get(_MARK, {}).values())


def _mark(cache: Any, key: str, count: int) -> None:
    """Note in a cache that it holds these tokens."""
    from transformers import Cache

    if isinstance(cache, Cache):
        vars(cache)[_MARK] = {**vars(cache).get(_MARK, {}), key: count}


def _size(branch: Branch, given: dict[str, Any]) -> tuple[int, int]:
    """Rows and tokens of the input. Errors: ConflictError if there is none."""
    x = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if x is None:
        _refuse(branch, "there is no text", "neither tokens nor embeddings", "one of them", _AS)
    return int(x.shape[0]), int(x.shape[1])


def _wider(branch: Branch, host: nn.Module, given: dict[str, Any], count: int, past: int) -> dict[str, Any]:
    """The arguments with a mask that shows `count` tokens more, on the left, and positions behind them.

    Errors: ConflictError for arguments that do not say of each token where it is and what it sees, one row a text.
    """
    wide, (_, length) = dict(given), _size(branch, given)
    others = [n for n, t in given.items() if isinstance(t, Tensor) and t.dim() and n not in _KNOWN]
    flat = all(given[n].dim() == 2 for n in _KNOWN - {"inputs_embeds"} if isinstance(given.get(n), Tensor))
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if others or not flat or not isinstance(mask, Tensor | None):
        got = ", ".join(others) or "a mask, positions or types that are not one row of numbers a text"
        _refuse(branch, "virtual tokens do not go with these arguments", got, "tokens, mask and positions", _AS)
    if given.get("token_type_ids") is not None and not getattr(cast(Any, host).config, "type_vocab_size", 0):
        _refuse(branch, "virtual tokens have no type here", "token_type_ids", "a model with a table of them", _AS)
    if mask is not None:
        if mask.shape[1] != past + length:
            got, want = f"a mask of {mask.shape[1]}", f"one of {past + length}: {past} tokens before, {length} now"
            _refuse(branch, "a mask does not fit the text", got, want, _AS)
        if _windowed(host) and not bool(mask[:, 0].all()):
            got, want = "padding on the left, which moves virtual tokens away from the text", "padding on the right"
            _refuse(
                branch, "layers see a window of tokens, not of text", got, want, "pad on the right, or run text by text"
            )
        wide["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], 1)
    if positions is not None:
        following = torch.arange(past, past + length, device=positions.device)
        if mask is None and not torch.equal(positions, following.expand_as(positions)):
            got, want = "positions that do not follow one another, and no mask", "one text a row"
            _refuse(branch, "packed texts cannot share virtual tokens", got, want, _AS)
        wide["position_ids"] = positions + count
    return wide


def _windowed(host: nn.Module) -> bool:
    """Whether layers see a window of what came before, or a state of it, in which padding has room."""
    from transformers.cache_utils import DynamicLayer

    return {type(c) for c in _cache(host).layers} - {DynamicLayer} != set()


_AS = "call the model as weft.generate and weft.train do; or take the branch off with weft.unbranch(model)"


def _refuse(branch: Branch, what: str, got: str, want: str, fix: str) -> NoReturn:
    raise ConflictError(what, where=branch.key, got=got, want=want, fix=fix)


def _without(branch: Branch, host: nn.Module, out: Any, count: int) -> Any:
    """The host's output without that of the first `count` positions; a pooled one is pooled anew.

    Errors: ConflictError for an output with other parts.
    """
    from transformers.utils.generic import ModelOutput

    if not isinstance(out, ModelOutput):
        _refuse(branch, "an output has no names", type(out).__name__, "return_dict=True", _AS)
    cut: dict[str, Any] = {}
    for name, part in out.items():
        if name == "last_hidden_state":
            cut[name] = part[:, count:]
        elif name == "hidden_states":
            cut[name] = tuple(h[:, count:] for h in part)
        elif name == "attentions":
            cut[name] = tuple(a[:, :, count:] for a in part)
        elif name == "pooler_output":
            cut[name] = cast(Any, host).pooler(cast(Any, out).last_hidden_state[:, count:])
            if cut[name].shape != part.shape:
                _refuse(branch, "this model pools in its own way", type(host).__name__, "a pooler of states", _AS)
        elif name != "past_key_values":
            _refuse(branch, "an output has more parts than tokens", str(name), "hidden states", _AS)
    for name, part in cut.items():
        setattr(out, name, part)
    return out
