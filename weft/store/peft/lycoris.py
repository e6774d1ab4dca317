"""LoHa and LoKr, as PEFT has them from LyCORIS."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from weft.expr import Expr, Kronecker, LowRank, Product
from weft.expr.entrywise import Entrywise
from weft.store.peft.kind import Held, alpha
from weft.store.peft.layers import At
from weft.store.peft.settings import CONFIG, Number, Ranked, first
from weft.store.peft.terms import Form, Single

_IDLE = ("rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d", "rank_dropout_scale")


class LycorisSettings(Ranked):
    """The settings of a LoHa."""

    alpha: Number

    def scale(self, path: str) -> float:
        """alpha / r of a module's adapter."""
        return first(self.alpha_pattern, path, self.alpha) / self.rank(path)


class Lycoris(Single[Form]):
    """Types with a rank and an alpha, which PEFT has for plain linear layers alone."""

    idle, transposed = _IDLE, False

    def why(self, s: LycorisSettings, at: At) -> str:
        return f"rank {s.rank(at.path)} by {CONFIG}"

    @abstractmethod
    def numbers(self, form: Form) -> tuple[int, float]:
        """The rank and the scale of a layer's adapter."""

    def ranked(self, forms: Mapping[str, Form]) -> dict[str, Any]:
        """Ranks and alphas: those of most layers, and the others by name."""
        ranks = {path: self.numbers(f)[0] for path, f in forms.items()}
        alphas = {path: alpha(self.numbers(f)[1], ranks[path]) for path, f in forms.items()}
        r, most = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
        by_rank = {path: own for path, own in ranks.items() if own != r}
        return {"r": r, "alpha": most, "rank_pattern": by_rank} | {
            "alpha_pattern": {path: own for path, own in alphas.items() if own != most}
        }


