"""LN tuning: whole norms, with other values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from weft.error import ShapeError, WeftError
from weft.expr import Dense
from weft.model import expressions, first_vectors, vectors
from weft.store.audit import Entry
from weft.store.peft.kind import FLOATS, Change, Found, Held, Kind, Reader, Written, heading
from weft.store.peft.settings import CONFIG, COPY, PREFIX, TENSORS, Settings, key, some, wrong

_PART = "ln_tuning_layers"


class LnTuning(Kind):
    """Modules whose own tensors have these values in place of the pretrained ones."""

    peft_type, method, order = "LN_TUNING", "layernorm", 3
    note = "whole norms; a bias of another layer is refused"

    def read(self, model: nn.Module, s: Settings, found: Mapping[str, Entry]) -> tuple[list[WeftError], Reader]:
        known, mine = vectors(model), dict[str, str]()
        for name in found:
            path, _, leaf = name.removeprefix(PREFIX).rpartition(f".{_PART}.")
            if path and name == key(path, f"{_PART}.{leaf}"):
                mine[name] = f"{path}.{leaf}"
        strays = [n for n in found if mine.get(n) not in known]
        want = f"a norm's tensors, {key('NORM', _PART)}.weight and so on"
        problems: list[WeftError] = some(
            strays, lambda n: wrong(f"a tensor is no part of {self.peft_type}", n, list(found[n].shape), want)
        )
        for name, vector in mine.items():
            shape, entry = tuple(known[vector].shape) if vector in known else (), found[name]
            if vector in known and (entry.shape != shape or entry.dtype not in FLOATS):
                got, fits = list(entry.shape), f"floats {list(shape)}"
                problems.append(ShapeError("a tensor does not fit", where=name, got=got, want=fits, fix=COPY))
        paths = {v.rpartition(".")[0] for v in mine.values()}
        lost = [v for v in known if v.rpartition(".")[0] in paths and v not in mine.values()]
        problems += some(lost, lambda v: wrong("a norm is incomplete", v, "no such tensor", "all of its tensors"))
        if not found:
            problems.append(wrong("the adapter has no norm", TENSORS, "0 tensors", want))
        problems += self._unlike(model, s, paths)

        def make(tensors: Held, name: str) -> Change:
            rows = {v: tensors[n].detach().to(known[v].dtype).reshape(1, -1).clone() for n, v in mine.items()}
            return Change(vectors={v: Dense(row) for v, row in rows.items()})

        return problems, make

    def _unlike(self, model: nn.Module, s: Settings, have: set[str]) -> list[WeftError]:
        """Modules of a list of targets that the folder lacks."""
        if not isinstance(s.target_modules, list):
            return []
        held: dict[str, bool] = {n: any(True for _ in m.parameters(recurse=False)) for n, m in model.named_modules()}
        meant = [n for n, own in held.items() if own and s.targets(n)]
        return some(
            [n for n in meant if n not in have],
            lambda n: wrong("the adapter is incomplete", f"{CONFIG}: target_modules", n, "its tensors"),
        )

    def find(self, model: nn.Module, only: str | None) -> Found:
        return Found(vectors=set(first_vectors(model)) if only is None else set(), rest=dict(expressions(model)))

    def refusals(self, model: nn.Module, found: Found) -> list[WeftError]:
        plain, problems = vectors(model), list[WeftError]()
        for name in sorted(found.vectors):
            path = name.rpartition(".")[0]
            held = [f"{path}.{n}" for n, _ in model.get_submodule(path).named_parameters()]
            if "Norm" not in type(model.get_submodule(path)).__name__ or any(n not in plain for n in held):
                problems.append(self.no(name, "a vector of no norm (bitfit)", "norms alone, which it holds whole"))
        return problems

    def write(self, model: nn.Module, found: Found) -> Written:
        paths = sorted({n.rpartition(".")[0] for n in found.vectors})
        tensors = {
            key(path, f"{_PART}.{leaf}"): p.detach()
            for path in paths
            for leaf, p in model.get_submodule(path).named_parameters()
        }
        return Written(tensors, {**heading(self.peft_type, model), "target_modules": paths})
