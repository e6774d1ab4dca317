"""torch.compile of woven models: few graphs, few recompilations, equal outputs and gradients, nothing dense kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from laws.cases import KINDS, nodes_in, randn, rng
from tiny import build_tiny
from torch import Tensor, nn
from torch import _inductor as inductor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import weft
from weft.engine.run import Step, apply
from weft.expr import NODES, Quantized
from weft.grid import GRIDS
from weft.model import expressions, places, weave

from .processes import IDS

MODELS: dict[str, tuple[list[Step], str, bool]] = {
    "dense": ([], "*", False),
    "int4 + lora": ([Step.of("rtn", group=8)], "*", True),
    "2:4": ([Step.of("magnitude", pattern="2:4")], "*", False),
    "2:4 of int4 + lora": ([Step.of("magnitude", pattern="2:4"), Step.of("rtn", group=8)], "all-linear", True),
}
LENGTHS = (9, 7, 5)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing compiled before or after, and nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def made(name: str, layers: int = 2) -> nn.Module:
    """A woven Llama of this kind."""
    steps, at, lora = MODELS[name]
    model = weave(build_tiny(layers=layers))
    apply(model, steps, at=at)
    if lora:
        apply(model, [Step.of("lora", rank=2)], at="all-linear")
    return model


def logits(model: Any, length: int = 9) -> Tensor:
    """The model's logits of the first tokens."""
    return model(input_ids=IDS[:, :length], use_cache=False).logits


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt", {"length": 3}),
        ("prefix", {"length": 3}),
        ("bottleneck", {}),
        ("qst", {}),
        ("lofit", {}),
        ("invertible", {}),
    ],
)
def test_a_branch_breaks_no_graph(method: str, options: dict[str, Any]) -> None:
    """Nothing of it runs outside, and the output is the same."""
    model = made("dense")
    weft.apply(model, method, **options)
    with torch.no_grad():
        want = logits(model)
        assert torch.equal(logits(torch.compile(model, backend="eager")), want)
        assert torch._dynamo.explain(model)(input_ids=IDS[:, :9], use_cache=False).graph_break_count == 0


@pytest.mark.parametrize("name", ["dense", "int4 + lora", "2:4"])
def test_a_model_is_one_graph(name: str) -> None:
    """Two compilations serve all lengths; only a packed embedding, which is looked up outside, splits the graph in three."""
    model = made(name, layers=1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for length in LENGTHS:
            assert torch.equal(logits(compiled, length), logits(model, length))
    parts = 1 if name == "dense" else 3
    assert counters["stats"]["unique_graphs"] == 2 * parts
    assert len(counters["graph_break"]) == (parts > 1)


def test_layers_share_what_is_compiled() -> None:
    """Compiled one by one, four layers and three lengths take at most three graphs: static, dynamic, without a mask."""
    model = made("2:4 of int4 + lora", layers=4)
    want = [logits(model, length) for length in LENGTHS]
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        assert all(torch.equal(logits(model, n), w) for n, w in zip(LENGTHS, want, strict=True))
    assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]


def test_a_rewrite_is_seen() -> None:
    """Tensors of the same shapes that mean something else: a compiled layer knows."""
    model, x = made("dense", layers=1), randn(rng("x"), 2, 9, 32)
    part = model.model.layers[0].mlp
    compiled = torch.compile(part, backend="eager")
    with torch.no_grad():
        for steps in ([Step.of("rtn", group=8)], [Step.of("nf4", group=8)], [Step.of("mx", format="mxfp4")]):
            apply(model, steps, at="all-linear")
            assert torch.equal(compiled(x), part(x))
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("name", ["int4 + lora", "2:4 of int4 + lora"])
def test_training_keeps_nothing_dense(name: str) -> None:
    """Gradients are those of eager mode; what the compiled forward hands to its backward has no weight's shape."""
    kept: list[tuple[int, ...]] = []

    def look(graph: Any, _: Any) -> Any:
        values = [v for v in next(n for n in graph.graph.nodes if n.op == "output").args[0] if v is not None]
        kept.extend(
            tuple(v.meta["val"].shape) for v in values if v.op != "placeholder" and hasattr(v.meta["val"], "shape")
        )
        return graph

    model = made(name, layers=1)
    compiled = torch.compile(
        model,
        backend=aot_autograd(
            fw_compiler=look, bw_compiler=lambda g, _: g, partition_fn=min_cut_rematerialization_partition
        ),
    )
    grads: list[dict[str, Tensor]] = []
    for one in (model, compiled):
        model.zero_grad()
        one(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 14
    for n, g in grads[0].items():
        torch.testing.assert_close(grads[1][n], g, rtol=1e-4, atol=1e-6)
    packed = {e.shape for e in expressions(model).values()}
    shapes = {s for m, n in packed for s in ((m, n), (n, m))}
    assert kept and not shapes & set(kept)


def test_every_node_compiles_right() -> None:
    """The product of each node, and of each grid, is one graph; what is generated on the CPU makes several, but right."""
    seen: set[str] = set()
    for name, make in KINDS.items():
        expr = make(16, 8, rng("compile", name))
        kinds = nodes_in(expr) | {leaf.grid for leaf in expr.modules() if isinstance(leaf, Quantized)}
        if kinds <= seen:
            continue
        torch._dynamo.reset()
        counters.clear()
        x = randn(rng("x"), 3, expr.shape[1])
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(expr, backend="eager")(x), expr(x), rtol=1e-5, atol=1e-5)
        assert not counters["graph_break"] or "Basis" in nodes_in(expr), (name, dict(counters["graph_break"]))
        seen |= kinds
    assert seen == set(NODES) | set(GRIDS)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is no g++")
@inductor.config.patch({"cpp.vec_isa_ok": True, "cpp.simdlen": 256, "compile_threads": 1})
def test_inductor_gives_the_same() -> None:
    """A packed layer with an adapter, compiled to machine code: outputs of two lengths.

    Vectors are the ones of 256 bits, where there are any, as to find the widest inductor builds a program for each width.
    """
    model = made("2:4 of int4 + lora")
    layer = model.get_submodule(places(model)["model.layers.0.mlp.up_proj.weight"].modules[0])
    compiled = torch.compile(layer, dynamic=True)
    with torch.no_grad():
        for rows in (3, 6):
            x = randn(rng("x", rows), rows, 32)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
