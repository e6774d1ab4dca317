"""Branch: a module added to a model at one place, which takes part in every call of the module there."""

from __future__ import annotations

import functools
import inspect
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from weft.error import ConflictError, FormatError, NumericError, OptionError, WeftError, raise_all
from weft.expr.fields import Field, defaults, fields, misfit

HELD = "weft_branches"
"""What a host calls its branches; the first is the innermost."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
Call = Callable[[dict[str, Any]], Any]
"""What a branch is given to go on with: the host's own forward, or the next branch, with arguments by name."""

BRANCHES: dict[str, type[Branch]] = {}
"""Every kind of branch by name: a class of Branch is one as soon as its file is imported."""


class Branch(nn.Module, ABC):
    """A module beside a model's own: `at` is the path of its host, `name` tells it from the host's other branches.

    A branch is a class of annotated fields, as a node is: tensors (`Float[Tensor, "k d"]`), which become parameters, frozen unless
    passed as trainable ones, and plain values (a value in the class is the default). It writes `forward`, its part in a call of the
    host, and `check`. What the host is and holds never changes: without its branches it is as it was.
    Errors: OptionError for a name that is none; ShapeError naming the field that does not fit.
    """

    __annotations__: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    at: str
    name: str
    on: bool
    """Whether it takes part; `weft.activate` turns it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        BRANCHES[cls.__name__] = cls

    def __init__(self, *, at: str, name: str = "default", **given: Any) -> None:
        super().__init__()
        spec, kind = fields(type(self)), type(self).__name__
        given = {**defaults(type(self)), **given}
        if not isinstance(at, str) or not isinstance(name, str) or not _NAME.fullmatch(name):  # pyright: ignore[reportUnnecessaryIsInstance]
            want, fix = "a path, and a name of 1 to 64 letters, digits, _ and -", "give another name"
            raise OptionError("a branch cannot be called so", where=kind, got=f"{at}:{name}", want=want, fix=fix)
        if set(given) != {f.name for f in spec}:
            want, fix = ", ".join(f.name for f in spec), "pass each field once"
            raise OptionError("a branch has other fields", where=kind, got=", ".join(given), want=want, fix=fix)
        dims: dict[str, int] = {}
        raise_all([p for f in spec if (p := misfit(kind, f, given[f.name], dims))])
        self.at, self.name, self.on = at, name, True
        for f in spec:
            self._store(f, given[f.name])

    def _store(self, f: Field, value: Any) -> None:
        if f.kind == "tensor":
            held = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            self.register_parameter(f.name, held)
        else:
            setattr(self, f.name, value)

    @property
    def key(self) -> str:
        """Place and name, which no other branch of the model has."""
        return f"{self.at}:{self.name}"

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Refuse a model that it does not fit. Errors: ShapeError, ConflictError with the reason."""

    @abstractmethod
    def forward(self, host: nn.Module, call: Call, given: dict[str, Any]) -> Any:
        """What the host gives for these arguments; `call` is the host without this branch."""

    def begin(self, step: int, seed: int) -> None:
        """Told before every step of training; what a branch draws for a step depends on its number and the seed alone."""

    @property
    def numbers(self) -> int:
        """Entries of all its tensors."""
        return sum(t.numel() for t in self.parameters())

    def nbytes(self) -> int:
        """Tensor bytes that it takes on disk."""
        return sum(t.numel() * t.element_size() for t in self.parameters())

    def describe(self) -> str:
        """Such as `Prompt(16)`."""
        return type(self).__name__

    def extra_repr(self) -> str:
        return f"{self.key}, {self.describe()}"


def branches(model: nn.Module) -> list[Branch]:
    """Every branch, host by host, the innermost first."""
    return [b for m in model.modules() for b in _held(m)]


def add_branch(model: nn.Module, *added: Branch) -> None:
    """Put branches on their hosts, in place, around the branches that the hosts have: all of them, or none.

    Errors: OptionError for a place that is none; ConflictError for a name that is taken, a host whose forward is not its class's,
    and what a branch says; NumericError for values that are not finite.
    """
    may_stand(model, *added)
    for branch in added:
        host = model.get_submodule(branch.at)
        if not _held(host):
            host.add_module(HELD, nn.ModuleList())
            host.forward = _through(host)
        device = next((p.device for p in host.parameters()), torch.device("cpu"))
        cast(nn.ModuleList, host.get_submodule(HELD)).append(branch.to(device))


def begin_step(model: nn.Module, step: int, seed: int = 0) -> None:
    """Tell every branch that a step of training begins: the steps before it, and the run's seed.

    `weft.train` and `weft.Trainer` do; a loop of your own has to where a branch trains by parts.
    """
    for branch in branches(model):
        branch.begin(step, seed)


def may_stand(model: nn.Module, *added: Branch, instead: str | None = None) -> None:
    """Whether these branches can be put on their hosts, once those called `instead` are off. Errors: as `add_branch`."""
    modules = dict(model.named_modules())
    for i, branch in enumerate(added):
        _may_stand(model, modules, branch, instead)
        if branch.key in {b.key for b in added[:i]}:
            problem = _taken(branch)
            raise problem


