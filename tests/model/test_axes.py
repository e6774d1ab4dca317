"""A change of coordinates along any axis leaves the output as it is, or is refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.engine.run import Step, apply
from weft.error import ConflictError, NumericError, OptionError, ShapeError
from weft.expr import tensors
from weft.model import (
    Axis,
    Part,
    Permute,
    Rotate,
    Scale,
    Select,
    Transform,
    axes,
    expressions,
    fingerprint,
    fork,
    rotation,
    site,
    transport,
    weave,
)
from weft.store import load, save

from .zoo import batch, build, output

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "bert", "eurobert", "t5", "vit", "mixtral", "qwen3-moe")
ROLES = ("residual", "norm", "value", "score", "heads", "feed")


def varied(name: str, *, quiet: tuple[str, ...] = ()) -> Any:
    """A woven model in float64 whose norms and biases are not the trivial ones, but for the biases of the `quiet`."""
    model = copy.deepcopy(build(name)).double()  # its configuration is its own
    rng = torch.Generator().manual_seed(3)
    for path, p in model.named_parameters():
        if p.dim() == 1 and not (path.endswith(".bias") and path.rpartition(".")[0] in quiet):
            p.data += 0.3 * torch.randn(p.shape, generator=rng, dtype=torch.float64)
    return weave(model)


def logits(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return output(model, {k: v.double() if v.is_floating_point() else v for k, v in batch(name).items()})


def example(axis: Axis, kind: str) -> Transform:
    """A transform of that kind, far from the identity."""
    rng = torch.Generator().manual_seed(len(axis.name))
    each = axis.size // axis.blocks
    if kind == "scale":
        by = torch.rand(axis.blocks, each, generator=rng).double() + 0.5
        return Scale((by.view(axis.blocks, 2, -1)[:, :1].expand(-1, 2, -1) if axis.pairs else by).flatten())
    if kind == "permute":
        rows = [torch.randperm(each, generator=rng) + i * each for i in range(axis.blocks)]
        return Permute(torch.cat(rows))
    if kind == "rotate":
        return rotation(axis, seed=1)
    return Select(torch.randperm(axis.size, generator=rng)[: axis.size // 2])


def same(a: Tensor, b: Tensor) -> None:
    """Equal up to what is computed in float32 inside: softmaxes and norms."""
    assert float((a - b).abs().max()) < 2e-5 * float(b.abs().max())


@pytest.mark.parametrize("kind", ("scale", "permute", "rotate"))
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_stays_or_the_reason_is_told(name: str, role: str, kind: str) -> None:
    """All axes of a role at once, or one refusal each, and then nothing has changed."""
    quiet = ("transformer.ln_f",)  # a head without a bias cannot take it: see below
    model = varied(name, quiet=quiet)
    chosen = [a for a in axes(model).values() if a.kind == role]
    before, was = logits(model, name), fingerprint(model)
    if can := [a for a in chosen if a.admits(kind)]:
        transport(model, {a.name: example(a, kind) for a in can})
        assert fingerprint(model) != was
        same(logits(model, name), before)
        for n, e in expressions(model).items():
            torch.testing.assert_close(site(model, n).source(), e.dense(), rtol=0, atol=0)
        was = fingerprint(model)
    for axis in (a for a in chosen if not a.admits(kind)):
        with pytest.raises(ConflictError) as told:
            transport(model, {axis.name: example(axis, kind)})
        assert axis.refused[kind] in str(told.value)
    assert fingerprint(model) == was and (chosen or (name, role) == ("bert", "norm"))


def test_large_matrices_are_moved_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same values, along rows and along columns."""
    axis = axes(varied("llama"))["residual"]
    w = torch.randn(32, 40, generator=torch.Generator().manual_seed(0)).double()
    for t, dim in ((w, 0), (w.T.contiguous(), 1)):
        for kind in ("permute", "rotate"):
            by, part = example(axis, kind), Part("w", dim)
            whole = by.on(t, part, 1, 32, reads=True)
            monkeypatch.setattr("weft.model.transforms.CHUNK", 32 * 7)
            torch.testing.assert_close(by.on(t, part, 1, 32, reads=True), whole, rtol=1e-14, atol=1e-14)
            monkeypatch.undo()


def test_a_bias_without_a_place_is_refused() -> None:
    """GPT-2's head cannot take its last norm's bias; nothing has been folded then."""
    model = varied("gpt2")
    was = fingerprint(model)
    with pytest.raises(ConflictError, match=r"ln_f\.bias"):
        transport(model, {"residual": rotation(axes(model)["residual"])})
    assert fingerprint(model) == was


def test_a_rotation_of_the_stream_unties_the_head(tmp_path: Path) -> None:
    """The configuration says so, and what is saved is an ordinary checkpoint that transformers reads."""
    model = varied("gpt2", quiet=("transformer.ln_f",))
    before = logits(model, "gpt2")
    notes = transport(model, {"residual": rotation(axes(model)["residual"])})
    assert notes[0][0] == "lm_head.weight" and not model.config.tie_word_embeddings
    save(model, tmp_path / "out")
    back = cast(Any, type(build("gpt2"))).from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    same(logits(back, "gpt2"), before)
    same(logits(load(tmp_path / "out", dtype=torch.float64), "gpt2"), before)


