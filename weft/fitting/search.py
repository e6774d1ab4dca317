"""Choose: which candidate each site becomes, by predicted loss corrected with a few measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from weft.engine import Bench, get, names
from weft.engine.run import Chain
from weft.error import ConflictError, OptionError
from weft.fitting.candidates import Table

Choice = tuple[int, ...]


class Search:
    """Choices on one table. The bench builds from dense evidence and measures; `fixed` bytes are spent in any case."""

    def __init__(self, table: Table, fixed: int, bench: Bench) -> None:
        self.table, self.fixed, self.bench = table, fixed, bench
        self.roles = [role(s) for s in table.sites]
        self.factor: dict[str, float] = {}
        """Measured over predicted loss of a role's sites, compressed alone."""
        self.seen: dict[Choice, float] = {}

    def measure(self, choice: Choice) -> float:
        """The loss of a choice, measured once."""
        if choice not in self.seen:
            self.seen[choice] = self.bench.evaluate(choice)
        return self.seen[choice]

    def nbytes(self, choice: Choice) -> int:
        """Bytes of the saved model."""
        return self.fixed + int(sum(self.table.nbytes[i, c] for i, c in enumerate(choice)))

    def predicted(self, choice: Choice) -> float:
        """Predicted distance, corrected where roles were measured."""
        return float(
            sum(
                self.factor.get(r, 1.0) * self.table.loss[i, c]
                for i, (r, c) in enumerate(zip(self.roles, choice, strict=True))
            )
        )

    def uniform(self, wanted: Sequence[Chain], limit: int, tries: int) -> Choice:
        """The best uniform choice within the limit: of more than one, the `tries` best predicted ones are measured.

        Errors: ConflictError if none fits.
        """
        fits = [(c,) * len(self.table.sites) for c in self.table.columns(wanted)]
        fits = [c for c in fits if np.isfinite(self.predicted(c)) and self.nbytes(c) <= limit]
        if not fits:
            raise ConflictError(
                "no uniform choice fits",
                where="--budget",
                got=f"{limit} bytes",
                want="a width that fits",
                fix="raise the budget",
            )
        best = sorted(fits, key=self.predicted)[:tries]
        return min(best, key=self.measure) if len(best) > 1 else best[0]

    def mixed(self, limit: int, by: str) -> Choice:
        """What this search chooses within the limit, from corrected losses. Errors: ConflictError with the smallest reachable size."""
        weight = np.array([self.factor.get(r, 1.0) for r in self.roles])[:, None]
        loss = np.where(np.isfinite(self.table.loss), self.table.loss * weight, np.inf)
        method = get(by)
        given = (self.bench,) if method.needs else ()
        made = method(torch.tensor(self.table.nbytes), torch.tensor(loss), limit - self.fixed, *given)
        return tuple(int(c) for c in made)

    def factors(self, choice: Choice) -> dict[str, float]:
        """Measured over predicted loss of each role's sites, compressed alone as in this choice (between 1/4 and 4)."""
        made: dict[str, float] = {}
        for name in dict.fromkeys(self.roles):
            part = {
                s: (i, c)
                for i, (s, r, c) in enumerate(zip(self.table.sites, self.roles, choice, strict=True))
                if r == name
            }
            predicted = float(sum(self.table.loss[i, c] for i, c in part.values()))
            if predicted > 1e-9:
                made[name] = float(
                    np.clip(self.bench.alone({s: c for s, (_, c) in part.items()}) / predicted, 0.25, 4.0)
                )
        return made

    def label(self, choice: Choice) -> str:
        """`gptq int3 g64 asymmetric` for a uniform choice, `mixed` for others."""
        if len(set(choice)) > 1:
            return "mixed"
        chain = self.table.chains[choice[0]]
        o = dict(chain[0].options)
        where = f"g{o['group']}" if o["group"] else "channel"
        return f"{chain[0].method} int{o['bits']} {where}{'' if o['symmetric'] else ' asymmetric'}"


def known(name: str) -> None:
    """Refuse what makes no choices. Errors: OptionError with the searches that there are."""
    found = [n for n in names() if get(n).kind == "search"]
    if name not in found:
        raise OptionError(
            "this is no search", where="search", got=name, want=", ".join(found), fix="give the name of one of these"
        )


def role(site: str) -> str:
    """What a site is in its block: the module's own name."""
    parts = site.removesuffix(".weight").split(".")
    digits = [i for i, p in enumerate(parts) if p.isdigit()]
    return ".".join(parts[digits[-1] + 1 :]) if digits else parts[-1]
