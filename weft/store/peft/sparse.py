"""SHiRA: a few entries of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.error import ConflictError
from weft.expr import Expr, SparseDelta
from weft.store.peft.kind import Held
from weft.store.peft.layers import At
from weft.store.peft.settings import COPY, Rank, Settings, key
from weft.store.peft.terms import Single

_VALUES, _AT = "shira_weight", "shira_indices"


class ShiraSettings(Settings):
    """The settings of a SHiRA."""

    r: Rank


class Shira(Single[SparseDelta]):
    """r (m + n) entries beside a weight [m n], at the rows and columns that the file has."""

    peft_type, method, settings = "SHIRA", "sparse", ShiraSettings
    note = "other numbers of entries than r (m + n) are filled up with zeros, and refused where that is more than all"
    idle = ("mask_type", "random_seed", "init_weights")
    parts, integers, transposed, want = (_VALUES, _AT), (_AT,), False, "a SparseDelta term"

    def shapes(self, s: ShiraSettings, at: At) -> dict[str, tuple[int, ...]]:
        count = s.r * (at.m + at.n)
        return {_VALUES: (count,), _AT: (2, count)}

    def value(self, s: ShiraSettings, at: At, t: Held, common: Held) -> Expr:
        rows, columns = t[_AT].long()
        good = bool(((rows >= 0) & (rows < at.m) & (columns >= 0) & (columns < at.n)).all())
        places, order = (rows * at.n + columns).sort()
        if not good or not bool((places.diff() > 0).all()):
            what, want = "an entry has no place, or two have one", f"places of a weight [{at.m} {at.n}], each once"
            raise ConflictError(what, where=key(at.path, _AT), got="another place", want=want, fix=COPY)
        counts = torch.bincount(rows, minlength=at.m).int()
        return SparseDelta(counts, columns[order].int(), t[_VALUES][order].clone(), at.n)

    def form(self, term: Expr) -> SparseDelta | None:
        return term if isinstance(term, SparseDelta) else None

    def content(self, forms: Mapping[str, SparseDelta]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        r = max(-(-len(f.values) // sum(f.shape)) for f in forms.values())
        made: dict[str, dict[str, Tensor]] = {}
        for path, f in forms.items():
            (m, n), lacking = f.shape, r * sum(f.shape) - len(f.values)
            if r * (m + n) > m * n:
                got, want = f"{len(f.values)} entries", f"{r * (m + n)}, which is more than [{m} {n}] has"
                problem = self.no(path, got, want)
                raise problem
            mask = f.mask()
            free = (~mask).flatten().nonzero()[:lacking, 0]
            at = torch.cat([mask.flatten().nonzero()[:, 0], free])
            values = torch.cat([f.values.detach(), f.values.new_zeros(lacking)])
            made[path] = {_VALUES: values, _AT: torch.stack([at // n, at % n]).int()}
        return made, {"r": r, "mask_type": "random"}
