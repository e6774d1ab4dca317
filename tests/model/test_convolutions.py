"""A woven convolution is a convolution, and its inputs are rows that its matrix is multiplied with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.engine.run import Step, apply
from weft.expr import Dense, LowRank, Sum
from weft.model import expressions, places, set_expressions, unweave, weave

LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (nn.Conv2d, {"kernel_size": 3}),
    "strided": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "same": (nn.Conv2d, {"kernel_size": 4, "padding": "same", "bias": False}),
    "valid": (nn.Conv2d, {"kernel_size": 2, "padding": "valid"}),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    "reflected": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "1x1": (nn.Conv2d, {"kernel_size": 1}),
    "sequence": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "sequence, same": (nn.Conv1d, {"kernel_size": 4, "padding": "same"}),
    "sequence, repeated": (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "dilation": 2}),
}
every = pytest.mark.parametrize("case", LAYERS)


def layer(case: str) -> tuple[nn.Sequential, Tensor]:
    """A model of one convolution, and inputs."""
    kind, how = LAYERS[case]
    torch.manual_seed(0)
    return nn.Sequential(kind(4, 6, **how)), torch.randn(2, 4, *([9, 8] if kind is nn.Conv2d else [11]))


@every
def test_the_result_is_the_plain_layers(case: str) -> None:
    """Also of a sum of terms, frozen and trainable, and after a rewrite that changes nothing of it."""
    model, x = layer(case)
    want = model(x).detach()
    woven = weave(model)
    torch.testing.assert_close(woven(x), want, rtol=1e-5, atol=1e-5)
    (name, held), (_, place) = next(iter(expressions(woven).items())), next(iter(places(woven).items()))
    assert held.shape == (6, place.shape[1] * torch.Size(place.shape[2:]).numel())
    parts = LowRank(nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, held.shape[1])))
    value = held.dense() - 2 * parts.dense().detach()
    frozen = LowRank(parts.b.detach().clone(), parts.a.detach().clone())
    set_expressions(woven, {name: Sum({"base": Dense(value), "compensation": frozen, "adapter:a": parts})})
    torch.testing.assert_close(woven(x), want, rtol=1e-4, atol=1e-4)


@every
def test_gradients_are_those_of_the_dense_layer(case: str) -> None:
    """Of inputs through frozen codes, and of a trainable term."""
    model, x = layer(case)
    woven = weave(model)
    apply(woven, [Step.of("rtn", group=0), Step.of("lora", rank=2)])
    with torch.no_grad():
        adapter = next(p for n, p in woven.named_parameters() if n.endswith("adapter:default.b"))
        adapter.copy_(torch.randn(adapter.shape))
    leaf = x.clone().requires_grad_()
    y = woven(leaf)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weigh).sum().backward()
    plain, again = unweave(woven), x.clone().requires_grad_()
    plain.requires_grad_(True)
    (plain(again) * weigh).sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-4, atol=1e-4)
    weight = next(p for n, p in plain.named_parameters() if n.endswith("weight"))
    assert weight.grad is not None and adapter.grad is not None


@every
def test_frozen_codes_keep_nothing_dense(case: str) -> None:
    """Between forward and backward no tensor of the weight's size is held."""
    model, x = layer(case)
    woven = weave(model)
    apply(woven, [Step.of("rtn", group=0)])
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = woven(x.requires_grad_())
    assert y.requires_grad and expressions(woven)["0.weight"].dense().numel() not in kept


@every
def test_inputs_are_what_the_matrix_is_multiplied_with(case: str) -> None:
    """Row by row: inputs(x) valueᵀ is the convolution, so that their Gram is the layer's."""
    model, x = layer(case)
    woven: Any = weave(model)
    rows = woven[0].inputs(x)
    made = rows @ expressions(woven)["0.weight"].dense().T
    want = woven(x) - (woven[0].bias.view(-1, *[1] * (x.dim() - 2)) if woven[0].bias is not None else 0)
    torch.testing.assert_close(made, want.flatten(2).movedim(1, -1), rtol=1e-4, atol=1e-5)


def test_groups_stay_plain() -> None:
    """A convolution in groups is not woven; one of one group beside it is."""
    woven = weave(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3)))
    assert list(expressions(woven)) == ["1.weight"] and type(woven[0]) is nn.Conv2d