@pytest.mark.parametrize("name", ("llama", "gpt2", "vit"))
def test_every_term_goes_along(name: str) -> None:
    """Quantized, sparse and low-rank terms, trainable ones too; a fork stays where it was."""
    model = varied(name, quiet=("transformer.ln_f",))
    sites = [n for n, p in weft.model.places(model).items() if p.linear]
    apply(model, [Step.of("rtn", group=8), Step.of("lora", rank=2)], at=sites)
    apply(model, [Step.of("magnitude", pattern="2:4")], at=sites[:2])
    for e in expressions(model).values():
        for path, p in e.named_parameters():
            if path.endswith("adapter:default.b"):
                p.data.normal_(std=0.05)
    other, before = fork(model), logits(model, name)
    was = fingerprint(other)
    known = axes(model)
    for kind in ("scale", "permute", "rotate"):
        transport(model, {a.name: example(a, kind) for a in known.values() if a.admits(kind)})
        known = axes(model)
    same(logits(model, name), before)
    adapters = [p for n, p in model.named_parameters() if "adapter:default" in n]
    assert adapters and all(p.requires_grad for p in adapters) and fingerprint(other) == was
    same(logits(other, name), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_selection_is_a_smaller_plain_model(name: str, tmp_path: Path) -> None:
    """Half of the inner features, those that are kept compute what they did; transformers and weft read it."""
    model = varied(name)
    feeds = [a for a in axes(model).values() if a.kind == "feed"]
    kept = {a.name: cast(Select, example(a, "select")) for a in feeds}
    masked = copy.deepcopy(model)
    for axis in feeds:
        for part in axis.readers:
            expr = expressions(masked)[part.name]
            gone = torch.ones(axis.size, dtype=torch.bool)
            gone[kept[axis.name].order] = False
            tensors(expr)["w"].data.masked_fill_(gone, 0)
    transport(model, dict(kept))
    same(logits(model, name), logits(masked, name))
    save(model, tmp_path / "out")
    small = cast(Any, type(build(name))).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in build(name).parameters())
    with torch.no_grad():
        same(output(small, batch(name)).double(), logits(model, name))
    same(logits(load(tmp_path / "out", dtype=torch.float64), name), logits(model, name))


def test_heads_can_be_selected(tmp_path: Path) -> None:
    """One key head of two, with its queries."""
    model = varied("llama")
    heads = [a for a in axes(model).values() if a.kind == "heads"]
    transport(model, {a.name: Select(torch.tensor([1])) for a in heads})
    save(model, tmp_path / "out")
    small = cast(Any, type(build("llama"))).from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    same(logits(small, "llama"), logits(model, "llama"))


def test_a_transported_model_is_compressed_and_saved(tmp_path: Path) -> None:
    """What is loaded computes the same; the pretrained values in the new coordinates are nowhere on disk, and it says so."""
    build("llama").save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    transport(model, {"residual": rotation(axes(model)["residual"])})
    apply(model, [Step.of("rtn", group=8)])
    save(model, tmp_path / "small")
    back = load(tmp_path / "small")
    assert fingerprint(back) == fingerprint(model)
    with pytest.raises(weft.WeftError, match="pretrained weights are not at hand"):
        site(back, "lm_head.weight").source()


WRONG = [
    ("residual", Permute(torch.arange(31)), ShapeError, "another axis"),
    ("residual", Permute(torch.zeros(32, dtype=torch.long)), ShapeError, "each once"),
    ("residual", Rotate(torch.ones(1, 32, 32)), NumericError, "orthogonal"),
    ("residual", Rotate(torch.full((1, 32, 32), float("nan"))), NumericError, "orthogonal"),
    ("model.layers.0.self_attn.value", Permute(torch.arange(16).flip(0)), ShapeError, "2 blocks"),
    ("model.layers.0.self_attn.score", Scale(torch.arange(1.0, 17)), ConflictError, "pairs"),
    ("model.layers.0.mlp", Scale(torch.zeros(48)), NumericError, "no inverse"),
    ("model.layers.0.mlp", Select(torch.tensor([1, 1])), ShapeError, "each once"),
    ("model.layers.0.mlp", Select(torch.arange(4)), ConflictError, "one width"),
    ("model.layers.0.mlp", Scale(torch.ones(47)), ShapeError, "another axis"),
    ("nowhere", Scale(torch.ones(3)), OptionError, "no such axis"),
]


@pytest.mark.parametrize(("name", "by", "kind", "text"), WRONG, ids=[f"{n}-{t}" for n, _, _, t in WRONG])
def test_a_wrong_transform_is_refused(name: str, by: Transform, kind: type[Exception], text: str) -> None:
    model = varied("llama")
    was = fingerprint(model)
    with pytest.raises(kind, match=text):
        transport(model, {"model.layers.1.mlp": Scale(torch.full((48,), 2.0)), name: by})
    assert fingerprint(model) == was


def test_columns_of_a_compressed_weight_are_not_selected() -> None:
    """Refused before anything has changed."""
    model = varied("llama")
    feeds = {a.name: Select(torch.arange(24)) for a in axes(model).values() if a.kind == "feed"}
    apply(model, [Step.of("rtn", group=8)], at="down_proj")
    was = fingerprint(model)
    with pytest.raises(ConflictError, match="cannot be selected"):
        transport(model, feeds)
    assert fingerprint(model) == was


def test_what_no_table_describes_is_refused() -> None:
    """An unknown family; a base model, whose stream is its output; a negative scale before a ReLU; a rotated mean."""
    with pytest.raises(ConflictError, match="family"):
        axes(weave(build("mamba2")))
    inner = weave(cast(nn.Module, build("llama").model))
    assert "output" in axes(inner)["residual"].refused["permute"] and axes(inner)["layers.0.mlp"].admits("permute")
    model = varied("t5")
    feed = next(a for a in axes(model).values() if a.kind == "feed")
    with pytest.raises(NumericError, match="none below it"):
        transport(model, {feed.name: Scale(-torch.ones(48))})
    model = varied("vit")
    q = torch.linalg.qr(torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0)))[0]
    with pytest.raises(ConflictError, match="mean"):
        transport(model, {"residual": Rotate(q)})
