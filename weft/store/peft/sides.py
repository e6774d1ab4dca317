"""IA3 and OFT: what stands beside a weight, as a side of its normal form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.error import ConflictError, WeftError
from weft.expr import Dense, Diagonal, Expr, Product, between, terms_of, total
from weft.expr.cayley import Cayley
from weft.expr.named import Named
from weft.model import Tap, expressions, first_vectors, name_of, places
from weft.model.devices import device_of
from weft.store.audit import Entry
from weft.store.peft.kind import Change, Found, Held, Piece, Woven, Written
from weft.store.peft.layers import At, Layers, layers
from weft.store.peft.settings import CONFIG, Names, Number, Settings, key, wrong


class Sides(Layers):
    """Adapters that multiply a weight from the left or the right: W' = L W or W R."""

    order = 2

    takes: ClassVar[type[Expr]]
    """What its sides are."""
    left: ClassVar[bool] = False
    """Whether one may stand on the left."""

    def cut(self, expr: Expr, only: str | None = None) -> tuple[Expr, bool, Expr] | None:
        """The side of a product, of this name or that is on, whether it is the right one, and the rest."""
        factors = [*expr.kids()] if isinstance(expr, Product) else []
        factors = [f for f in factors if not isinstance(f, Named) or f.on or f.name == only]
        bare = [f.kept if isinstance(f, Named) else f for f in factors]
        named = [only is None or (isinstance(f, Named) and f.name == only) for f in factors]
        if len(bare) > 1 and self.left and isinstance(bare[0], self.takes) and named[0]:
            return bare[0], False, _product(factors[1:])
        if len(bare) > 1 and isinstance(bare[-1], self.takes) and named[-1]:
            return bare[-1], True, _product(factors[:-1])
        return None

    @abstractmethod
    def right(self, at: At, t: Held) -> bool:
        """Whether a layer's tensors are a right side."""

    @abstractmethod
    def content(
        self, model: nn.Module, sides: Mapping[str, tuple[Expr, bool]], found: Found
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """By path each layer's tensor, and the settings. Errors: ConflictError for what one folder cannot say."""

    def change(self, woven: Woven, s: Any, at: At, t: Held, common: Held, role: str) -> Change:
        now, site = woven.exprs[at.sites[0]], at.sites[0]
        right = self.right(at, t)
        if right and (woven.taps.get(site) or Tap()).turns():
            got, fix = woven.taps[site].describe(), "take the taps off with weft.untap(model), attach, and turn again"
            what = "a side of what was read before a turn is none behind it"
            raise ConflictError(what, where=site, got=got, want="plain inputs", fix=fix)
        value = self.value(s, at, {k: x.to(device_of(now)).clone() for k, x in t.items()}, common)
        side = Named(value, name_of(role) or "")
        terms = terms_of(now)
        inner = total({r: e for r, e in terms.items() if name_of(r) is None})
        put = between((), inner, (side,)) if right else between((side,), inner, ())
        return Change({site: total({"base": put, **{r: e for r, e in terms.items() if name_of(r) is not None}})})

    def find(self, model: nn.Module, only: str | None) -> Found:
        held = expressions(model)
        found = Found(rest={n: e if only is None else terms_of(e).get("base", e) for n, e in held.items()})
        for site, inner in [*found.rest.items()]:
            if (parts := self.cut(inner, only)) is not None:
                side, right, rest = parts
                one = Product(rest, side) if right else Product(side, rest)
                found.pieces[site] = Piece(places(model)[site], {"base": one})
                found.rest[site] = rest
        return found

    def refusals(self, model: nn.Module, found: Found) -> list[WeftError]:
        return [p for site, piece in found.pieces.items() for p in self.unfit(site, piece.place)]

    def write(self, model: nn.Module, found: Found) -> Written:
        cut = {
            p.place.modules[0]: parts for p in found.pieces.values() if (parts := self.cut(p.terms["base"])) is not None
        }
        held, settings = self.content(model, {path: (side, right) for path, (side, right, _) in cut.items()}, found)
        tensors = {key(path, self.parts[0]): t.detach() for path, t in held.items()}
        return Written(tensors, {**self.targets(model, list(cut)), **settings})


class Ia3Settings(Settings):
    """The settings of an IA3."""

    feedforward_modules: Names | str | None = None


class Ia3(Sides):
    """diag(l) (W x + b), or W diag(l) x + b for a layer whose l is a row: what `feedforward_modules` means."""

    peft_type, method, settings = "IA3", "ia3", Ia3Settings
    note = "PEFT scales a key's or value's bias too: refused where weft did not"
    idle, parts = ("init_ia3_weights",), ("ia3_l",)
    takes, left = Diagonal, True

    def shapes(self, s: Ia3Settings, at: At) -> dict[str, tuple[int, ...]]:
        return {self.parts[0]: (1, at.n) if self._fed(s, at) else (at.m, 1)}

    def _fed(self, s: Ia3Settings, at: At) -> bool:
        """Whether a layer's inputs are scaled. As PEFT compares: any name that the path ends with."""
        return at.path.endswith(tuple(s.feedforward_modules or ()))

    def lacks(self, s: Ia3Settings, found: Mapping[str, Entry], mine: Collection[At]) -> list[WeftError]:
        if not isinstance(s.feedforward_modules, str):
            return []
        want, fix = "a list of names; a stranger's regular expression is never run", "write the modules' names"
        where = f"{CONFIG}: feedforward_modules"
        return [ConflictError("a pattern is no name", where=where, got=s.feedforward_modules, want=want, fix=fix)]

    def right(self, at: At, t: Held) -> bool:
        return t[self.parts[0]].shape == (1, at.n) and (at.m, 1) != (1, at.n)

    def value(self, s: Ia3Settings, at: At, t: Held, common: Held) -> Expr:
        return Diagonal(t[self.parts[0]].flatten())

    def change(self, woven: Woven, s: Ia3Settings, at: At, t: Held, common: Held, role: str) -> Change:
        made = super().change(woven, s, at, t, common, role)
        if at.bias and not self.right(at, t):
            bias = woven.model.get_parameter(at.bias)
            made.vectors[at.bias] = Dense(_times(t[self.parts[0]].flatten(), bias.detach())[None])
        return made

    def find(self, model: nn.Module, only: str | None) -> Found:
        """With the biases that are scaled as PEFT scales them."""
        found, known, first = super().find(model, only), layers(model), first_vectors(model)
        for piece in found.pieces.values():
            side, right, _ = self.cut(piece.terms["base"]) or (None, True, None)
            bias = known[piece.place.modules[0]].bias
            if isinstance(side, Diagonal) and not right and bias in first:
                now = model.get_parameter(bias).detach()
                if torch.equal(_times(side.d.detach(), first[bias]().to(now)), now):
                    found.vectors.add(bias)
        return found

    def refusals(self, model: nn.Module, found: Found) -> list[WeftError]:
        problems, known = super().refusals(model, found), layers(model)
        for site, piece in found.pieces.items():
            bias = known[piece.place.modules[0]].bias
            side, right, _ = self.cut(piece.terms["base"]) or (None, True, None)
            if right or not isinstance(side, Diagonal) or not bias or bias in found.vectors:
                continue
            now = model.get_parameter(bias).detach()
            if not torch.equal(_times(side.d.detach(), now), now):
                got, want = f"{bias}, which is not scaled", "a layer without a bias: PEFT scales that too"
                problems.append(self.no(site, got, want))
        return problems

    def content(
        self, model: nn.Module, sides: Mapping[str, tuple[Expr, bool]], found: Found
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        fed = sorted(path for path, (_, right) in sides.items() if right)
        for path, (_, right) in sides.items():
            if not right and (like := next((p for p in fed if path.endswith(p)), None)):
                problem = self.no(
                    path, f"it ends with {like}", "a name that no feed-forward layer's path is the end of"
                )
                raise problem
        made = {
            path: side.d[None] if right else side.d[:, None]
            for path, (side, right) in sides.items()
            if isinstance(side, Diagonal)
        }
        return made, {"feedforward_modules": fed}


class OftSettings(Settings):
    """The settings of an OFT."""

    r: Annotated[int, Field(ge=0, le=1 << 31)]
    oft_block_size: Annotated[int, Field(ge=0, le=1 << 31)]
    use_cayley_neumann: bool = True
    coft: bool | None = None
    block_share: bool | None = None
    eps: Number | None = None

    def odd(self) -> dict[str, Any]:
        series = {"use_cayley_neumann": True} if self.use_cayley_neumann else {}
        return super().odd() | series | ({"coft": True} if self.coft else {})

    def block(self, n: int) -> int:
        """The inputs that one rotation is of, for a layer with n. Nearest divisors take the place of what does not divide n."""
        if self.r:
            return n // _divisor(n, self.r)
        return _divisor(n, self.oft_block_size)


class Oft(Sides):
    """W R with rotations R = (I + Q)(I - Q)⁻¹ of blocks of inputs, in order; Q of the numbers above its diagonal, row by row."""

    peft_type, method, settings = "OFT", "oft", OftSettings
    note = "exact rotations alone (`use_cayley_neumann` false, no `coft`); refused where no one block size gives all layers theirs"
    idle = ("module_dropout", "init_weights", "num_cayley_neumann_terms")
    parts, transposed = ("oft_R.weight",), False
    takes = Cayley

    def lacks(self, s: OftSettings, found: Mapping[str, Entry], mine: Collection[At]) -> list[WeftError]:
        if (s.r == 0) != (s.oft_block_size == 0):
            return []
        got = f"r={s.r}, oft_block_size={s.oft_block_size}"
        return [wrong("the blocks have no size", f"{CONFIG}: oft_block_size", got, "one of them zero, the other not")]

    def shapes(self, s: OftSettings, at: At) -> dict[str, tuple[int, ...]]:
        size = s.block(at.n) if (s.r == 0) != (s.oft_block_size == 0) else 1
        return {self.parts[0]: (1 if s.block_share else at.n // size, size * (size - 1) // 2)}

    def right(self, at: At, t: Held) -> bool:
        return True

    def value(self, s: OftSettings, at: At, t: Held, common: Held) -> Expr:
        size, q = s.block(at.n), t[self.parts[0]]
        return Cayley(q.expand(at.n // size, -1).clone() if s.block_share else q, size)

    def content(
        self, model: nn.Module, sides: Mapping[str, tuple[Expr, bool]], found: Found
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        turns = {path: side for path, (side, _) in sides.items() if isinstance(side, Cayley)}
        sizes, counts = {s.block for s in turns.values()}, {len(s.q) for s in turns.values()}
        tried = [(0, b) for b in (*sizes, *range(min(sizes), max(sizes)))]
        tried += [(r, 0) for r in (*counts, *range(min(counts), max(counts)))]
        for r, block in tried:
            s = OftSettings(r=r, oft_block_size=block)
            if all(s.block(side.shape[1]) == side.block for side in turns.values()):
                plain = {"use_cayley_neumann": False, "coft": False, "block_share": False, "bias": "none"}
                return {path: side.q for path, side in turns.items()}, {"r": r, "oft_block_size": block, **plain}
        want = "sizes that one oft_block_size, or one number of blocks, gives"
        problem = self.no(next(iter(turns)), f"blocks of {sorted(sizes)}", want)
        raise problem


def _times(d: Tensor, bias: Tensor) -> Tensor:
    """A bias that is scaled with its outputs, in its own dtype."""
    return (bias * d.to(bias.device)).to(bias.dtype)


def _product(factors: list[Expr]) -> Expr:
    return factors[0] if len(factors) == 1 else Product(*factors)


def _divisor(n: int, near: int) -> int:
    """The divisor of n that is nearest; of two as near the smaller."""
    if near >= n:
        return n
    lower = max(k for k in range(1, max(1, near) + 1) if n % k == 0)
    higher = next(k for k in range(max(1, near), n + 1) if n % k == 0)
    return lower if near - lower <= higher - near else higher
