"""Site: one weight of one model, as a method sees it. Group: the sites that a method rewrites together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.error import ConflictError, NumericError, OptionError
from weft.expr import Expr, Hadamard
from weft.linalg.columns import inverse_factor
from weft.linalg.lowrank import roots
from weft.model.rounding import Rounding
from weft.model.taps import Tap, moved

Kind = Literal["linear", "conv1d", "conv", "embedding", "vector"]


@dataclass(frozen=True)
class Evidence:
    """What calibration says of one use of a weight W [m n]: an error dW costs about 1/2 Σ_i weight_i dW_i gram dW_iᵀ a token.

    As a linear map: gram = E[x xᵀ] of its inputs, weight = E[g²] of its output gradients.
    As an embedding: gram = E[g gᵀ] of its output gradients, weight = the share of tokens that look a row up.
    """

    gram: Float[Tensor, "n n"]
    weight: Float[Tensor, "m"]
    tokens: int = 0
    mean: Float[Tensor, "n"] | None = None
    """E[x], where inputs were seen."""
    mean_abs: Float[Tensor, "n"] | None = None
    """E[|x|]."""
    most: Float[Tensor, "n"] | None = None
    """The largest |x|."""

    def turned(self, by: Hadamard) -> Evidence:
        """The same behind a turn of the input, where nothing is known of absolute values."""
        mean = by(self.mean) if self.mean is not None else None
        return Evidence(by(by(self.gram).T), self.weight, self.tokens, mean)


@dataclass(frozen=True)
class Site:
    """A weight: its name, its expression now, its pretrained value, and the evidence of its uses (two when tied)."""

    name: str
    kind: Kind
    now: Expr
    source: Callable[[], Float[Tensor, "m n"]]
    evidence: tuple[Evidence, ...] = ()
    seed: int = 0
    tap: Tap | None = None
    """What its input goes through first; expression, pretrained value and evidence are those behind it."""
    tags: frozenset[str] = frozenset()
    """Of what the method's `on` names, what it is."""
    beside: Expr | None = None
    """Where a method is given the base alone, the compensation that stands beside it."""
    adapters: Mapping[str, Expr] = field(default_factory=dict[str, Expr])
    """The same of adapters, by role: for a method to look at; they stay."""

    @property
    def original(self) -> Float[Tensor, "m n"]:
        """The pretrained value in float32 on the CPU, read anew each time."""
        return self.source().cpu().float()

    def describe(self) -> str:
        """Its expression, and what its input goes through: `int8[channel] on int8[token]`."""
        return self.now.describe() + (f" on {self.tap.describe()}" if self.tap is not None else "")

    def cost(self, new: Expr) -> float:
        """Predicted loss a unit of the new value: Σ over uses of 1/2 Σ_i weight_i e_i gram e_iᵀ, e = new - original."""
        total = 0.0
        for part, expr in zip(self.slices(), new.slices(), strict=True):
            error = expr.dense().float() - part.original
            for e in part.evidence:
                rows = ((error @ e.gram.float()) * error).sum(1).double()
                total += 0.5 * float(rows.clamp(min=0) @ e.weight.double())
        return total

    def slices(self) -> Iterator[Site]:
        """The site in slices of rows, none larger than `CHUNK` entries."""
        for s in self.now.row_slices():
            yield self if s == slice(0, self.now.shape[0]) else self.rows(s)

    def rows(self, rows: slice) -> Site:
        """These rows as a site of their own; storage is shared."""
        evidence = tuple(replace(e, weight=e.weight[rows]) for e in self.evidence)
        return replace(self, now=self.now.take(rows), source=lambda: self.source()[rows], evidence=evidence)


