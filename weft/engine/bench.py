"""A model on which choices are tried and taken back: what a search may measure beside bytes and predicted loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from weft.engine.run import Chain, chain_key, group_of, groups, run
from weft.expr import Dense, Expr
from weft.memory import release
from weft.model import Site, expressions, set_expressions
from weft.model.blocks import block_of
from weft.stats import Objective, Stats, fisher
from weft.stats.fisher import lots
from weft.store.cache import Cache, key

Batch = Mapping[str, Tensor]
Distance = Callable[[nn.Module, float, int], float]
"""Of a model to the original, on a share of the texts that choices are made by; a number draws which."""


class Bench:
    """What is true of sites [s] and their candidates [c] but takes work to know; every number is found once and cached.

    The model is the bench's own: it is rewritten, and made plain again where that is needed. A search that declares a method
    of this class among its `needs` is given the bench.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[str],
        chains: Sequence[Chain],
        usable: Bool[Tensor, "s c"],
        stats: Stats,
        batches: Sequence[Batch],
        goal: Objective,
        distance: Distance,
        *,
        cache: Cache,
        about: str,
        seed: int = 0,
    ) -> None:
        """`usable`: which candidates a site has. `about`: what distances depend on besides candidates."""
        self.model, self.sites, self.chains, self.usable = model, list(sites), list(chains), usable
        self.stats, self.batches, self.goal, self.distance = stats, batches, goal, distance
        self.cache, self.seed = cache, seed
        self.keys = [chain_key(c) for c in chains]
        self.about = key(about, stats.folder.name, seed)
        self.plain = expressions(model)
        self.placed: dict[str, int | None] = {}

    def evaluate(self, choice: Sequence[int] | Tensor, share: float = 1.0, draw: int = 0) -> float:
        """The distance with every site as chosen, on this share of the texts, which `draw` picks."""
        return self.alone({s: int(c) for s, c in zip(self.sites, choice, strict=True)}, share, draw)

    def alone(self, part: Mapping[str, int], share: float = 1.0, draw: int = 0) -> float:
        """The distance with only these sites rewritten."""

        def measure() -> float:
            self._place(part)
            return self.distance(self.model, share, draw)

        what = [sorted((s, self.keys[c]) for s, c in part.items()), share, draw]
        return self.cache.json("measured", key("choice", self.about, what), measure)

    def disturb(self, site: int, size: float, share: float = 1.0, draw: int = 0) -> float:
        """The distance with Gaussian noise on one weight, ||noise||² = size · ||W||²."""
        name = self.sites[site]

        def measure() -> float:
            self._place({})
            w = self.plain[name].dense().detach().float()
            noise = torch.randn(w.shape, generator=self.rng(f"{name}/{draw}"))
            set_expressions(self.model, {name: Dense(w + noise * (size**0.5 * w.norm() / noise.norm()))})
            try:
                return self.distance(self.model, share, draw)
            finally:
                set_expressions(self.model, {name: self.plain[name]})

        return self.cache.json("measured", key("noise", self.about, name, size, share, draw), measure)

    def relative(self) -> Float[Tensor, "s c"]:
        """||W_c - W||² / ||W||² of every candidate; infinite where a site has none."""

        def error(site: Site, new: Expr) -> float:
            w = site.now.dense().detach().float()
            return float((new.dense().float() - w).square().sum() / w.square().sum().clamp(min=1e-30))

        return self._table("relative", lambda: self._scores(self.sites, error))

    def fisher(self) -> Float[Tensor, "s c"]:
        """½ Σ_ij F_ij (W_c - W)_ij² of every candidate, F the diagonal of the Fisher information a token or text; infinite as above."""

        def make() -> dict[str, list[float | None]]:
            made: dict[str, list[float | None]] = {}
            for names in lots({n: self.plain[n] for n in self.sites}):
                self._place({})
                held = fisher(self.model, names, self.batches, self.goal, seed=self.seed)

                def error(site: Site, new: Expr, held: Mapping[str, Tensor] = held) -> float:
                    gap = new.dense().float() - site.now.dense().detach().float()
                    return 0.5 * float((held[site.name] * gap * gap).sum())

                made |= self._scores(names, error)
                release()
            return made

        return self._table("fisher", make)

    def outliers(self, above: float) -> Float[Tensor, "s"]:
        """The share of a block's scores |w_ij| · ||x_j|| that exceed `above` times their mean; of a site outside the blocks, of its own."""

        def make() -> dict[str, float]:
            blocks: dict[int | str, list[str]] = {}
            for name in self.sites:
                where = block_of(self.model, name)
                blocks.setdefault(name if where is None else where, []).append(name)
            self._place({})
            found: dict[str, float] = {}
            for names in blocks.values():
                group = group_of(self.model, names, self.stats, seed=self.seed)
                scores = [s.now.dense().detach().abs().float() * _sizes(s) for s in group]
                count = sum(s.numel() for s in scores)
                mean = sum(float(s.double().sum()) for s in scores) / count
                found |= dict.fromkeys(names, sum(int((s > above * mean).sum()) for s in scores) / count)
            return found

        held = self.cache.json("measured", key("outliers", self.about, self.sites, above), make)
        return torch.tensor([held[n] for n in self.sites], dtype=torch.float64)

    def rng(self, salt: str) -> torch.Generator:
        """A generator that depends on the seed and `salt` only."""
        word = hashlib.blake2b(f"{self.seed}/{salt}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(word, "little"))

    def _place(self, part: Mapping[str, int]) -> None:
        """Rewrite the groups in which something is to change, from the plain model."""
        for names in groups(self.model, self.sites, self.stats):
            if all(part.get(n) == self.placed.get(n) for n in names):
                continue
            self.placed |= dict.fromkeys(names, -1)  # until all of it is done
            set_expressions(self.model, {n: self.plain[n] for n in names})
            put(self.model, {n: self.chains[part[n]] for n in names if n in part}, self.stats, seed=self.seed)
            self.placed |= {n: part.get(n) for n in names}

    def _scores(self, names: Sequence[str], score: Callable[[Site, Expr], float]) -> dict[str, list[float | None]]:
        """A number a candidate of each of these sites, as the sites of a group with that candidate are rewritten together."""
        self._place({})
        made: dict[str, list[float | None]] = {n: [None] * len(self.chains) for n in names}
        for whole in groups(self.model, names, self.stats):
            group = group_of(self.model, whole, self.stats, seed=self.seed)
            for c, chain in enumerate(self.chains):
                part = tuple(s for s in group if bool(self.usable[self.sites.index(s.name), c]))
                after = run(type(group)(part, group.notes, group.cache), chain) if part else []
                for site, new in zip(part, after, strict=True):
                    made[site.name][c] = score(site, new)
        return made

    def _table(self, kind: str, make: Callable[[], dict[str, list[float | None]]]) -> Float[Tensor, "s c"]:
        """Numbers by site and candidate, from the cache or made now; infinite where there are none."""
        name = key(kind, self.about, self.sites, self.keys, self.usable.tolist())
        held = self.cache.json("measured", name, make)
        rows = [[torch.inf if v is None else v for v in held[n]] for n in self.sites]
        return torch.tensor(rows, dtype=torch.float64)


def put(model: nn.Module, chains: Mapping[str, Chain], stats: Stats, *, seed: int) -> None:
    """Rewrite these sites in place from dense evidence, each from its present expression."""
    for names in groups(model, list(chains), stats):
        group = group_of(model, names, stats, seed=seed)
        for chain in dict.fromkeys(chains[n] for n in names):
            part = tuple(s for s in group if chains[s.name] == chain)
            made = run(type(group)(part, group.notes, group.cache), chain)
            set_expressions(model, {s.name: e for s, e in zip(part, made, strict=True)})
        release()


def _sizes(site: Site) -> Tensor:
    """||x_j|| a column, up to a factor; of what is only looked up, the root of how often a row is."""
    read = next((e for e in site.evidence if e.mean is not None), None)
    if read is None:
        return site.evidence[0].weight.clamp(min=0).sqrt()[:, None]
    return read.gram.diagonal().clamp(min=0).sqrt()
