"""VeRA and FourierFT: what is trained are a few numbers, the rest is shared or drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from weft.error import WeftError
from weft.expr import Basis, Dense, Diagonal, Expr, Product
from weft.store.audit import Entry
from weft.store.peft.kind import FLOATS, Held
from weft.store.peft.layers import At
from weft.store.peft.settings import CONFIG, Number, Rank, Ranks, Settings, first, wrong
from weft.store.peft.terms import Single

_B, _D = "vera_lambda_b", "vera_lambda_d"
_UP, _DOWN = "base_model.vera_B", "base_model.vera_A"
_Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


class VeraSettings(Settings):
    """The settings of a VeRA."""

    r: Rank
    save_projection: bool = True

    def odd(self) -> dict[str, Any]:
        drawn = {} if self.save_projection else {"save_projection": False}
        return super().odd() | drawn


Scaled = tuple[Float[Tensor, "m"], Float[Tensor, "m r"], Float[Tensor, "r"], Float[Tensor, "r n"]]


class Vera(Single[Scaled]):
    """diag(b) B diag(d) A beside a weight: A and B are the first columns and rows of one pair for all layers."""

    peft_type, method, settings = "VERA", "vera", VeraSettings
    note = "refused without its projections (`save_projection` false)"
    idle = ("vera_dropout", "d_initial", "init_weights", "projection_prng_key")
    parts, shared = (_B, _D), (_UP, _DOWN)
    want = "a product of a diagonal, a frozen matrix, a diagonal and a frozen matrix"

    def shapes(self, s: VeraSettings, at: At) -> dict[str, tuple[int, ...]]:
        return {_B: (at.m,), _D: (s.r,)}

    def lacks(self, s: VeraSettings, found: Mapping[str, Entry], mine: Collection[At]) -> list[WeftError]:
        m, n = max((at.m for at in mine), default=1), max((at.n for at in mine), default=1)
        problems: list[WeftError] = []
        for name, want in ((_UP, (m, s.r)), (_DOWN, (s.r, n))):
            entry = found.get(name)
            good = entry is not None and entry.dtype in FLOATS and len(entry.shape) == 2
            if entry is None or not good or any(a < b for a, b in zip(entry.shape, want, strict=True)):
                got = list(entry.shape) if entry is not None else "no such tensor"
                problems.append(wrong("the projection does not fit", name, got, f"floats, {list(want)} at least"))
        return problems

    def common(self, s: VeraSettings, held: Held, mine: Collection[At]) -> dict[str, Tensor]:
        """The rows and columns of the pair that layers use, once for each size."""
        made = {f"{_UP} {m}": held[_UP][:m, : s.r].clone() for m in {at.m for at in mine}}
        return made | {f"{_DOWN} {n}": held[_DOWN][: s.r, :n].clone() for n in {at.n for at in mine}}

    def value(self, s: VeraSettings, at: At, t: Held, common: Held) -> Expr:
        up, down = Dense(common[f"{_UP} {at.m}"]), Dense(common[f"{_DOWN} {at.n}"])
        return Product(Diagonal(t[_B]), up, Diagonal(t[_D]), down)

    def form(self, term: Expr) -> Scaled | None:
        match tuple(term.kids()) if isinstance(term, Product) else ():
            case (Diagonal() as b, up, Diagonal() as d, down) if up.frozen() and down.frozen():
                return b.d, up.dense(), d.d, down.dense()
            case _:
                return None

    def content(self, forms: Mapping[str, Scaled]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """One pair whose slices all layers have, if there is one; else each shape's own, one beside the other, d zero elsewhere."""
        tall, wide = (max((f[i] for f in forms.values()), key=lambda t: t.numel()) for i in (1, 3))
        if all(_begins(tall, f[1], 0) and _begins(wide, f[3], 1) for f in forms.values()):
            made = {path: {_B: f[0], _D: f[2]} for path, f in forms.items()}
            return made, _settings(tall, wide)
        pairs: list[tuple[Tensor, Tensor]] = []
        slot: dict[str, int] = {}
        for path, (_, up, _, down) in forms.items():
            at = next((i for i, p in enumerate(pairs) if _same(p[0], up) and _same(p[1], down)), len(pairs))
            pairs += [(up, down)] if at == len(pairs) else []
            slot[path] = at
        m, n = max(up.shape[0] for up, _ in pairs), max(down.shape[1] for _, down in pairs)
        tall = torch.cat([pad(up, (0, 0, 0, m - up.shape[0])) for up, _ in pairs], 1)
        wide = torch.cat([pad(down, (0, n - down.shape[1])) for _, down in pairs])
        starts = [sum(len(down) for _, down in pairs[:i]) for i in range(len(pairs))]
        made = {
            path: {_B: b, _D: pad(d, (starts[slot[path]], len(wide) - len(d) - starts[slot[path]]))}
            for path, (b, _, d, _) in forms.items()
        }
        return made, _settings(tall, wide)