@dataclass(frozen=True)
class Group:
    """The sites that a rewrite sees at once: one, or all that read the same input, with their shared evidence."""

    sites: tuple[Site, ...]
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Declared fallbacks: (where, what). They end in the report."""
    cache: dict[object, Tensor] = field(default_factory=dict[object, Tensor], repr=False)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    @property
    def name(self) -> str:
        """The first site's name."""
        return self.sites[0].name

    @property
    def site(self) -> Site:
        """The only site of a per-site group."""
        if len(self.sites) != 1:
            raise OptionError(
                "this group has several sites",
                where=self.name,
                got=len(self.sites),
                want="one",
                fix='declare per="site"',
            )
        return self.sites[0]

    @property
    def now(self) -> Expr:
        """The only site's expression."""
        return self.site.now

    @property
    def original(self) -> Float[Tensor, "m n"]:
        """The only site's pretrained value."""
        return self.site.original

    def gram(self) -> Float[Tensor, "n n"]:
        """Second moment of what the group reads, in float64: E[x xᵀ], uses and sites weighted by their mean row weight.

        Errors: NumericError with the site's name if it is not finite; OptionError if there is no evidence.
        """
        if "gram" not in self.cache:
            gram = self._gram()
            if not bool((gram.diagonal() > 0).any()):
                self.fallback("no input was seen: every feature counts alike")
                gram = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            self.cache["gram"] = gram
        return self.cache["gram"]

    def _gram(self) -> Tensor:
        seen: dict[int, tuple[Tensor, float]] = {}
        for site in self.sites:
            if not site.evidence:
                raise OptionError(
                    "this method needs calibration data",
                    where=site.name,
                    got="no evidence",
                    want="a Gram matrix",
                    fix="pass data",
                )
            for e in site.evidence:
                finite(e.gram, f"{site.name}.gram")
                finite(e.weight, f"{site.name}.weight")
                gram, weight = seen.get(id(e.gram), (e.gram, 0.0))
                seen[id(e.gram)] = gram, weight + float(e.weight.double().mean())
        if len(seen) == 1:
            return next(iter(seen.values()))[0].double()
        scale = sum(w for _, w in seen.values()) or 1.0
        return torch.stack([g.double() * (w / scale) for g, w in seen.values()]).sum(0)

    def second_moment(self) -> Float[Tensor, "n"]:
        """The Gram's diagonal: E[x²] of each input feature, not negative."""
        return self.gram().diagonal().clamp(min=0)

    def order(self) -> Int[Tensor, "n"]:
        """Columns by falling second moment: those that matter most are settled while all others can still make up for them."""
        return self.second_moment().argsort(descending=True, stable=True)

    def inverse_factor(self, damp: float, *, ordered: bool = False) -> Float[Tensor, "n n"]:
        """Upper U with (G + λI)^-1 = Uᵀ U, columns by `order` if asked; made once for all methods and widths. More damping is declared."""
        key = ("inverse factor", damp, ordered)
        if key not in self.cache:
            by = self.order() if ordered else slice(None)
            self.cache[key], used = inverse_factor(self.gram()[by][:, by], damp, f"{self.name}.gram")
            if used != damp:
                self.fallback(f"damping raised from {damp:g} to {used:g}")
        return self.cache[key]

    def roots(self) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
        """(R, R⁺) with the Gram R Rᵀ, in float64; made once for all methods and ranks."""
        if "root" not in self.cache:
            self.cache["root"], self.cache["unroot"] = roots(self.gram())
        return self.cache["root"], self.cache["unroot"]

    def fallback(self, what: str) -> None:
        """Declare that the method could not do what it says here, and what it did instead."""
        self.notes.append((self.name, what))

    def rng(self, salt: str) -> torch.Generator:
        """A generator that depends on the seed, the first site's name and `salt` only, never on order."""
        return torch.Generator().manual_seed(_word(f"{self.sites[0].seed}/{self.name}/{salt}"))

    def common(self, salt: str) -> int:
        """A seed that depends on the run's seed and `salt` only: what is generated from it is the same for all sites."""
        return _word(f"{self.sites[0].seed}//{salt}")

    def most(self) -> Float[Tensor, "n"]:
        """The largest |x| of each input feature. Errors: NumericError; OptionError where it was not measured."""
        known = [finite(e.most, f"{s.name}.most") for s in self.sites for e in s.evidence if e.most is not None]
        if not known:
            want, fix = "evidence of inputs", "pass data; behind a new turn, apply one method after the other"
            raise OptionError(
                "the range of inputs is not known", where=self.name, got="no evidence", want=want, fix=fix
            )
        return torch.stack(known).amax(0)

    def rounded(self, by: Rounding) -> Group:
        """The same group with its input rounded, in place of a rounding that was there."""
        made = {id(s.tap): Tap(s.tap.turns() if s.tap is not None else (), by) for s in self}
        return replace(self, sites=tuple(replace(s, tap=made[id(s.tap)]) for s in self))

    def turned(self, by: Hadamard) -> Group:
        """The same group with one more turn of its input; weights, pretrained values and evidence follow.

        Errors: ConflictError behind a static rounding, whose scale was measured without the turn.
        """
        taps = {id(s.tap): _turned(s, by) for s in self}
        seen = {id(e.gram): e.turned(by) for s in self for e in s.evidence}
        sites = [
            replace(
                s,
                now=moved(s.now, by),
                source=lambda s=s: by(s.original),
                evidence=tuple(replace(seen[id(e.gram)], weight=e.weight) for e in s.evidence),
                tap=taps[id(s.tap)],
            )
            for s in self
        ]
        return replace(self, sites=tuple(sites), cache={})

    def put(self, exprs: Sequence[Expr]) -> Group:
        """The same group after a rewrite; evidence and what was derived from it are shared."""
        return replace(self, sites=tuple(replace(s, now=e) for s, e in zip(self.sites, exprs, strict=True)))


def _word(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _turned(site: Site, by: Hadamard) -> Tap:
    """The tap of a site with one more turn, before its rounding."""
    turns, rounding = (site.tap.turns(), site.tap.round) if site.tap is not None else ((), None)
    if rounding is not None and rounding.per == "static":
        got, want, fix = (
            rounding.describe(),
            "a rounding that fits its scale anew",
            "turn first, then measure the scale",
        )
        raise ConflictError("a measured scale does not fit a turn", where=site.name, got=got, want=want, fix=fix)
    return Tap((*turns, by), rounding)


def finite(t: Tensor, where: str) -> Tensor:
    """`t`, or NumericError naming `where` if any entry is NaN or infinite."""
    bad = t.numel() - int(torch.isfinite(t).sum())
    if bad:
        raise NumericError(
            "a statistic is not finite",
            where=where,
            got=f"{bad} of {t.numel()} entries NaN or infinite",
            want="finite values",
            fix="look for NaN weights or inputs that overflow; calibrate in float32",
        )
    return t
