"""Vectors as sites, and the methods that train them, whole weights, or sides: at first nothing changes, and nothing is lost later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.engine import get
from weft.engine.run import Step, apply, reach
from weft.error import ConflictError, FormatError, OptionError, ShapeError
from weft.expr import Dense, LowRank, Product, terms_of
from weft.learn.trainer import restore, trainable
from weft.model import (
    expressions,
    fingerprint,
    first_vectors,
    fork,
    plain_tensors,
    tagged,
    transport,
    unweave,
    vectors,
    weave,
)
from weft.model.sites import set_vectors
from weft.model.transforms import Scale
from weft.model.transport import rotation
from weft.store import load, save

TUNED = ("full", "bitfit", "layernorm", "ia3")
VECTORS = ("full", "bitfit", "layernorm")
FAMILIES = ("llama", "llama-tied", "bert", "bert-mlm")


CASES = [(m, f) for m in TUNED for f in FAMILIES if m != "bitfit" or f.startswith("bert")]
"""A llama has no biases."""
OF_VECTORS = [case for case in CASES if case[0] in VECTORS]


def step(model: Any, batch: dict[str, torch.Tensor], steps: int = 2) -> None:
    """A few steps of plain gradient descent on what is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        made = model(**batch)
        (made.logits if hasattr(made, "logits") else made.last_hidden_state).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def made(tiny: Any, family: str, method: str, batch: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """A woven tiny model with this method, trained if there is a batch."""
    model = weave(tiny(family))
    apply(model, [Step.of(method)])
    if batch is not None:
        step(model, batch)
    return model


@pytest.mark.parametrize(("method", "family"), CASES)
def test_at_first_nothing_changes(method: str, family: str, tiny: Any, batches: Any, run: Any) -> None:
    """The output is what it was, of whole weights and vectors bit for bit; exactly what the method is for is trainable."""
    plain, batch = tiny(family), batches(1)[0]
    model = made(tiny, family, method)
    if method == "ia3":  # a scaled product adds its bias in a step of its own
        torch.testing.assert_close(run(model, batch), run(plain, batch), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(run(model, batch), run(plain, batch))
    names, own = set(trainable(model)), dict(plain.named_parameters())
    norms = {n for n in own if "norm" in n.lower() and own[n].dim() == 1}
    biases = {n for n in own if n.endswith("bias")}
    if method == "full":
        assert all(p.requires_grad for p in model.parameters())
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in own.values())
    elif method == "ia3":
        assert len(names) == 6 and all(n.endswith((".expr.factors.0.kept.d", ".expr.factors.1.kept.d")) for n in names)
    else:
        assert names == (biases if method == "bitfit" else norms)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_all_that_is_trainable_learns(method: str, family: str, tiny: Any, batches: Any, run: Any) -> None:
    """Each trainable tensor that the output depends on changes, and no other."""
    batch = batches(1)[0]
    model = made(tiny, family, method)
    was = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, batch)
    for name, p in model.named_parameters():
        alone = "pooler" in name or name.endswith(("key.bias", "token_type_embeddings.expr.w"))
        if not p.requires_grad:
            assert torch.equal(p, was[name]), name
        elif not alone:  # a softmax does not see what is added to all of its scores
            assert not torch.equal(p, was[name]), name


@pytest.mark.parametrize(("method", "family"), CASES)
def test_saved_and_loaded(method: str, family: str, tiny: Any, batches: Any, run: Any, tmp_path: Path) -> None:
    """Bit for bit the same output; weights and vectors alone make an ordinary checkpoint."""
    batch = batches(1)[0]
    model = made(tiny, family, method, batch)
    save(model, tmp_path / "out")
    back = load(tmp_path / "out")
    assert torch.equal(run(back, batch), run(model, batch)) and not trainable(back)
    assert fingerprint(back) == fingerprint(model) and weft.verify(tmp_path / "out") == []
    assert (tmp_path / "out" / "model.safetensors").exists() == (method != "ia3")


@pytest.mark.parametrize(("method", "family"), OF_VECTORS)
def test_the_first_values_come_back(
    method: str, family: str, tiny: Any, batches: Any, run: Any, tmp_path: Path
) -> None:
    """Unweaving gives today's values or the first ones; those of a saved compressed model too, from its base."""
    plain, batch = tiny(family), batches(1)[0]
    model = made(tiny, family, method, batch)
    tuned = run(model, batch)
    assert torch.equal(run(unweave(fork(model)), batch), tuned)
    assert torch.equal(run(unweave(fork(model), original=True), batch), run(plain, batch))
    save(weave(tiny(family)), tmp_path / "base")
    model = load(tmp_path / "base")
    apply(model, [Step.of(method)])
    step(model, batch)
    apply(model, [Step.of("rtn", bits=8)], at="all-linear")
    save(model, tmp_path / "small")
    back = load(tmp_path / "small")
    assert (
        set(first_vectors(back))
        == set(first_vectors(model))
        == set(vectors(model))
        & {
            *reach(model, method),
        }
    )
    assert torch.equal(run(unweave(back, original=True), batch), run(plain, batch))