def _settings(up: Tensor, down: Tensor) -> dict[str, Any]:
    return {"r": len(down), "save_projection": True, "bias": "none", "shared": {_UP: up, _DOWN: down}}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _begins(whole: Tensor, part: Tensor, dim: int) -> bool:
    """Whether a matrix is the first rows (0) or columns (1) of another."""
    return part.shape[dim] <= whole.shape[dim] and _same(whole.narrow(dim, 0, part.shape[dim]), part)


class FourierSettings(Settings):
    """The settings of a FourierFT."""

    n_frequency: Rank
    scaling: Number
    random_loc_seed: _Seed
    n_frequency_pattern: Ranks | None = None

    def count(self, path: str) -> int:
        """How many frequencies a layer has: those of a name that is the end of its path come before those of its path."""
        whole = (self.n_frequency_pattern or {}).get(path, self.n_frequency)
        return first(self.n_frequency_pattern, path.partition(".")[2], whole)

    def patterns(self) -> dict[str, list[str]]:
        return super().patterns() | {"n_frequency_pattern": [*(self.n_frequency_pattern or {})]}


class Fourier(Single[Basis]):
    """The real part of an inverse Fourier transform of a few coefficients: Σ c cos(2π (p i / m + q j / n)) scaling / (m n)."""

    peft_type, method, settings = "FOURIERFT", "fourierft", FourierSettings
    note = "one `scaling` for all shapes: other layers' coefficients are multiplied"
    idle, parts = ("init_weights",), ("fourierft_spectrum",)
    want = "a fourier basis of drawn places (fourier_mt19937), of one seed for all weights"

    def shapes(self, s: FourierSettings, at: At) -> dict[str, tuple[int, ...]]:
        return {self.parts[0]: (s.count(at.path),)}

    def why(self, s: FourierSettings, at: At) -> str:
        return f"n_frequency {s.count(at.path)} by {CONFIG}"

    def value(self, s: FourierSettings, at: At, t: Held, common: Held) -> Expr:
        scale = s.scaling / (at.m * at.n * 2**0.5)
        return Basis(t[self.parts[0]], "fourier_mt19937", s.random_loc_seed, at.m, at.n, scale)

    def form(self, term: Expr) -> Basis | None:
        return term if isinstance(term, Basis) and term.kind == "fourier_mt19937" else None

    def content(self, forms: Mapping[str, Basis]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        seeds = Counter(f.seed for f in forms.values())
        if len(seeds) > 1:
            path = next(p for p, f in forms.items() if f.seed != seeds.most_common(1)[0][0])
            problem = self.no(path, f"the seed {forms[path].seed}", f"{seeds.most_common(1)[0][0]}, as of other layers")
            raise problem
        scales = {path: _scaling(f) for path, f in forms.items()}
        counts = {path: len(f.c) for path, f in forms.items()}
        scaling, count = (Counter(each.values()).most_common(1)[0][0] for each in (scales, counts))
        made = {
            path: {self.parts[0]: f.c if scales[path] == scaling else f.c.detach() * (scales[path] / scaling)}
            for path, f in forms.items()
        }
        return made, {
            "n_frequency": count,
            "scaling": scaling,
            "random_loc_seed": next(iter(seeds)),
            "n_frequency_pattern": {path: own for path, own in counts.items() if own != count},
            "bias": "none",
        }


def _scaling(f: Basis) -> float:
    """PEFT's scaling of a basis: the number, of few digits if there is one, that gives its scale."""
    over = f.m * f.n * 2**0.5
    near = f.scale * over
    return next((x for x in (round(near, 9), near) if x / over == f.scale), near)
