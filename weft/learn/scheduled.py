"""A schedule on a model: gradients are shown to it, its terms put in place, and the optimizer's state goes with them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from weft.error import ConflictError, FormatError
from weft.expr import Expr, SparseDelta, Sum, build, spec, tensors
from weft.learn.schedule import Rewrites, Schedule, Trained
from weft.learn.watch import watched
from weft.model.adapters import put_terms, trained_terms
from weft.store.files import read_json, write_json
from weft.store.tensors import read_tensors, write_tensors

TENSORS, TREES = "schedule.safetensors", "schedule.json"
"""What a checkpoint holds of the terms besides the tensors that train."""


class Scheduled:
    """A schedule and the terms that it rewrites."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        """Errors: ConflictError if no term that it takes trains."""
        self.model, self.schedule = model, schedule
        found = [t for t in trained_terms(model) if isinstance(t.term, schedule.takes)]
        if not found:
            want = f"a term of an adapter that trains, a {schedule.takes[0].__name__}"
            fix = f"add one first: weft.apply(model, '{schedule.adds}')"
            where, got = type(model).__name__, "no such term"
            raise ConflictError("there is nothing to rewrite", where=where, got=got, want=want, fix=fix)
        held = [Trained(f"{t.site} {t.role}", t.role, t.term, t.beside, {t.role: t.term}) for t in found]
        self.held = {at.name: at for at in held}

    def begin(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Put in place what the schedule begins with. Errors: those of the schedule, before anything changes."""
        with torch.no_grad():
            self._rewritten(self.schedule.begin(list(self.held.values())), optimizer)

    @contextmanager
    def watching(self, step: int) -> Generator[None]:
        """Within, backward passes show the schedule the gradients of this step, if it wants them."""
        held = self.held.values() if self.schedule.watches(step) else ()
        with watched((at.term, partial(self._see, at, step)) for at in held):
            yield

    def _see(self, at: Trained, step: int, gradient: Tensor) -> None:
        self.schedule.see(at, gradient, step)

    def settle(self, accelerator: Any) -> None:
        """Bring together what all processes noted in this step, in the same order in each."""
        mine = [(n, note, tuple(t.shape)) for n, at in self.held.items() for note, t in at.fresh.items()]
        said: list[tuple[str, str, tuple[int, ...]]] = gather_object(mine)
        for (name, note), shape in sorted({(name, note): shape for name, note, shape in said}.items()):
            at = self.held[name]
            value = at.fresh.pop(note, None)
            if note == "nominated":  # as many as there are, in every process
                value = at.values.new_zeros(0, dtype=torch.long) if value is None else value
                every = accelerator.gather(accelerator.pad_across_processes(value, pad_index=-1))
                at.notes[note] = every[every >= 0].unique()
            else:
                value = accelerator.reduce(at.values.new_zeros(shape) if value is None else value, "mean")
                at.notes[note] = at.notes[note] + value if note in at.notes else value

    def rewrite(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Let the schedule do what it does after this step."""
        with torch.no_grad():
            self._rewritten(self.schedule.after(step, list(self.held.values())), optimizer)

    def _rewritten(self, made: Rewrites, optimizer: torch.optim.Optimizer | None) -> None:
        table: dict[int, Mapping[str, Expr]] = {}
        for name, new in made.items():
            at = self.held[name]
            self._replace(at, new.named() if isinstance(new, Sum) else {at.role: new}, optimizer, table)
        put_terms(self.model, table)

    def _replace(
        self,
        at: Trained,
        parts: Mapping[str, Expr],
        optimizer: torch.optim.Optimizer | None,
        table: dict[int, Mapping[str, Expr]],
    ) -> None:
        """Note in `table` what takes a term's place. A trained tensor of the same shape stays the same parameter, with new numbers."""
        old, mine, term = at.term, at.values, parts[at.role]
        trained = next(p for p in term.parameters() if p.requires_grad)
        if trained is not mine:
            state = _followed(old, term, optimizer.state.pop(mine, {})) if optimizer is not None else {}
            if (trained.shape, trained.dtype) == (mine.shape, mine.dtype):
                mine.data.copy_(trained.data)
                term, trained = _holding(term, trained, mine), mine
            if optimizer is not None:
                _exchange(optimizer, mine, trained, state)
        table |= {id(t): {} for t in at.parts.values()} | {id(old): {**parts, at.role: term}}
        at.term, at.parts = term, table[id(old)]

    def save(self, folder: Path) -> None:
        """Write what the terms are besides the tensors that train, and all notes."""
        content: dict[str, Tensor] = {}
        terms: dict[str, Any] = {}
        for i, (name, at) in enumerate(self.held.items()):
            paths = {f"{role}/{p}": t for role, e in at.parts.items() for p, t in tensors(e).items()}
            content |= {f"{i}/{p}": t for p, t in paths.items() if t is not at.values}
            content |= {f"{i}/note/{n}": t for n, t in at.notes.items()}
            trains = next(p for p, t in paths.items() if t is at.values)
            parts = {role: spec(e) for role, e in at.parts.items()}
            terms[name] = {"parts": parts, "trains": trains, "shape": list(at.values.shape)}
        write_tensors(folder / TENSORS, content)
        write_json(folder / TREES, {"by": self._by(), "terms": terms})

    def restore(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        """Put back the terms and notes that `save` wrote; the numbers that train come from the trainer's own file.

        Errors: PathError where there are none; FormatError for those of another model or schedule.
        """
        said, content = read_json(folder / TREES), read_tensors(folder / TENSORS)
        table: dict[int, Mapping[str, Expr]] = {}
        if said.get("by") != self._by() or list(said["terms"]) != list(self.held):
            got = f"{len(said['terms'])} terms under {said.get('by')}"
            problem = _another(folder, got, f"{len(self.held)} under {self._by()}")
            raise problem
        for i, (at, of) in enumerate(zip(self.held.values(), said["terms"].values(), strict=True)):
            values = at.values
            held = {p.removeprefix(f"{i}/"): t.to(values.device) for p, t in content.items() if p.startswith(f"{i}/")}
            fits = list(values.shape) == of["shape"]
            held[of["trains"]] = values if fits else nn.Parameter(values.new_empty(of["shape"]))
            parts = {role: build(tree, held.__getitem__, f"{role}/") for role, tree in of["parts"].items()}
            self._replace(at, parts, optimizer, table)
            at.notes = {p.removeprefix("note/"): t for p, t in held.items() if p.startswith("note/")}
        put_terms(self.model, table)

    def _by(self) -> str:
        """What tells the schedule from others."""
        return f"{type(self.schedule).__module__}.{type(self.schedule).__qualname__}"


def refuse_scheduled(folder: Path) -> None:
    """Errors: FormatError for a checkpoint of a run with a schedule, where there is none."""
    if (folder / TREES).exists():
        problem = _another(folder, "a run with a schedule", "one without")
        raise problem


def _another(folder: Path, got: str, want: str) -> FormatError:
    fix = "remove the checkpoint folder, or train as before"
    return FormatError("a checkpoint is of another run", where=str(folder), got=got, want=want, fix=fix)


def _holding(term: Expr, old: nn.Parameter, new: nn.Parameter) -> Expr:
    """The term with one parameter for another."""
    held = {path: new if t is old else t for path, t in tensors(term).items()}
    return build(spec(term), held.__getitem__)


def _followed(old: Expr, new: Expr, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state of a term after its rewrite: of a sparse one what belongs to an entry follows it, and is zero of a new one.

    It begins anew where no entry stayed, and for other terms.
    """
    if not (isinstance(old, SparseDelta) and isinstance(new, SparseDelta)):
        return {}
    was, now = old.entries(), new.entries()
    stayed = torch.isin(now, was)
    if not bool(stayed.any()):
        return {}
    at = torch.searchsorted(was, now[stayed])

    def moved(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.shape != was.shape:
            return t
        return t.new_zeros(now.shape).masked_scatter(stayed, t[at])

    return {key: moved(t) for key, t in state.items()}


def _exchange(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, state: dict[str, Any]) -> None:
    """Let an optimizer move one parameter in place of another."""
    for group in optimizer.param_groups:
        group["params"][:] = [new if p is old else p for p in group["params"]]
    if state:
        optimizer.state[new] = state