@pytest.mark.parametrize(("method", "family"), CASES)
def test_forks_are_apart(method: str, family: str, tiny: Any, batches: Any) -> None:
    """Training a fork leaves its source alone, and putting vectors on one leaves the other frozen."""
    batch = batches(1)[0]
    source = made(tiny, family, method)
    mark, other = fingerprint(source), fork(source)
    step(other, batch)
    assert fingerprint(source) == mark != fingerprint(other)
    source = weave(tiny(family))
    other = fork(source)
    apply(other, [Step.of(method)])
    assert not trainable(source) and not first_vectors(source) and trainable(other)


@pytest.mark.parametrize("method", TUNED)
def test_a_checkpoint_of_training_goes_on(method: str, tiny: Any, batches: Any, tmp_path: Path) -> None:
    """What the trainer keeps is put back exactly."""
    from weft.store.tensors import write_tensors

    model = made(tiny, "bert-mlm", method, batches(1)[0])
    write_tensors(tmp_path / "trainable.safetensors", trainable(model))
    other = made(tiny, "bert-mlm", method)
    restore(other, tmp_path)
    assert fingerprint(other) == fingerprint(model)


def test_a_mapped_file_is_not_written(tiny: Any, batches: Any, tmp_path: Path) -> None:
    """What trains of a loaded model is a copy."""
    batch = batches(1)[0]
    save(weave(tiny("bert")), tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    model = load(tmp_path / "model")
    apply(model, [Step.of("full")])
    step(model, batch)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert fingerprint(load(tmp_path / "model")) != fingerprint(model)


def test_a_vector_that_is_used_twice_stays_one(tiny: Any, batches: Any) -> None:
    """The bias of BERT's tied decoder: one site, one parameter, also after training."""
    model = made(tiny, "bert-mlm", "bitfit", batches(1)[0])
    twice: Any = model
    assert twice.cls.predictions.bias is twice.cls.predictions.decoder.bias
    assert len([n for n in reach(model, "bitfit") if n.startswith("cls.predictions.") and "transform" not in n]) == 1


def test_tags_cover_everything(family: str, tiny: Any) -> None:
    """Matrices and vectors are all floating parameters; biases and norms are of them."""
    model = weave(tiny(family))
    every = tagged(model, ("matrix", "vector"))
    assert set(every) == {*expressions(model), *(n for n, t in plain_tensors(model).items() if t.is_floating_point())}
    norms = tagged(model, ("norm",))
    assert norms.keys() == {n for n in vectors(model) if "norm" in n.lower()}


def test_sides_go_where_the_paper_has_them(tiny: Any) -> None:
    """Keys and values are scaled by rows, what reads the inner activations by columns; queries are left."""
    model = made(tiny, "llama", "ia3")
    for name, e in expressions(model).items():
        kinds = [type(k).__name__ for k in (e.acting() if isinstance(e, Product) else e.kids())]
        want = {"k_proj": ["Diagonal", "Dense"], "v_proj": ["Diagonal", "Dense"], "down_proj": ["Dense", "Diagonal"]}
        assert kinds == want.get(name.split(".")[-2], []), name


def test_compressed_weights_become_dense_and_say_so(tiny: Any) -> None:
    """Full tuning of a rounded model with an adapter: the same values, the adapter beside it, one note a rounded weight."""
    model = weave(tiny())
    apply(model, [Step.of("rtn", bits=4, group=8)], at="all-linear")
    apply(model, [Step.of("lora", rank=2)], at="q_proj")
    before = {n: e.dense().detach().float() for n, e in expressions(model).items()}
    _, notes = apply(model, [Step.of("full")])
    assert {n for n, _ in notes} == set(reach(model, "lora")) and all("became dense" in what for _, what in notes)
    for name, e in expressions(model).items():
        assert torch.equal(e.dense(), before[name]) and isinstance(terms_of(e)["base"], Dense)
        assert ("adapter:default" in terms_of(e)) == name.endswith("q_proj.weight")


def test_what_a_model_has_not_is_refused(tiny: Any) -> None:
    """No biases; a family that no table describes; a pattern of other sites; two steps for different sites."""
    model = weave(tiny("llama"))
    mark = fingerprint(model)
    with pytest.raises(ConflictError, match="no bias"):
        weft.apply(model, "bitfit")
    with pytest.raises(OptionError, match="matches no site"):
        weft.apply(model, "layernorm", at="*.mlp.*")
    with pytest.raises(OptionError, match="other sites"):
        apply(model, [Step.of("rtn"), Step.of("layernorm")])
    assert fingerprint(model) == mark
    model = weave(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    with pytest.raises(ConflictError, match="nothing is known"):
        weft.apply(model, "ia3")
    assert [c.name for c in weft.apply(model, "bitfit")] == ["0.bias", "1.bias"]


def test_a_vector_has_one_plain_row_of_its_dtype(tiny: Any) -> None:
    """Other shapes, other nodes and other dtypes are refused before anything changes; so is training in bfloat16."""
    model = weave(tiny("llama"))
    (name, p), *_ = vectors(model).items()
    n, mark = p.numel(), fingerprint(model)
    for bad in (Dense(torch.ones(1, n + 1)), Dense(torch.ones(n, 1)), LowRank(torch.ones(1, 1), torch.ones(1, n))):
        with pytest.raises(ShapeError, match="one plain row"):
            set_vectors(model, {name: bad})
    with pytest.raises(ConflictError, match="dtype"):
        set_vectors(model, {name: Dense(torch.ones(1, n, dtype=torch.float64))})
    assert fingerprint(model) == mark
    model = weave(tiny("llama", dtype=torch.bfloat16))
    with pytest.raises(ConflictError, match="float32"):
        weft.apply(model, "layernorm")
    assert not trainable(model)


def test_changed_vectors_are_no_peft_adapter(tiny: Any, batches: Any, tmp_path: Path) -> None:
    """An adapter beside trained norms would lose them: refused, unless its base is written too."""
    save(weave(tiny("llama")), tmp_path / "base")
    model = load(tmp_path / "base")
    apply(model, [Step.of("lora", rank=2)], at="q_proj")
    apply(model, [Step.of("layernorm")])
    weft.export(model, tmp_path / "same", to="peft")
    step(model, batches(1)[0])
    with pytest.raises(ConflictError, match=r"input_layernorm\.weight"):
        weft.export(model, tmp_path / "peft", to="peft")
    weft.export(model, tmp_path / "peft", to="peft", base=tmp_path / "own")
    back = load(tmp_path / "own")
    assert all(torch.equal(vectors(back)[n], p) for n, p in vectors(model).items())


def test_changed_vectors_move_with_their_axis_or_refuse(tiny: Any, batches: Any, run: Any) -> None:
    """Scaling what a norm gives moves its first value too; folding a changed norm into its readers is refused."""
    plain, batch = tiny("llama"), batches(1)[0]
    model = made(tiny, "llama", "layernorm", batch)
    tuned = run(model, batch)
    axis = next(a for a in weft.axes(model).values() if a.kind == "norm" and a.admits("scale"))
    transport(model, {axis.name: Scale(torch.linspace(0.5, 2, axis.size))})
    torch.testing.assert_close(run(model, batch), tuned, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(unweave(fork(model), original=True), batch), run(plain, batch), rtol=1e-4, atol=1e-5)
    mark = fingerprint(model)
    with pytest.raises(ConflictError, match="cannot be folded"):
        transport(model, {"residual": rotation(weft.axes(model)["residual"])})
    assert fingerprint(model) == mark


@pytest.mark.parametrize("said", [["nowhere"], "norm", [3]])
def test_a_wrong_list_of_vectors_is_refused(said: Any, tiny: Any, tmp_path: Path) -> None:
    """A manifest that names what the model has not."""
    from weft.store.swap import MANIFEST, read_manifest

    model = weave(tiny("llama"))
    apply(model, [Step.of("rtn", bits=8)])
    save(model, tmp_path / "out")
    manifest = dict(read_manifest(tmp_path / "out")) | {"vectors": said}
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="changed vectors"):
        load(tmp_path / "out")


def test_methods_say_which_sites_they_are_for() -> None:
    """An unknown tag is refused when a method is declared; none means weights."""
    from weft.engine import method

    with pytest.raises(OptionError, match="unknown name"):
        method(kind="rewrite", on=("nowhere",))
    assert get("rtn").sites == ("matrix",) and get("bitfit").sites == ("bias",)
