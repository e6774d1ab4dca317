"""Evidence of what reads no tokens, and of what gives no distribution."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from model import zoo
from torch import Tensor, nn

import weft
from weft.error import ConflictError
from weft.lab.distance import Distance
from weft.model import fork, weave
from weft.stats import collect, forward, objective
from weft.store.cache import Cache


@pytest.mark.parametrize(("name", "kind"), [("flow", "field"), ("dit", "field"), ("vit", "classes")])
def test_evidence_of_images(name: str, kind: str, tmp_path: Path) -> None:
    """Grams are those of one plain pass, weights the output gradients of the objective's probe; of layers that are called once."""
    plain, given = zoo.build(name), zoo.batch(name)
    stats, goal = collect(weave(zoo.build(name)), [given], tmp_path, seed=4), objective(plain)
    assert goal.kind == kind and stats.units == 2
    outs, seen, calls = dict[str, Tensor](), dict[str, Tensor](), Counter[str]()

    def hook(path: str) -> None:
        def see(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[path], outs[path] = args[0].detach(), out
            calls[path] += 1

        plain.get_submodule(path).register_forward_hook(see)

    paths = [p for p, m in plain.named_modules() if isinstance(m, nn.Linear)]
    for path in paths:
        hook(path)
    rng, total, grams = torch.Generator().manual_seed(4), dict[str, Tensor](), dict[str, Tensor]()
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in given.items()}
        vectors = goal.vectors(forward(plain, one), one)
        grads = torch.autograd.grad(goal.probe(vectors, rng), [outs[p] for p in paths])
        for path, g in zip(paths, grads, strict=True):
            total[path] = total.get(path, 0) + g.double().flatten(0, -2).square().sum(0) / 2
            x = seen[path].flatten(0, -2)
            grams[path] = grams.get(path, 0) + x.T @ x / len(x) / 2
    once = {p: w for p, w in total.items() if calls[p] == 2}
    for path, want in once.items():
        (e,) = stats.evidence([f"{path}.weight"])[f"{path}.weight"]
        assert torch.allclose(e.weight.double(), want, rtol=1e-3, atol=1e-4 * float(want.max())), path
        assert torch.allclose(e.gram, grams[path], rtol=1e-3, atol=1e-5 * float(e.gram.abs().max())), path
    assert len(once) >= 12 and sum(bool(w.any()) for w in once.values()) >= 12


def test_shares_of_look_ups_of_classes(tmp_path: Path) -> None:
    """The two classes that the batch names have half each, with and without a backward pass."""
    for gradient in (True, False):
        stats = collect(weave(zoo.build("flow")), [zoo.batch("flow")], tmp_path, gradient=gradient)
        (e,) = stats.evidence(["classes.weight"])["classes.weight"]
        assert e.weight.tolist() == [0.5 * (i in (1, 7)) for i in range(10)]


def test_the_distance_of_fields_is_half_their_squares(tmp_path: Path) -> None:
    """An image is a unit; 1/2 δᵀ F δ, where F, the second moment of the gradients of probes, is the identity."""
    model, given = weave(zoo.build("flow")), zoo.batch("flow")
    goal, other = objective(model), fork(model)
    weft.apply(other, "rtn", bits=4, group=8)
    with torch.no_grad():
        gap = (forward(other, given) - forward(model, given)).flatten(1)
    far = Distance(model, [given], goal, Cache(tmp_path), "flow")
    want = gap.double().square().sum(1) / 2
    values, weights = far.documents(other)
    assert values.tolist() == pytest.approx(want.tolist(), rel=1e-5) and weights.tolist() == [1.0, 1.0]
    assert far(model) == 0.0 and far.part(0.5, 0)(other) in [pytest.approx(v) for v in values]
    rng, vectors = torch.Generator().manual_seed(0), torch.zeros(4000, 3, requires_grad=True)
    goal.probe(vectors, rng).backward()
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad.T @ vectors.grad / 4000, torch.eye(3), atol=0.1, rtol=0)


@pytest.mark.parametrize(("name", "said"), [("clip", "tells nothing of its weights"), ("t5", "walked block by block")])
def test_what_gives_no_evidence_is_refused_by_name(name: str, said: str, tmp_path: Path) -> None:
    """One image beside one caption has no other to be told from; a decoder's blocks hand on more than their hidden state."""
    given = zoo.batch(name)
    if name == "t5":
        given = {**given, "attention_mask": torch.ones_like(given["input_ids"])}
    with pytest.raises(ConflictError, match=said):
        collect(weave(zoo.build(name)), [given], tmp_path, seed=0)
