"""Shifts: norms and biases with something added while their part of the model runs, wherever they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.error import ConflictError, ShapeError
from weft.model import Shift, add_branch, branches, expressions, fingerprint, fork, shifts, unbranch, vectors, weave

from . import zoo

FAMILIES = ("llama", "bert", "gpt2")


def added(model: nn.Module) -> dict[str, Tensor]:
    """Something for every vector."""
    rng = torch.Generator().manual_seed(5)
    return {n: 0.3 * torch.randn(p.shape, generator=rng) for n, p in vectors(model).items()}


def stopped(*_: Any) -> None:
    """Fails in the middle of a call."""
    raise InterruptedError


def output(model: nn.Module, family: str) -> Tensor:
    """What the model gives."""
    with torch.no_grad():
        out = model(**zoo.batch(family))
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shift_is_what_other_values_are(family: str, tmp_path: Path) -> None:
    """On: as the model with the sum in its vectors. Off, and after an error inside: to the bit as before. Saved, forked, taken off."""
    model = weave(zoo.build(family))
    other, values = fork(model), added(model)
    for n, p in vectors(other).items():
        p.data = p.data + values[n]
    plain, mark, want = output(model, family), fingerprint(model), output(other, family)
    add_branch(model, *shifts(model, values, "task"))
    assert (want - plain).abs().max() > 1e-3
    torch.testing.assert_close(output(model, family), want)
    weft.save(model, tmp_path / "saved")
    back = weft.load(tmp_path / "saved")
    assert torch.equal(output(back, family), output(model, family)) and torch.equal(output(fork(model), family), want)
    weft.activate(model, ())
    assert torch.equal(output(model, family), plain)
    weft.activate(model, "task")
    before = output(model, family)
    block = next(b.at for b in branches(model) if b.at[-1].isdigit())
    *_, norm = (m for m in model.get_submodule(block).modules() if "Norm" in type(m).__name__)
    hook = norm.register_forward_hook(stopped)
    with pytest.raises(InterruptedError):
        output(model, family)
    hook.remove()
    assert torch.equal(output(model, family), before)
    weft.activate(model, ())
    assert torch.equal(output(model, family), plain)
    unbranch(model, "task")
    assert fingerprint(model) == mark and torch.equal(output(model, family), plain)


def test_two_shifts_add_up_and_blocks_have_one_each() -> None:
    """Both on: the sum of both. Hosts are blocks, and what stands alone."""
    model = weave(zoo.build("llama"))
    values = added(model)
    add_branch(model, *shifts(model, values, "one"))
    add_branch(model, *shifts(model, {n: 2 * v for n, v in values.items()}, "two"))
    other = weave(zoo.build("llama"))
    for n, p in vectors(other).items():
        p.data = p.data + 3 * values[n]
    torch.testing.assert_close(output(model, "llama"), output(other, "llama"), rtol=1e-4, atol=1e-5)
    assert {b.at for b in branches(model)} >= {"model.layers.0", "model.layers.1", "model.norm"}


class Reads(nn.Module):
    """A model whose parts read each other's vectors without calling their owners."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"in": nn.Linear(4, 4), "never": nn.LayerNorm(4)})])
        self.loose = nn.ParameterList([torch.ones(4)])
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layers[0]
        x = layer["in"](x) + layer["never"].bias + self.loose[0]
        return self.attention(x, x, x)[0]


def test_hosts_are_called() -> None:
    """A list that is no module to be called is no host, and torch's attention is one as a whole."""
    model = weave(Reads())
    made = {b.at: b.paths for b in shifts(model, {n: torch.ones(p.shape) for n, p in vectors(model).items()}, "task")}
    assert made[""] == "loose.0"
    assert set(made["attention"].split(",")) == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}


@pytest.mark.parametrize(
    ("at", "paths", "count"),
    [
        ("model.norm", "bias", 32),
        ("model.norm", "weight", 31),
        ("model.norm", "weight", 33),
        ("model.layers.0", "mlp.up_proj.expr.w", 1536),
    ],
)
def test_what_does_not_fit_is_refused(at: str, paths: str, count: int) -> None:
    """No such vector, too few numbers, too many, and a weight."""
    model = weave(zoo.build("llama"))
    with pytest.raises(ShapeError, match=at):
        add_branch(model, Shift(at=at, name="task", values=torch.zeros(count), paths=paths))
    assert not branches(model)


def test_gradients_reach_the_vectors() -> None:
    """What trains beside a shift trains as without."""
    model = weave(zoo.build("llama"))
    add_branch(model, *shifts(model, added(model), "task"))
    for p in vectors(model).values():
        p.requires_grad_(True)
    model(**zoo.batch("llama")).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in vectors(model).values())


def test_a_weight_has_no_gate_for_it() -> None:
    """A strength between is refused, as of every branch."""
    model = weave(zoo.build("llama"))
    add_branch(model, *shifts(model, added(model), "task"))
    with pytest.raises(ConflictError, match="on or off"):
        weft.activate(model, {"task": 0.5})
    assert expressions(model)
