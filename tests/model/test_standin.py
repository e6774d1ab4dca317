"""The stand-in for `.weight`: metadata is free, reading is right, writing is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.engine.run import Step, apply
from weft.error import ConflictError
from weft.model import fingerprint, weave
from weft.model.standin import StandIn


@pytest.fixture(params=["dense", "rtn", "magnitude", "lora"])
def linear(request: pytest.FixtureRequest, tiny: Any) -> nn.Module:
    """A woven layer with each kind of expression."""
    model = weave(tiny())
    if request.param != "dense":
        apply(model, [Step.of(request.param)])
    return model.model.layers[0].mlp.up_proj


FREE: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "dtype": (lambda w: w.dtype, torch.float32),
    "shape": (lambda w: tuple(w.shape), (48, 32)),
    "size": (lambda w: w.size(0), 48),
    "device": (lambda w: w.device.type, "cpu"),
    "dim": (lambda w: w.dim(), 2),
    "numel": (lambda w: w.numel(), 48 * 32),
    "requires_grad": (lambda w: w.requires_grad, False),
    "is_floating_point": (lambda w: w.is_floating_point(), True),
    "isinstance": (lambda w: isinstance(w, Tensor), True),
    "detach": (lambda w: tuple(w.detach().shape), (48, 32)),
    "repr": (lambda w: "StandIn([48, 32]" in repr(w), True),
}


@pytest.mark.parametrize("what", FREE)
def test_metadata_is_free(what: str, linear: Any) -> None:
    """Nothing is made dense for dtype, shape, device and the like."""
    made = StandIn.made
    act, want = FREE[what]
    assert act(linear.weight) == want
    assert StandIn.made == made


READS: dict[str, Callable[[Any], Tensor]] = {
    "clone": lambda w: w.clone(),
    "sum": lambda w: w.sum(0),
    "index": lambda w: w[3],
    "matmul": lambda w: torch.ones(2, 48) @ w,
    "cat": lambda w: torch.cat([w, w]),
    "cast": lambda w: w.to(torch.float64),
    "linear": lambda w: nn.functional.linear(torch.ones(2, 32), w),
    "copy out": lambda w: torch.zeros(48, 32).copy_(w),
}


@pytest.mark.parametrize("what", READS)
def test_reading_gives_the_value(what: str, linear: Any) -> None:
    """Any use sees the expression's value, and is counted."""
    made = StandIn.made
    found = READS[what](linear.weight)
    assert torch.equal(found, READS[what](linear.expr.dense().detach()))
    assert not isinstance(found, StandIn) and StandIn.made > made


WRITES: dict[str, Callable[[Any], Any]] = {
    "zero_": lambda m: m.weight.zero_(),
    "add_": lambda m: m.weight.add_(1),
    "mul_": lambda m: m.weight.__imul__(2),
    "copy_": lambda m: m.weight.copy_(torch.zeros(48, 32)),
    "normal_": lambda m: nn.init.normal_(m.weight),
    "data.normal_": lambda m: m.weight.data.normal_(),
    "detach().zero_": lambda m: m.weight.detach().zero_(),
    "out=": lambda m: torch.add(torch.ones(48, 32), 1, out=m.weight),
    "assign": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(48, 32))),
    "_foreach": lambda m: torch._foreach_add_([m.weight], 1.0),
}


@pytest.mark.parametrize("what", WRITES)
def test_writes_are_refused(what: str, linear: Any) -> None:
    """An in-place write or an assignment raises, and the layer is as it was."""
    before = linear.expr.dense().detach().clone()
    with pytest.raises(ConflictError), torch.no_grad():
        WRITES[what](linear)
    assert torch.equal(linear.expr.dense(), before)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "row": lambda w: w[0].fill_(7),
    "item": lambda w: w.__setitem__(0, 7.0),
    "slice": lambda w: w.__setitem__((slice(None), slice(0, 2)), 7.0),
    "transpose": lambda w: w.t().fill_(7),
    "view": lambda w: w.view(-1).fill_(7),
    "data.view": lambda w: w.data.view(-1).fill_(7),
    "chunk": lambda w: w.chunk(2)[0].fill_(7),
    "data=": lambda w: setattr(w, "data", torch.zeros(48, 32)),
    "same dtype": lambda w: w.to(torch.float32).fill_(7),
    "contiguous": lambda w: w.contiguous().fill_(7),
}


@pytest.mark.parametrize("what", VIEWS)
def test_no_write_through_a_view_reaches_the_weight(what: str, tiny: Any) -> None:
    """A write to a view of the stand-in is refused or changes a copy; it never reaches the model."""
    model = weave(tiny())
    mark = fingerprint(model)
    with contextlib.suppress(ConflictError, RuntimeError), torch.no_grad():
        VIEWS[what](model.model.layers[0].mlp.up_proj.weight)
    assert fingerprint(model) == mark


def test_forward_makes_nothing_dense_through_the_stand_in(family: str, tiny: Any, batches: Any, run: Any) -> None:
    """A forward pass of a rewritten model never goes through the stand-in."""
    model = weave(tiny(family))
    apply(model, [Step.of("rtn")])
    made = StandIn.made
    run(model, batches(1)[0])
    assert StandIn.made == made


def test_dtype_follows_the_model(tiny: Any) -> None:
    """The stand-in has the dtype that the layer computes in, also for packed codes."""
    model = weave(tiny())
    apply(model, [Step.of("rtn")])
    assert model.to(torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