class Loha(Lycoris[tuple[LowRank, LowRank]]):
    """scale (B A) ⊙ (D C) beside a weight."""

    peft_type, method, settings = "LOHA", "loha", LycorisSettings
    parts, want = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "an entry by entry product of two LowRank"

    def shapes(self, s: LycorisSettings, at: At) -> dict[str, tuple[int, ...]]:
        r = s.rank(at.path)
        return dict(zip(self.parts, ((at.m, r), (r, at.n)) * 2, strict=True))

    def value(self, s: LycorisSettings, at: At, t: Held, common: Held) -> Expr:
        b, a, d, c = (t[p] for p in self.parts)
        return Entrywise([LowRank(b, a, s.scale(at.path)), LowRank(d, c)])

    def form(self, term: Expr) -> tuple[LowRank, LowRank] | None:
        kids = tuple(term.kids()) if isinstance(term, Entrywise) else ()
        match kids:
            case (LowRank() as one, LowRank() as two):
                return one, two
            case _:
                return None

    def numbers(self, form: tuple[LowRank, LowRank]) -> tuple[int, float]:
        return max(f.a.shape[0] for f in form), form[0].scale * form[1].scale

    def content(
        self, forms: Mapping[str, tuple[LowRank, LowRank]]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        made: dict[str, dict[str, Tensor]] = {}
        for path, form in forms.items():
            most = self.numbers(form)[0]
            wide = [(pad(f.b, (0, most - f.b.shape[1])), pad(f.a, (0, 0, 0, most - f.a.shape[0]))) for f in form]
            made[path] = dict(zip(self.parts, (t for pair in wide for t in pair), strict=True))
        return made, self.ranked(forms)


class LokrSettings(LycorisSettings):
    """The settings of a LoKr."""

    decompose_both: bool | None = None
    decompose_factor: int | None = None


@dataclass(frozen=True)
class Factors:
    """scale u ⊗ v, where u and v may be two factors each, whose product they are: (a, b) for a b."""

    u: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    scale: float

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The rows of u and v, and their columns."""
        return (self.u[0].shape[0], self.v[0].shape[0]), (self.u[-1].shape[1], self.v[-1].shape[1])

    @property
    def whole(self) -> tuple[bool, bool]:
        """Whether u and v are matrices."""
        return len(self.u) == 1, len(self.v) == 1


class Lokr(Lycoris[Factors]):
    """scale U ⊗ V beside a weight. Which sizes U and V have, and which is a product, PEFT's rule gives from its settings."""

    peft_type, method, settings = "LOKR", "lokr", LokrSettings
    note = "refused where no `decompose_factor` gives all layers their sizes"
    parts = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    want = "a Kronecker product of two matrices, or of low-rank ones"

    def shapes(self, s: LokrSettings, at: At) -> dict[str, tuple[int, ...]]:
        r, (rows, columns) = s.rank(at.path), _sizes(at.shape, _factor(s))
        made: dict[str, tuple[int, ...]] = {}
        for i, whole in enumerate(_whole((rows, columns), r, bool(s.decompose_both))):
            name, m, n = f"lokr_w{i + 1}", rows[i], columns[i]
            made |= {name: (m, n)} if whole else {f"{name}_a": (m, r), f"{name}_b": (r, n)}
        return made

    def value(self, s: LokrSettings, at: At, t: Held, common: Held) -> Expr:
        scale = s.scale(at.path)
        u, v = ((t[name],) if name in t else (t[f"{name}_a"], t[f"{name}_b"]) for name in ("lokr_w1", "lokr_w2"))
        if len(u) == len(v) == 1:
            return Kronecker(u[0], v[0], scale)
        (a, b), (c, d) = (x if len(x) == 2 else (x[0], _unit(x[0])) for x in (u, v))
        return Product(Kronecker(a, c, scale), Kronecker(b, d))

    def form(self, term: Expr) -> Factors | None:
        match tuple(term.kids()) if isinstance(term, Product) else (term,):
            case (Kronecker() as one,):
                return Factors((one.a,), (one.b,), one.scale)
            case (Kronecker() as one, Kronecker() as two) if one.a.shape[1] == two.a.shape[0]:
                u, v = (
                    (a,) if torch.equal(b.float(), torch.eye(len(b), device=b.device)) else (a, b)
                    for a, b in ((one.a, two.a), (one.b, two.b))
                )
                return Factors(u, v, one.scale * two.scale)
            case _:
                return None

    def numbers(self, form: Factors) -> tuple[int, float]:
        low = [x[1].shape[0] for x in (form.u, form.v) if len(x) == 2]
        return (low[0] if low else -(-max(map(max, form.sizes)) // 2)), form.scale

    def content(self, forms: Mapping[str, Factors]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        path, factor, both = self._rule(forms)
        if path:
            f = forms[path]
            sizes = [[tuple(x.shape) for x in side] for side in (f.u, f.v)]
            want = "sizes that one decompose_factor gives for all layers, and ranks below half the larger side"
            problem = self.no(path, f"factors {sizes}", want)
            raise problem
        made: dict[str, dict[str, Tensor]] = {}
        for path, f in forms.items():
            made[path] = {}
            for name, x in (("lokr_w1", f.u), ("lokr_w2", f.v)):
                made[path] |= dict(zip((name,) if len(x) == 1 else (f"{name}_a", f"{name}_b"), x, strict=True))
        return made, {**self.ranked(forms), "decompose_factor": factor, "decompose_both": both}

    def _rule(self, forms: Mapping[str, Factors]) -> tuple[str, int, bool]:
        """The settings under which PEFT has all layers so; if there are none, a layer that it has not."""
        missed = ""
        for factor in dict.fromkeys([*(n for f in forms.values() for n in (f.sizes[0][0], f.sizes[1][0])), -1]):
            for both in (False, True):
                bad = (path for path, f in forms.items() if not self._given(f, factor, both))
                missed = next(bad, "")
                if not missed:
                    return "", factor, both
        return missed, 0, False

    def _given(self, f: Factors, factor: int, both: bool) -> bool:
        """Whether PEFT has a layer so under these settings."""
        (p, s), (q, t) = f.sizes
        low = {x[1].shape[0] for x in (f.u, f.v) if len(x) == 2}
        sizes = _sizes((p * s, q * t), factor)
        return len(low) < 2 and sizes == f.sizes and _whole(sizes, self.numbers(f)[0], both) == f.whole


def _unit(x: Tensor) -> Tensor:
    """What a matrix may be multiplied with."""
    return torch.eye(x.shape[1], dtype=torch.bfloat16, device=x.device)


def _factor(s: LokrSettings) -> int:
    return -1 if s.decompose_factor is None else s.decompose_factor


def _sizes(shape: tuple[int, int], factor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows of U and V and their columns, for a weight [m n]."""
    return _split(shape[0], factor), _split(shape[1], factor)


def _split(size: int, factor: int) -> tuple[int, int]:
    """A size as a product: of `factor` if that divides it, else of the divisors up to it (-1: any) that are nearest to each other."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    low = max(k for k in range(1, int(size**0.5) + 1) if size % k == 0 and (k == 1 or factor == -1 or k <= factor))
    return low, size // low


def _whole(sizes: tuple[tuple[int, int], tuple[int, int]], r: int, both: bool) -> tuple[bool, bool]:
    """Whether U and V are matrices: where the rank is not below half the larger side; U also unless both are to be products."""
    (p, s), (q, t) = sizes
    return not both or r >= max(p, q) / 2, r >= max(s, t) / 2
