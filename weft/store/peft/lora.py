"""LoRA, with ranks and alphas by name, DoRA's magnitudes, and the stacked weights of experts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.error import ConflictError, WeftError
from weft.expr import Expr, LowRank, terms_of, total
from weft.expr.weightnorm import WeightNorm
from weft.model import expressions, name_of
from weft.model.devices import device_of
from weft.model.experts import ApartExperts
from weft.store.peft.kind import Change, Found, Held, Piece, Woven, Written, alpha
from weft.store.peft.layers import At, layers
from weft.store.peft.settings import CONFIG, MERGE, Names, Number, Ranked, brief, ends, first, key, named, some, wrong
from weft.store.peft.terms import Terms

_STARTS = {"gaussian", "eva", "orthogonal", "mica"}
"""Initialisations, besides true and false, that leave the base as it is."""
DOWN, UP, LENGTHS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_STACKS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""The stacked weights of experts: which of an expert's layers each is of."""
_INNER = ".base_layer"
"""What the names of gate_up_proj's tensors have where down_proj has some too."""


class LoraSettings(Ranked):
    """The settings of a LoRA."""

    lora_alpha: Number
    use_rslora: bool | None = None
    use_dora: bool | None = None
    init_lora_weights: bool | str | None = None
    target_parameters: Names | None = None

    def scale(self, path: str) -> float:
        """alpha / r of a module's adapter; alpha / sqrt(r) where it is rank-stabilised."""
        r = self.rank(path)
        return first(self.alpha_pattern, path, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)

    def odd(self) -> dict[str, Any]:
        start = self.init_lora_weights
        return super().odd() | (
            {"init_lora_weights": start} if isinstance(start, str) and start.lower() not in _STARTS else {}
        )