def _may_stand(model: nn.Module, modules: Mapping[str, nn.Module], branch: Branch, instead: str | None) -> None:
    host = modules.get(branch.at)
    if host is None:
        want, fix = "a module's path", "print(model) shows them"
        raise OptionError("no such place", where=branch.key, got=branch.at, want=want, fix=fix)
    if any(b.name == branch.name != instead for b in _held(host)):
        problem = _taken(branch)
        raise problem
    branch.check(model)
    for path, t in branch.named_parameters():
        if not bool(torch.isfinite(t).all()):
            want, fix = "finite numbers", "look for NaN in what it was made from"
            raise NumericError("a branch is not finite", where=f"{branch.key}.{path}", got="NaN", want=want, fix=fix)
    if not _held(host) and "forward" in vars(host):
        want, fix = "its class's forward", "put branches on before the model is dispatched or wrapped"
        raise ConflictError("this host is wrapped", where=branch.key, got="another forward", want=want, fix=fix)


def _taken(branch: Branch) -> ConflictError:
    want, fix = "a new name", "give another name, or take the first off with weft.unbranch"
    return ConflictError("this place has a branch of that name", where=branch.key, got=branch.name, want=want, fix=fix)


def unbranch(model: nn.Module, name: str | None = None) -> list[str]:
    """Take the branches of this name off, in place, or all of them; the model is what it was without. Returns their keys.

    Errors: OptionError for a name that no branch has.
    """
    found = [b for b in branches(model) if name in (None, b.name)]
    if name is not None and not found:
        want, fix = (
            ", ".join(sorted({b.name for b in branches(model)})) or "none: there is no branch",
            "name one of these",
        )
        raise OptionError("no such branch", where=type(model).__name__, got=name, want=want, fix=fix)
    for host in [m for m in model.modules() if _held(m)]:
        left = [b for b in _held(host) if b not in found]
        delattr(host, HELD)
        if left:
            host.add_module(HELD, nn.ModuleList(left))
        else:
            del vars(host)["forward"]
    return [b.key for b in found]


def refuse_branches(model: nn.Module, what: str) -> None:
    """Errors: ConflictError naming every branch, for what cannot hold one or see through it."""
    fix = "take it off with weft.unbranch(model); weft.save keeps it"
    problems: list[WeftError] = [
        ConflictError(f"{what} knows no branches", where=b.key, got=b.describe(), want="a model without", fix=fix)
        for b in branches(model)
    ]
    raise_all(problems)


def inside_branches(model: nn.Module) -> tuple[str, ...]:
    """How the names of all branches' tensors begin, in the model's own names."""
    return tuple({f"{b.at}.{HELD}." if b.at else f"{HELD}." for b in branches(model)})


def branch_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of every branch, by its name in a weft folder."""
    return {f"{b.at}:branch.{b.name}.{n}": t for b in branches(model) for n, t in b.named_parameters()}


def branch_spec(branch: Branch) -> dict[str, Any]:
    """A branch without its tensors, as JSON."""
    plain = {f.name: getattr(branch, f.name) for f in fields(type(branch)) if f.kind == "static"}
    off = {} if branch.on else {"on": False}
    return {"branch": type(branch).__name__, "at": branch.at, "name": branch.name, **off, **plain}


def build_branch(said: Mapping[str, Any], get: Callable[[str], Tensor]) -> Branch:
    """The branch of a spec; `get(field)` gives each tensor. Errors: FormatError for an unknown kind or field; those of Branch."""
    kind: Any = said.get("branch")
    if not isinstance(kind, str) or kind not in BRANCHES:
        want, fix = ", ".join(sorted(BRANCHES)), "use a newer weft"
        raise FormatError("unknown branch", where="branch", got=kind, want=want, fix=fix)
    spec = fields(BRANCHES[kind])
    want = {"branch", "at", "name", *(f.name for f in spec if f.kind == "static")}
    if (set(said) | set(defaults(BRANCHES[kind]))) - {"on"} != want or said.get("on", False) is not False:
        fix = "use the weft that wrote it"
        raise FormatError("a branch has other fields", where=kind, got=sorted(said), want=sorted(want), fix=fix)
    held = {f.name: get(f.name) for f in spec if f.kind == "tensor"}
    held |= {
        f.name: said[f.name] for f in spec if f.name in said
    }  # what is absent, in a file of an older weft, has its default
    made = BRANCHES[kind](at=said["at"], name=said["name"], **held)
    made.on = "on" not in said
    return made


def _held(host: nn.Module) -> Iterable[Branch]:
    return cast("Iterable[Branch]", host._modules.get(HELD) or ())  # pyright: ignore[reportPrivateUsage]


def _through(host: nn.Module) -> Callable[..., Any]:
    """The forward of a host through its branches, which is copied and pickled with it."""
    own = types.MethodType(type(host).forward, host)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in inspect.signature(own).parameters.values() if p.kind in kinds)
    made = functools.partial(_forward, host, names)
    cast(Any, made).__wrapped__ = own  # whose signature it shows
    return made


def _forward(host: nn.Module, names: Sequence[str], /, *args: Any, **named: Any) -> Any:
    """The host's output through its branches, with all arguments by name."""
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or given.keys() & named.keys():
        inspect.signature(type(host).forward).bind(host, *args, **named)  # says what is wrong
    call: Call = functools.partial(_plainly, host)
    for branch in (b for b in _held(host) if b.on):
        call = functools.partial(branch, host, call)
    return call({**given, **named})


def _plainly(host: nn.Module, given: dict[str, Any]) -> Any:
    """The host's own forward."""
    return type(host).forward(host, **given)
