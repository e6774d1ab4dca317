"""Laws of every method that adds a branch: it acts, trains, is kept, and without it the model is what it was."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from model import zoo
from torch import Tensor, nn

import weft
from weft.engine import branches as engine
from weft.engine import get, names
from weft.engine.run import Step, apply
from weft.error import ConflictError, OptionError
from weft.model import branches, expressions, fingerprint, fork, unbranch, unweave, weave
from weft.stats import collect
from weft.store import load, nbytes, save, verify

from .cases import options, rng

BRANCHES = [name for name in names() if get(name).kind == "branch"]
MODELS = ("llama", "gpt2", "bert")
REFUSED = {("prefix", "bert"), ("generative", "bert")}
"""An encoder keeps no keys and values; its parts add the stream themselves."""
SHORT = {"generative": {"window": 3}}
"""Options by which a branch acts on a few tokens."""


@cache
def model(name: str) -> nn.Module:
    """A woven model; never changed."""
    return weave(zoo.build(name))


def with_branch(method: str, family: str = "llama", *, seed: int = 0, **given: object) -> nn.Module:
    """A fork with a branch."""
    made = fork(model(family))
    engine.run(made, Step.of(method, **{**SHORT.get(method, {}), **given}), seed=seed)
    return made


def stirred(of: nn.Module, name: str = "default") -> nn.Module:
    """The model with the branches of this name moved, as by training: those that begin as nothing act."""
    for b in branches(of):
        for n, p in b.named_parameters():
            if b.name == name and p.requires_grad:
                p.data += 0.3 * torch.randn(p.shape, generator=rng("stirred", b.key, n))
    return of


def logits(of: nn.Module) -> Tensor:
    """What the model gives."""
    with torch.no_grad():
        return of(**zoo.batch("llama")).logits


def train(of: nn.Module) -> None:
    """Two steps of plain gradient descent on all that is trainable; by the second every tensor of a branch has a part in it."""
    for step in range(2):
        of.zero_grad()
        of(**zoo.batch("llama")).logits.square().mean().backward()
        with torch.no_grad():
            for n, p in ((n, p) for n, p in of.named_parameters() if p.requires_grad):
                assert p.grad is not None and bool(p.grad.isfinite().all())
                assert bool(p.grad.any()) or not step or "weft_branches" not in n
                p -= 0.5**step * p.grad / p.grad.norm().clamp(min=1e-9)


@pytest.mark.parametrize("method", [*BRANCHES, "lora", "nf4"])
def test_a_pickle_is_the_model(method: str) -> None:
    """As a deep copy is, with its methods, and none of them is the first one's."""
    made = with_branch(method) if method in BRANCHES else fork(model("llama"))
    if method not in BRANCHES:
        apply(made, [Step.of(method)])
    others = pickle.loads(pickle.dumps(stirred(made))), copy.deepcopy(made)
    want = logits(made)
    for other in others:
        assert torch.equal(logits(other), want) and fingerprint(other) == fingerprint(made)
        assert inspect.signature(other.forward) == inspect.signature(made.forward)
        for b in branches(other):
            b.on = False
        if branches(other):
            assert not torch.equal(logits(other), want) and torch.equal(logits(made), want)
        with pytest.raises(ConflictError, match="resized"):
            other.resize_token_embeddings(9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", BRANCHES)
def test_what_is_taken_off_leaves_nothing(method: str, name: str) -> None:
    """With it the output is another of the same shape; without it every bit, name and attribute is as it was."""
    was = model(name)
    if (method, name) in REFUSED:
        with pytest.raises(ConflictError, match="takes no"):
            with_branch(method, name)
        return
    made = stirred(with_branch(method, name))
    host = made.get_submodule(branches(made)[0].at)
    assert logits(made).shape == logits(was).shape and not torch.allclose(logits(made), logits(was), atol=1e-4)
    assert unbranch(made) == [f"{b.at}:default" for b in branches(with_branch(method, name))]
    assert torch.equal(logits(made), logits(was)) and fingerprint(made) == fingerprint(was)
    assert [n for n, _ in made.named_modules()] == [n for n, _ in was.named_modules()] and "forward" not in vars(host)
    assert made.state_dict().keys() == was.state_dict().keys()
    assert torch.equal(logits(unweave(made)), logits(zoo.build(name)))


def only_it_trains(method: str) -> None:
    """Its tensors have gradients, and nothing else is trainable; a step changes what the model gives."""
    made = with_branch(method)
    before = logits(made)
    moving = [n for n, p in made.named_parameters() if p.requires_grad]
    assert moving and all("weft_branches" in n for n in moving)
    train(made)
    assert not torch.equal(logits(made), before)
    unbranch(made)
    assert torch.equal(logits(made), logits(model("llama")))


def it_comes_back_from_disk(method: str) -> None:
    """The same bytes, counted; the same output; frozen, as all that is loaded."""
    made = with_branch(method)
    train(made)
    with TemporaryDirectory() as place:
        out = Path(place) / "out"
        save(made, out)
        back = load(out)
        assert verify(out) == [] and fingerprint(back) == fingerprint(made) and torch.equal(logits(back), logits(made))
        assert nbytes(made) == nbytes(back) == nbytes(model("llama")) + sum(b.nbytes() for b in branches(made))
        assert not any(p.requires_grad for p in back.parameters())
        unbranch(back)
        assert torch.equal(logits(back), logits(model("llama")))


def a_fork_is_on_its_own(method: str) -> None:
    """Neither training one of two nor taking its branch off reaches the other."""
    source = with_branch(method)
    other = fork(source)
    mark, before = fingerprint(source), logits(source)
    assert fingerprint(other) == mark and torch.equal(logits(other), before)
    train(other)
    assert fingerprint(source) == mark != fingerprint(other) and torch.equal(logits(source), before)
    unbranch(other)
    assert torch.equal(logits(source), before) and torch.equal(logits(other), logits(model("llama")))


def the_seed_decides(method: str) -> None:
    """The same branch again for the same seed and name, another for another; global randomness has no part."""
    torch.manual_seed(1)
    first = fingerprint(with_branch(method))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert fingerprint(with_branch(method)) == first != fingerprint(with_branch(method, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)


def options_work_or_are_refused(method: str) -> None:
    """The ends and the middle of every option matter; what is outside or unknown is refused."""
    for option, good, bad in options(get(method)):
        prints = {fingerprint(with_branch(method, **{option: v})) for v in good}
        assert len(prints) == len(good)
        for value in bad:
            with pytest.raises(OptionError, match=option):
                get(method).bind({option: value})
    with pytest.raises(OptionError, match="unheard_of"):
        get(method).bind({"unheard_of": 1})


def it_goes_with_compressed_weights_and_adapters(method: str) -> None:
    """On a rounded base with LoRA, before and after; both train; they are saved together and it is taken off alone."""
    with TemporaryDirectory() as place:
        made = fork(model("llama"))
        apply(made, [Step.of("rtn", group=8), Step.of("lora", rank=2)], at="all-linear")
        before = logits(made)
        engine.run(made, Step.of(method, **SHORT.get(method, {})))
        train(made)
        apply(made, [Step.of("lora", rank=2, name="two")], at="q_proj")
        save(made, Path(place) / "out")
        back = load(Path(place) / "out")
        assert torch.equal(logits(back), logits(made))
        assert {"adapter:default" in e.describe() for n, e in expressions(back).items() if "proj" in n} == {True}
        unbranch(made)
        assert not torch.equal(logits(made), before)  # the adapters have trained


def names_tell_branches_apart(method: str) -> None:
    """A second one of another name goes around the first; a name that is taken, or that nothing has, is refused."""
    made = stirred(with_branch(method))
    one, count = logits(made), len(branches(made))
    with pytest.raises(ConflictError, match="of that name"):
        engine.run(made, Step.of(method))
    assert len(branches(made)) == count
    engine.run(made, Step.of(method, name="two", **SHORT.get(method, {})))
    assert not torch.equal(logits(stirred(made, "two")), one)
    by_host = [tuple(other.name for other in branches(made) if other.at == b.at) for b in branches(made)]
    assert set(by_host) <= {("default", "two"), ("default",), ("two",)} and "two" in {b.name for b in branches(made)}
    with TemporaryDirectory() as place:
        save(made, Path(place) / "out")
        assert torch.equal(logits(load(Path(place) / "out")), logits(made))
    with pytest.raises(OptionError, match="no such branch"):
        unbranch(made, "three")
    unbranch(made, "two")
    assert torch.equal(logits(made), one)


def what_cannot_hold_it_says_so(method: str) -> None:
    """Plain weights, other tools' formats, changes of coordinates and evidence: refused by its name, and nothing changes."""
    made = with_branch(method)
    apply(made, [Step.of("lora", rank=2)], at="q_proj")
    mark = fingerprint(made)
    with TemporaryDirectory() as place:
        out = Path(place) / "out"
        acts: list[Callable[[], object]] = [
            lambda: unweave(made),
            lambda: weft.export(made, out),
            lambda: weft.export(made, out, to="peft"),
            lambda: weft.export(made, out, to="compressed-tensors"),
            lambda: weft.apply(made, "rotate"),
            lambda: collect(made, [zoo.batch("llama")], out),
        ]
        for act in acts:
            with pytest.raises(ConflictError, match="knows no branches") as e:
                act()
            assert branches(made)[0].key in str(e.value.where) and "unbranch" in e.value.fix
        assert fingerprint(made) == mark and not list(Path(place).glob("**/*.safetensors"))
    with pytest.raises(OptionError, match="goes to no sites"):
        weft.apply(made, method, at="q_proj", name="two")
    unweave(made, original=True)
    assert torch.equal(logits(made), logits(model("llama")))


LAWS: list[Callable[[str], None]] = [
    only_it_trains,
    it_comes_back_from_disk,
    a_fork_is_on_its_own,
    the_seed_decides,
    options_work_or_are_refused,
    it_goes_with_compressed_weights_and_adapters,
    names_tell_branches_apart,
    what_cannot_hold_it_says_so,
]


@pytest.mark.parametrize("method", BRANCHES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_branch(law: Callable[[str], None], method: str) -> None:
    """Each law, for each branch."""
    law(method)
