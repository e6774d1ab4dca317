"""Models of other vocabularies beside one: rows of embeddings and of the head go by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.error import ConflictError
from weft.expr import Dense
from weft.learn.tokenizer import source, tokenizer
from weft.model import expressions, fork, places, plain_tensors
from weft.model.weave import Original

SAID = 5
"""Tokens that a note names."""
_OWN = ("vocab", "merges", "unk_id")
"""What a tokenizer's model says of single tokens."""


def by_tokens(
    lead: nn.Module, others: Sequence[nn.Module], labels: Sequence[str]
) -> tuple[list[nn.Module], list[tuple[str, str]]]:
    """The others as sources of a merge, with the first one's tokens in its order; and what was lost or filled in, by label.

    Row i of embeddings, head and the head's bias is that of the token with the first one's id i; of tokens that a model has not, and
    rows without a token, the first one's, from which it differs there in nothing. A model that has the same tokens is itself.
    Errors: PathError for models without a tokenizer; ConflictError for tokenizers that cut texts in other ways, for vocabularies with
    nothing in common, and for weights that go by tokens elsewhere.
    """
    words, made, notes = _words(lead), list[nn.Module](), list[tuple[str, str]]()
    for label, model in zip(labels, others, strict=True):
        if type(model) is not type(lead) or _width(model) != _width(lead):
            made.append(model)  # which the merge refuses
            continue
        mine = _words(model)
        if differ := [k for k in words if k != "tokens" and words[k] != mine.get(k)]:
            got, want = f"another {', another '.join(differ)}", f"those of {source(lead)}"
            fix = "merge models whose tokenizers differ in their tokens alone"
            raise ConflictError("these tokenizers cut texts in other ways", where=label, got=got, want=want, fix=fix)
        if mine["tokens"] == words["tokens"] and _rows(model) == _rows(lead):
            made.append(model)
            continue
        made.append(_moved(model, lead, mine["tokens"], words["tokens"], label))
        for tokens, what in (
            (mine["tokens"].keys() - words["tokens"], "of its tokens are lost, which the result's tokenizer has not"),
            (words["tokens"].keys() - mine["tokens"], "of the result's tokens it has not: they are the first model's"),
        ):
            first = sorted(tokens)[:SAID]
            if tokens:
                more = ", ..." if len(tokens) > SAID else ""
                notes.append((label, f"{len(tokens)} {what}: {', '.join(map(repr, first))}{more}"))
    return made, notes


def _words(model: nn.Module) -> dict[str, Any]:
    """The ids of a model's tokens, and how its tokenizer cuts texts. Errors: PathError."""
    words = tokenizer(model)
    made = {"tokens": dict(words.get_vocab()), "kind": type(words).__name__}
    if not words.is_fast:
        return made
    held = json.loads(words.backend_tokenizer.to_str())
    model_ = {k: v for k, v in held["model"].items() if k not in _OWN}
    return made | {"kind": "", "model": model_, **{k: held.get(k) for k in ("normalizer", "pre_tokenizer")}}


def _moved(
    model: nn.Module, lead: nn.Module, mine: Mapping[str, int], want: Mapping[str, int], label: str
) -> nn.Module:
    """The model with the rows of another's tokens."""
    made, sites = fork(model), _tables(model, label)
    had, size = _rows(model), _rows(lead)
    at = torch.full((size,), -1)
    for token, i in want.items():
        if i < size and mine.get(token, had) < had:
            at[i] = mine[token]
    if not bool((at >= 0).any()):
        got, fix = "no token of it", "merge models of related vocabularies"
        raise ConflictError("these vocabularies have nothing in common", where=label, got=got, want="some", fix=fix)
    for name, there in zip(sites, _tables(lead, "the first model"), strict=False):
        place, like = places(made)[name], expressions(lead)[there].dense().detach()
        rows = Dense(_taken(expressions(model)[name].dense().detach(), like, at))
        place.shape, place.original = (size, *place.shape[1:]), Original(rows.dense)
        for path in place.modules:
            module = made.get_submodule(path)
            module.expr = rows
            for field in ("num_embeddings", "out_features"):
                if hasattr(module, field):
                    setattr(module, field, size)
    if (bias := _bias(made)) is not None and (other := _bias(lead)) is not None:
        bias.data = _taken(bias.detach(), other.detach(), at)
    config = cast(Any, made).config
    for held in (config, config.get_text_config()):
        if getattr(held, "vocab_size", None) == had:
            held.vocab_size = size
    return made


def _taken(rows: Float[Tensor, "v *d"], like: Float[Tensor, "w *d"], at: Int[Tensor, "w"]) -> Float[Tensor, "w *d"]:
    """Row `at` of these, or where that is negative the other's."""
    there = (at >= 0).view(-1, *[1] * (rows.dim() - 1))
    return torch.where(there, rows[at.clamp(min=0)], like.to(rows.dtype))


def _tables(model: nn.Module, label: str) -> list[str]:
    """The sites of embeddings and head. Errors: ConflictError for other tensors of as many rows or columns."""
    found, size, bias = _ends(model), _rows(model), _bias(model)
    sizes = {n: p.shape for n, p in places(model).items() if n not in found}
    sizes |= {n: tuple(t.shape) for n, t in plain_tensors(model).items() if t is not bias}
    if odd := [n for n, shape in sizes.items() if size in shape]:
        got, want = f"{list(sizes[odd[0]])}", "a vocabulary at the embeddings and the head alone"
        fix = "merge models of one vocabulary"
        raise ConflictError("this may go by tokens too", where=f"{label}: {odd[0]}", got=got, want=want, fix=fix)
    return found


def _ends(model: nn.Module) -> list[str]:
    """The sites that go by tokens: embeddings, then a head that is not tied to them. Errors: ConflictError if no embeddings are known."""
    try:
        ends = [cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        ends = [None, None]
    of = {id(model.get_submodule(path)): n for n, p in places(model).items() for path in p.modules}
    if id(ends[0]) not in of:
        kind, want, fix = type(model).__name__, "one table of tokens", "merge models of one vocabulary"
        raise ConflictError("tokens have no known place", where=kind, got="no embeddings", want=want, fix=fix)
    return list(dict.fromkeys(of[id(m)] for m in ends if id(m) in of))


def _width(model: nn.Module) -> int:
    """How many numbers an embedding has."""
    return places(model)[_ends(model)[0]].shape[1]


def _rows(model: nn.Module) -> int:
    """How many rows the embeddings have."""
    return places(model)[_ends(model)[0]].shape[0]


def _bias(model: nn.Module) -> nn.Parameter | None:
    """The head's bias."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return getattr(head, "bias", None)