class Lora(Terms[LowRank]):
    """scale B A beside a weight; with a magnitude g the rows of the sum have these lengths."""

    peft_type, method, settings = "LORA", "lora", LoraSettings
    note = "DoRA (`magnitude`) not on experts; several adapters become their sum; of PiSSA and the like twice the rank"
    idle = (
        "lora_dropout", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying", "unsloth_fixed",
    )  # fmt: skip
    parts, several, want = (DOWN, UP, LENGTHS), True, "a LowRank term on one linear layer"

    def shapes(self, s: LoraSettings, at: At) -> dict[str, tuple[int, ...]]:
        r = s.rank(at.name) * at.count
        return {DOWN: (r, at.n), UP: (at.m, r)} | ({LENGTHS: (at.m,)} if s.use_dora else {})

    def why(self, s: LoraSettings, at: At) -> str:
        return f"rank {s.rank(at.name)} by {CONFIG}" + (f", {at.count} experts" if at.count > 1 else "")

    def value(self, s: LoraSettings, at: At, t: Held, common: Held) -> Expr:
        return LowRank(t[UP], t[DOWN], s.scale(at.name))

    def carriers(self, model: nn.Module, s: LoraSettings) -> dict[str, At]:
        stacks = _stacks(model, lambda name: named(name, frozenset(s.target_parameters or ())))
        return layers(model) | {at.path: at for at in stacks}

    def unlike(self, model: nn.Module, s: LoraSettings, have: set[str]) -> list[WeftError]:
        known = {end for at in _stacks(model, lambda _: True) for end in ends(at.target)}
        problems: list[WeftError] = [
            ConflictError(
                "the model has no such stack of experts",
                where=f"{CONFIG}: target_parameters",
                got=brief(p),
                want="gate_up_proj or down_proj of experts that checkpoints hold apart",
                fix=MERGE,
            )
            for p in s.target_parameters or []
            if p not in known
        ]
        problems += some(
            [p for p, at in self.carriers(model, s).items() if at.kind == "experts" and p not in have],
            lambda p: wrong("the adapter is incomplete", key(p, DOWN), "no such tensor", "all of target_parameters"),
        )
        return problems + super().unlike(model, s, have)

    def change(self, woven: Woven, s: LoraSettings, at: At, t: Held, common: Held, role: str) -> Change:
        if at.kind == "experts":
            return self._to_experts(woven, s, at, t, role)
        if not s.use_dora:
            return super().change(woven, s, at, t, common, role)
        now = woven.exprs[at.sites[0]]
        terms = terms_of(now)
        if isinstance(now, WeightNorm) or any(name_of(r) for r in terms):
            got, want, fix = now.describe(), "a weight without other adapters", "attach it to a fork without them"
            what = "a magnitude is that of a weight and one adapter"
            raise ConflictError(what, where=at.sites[0], got=got, want=want, fix=fix)
        one = super().change(woven, s, at, {k: x for k, x in t.items() if k != LENGTHS}, common, role)
        return Change({n: WeightNorm(t[LENGTHS].to(device_of(now)).clone(), e) for n, e in one.exprs.items()})

    def _to_experts(self, woven: Woven, s: LoraSettings, at: At, t: Held, role: str) -> Change:
        """Each expert's own factors; gate and up share A. Rank and expert are one index of B, the expert the faster."""
        a = t[DOWN].unflatten(0, (at.count, -1))
        b = t[UP].unflatten(1, (-1, at.count)).movedim(-1, 0)
        made, each = Change(), len(at.sites) // at.count
        for i in range(at.count):
            own = a[i].clone()
            for site, rows in zip(
                at.sites[i * each :][:each], b[i].clone(memory_format=torch.contiguous_format).chunk(each), strict=True
            ):
                now = woven.exprs[site]
                device = device_of(now)
                term = woven.turned(site, LowRank(rows.to(device), own.to(device), s.scale(at.name)))
                made.exprs[site] = total({**terms_of(now), role: term})
        return made

    def form(self, term: Expr) -> LowRank | None:
        return term if isinstance(term, LowRank) else None

    def refusals(self, model: nn.Module, found: Found) -> list[WeftError]:
        experts = {site for at in _stacks(model, lambda _: True) for site in at.sites}
        lost = {piece.magnitude is None for site, piece in found.pieces.items() if site not in experts}
        problems = super().refusals(model, found)
        for site, piece in found.pieces.items():
            if site in experts and piece.magnitude is not None:
                problems.append(self.no(site, "rows of given lengths (norm)", "a plain sum, as PEFT has of experts"))
        if len(lost) > 1:
            bare = next(n for n, p in found.pieces.items() if p.magnitude is None)
            problems.append(self.no(bare, "no magnitude, where other weights have one", "all or none (use_dora)"))
        return problems

    def write(self, model: nn.Module, found: Found) -> Written:
        """Rank and alpha are those of most layers; those of others stand beside them by name."""
        pairs = {site: _added(piece) for site, piece in found.pieces.items()}
        held, tensors = dict[At, LowRank](), dict[str, Tensor]()
        for at in _stacks(model, lambda _: True, set(pairs)):
            held[at] = _stacked(at, {site: pairs.pop(site, None) for site in at.sites})
        plain = {at.sites[0]: at for at in layers(model).values()}
        held |= {plain[site]: pair for site, pair in pairs.items()}
        for at, pair in held.items():
            tensors |= {key(at.path, DOWN): pair.a.detach(), key(at.path, UP): pair.b.detach()}
        lengths = {plain[site]: p.magnitude for site, p in found.pieces.items() if p.magnitude is not None}
        tensors |= {key(at.path, LENGTHS): g.detach() for at, g in lengths.items()}
        ranks = {at.name: pair.a.shape[0] // at.count for at, pair in held.items()}
        alphas = {at.name: alpha(pair.scale, ranks[at.name]) for at, pair in held.items()}
        r, most = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
        settings = self.targets(model, [plain[site].path for site in pairs]) | {
            "r": r,
            "lora_alpha": most,
            "rank_pattern": {name: own for name, own in ranks.items() if own != r},
            "alpha_pattern": {name: own for name, own in alphas.items() if own != most},
            "target_parameters": sorted(at.target for at in held if at.target) or None,
            "use_dora": bool(lengths),
            "use_rslora": False,
            "lora_dropout": 0.0,
            "bias": "none",
        }
        return Written(tensors, settings)


def _added(piece: Piece) -> LowRank:
    """A sum of low-rank terms as one: their factors side by side, under the first one's scale."""
    low = [t for t in piece.terms.values() if isinstance(t, LowRank)]
    scale = low[0].scale or 1.0
    b = [t.b.detach() if t.scale == scale else t.b.detach().float() * (t.scale / scale) for t in low]
    return LowRank(torch.cat(b, 1), torch.cat([t.a.detach() for t in low]), scale)


def _stacked(at: At, terms: Mapping[str, LowRank | None]) -> LowRank:
    """The factors of a stack of experts from those of their layers; what has fewer ranks, or none, is filled up with zeros."""
    each = len(at.sites) // at.count
    scales = {t.scale for t in terms.values() if t is not None}
    scale = scales.pop() if len(scales) == 1 else 1.0
    of = [at.sites[i * each :][:each] for i in range(at.count)]
    one = [_beside([terms[site] for site in sites], at, scale) for sites in of]
    most = max(a.shape[0] for _, a in one)
    b = torch.stack([nn.functional.pad(b, (0, most - b.shape[1])) for b, _ in one], -1)
    a = torch.stack([nn.functional.pad(a, (0, 0, 0, most - a.shape[0])) for _, a in one])
    return LowRank(b.flatten(1), a.flatten(0, 1), scale)


def _beside(terms: list[LowRank | None], at: At, scale: float) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """The factors of an expert's layers above one another: one A where it is the same, else A above A and B block by block."""
    rows = at.m // len(terms)
    held = [t if t is not None else LowRank(torch.zeros(rows, 0), torch.zeros(0, at.n)) for t in terms]
    ups = [t.b.detach() if t.scale == scale else t.b.detach().float() * (t.scale / scale) for t in held]
    if all(t.a.shape == held[0].a.shape and torch.equal(t.a, held[0].a) for t in held):
        return torch.cat(ups), held[0].a.detach()
    return torch.block_diag(*ups), torch.cat([t.a.detach() for t in held])


def _stacks(model: nn.Module, meant: Callable[[str], bool], sites: Collection[str] | None = None) -> list[At]:
    """The stacked weights of experts whose name is meant, and of which a site is among these, as PEFT knows them."""
    exprs, made = expressions(model), list[At]()
    for path, module in model.named_modules():
        if not isinstance(module, ApartExperts):
            continue
        mine: list[At] = []
        for stack, roles in _STACKS.items():
            names = [f"{path}.{i}.{module.roles[r]}.weight" for i in range(module.num_experts) for r in roles]
            m, n = exprs[names[0]].shape
            if meant(f"{path}.{stack}") and (sites is None or any(n in sites for n in names)):
                shape, count = (m * len(roles), n), module.num_experts
                mine.append(At(path, tuple(names), shape, "experts", count=count, target=f"{path}.{stack}"))
        made += [replace(mine[0], path=path + _INNER), *mine[1:]] if len(mine) > 1 else mine
    return made
