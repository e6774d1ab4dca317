"""Every architecture merges: layers, convolutions, experts, norms, biases and what is tied; a merged model runs and is saved like any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model.zoo import MODELS, batch, build, output
from torch import nn

import weft
from weft.expr import Dense
from weft.model import expressions, fingerprint, fork, plain_tensors, set_expressions, unweave, weave


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """A fork with other values in every parameter."""
    made, g = fork(model), torch.Generator().manual_seed(seed)
    noise = {n: 0.02 * torch.randn(e.shape, generator=g) for n, e in expressions(made).items()}
    set_expressions(made, {n: Dense(e.dense().detach() + noise[n]) for n, e in expressions(made).items()})
    for t in plain_tensors(made).values():
        if isinstance(t, nn.Parameter):
            t.data = t.data + 0.02 * torch.randn(t.shape, generator=g)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_merges(name: str, tmp_path: Path) -> None:
    base = weave(build(name))
    models = [shaken(base, i) for i in range(2)]
    made = weft.combine(models, "soup", base=base)
    for n, e in expressions(made).items():
        mean = (expressions(models[0])[n].dense() + expressions(models[1])[n].dense()) / 2
        torch.testing.assert_close(e.dense(), mean, rtol=1e-5, atol=1e-6)
    for n, t in plain_tensors(made).items():
        one, two = (plain_tensors(m)[n] for m in models)
        want = (one + two) / 2 if isinstance(one, nn.Parameter) else plain_tensors(base)[n]
        torch.testing.assert_close(t, want, rtol=1e-5, atol=1e-6)
    inputs = batch(name)
    with torch.no_grad():
        now = output(made, inputs)
        weft.save(made, tmp_path / "made")
        again = output(weft.load(tmp_path / "made"), inputs)
        torch.testing.assert_close(again, now, rtol=1e-4, atol=1e-5)
        assert not torch.equal(now, output(base, inputs))
        torch.testing.assert_close(output(unweave(made), inputs), now, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_copies_give_every_architecture_back(name: str) -> None:
    """To the last bit, from two models that share no storage."""
    one, two = weave(build(name)), weave(build(name))
    for method in ("soup", "task_arithmetic"):
        assert fingerprint(weft.combine([one, two], method, base=fork(one))) == fingerprint(one)
    for n, e in expressions(weft.combine([one, two], "ties", base=one)).items():
        torch.testing.assert_close(e.dense(), expressions(one)[n].dense())


def test_the_result_is_a_model_of_its_own() -> None:
    """Training it, and moving it to another dtype, changes neither members nor base."""
    base = weave(build("llama"))
    models = [base, fork(base)]
    before = [fingerprint(m) for m in models]
    made = weft.combine(models, "soup")
    weft.apply(made, "lora", rank=2)
    for p in made.parameters():
        p.requires_grad_(p.is_floating_point())
    made(**batch("llama")).logits.square().mean().backward()
    norm = plain_tensors(made)["model.norm.weight"]
    torch.optim.SGD([norm], lr=1.0).step()
    assert [fingerprint(m) for m in models] == before and norm.grad is not None
    made.double()
    assert [fingerprint(m) for m in models] == before
