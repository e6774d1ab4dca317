"""The walker: run a model block by block over all batches, so that only one block's work is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.error import ConflictError, NumericError
from weft.model import places
from weft.model.blocks import blocks
from weft.model.branch import refuse_branches
from weft.stats.inputs import main_output, may_read, reading
from weft.stats.sums import InputSums

Batch = Mapping[str, Tensor]


@dataclass
class _Call:
    """How a block was called: everything but the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Walker:
    """Hidden states of every batch, moved through the blocks one block at a time.

    The model is run once with its blocks replaced by recorders, which gives the first hidden state and every block's
    other arguments. Batch 0 is checked against the plain model. Hidden states stay on the CPU.
    Errors: ConflictError for a model whose blocks cannot be replayed (the hidden state must be their first argument
    and result, and their other arguments must not depend on it), and for branches.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], *, check: bool = True) -> None:
        refuse_branches(model, "evidence")
        self.model, self.batches = model, batches
        self.path, self.blocks = blocks(model)
        self.hidden: list[Float[Tensor, "b t d"]] = []
        self.calls: list[list[_Call]] = []
        self.keep = [b["attention_mask"].bool() if "attention_mask" in b else None for b in batches]
        for batch in batches:
            first, calls = self._record(batch)
            self.calls.append(calls)
            self.hidden.append(first)
        self._first = self.hidden[0]
        if check:
            self._check()

    def _record(self, batch: Batch) -> tuple[Tensor, list[_Call]]:
        """The first hidden state, and how each block is called. Errors: ConflictError where blocks hand on more than it."""
        calls: list[_Call] = []
        try:
            with torch.no_grad(), self._replaced(lambda h, call: calls.append(call) or h) as entered:
                forward(self.model, batch)
        except (TypeError, ValueError, IndexError) as e:  # what is missing, the model finds out
            if self._tuple_result() < 2:
                raise
            raise ConflictError(
                "this model cannot be walked block by block",
                where=f"{type(self.model).__name__}.{self.path}",
                got=f"blocks that hand on {self._tuple_result()} things",
                want="the hidden state alone",
                fix="use methods that need no data",
            ) from e
        return entered[0], calls

    @contextmanager
    def _replaced(self, act: Callable[[Tensor, _Call], Tensor]) -> Generator[list[Tensor]]:
        """Blocks that call `act(hidden, call)` instead of computing; yields the hidden states that entered."""
        entered: list[Tensor] = []
        like = self._tuple_result() > 0

        def recorder(*args: Any, **kwargs: Any) -> Any:
            named = "hidden_states" in kwargs
            hidden = kwargs.pop("hidden_states") if named else args[0]
            entered.append(hidden)
            out = act(hidden, _Call(() if named else tuple(args[1:]), kwargs))
            return (out,) if like else out

        with forwards(self.blocks, lambda _: recorder):
            yield entered

    def _tuple_result(self) -> int:
        """How many things a block returns in a tuple, 0 for a tensor; found by running the first one once on batch 0."""
        if not hasattr(self, "_tuple"):
            results: list[Any] = []

            def take(*seen: Any) -> None:
                results.append(seen[-1])

            hook = self.blocks[0].register_forward_hook(take)
            with torch.no_grad(), _stop_after(self.blocks[0]):
                forward(self.model, {k: v[:1] for k, v in self.batches[0].items()})
            hook.remove()
            self._tuple = len(results[0]) if isinstance(results[0], tuple) else 0
        return self._tuple

    def _check(self) -> None:
        hidden = self._first
        for i in range(len(self.blocks)):
            hidden = self._run(i, 0, hidden)
        seen = self._finish(0, hidden)
        with torch.no_grad():
            want = forward(self.model, self.batches[0])
        gap = float((seen - want).abs().max() / want.abs().max().clamp(min=1e-9))
        if gap != gap:
            return  # not finite: the site that reads it is named where its sums are checked
        if not gap < 1e-4:
            raise ConflictError(
                "this model cannot be walked block by block",
                where=f"{type(self.model).__name__}.{self.path}",
                got=f"output off by {gap:.1e} of its largest value",
                want="the plain model's output",
                fix="report the model's type; its blocks depend on more than their first argument",
            )

    def _run(self, block: int, batch: int, hidden: Tensor) -> Tensor:
        call = self.calls[batch][block]
        with torch.no_grad():
            out = self.blocks[block](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _finish(self, batch: int, hidden: Tensor) -> Tensor:
        with torch.no_grad(), self._replaced(lambda _, __: hidden):
            return forward(self.model, self.batches[batch])

    def step(self, block: int, edges: Edges | None = None, *, keep: bool = True) -> None:
        """Run one block over every batch. `edges` sums what its sites read; `keep` adopts the outputs as hidden states."""
        for i, hidden in enumerate(self.hidden):
            with observing(self.model, f"{self.path}.{block}.", edges, self.keep[i]):
                out = self._run(block, i, hidden)
            if keep:
                self.hidden[i] = out

    def finish(self, edges: Edges | None = None) -> Iterator[Tensor]:
        """Run what follows the blocks, from today's hidden states; yields each batch's output."""
        for i, hidden in enumerate(self.hidden):
            with observing(self.model, "", edges, self.keep[i]):
                yield self._finish(i, hidden)


class _Stop(Exception):
    """Ends a forward pass that has shown what it had to."""


@contextmanager
def _stop_after(module: nn.Module) -> Generator[None]:
    def stop(*_: Any) -> None:
        raise _Stop

    hook = module.register_forward_hook(stop)
    try:
        yield
    except _Stop:
        pass
    finally:
        hook.remove()


@contextmanager
def forwards(modules: Iterable[nn.Module], make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Generator[None]:
    """While open, each module's `forward` is `make(forward)`."""
    before = [(m, m.__dict__.get("forward")) for m in modules]
    for m, _ in before:
        m.forward = make(m.forward)
    try:
        yield
    finally:
        for m, own in before:
            del m.forward
            if own is not None:
                m.forward = own


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """The model's main output: logits, of images by texts too, or the last hidden state of a model without a head.

    Errors: those of `may_read`; ConflictError for a batch on another device.
    """
    may_read(model, batch)
    here, there = next(iter(batch.values())).device, next(model.parameters()).device
    if here != there:
        raise ConflictError(
            "a batch and its model lie on different devices",
            where=type(model).__name__,
            got=f"inputs on {here}, the model on {there}",
            want="one device; evidence and scores are taken on the CPU",
            fix="model.cpu(), and back afterwards",
        )
    config = model.config if hasattr(model, "config") else cast(Any, model).module.config  # inside DDP
    with reading(model, batch):
        out = model(**batch, **({"use_cache": False} if getattr(config, "use_cache", False) else {}))
    return main_output(model, out)


class Edges:
    """Sums of what sites read. Sites that are given the same tensor share an edge, named after the first of them."""

    def __init__(self, only: frozenset[str] | None = None) -> None:
        self.only = only
        self.of: dict[str, str] = {}
        """Site to edge."""
        self.sums: dict[str, InputSums] = {}
        self.calls = 0
        """Calls that are over: batches."""
        self._alive: list[tuple[Tensor, str]] = []

    def see(self, name: str, x: Float[Tensor, "*b n"], keep: Tensor | None) -> None:
        """Add what site `name` reads; the same tensor counts once a call. Padding (`keep` false) is left out.

        Errors: NumericError naming site, batch and sample if a value or the sum of its squares is not finite.
        """
        if self.only is not None and name not in self.only:
            return
        if self._first(name, x):
            edge = self.of[name]
            sums = self.sums.setdefault(edge, self.zero(x.shape[-1], x.device))
            kept = keep if keep is not None and x.shape[:-1] == keep.shape else None
            if not sums.add(x[kept] if kept is not None else x.reshape(-1, x.shape[-1])):
                seen = x if kept is None else x.masked_fill(~kept.unsqueeze(-1), 0)
                problem = not_finite(name, self.calls, seen)
                raise problem

    def zero(self, n: int, device: torch.device) -> InputSums:
        """What an edge of n features begins with."""
        return InputSums.zero(n, device)

    def _first(self, name: str, x: Tensor) -> bool:
        """Note that `name` reads x; whether nothing has read it before in this call."""
        edge = next((e for t, e in self._alive if t is x), None)
        if edge is not None:
            self.of.setdefault(name, edge)
            return False
        self._alive.append((x, self.of.setdefault(name, name)))
        return True

    def end(self) -> None:
        """A call is over: its tensors may go, and their addresses may be used again."""
        self._alive = []
        self.calls += 1

    def groups(self) -> list[tuple[str, ...]]:
        """The sites of each edge, in the order they were first called."""
        return [tuple(s for s, e in self.of.items() if e == edge) for edge in dict.fromkeys(self.of.values())]


class _Readers(Edges):
    """Which sites read the same tensor, and no sums."""

    def see(self, name: str, x: Float[Tensor, "*b n"], keep: Tensor | None) -> None:
        self._first(name, x)


def readers(model: nn.Module) -> list[tuple[str, ...]] | None:
    """Sites by the input they read, in the order of the computation, as one pass of transformers' dummy inputs shows it.

    Sites that it does not reach are left out. None for a model that cannot run on them: it reads something else.
    """
    edges = _Readers()
    try:
        with torch.no_grad(), observing(model, "", edges, None):
            model(**{k: v.to(cast(Any, model).device) for k, v in cast(Any, model).dummy_inputs.items()})
    except Exception:  # whatever a model says to inputs that it is not made for
        return None
    return edges.groups()


def not_finite(name: str, batch: int, x: Tensor, sample: int | None = None) -> NumericError:
    """The error for a site whose values in a batch [b ...] are not finite or too large to square."""
    size = x.detach().float().abs().nan_to_num(nan=torch.inf).reshape(len(x), -1).amax(1)
    bad = x.numel() - int(torch.isfinite(x).sum())
    return NumericError(
        "an activation is not finite",
        where=f"{name}, batch {batch}, sample {int(size.argmax()) if sample is None else sample}",
        got=f"{bad} of {x.numel()} entries NaN or infinite" if bad else f"values up to {float(size.max()):.1e}",
        want="finite values whose squares are finite",
        fix="look for NaN or huge weights before it; compute in float32",
    )


def _reader(edges: Edges, name: str, keep: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        edges.see(name, cast(Any, module).inputs(args[0]), keep)

    return read


@contextmanager
def observing(model: nn.Module, prefix: str, edges: Edges | None, keep: Tensor | None) -> Generator[None]:
    """While open, `edges` sees what each woven layer but embeddings under `prefix` reads."""
    hooks: list[Any] = []
    for name, place in places(model).items() if edges is not None else ():
        for path in place.modules:
            module = model.get_submodule(path)
            if edges is not None and path.startswith(prefix) and not isinstance(module, nn.Embedding):
                hooks.append(module.register_forward_pre_hook(_reader(edges, name, keep)))
    try:
        yield
    finally:
        for h in hooks:
            h.remove()
        if edges is not None:
            edges.end()
