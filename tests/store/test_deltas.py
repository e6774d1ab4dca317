"""Deltas: what is restored, to the bit or within a budget; what is put onto a model, switched, saved; what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import weft
from weft.cli.app import build
from weft.error import ChangedError, ConflictError, FormatError, OptionError, ShapeError, WeftError
from weft.expr import Dense, LowRank, Product, Signs, SparseDelta, Sum, terms_of
from weft.fitting.deltas import families
from weft.fitting.diff import GAP
from weft.model import expressions, fingerprint, vectors
from weft.store import exact, load, verify
from weft.store.checkpoint import checkpoint
from weft.store.patch import write

DOCUMENT = Path(__file__).parents[2] / "docs" / "files.md"
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def bits(t: Tensor) -> bytes:
    """What a tensor holds."""
    return bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) if t.numel() else b""


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 9), max_size=3),
    change=st.sampled_from(["none", "small", "all", "bits"]),
    block=st.sampled_from([1, 7, 1 << 22]),
    seed=st.integers(0, 1 << 30),
)
def test_the_codec_gives_back_every_bit(
    dtype: torch.dtype, shape: list[int], change: str, block: int, seed: int
) -> None:
    """Of any dtype and shape, NaN and infinities among them, in blocks of any size."""
    rng = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        if change == "bits" and dtype.is_floating_point:
            raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=rng)
            return raw.view(dtype).view(shape)
        return (torch.randn(shape, generator=rng) * 3).to(dtype)

    old = drawn()
    new = {"none": old.clone(), "small": (old * 1.01).to(dtype) if dtype.is_floating_point else old}.get(change)
    new = drawn() if new is None else new
    with mock.patch.object(exact, "BLOCK", block):
        data, planes = exact.packed(old, new)
        made = exact.unpacked(old, dtype, memoryview(data), planes, "here")
    assert (made.dtype, made.shape, bits(made)) == (new.dtype, new.shape, bits(new))
    assert change != "none" or not data


@given(data=st.binary(max_size=60), planes=st.lists(st.integers(0, 40), max_size=5))
def test_the_codec_makes_no_more_than_the_tensor(data: bytes, planes: list[int]) -> None:
    """Any bytes: a tensor of the known size, or refused."""
    old = torch.zeros(5, 3, dtype=torch.float16)
    try:
        assert exact.unpacked(old, torch.float16, memoryview(data), planes, "here").shape == old.shape
    except FormatError as e:
        assert "here" in str(e)


def test_a_plane_that_would_unfold_is_stopped() -> None:
    """A deflated plane of a gigabyte of ones for a tensor of a kilobyte."""
    import tracemalloc
    import zlib

    old, bomb = torch.zeros(1024, dtype=torch.uint8), zlib.compress(b"\1" * (1 << 20), 9)
    bomb = bomb[:1000].ljust(1000, b"\0")
    tracemalloc.start()
    with pytest.raises(FormatError):
        exact.unpacked(old, torch.uint8, memoryview(bomb), [len(bomb)], "here")
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


class Pair:
    """A base and what was tuned from it, as folders."""

    def __init__(self, tiny: Any, folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        self.base, self.tuned, self.delta, self.out = (folder / n for n in ("base", "tuned", "delta", "out"))
        first, after = tiny(family, dtype=dtype), tiny(family, dtype=dtype)
        rng = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in after.parameters():
                low = torch.randn(p.shape[0], 2, generator=rng) @ torch.randn(2, p.shape[-1], generator=rng)
                change = low if p.dim() == 2 else torch.randn(p.shape, generator=rng)
                p += (0.02 * change + 0.002 * torch.randn(p.shape, generator=rng)).to(dtype)
        first.save_pretrained(self.base)
        after.save_pretrained(self.tuned)


@pytest.fixture
def pair(tiny: Any, tmp_path: Path) -> Pair:
    """A tiny Llama, all of it tuned."""
    return Pair(tiny, tmp_path)


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of a plain checkpoint."""
    found = checkpoint(folder, "model").read()
    return {n: str((t.dtype, t.shape)).encode() + bits(t) for n, t in found.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "bert"])
def test_lossless_restores_every_tensor(family: str, dtype: torch.dtype, tiny: Any, tmp_path: Path) -> None:
    """To the bit, with tied weights and norms, and in fewer bytes; the folder is whole and loads."""
    two = Pair(tiny, tmp_path, family, dtype)
    made = weft.diff(two.base, two.tuned, two.delta, lossless=True)
    assert 0 < made.bytes < 0.97 * sum(p.stat().st_size for p in two.tuned.glob("*.safetensors"))
    weft.restore(two.base, two.delta, two.out)
    assert tensors(two.out) == tensors(two.tuned)
    assert verify(two.delta) == [] and verify(two.out) == []
    assert fingerprint(load(two.out)) == fingerprint(load(two.tuned))


def test_lossless_goes_over_shards_dtypes_and_names(tiny: Any, tmp_path: Path) -> None:
    """Sharded on one side, in another dtype, and a tied weight that is stored twice on one side."""
    two = Pair(tiny, tmp_path, "llama-tied")
    held = {n: t.bfloat16() for n, t in load_file(two.tuned / "model.safetensors").items()}
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    names = sorted(held)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({n: held[n] for n in part}, two.tuned / file, {"format": "pt"})
    (two.tuned / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {n: file for file, part in files.items() for n in part}}
    (two.tuned / "model.safetensors.index.json").write_text(json.dumps(index))
    weft.diff(two.base, two.tuned, two.delta, lossless=True)
    weft.restore(two.base, two.delta, two.out)
    assert tensors(two.out) == tensors(two.tuned)
    weft.diff(two.tuned, two.base, tmp_path / "back", lossless=True)
    weft.restore(two.tuned, tmp_path / "back", tmp_path / "again")
    assert tensors(tmp_path / "again") == tensors(two.base)


def test_files_that_tuning_changed_come_along(pair: Pair) -> None:
    """A chat template of its own; what is alike is not stored."""
    (pair.base / "tokenizer.json").write_text("{}")
    (pair.tuned / "tokenizer.json").write_text("{}")
    (pair.tuned / "chat_template.jinja").write_text("{{ messages }}")
    for i, how in enumerate(({"lossless": True}, {"budget": "20%"})):
        delta, out = pair.delta / str(i), pair.out / str(i)
        weft.diff(pair.base, pair.tuned, delta, **how)
        assert (delta / "chat_template.jinja").is_file() and not (delta / "tokenizer.json").exists()
        weft.restore(pair.base, delta, out)
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}" and (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("how", [{"lossless": True}, {"budget": "2%"}])
def test_equal_models_have_an_empty_delta(how: dict[str, Any], pair: Pair) -> None:
    """No tensor, no byte; and what it makes of the base is the base."""
    made = weft.diff(pair.base, pair.base, pair.delta, **how)
    assert made.bytes == 0 and made.error == 0 and not list(pair.delta.glob("*.safetensors"))
    weft.restore(pair.base, pair.delta, pair.out)
    assert tensors(pair.out) == tensors(pair.base)
    if "budget" in how:
        model = load(pair.base)
        assert weft.patch(model, pair.delta) == [] and not weft.adapters(model)


@pytest.mark.parametrize("data", [False, True])
def test_a_budget_is_kept_and_more_of_it_errs_less(data: bool, pair: Pair, words: Any) -> None:
    """Of growing budgets, with and without texts; a large one restores nearly all of the difference."""
    text = pair.base.parent / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": f"the cat {i} sat on a red hill ."}) + "\n" for i in range(40)))
    for folder in (pair.base, pair.tuned):
        words.save_pretrained(folder)
    whole = sum(t.numel() * 2 for t in load_file(pair.base / "model.safetensors").values())
    before: list[float] = []
    for share in (4, 15, 100) if data else (4, 6, 20, 100):
        how = {"data": str(text), "tokens": 200} if data else {}
        made = weft.diff(pair.base, pair.tuned, pair.delta, budget=f"{share}%", replace=True, **how)
        assert made.bytes <= share * whole / 100
        assert made.bytes == sum(
            t.numel() * t.element_size() for t in load_file(pair.delta / "weft.safetensors").values()
        )
        assert not before or made.error <= before[-1] + GAP * max(before)
        before.append(made.error)
    assert before[-1] < 1e-3 * before[0] and max(k.left for k in made.kept) < 1e-3


def value(model: nn.Module, name: str) -> Tensor:
    """A weight's value, or a vector's."""
    return expressions(model)[name].dense() if name in expressions(model) else model.get_parameter(name).detach()


def test_what_is_restored_is_near_the_tuned_model(pair: Pair, batches: Any, run: Any) -> None:
    """As terms beside the base, dense, and as an adapter in place: the same values; norms too."""
    weft.diff(pair.base, pair.tuned, pair.delta, budget="60%")
    weft.restore(pair.base, pair.delta, pair.out)
    weft.restore(pair.base, pair.delta, pair.out / "dense", dense=True)
    tuned, base, sparse, dense = map(load, (pair.tuned, pair.base, pair.out, pair.out / "dense"))
    for name in [*expressions(tuned), *vectors(tuned)]:
        gap, whole = ((value(m, name) - value(tuned, name)).norm() for m in (sparse, base))
        assert gap < 0.1 * whole, name
        torch.testing.assert_close(value(dense, name), value(sparse, name), rtol=1e-6, atol=1e-7)
    weft.patch(base, pair.delta, name="task")
    assert set(weft.adapters(base)) == {"task"} and set(weft.adapters(sparse)) == {"delta"}
    batch = batches(1)[0]
    torch.testing.assert_close(run(base, batch), run(sparse, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "bert-mlm"])
def test_several_deltas_are_switched_on_one_base(
    family: str, tiny: Any, batches: Any, run: Any, tmp_path: Path
) -> None:
    """Each is what it is alone; off, the base is as before, to the bit; what is saved is what was; one is replaced, one deleted."""
    two, batch = Pair(tiny, tmp_path, family), batches(1)[0]
    other = tiny(family, seed=1)
    held = {
        n: a + 0.01 * b
        for (n, a), (_, b) in zip(tiny(family).state_dict().items(), other.state_dict().items(), strict=True)
    }
    other.load_state_dict(held)
    other.save_pretrained(tmp_path / "other")
    weft.diff(two.base, two.tuned, tmp_path / "a", budget="20%")
    weft.diff(two.base, tmp_path / "other", tmp_path / "b", budget="10%")
    alone: dict[str, Tensor] = {}
    for name in ("a", "b"):
        model = load(two.base)
        assert weft.patch(model, tmp_path / name, name=name)
        alone[name] = run(model, batch)
    model = load(two.base)
    plain, mark = run(model, batch), fingerprint(model)
    for name in ("a", "b"):
        weft.patch(model, tmp_path / name, name=name)
    for name in ("a", "b", "a"):
        weft.activate(model, name)
        torch.testing.assert_close(run(model, batch), alone[name], rtol=1e-5, atol=1e-5)
    assert (alone["a"] - alone["b"]).abs().max() > 1e-3
    weft.save(model, tmp_path / "both")
    back = load(tmp_path / "both")
    assert fingerprint(back) == fingerprint(model) and torch.equal(run(back, batch), run(model, batch))
    weft.activate(back, ())
    assert torch.equal(run(back, batch), plain)
    weft.patch(model, tmp_path / "b", name="a", replace=True)
    weft.activate(model, "a")
    torch.testing.assert_close(run(model, batch), alone["b"], rtol=1e-5, atol=1e-5)
    weft.delete_adapter(model, "a")
    weft.delete_adapter(model, "b")
    assert fingerprint(model) == mark and torch.equal(run(model, batch), plain)


def test_a_delta_that_cannot_be_put_on_replaces_nothing(pair: Pair, tmp_path: Path) -> None:
    """One for weights alone is on; another has vectors too, whose hosts somebody wrapped."""
    base, site = load(pair.base), "model.layers.0.mlp.up_proj.weight"
    m, n = expressions(base)[site].shape
    change = {site: LowRank(torch.ones(m, 1), torch.ones(1, n))}
    write(base, change, tmp_path / "weights", about={}, files={}, replace=False, progress=weft.Silent())
    weft.diff(pair.base, pair.tuned, tmp_path / "vectors", budget="20%")
    weft.patch(base, tmp_path / "weights")
    before = fingerprint(base)
    for module in base.modules():
        module.forward = module.forward
    with pytest.raises(ConflictError, match="wrapped"):
        weft.patch(base, tmp_path / "vectors", replace=True)
    assert fingerprint(base) == before and list(weft.adapters(base)) == ["delta"]


def test_every_form_is_switched_and_saved(tmp_path: Path, tiny: Any, batches: Any, run: Any) -> None:
    """Each form that a difference may have, as the delta of one weight: on, off, weighed, row by row, saved, replaced."""
    two, batch = Pair(tiny, tmp_path), batches(1)[0]
    base, site = load(two.base), "model.layers.0.mlp.up_proj.weight"
    delta = expressions(load(two.tuned))[site].dense() - expressions(base)[site].dense()
    made = [form() for family in families(delta, None) for form in family]
    assert {type(e) for e in made} >= {LowRank, Product, SparseDelta, Signs, Sum, Dense}
    kinds = {e.describe(): e for e in made}
    for i, expr in enumerate(kinds.values()):
        place, model = tmp_path / f"delta-{i}", load(two.base)
        write(base, {site: expr}, place, about={}, files={}, replace=False, progress=weft.Silent())
        plain, want = run(model, batch), expressions(base)[site].dense() + expr.dense().detach()
        weft.patch(model, place)
        torch.testing.assert_close(expressions(model)[site].dense(), want, rtol=1e-6, atol=1e-6)
        on = run(model, batch)
        assert (on - plain).abs().max() > 1e-5, expr.describe()
        with weft.per_row(model, ["delta", None]):
            rows = run(model, batch)
        weft.activate(model, {"delta": 0.5})
        half = base_plus(base, site, expr, 0.5)
        torch.testing.assert_close(expressions(model)[site].dense(), half, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rows[0], on[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows[1], plain[1], rtol=1e-4, atol=1e-5)
        weft.activate(model, ())
        assert torch.equal(run(model, batch), plain)
        weft.activate(model, "delta")
        weft.save(model, tmp_path / "saved", replace=True)
        assert fingerprint(load(tmp_path / "saved")) == fingerprint(model)


def base_plus(base: nn.Module, site: str, expr: Any, times: float) -> Tensor:
    """A weight with a multiple of an expression."""
    return expressions(base)[site].dense() + times * expr.dense().detach()


def test_a_delta_goes_onto_a_quantized_base(pair: Pair) -> None:
    """Its terms stand beside the codes."""
    weft.diff(pair.base, pair.tuned, pair.delta, budget="10%")
    model = load(pair.base)
    weft.apply(model, "rtn", bits=4)
    weft.save(model, pair.out)
    packed = load(pair.out)
    weft.patch(packed, pair.delta)
    site = "model.layers.0.mlp.up_proj.weight"
    terms = terms_of(expressions(packed)[site])
    assert terms["base"].describe().startswith("int4") and "adapter:delta" in terms


def test_tuned_may_be_in_memory_and_of_any_expressions(pair: Pair) -> None:
    """A model with a LoRA: its difference is low-rank, and found to be."""
    model = load(pair.base)
    weft.apply(model, "lora", rank=2, at="*.q_proj")
    for e in expressions(model).values():
        for t in e.parameters():
            if t.requires_grad:
                t.data += 0.05 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
    made = weft.diff(pair.base, model, pair.delta, budget="6%")
    assert {k.name.split(".")[-2] for k in made.kept} == {"q_proj"} and max(k.left for k in made.kept) < 1e-3


def test_bytes_do_not_depend_on_the_hash_seed(pair: Pair) -> None:
    """Both kinds, in processes of their own."""
    code = "import sys, weft; weft.diff(*sys.argv[1:4], budget='20%'); weft.diff(*sys.argv[1:3], sys.argv[4], lossless=True)"
    seen: set[tuple[bytes, ...]] = set()
    for seed in "12":
        outs = [pair.delta / f"{kind}{seed}" for kind in ("terms", "bits")]
        how = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, pair.base, pair.tuned, *outs], check=True, env=how)
        seen.add(tuple((out / "weft.json").read_bytes() for out in outs))
    assert len(seen) == 1


CALLS: dict[str, tuple[Callable[[Pair], Any], type[WeftError], str]] = {
    "no size": (lambda p: weft.diff(p.base, p.tuned, p.delta), OptionError, "--lossless"),
    "both": (lambda p: weft.diff(p.base, p.tuned, p.delta, budget="2%", lossless=True), OptionError, "or lossless"),
    "data and lossless": (
        lambda p: weft.diff(p.base, p.tuned, p.delta, data="python", lossless=True),
        OptionError,
        "data",
    ),
    "in memory": (lambda p: weft.diff(p.base, load(p.tuned), p.delta, lossless=True), OptionError, "memory"),
    "too little": (lambda p: weft.diff(p.base, p.tuned, p.delta, budget="9B"), ConflictError, "norms and biases"),
    "no delta": (lambda p: weft.patch(load(p.base), p.base), FormatError, "no delta"),
    "there": (lambda p: weft.diff(p.base, p.tuned, p.tuned, budget="2%"), ConflictError, "exists"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_cannot_be_right_are_refused(case: str, pair: Pair) -> None:
    """And nothing is written."""
    act, kind, word = CALLS[case]
    with pytest.raises(kind, match=word):
        act(pair)
    assert not pair.delta.exists()


@pytest.mark.parametrize("lossless", [False, True])
def test_nothing_that_is_read_is_written_over(lossless: bool, pair: Pair) -> None:
    """Neither base nor tuned nor delta, though weft wrote them and is told to replace."""
    how: dict[str, Any] = {"lossless": True} if lossless else {"budget": "20%"}
    base, tuned = pair.out / "base", pair.out / "tuned"
    weft.export(load(pair.base), base)
    weft.export(load(pair.tuned), tuned)
    weft.diff(base, tuned, pair.delta, **how)
    for place in (base, tuned, base / "in"):
        with pytest.raises(ConflictError, match="lie in one another"):
            weft.diff(base, tuned, place, replace=True, **how)
    for place in (base, pair.delta):
        with pytest.raises(ConflictError, match="lie in one another"):
            weft.restore(base, pair.delta, place, replace=True)
    assert verify(base) == verify(tuned) == verify(pair.delta) == []


@pytest.mark.parametrize("lossless", [False, True])
def test_models_that_do_not_fit_are_refused_by_name(lossless: bool, pair: Pair, tiny: Any, tmp_path: Path) -> None:
    """Another width, and another number of layers."""
    how: dict[str, Any] = {"lossless": True} if lossless else {"budget": "5%"}
    tiny("llama", intermediate_size=64).save_pretrained(tmp_path / "wide")
    tiny("llama", layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises((ShapeError, ConflictError), match=r"mlp.up_proj|intermediate_size"):
        weft.diff(pair.base, tmp_path / "wide", pair.delta, **how)
    with pytest.raises((ShapeError, ConflictError), match=r"layers.1|num_hidden_layers"):
        weft.diff(pair.base, tmp_path / "short", pair.delta, **how)
    model = load(pair.base)
    weft.apply(model, "rtn")
    weft.save(model, tmp_path / "packed")
    with pytest.raises(ConflictError, match="plain"):
        weft.diff(tmp_path / "packed", pair.tuned, pair.delta, **how)
    assert not pair.delta.exists()


@pytest.mark.parametrize("lossless", [False, True])
def test_another_base_is_refused(lossless: bool, pair: Pair, tiny: Any, tmp_path: Path) -> None:
    """One weight by one bit; a model in other coordinates, one with turned inputs, and a delta to the bit in memory."""
    weft.diff(pair.base, pair.tuned, pair.delta, **({"lossless": True} if lossless else {"budget": "20%"}))
    held = load_file(pair.base / "model.safetensors")
    held["model.norm.weight"].view(torch.int32)[0] += 1
    other = tmp_path / "other"
    load(pair.base)
    weft.export(load(pair.base), other)
    save_file(held, other / "model.safetensors", {"format": "pt"})
    (other / "weft.json").unlink()
    with pytest.raises(ChangedError, match="another base"):
        weft.restore(other, pair.delta, pair.out)
    assert not pair.out.exists()
    model, mark = load(other), fingerprint(load(other))
    with pytest.raises(ChangedError, match="another base"):
        weft.patch(model, pair.delta)
    assert fingerprint(model) == mark
    own = load(pair.base)
    if lossless:
        with pytest.raises(ConflictError, match="to the bit"):
            weft.patch(own, pair.delta)
        return
    weft.apply(own, "online_hadamard")
    with pytest.raises(ConflictError, match="plain inputs"):
        weft.patch(own, pair.delta)
    with pytest.raises(FormatError, match="weft patch"):
        load(pair.delta)


def test_the_reader_in_the_document_reads_a_lossless_delta(pair: Pair) -> None:
    """A second opinion on the bytes, made from what docs/files.md says."""
    weft.diff(pair.base, pair.tuned, pair.delta, lossless=True)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf8"), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(code, "files.md", "exec"), space)
    was, now = (load_file(folder / "model.safetensors") for folder in (pair.base, pair.tuned))
    held, said = (
        load_file(pair.delta / "weft.safetensors"),
        json.loads((pair.delta / "weft.json").read_text())["tensors"],
    )
    assert said.keys() == now.keys()
    for name, entry in said.items():
        old = was[name].flatten().view(torch.int32).numpy()
        made = space["tuned"](old, entry["planes"], held[name].numpy().tobytes(), 4)
        assert made.tobytes() == bits(now[name])


def command(*argv: object) -> Any:
    """The command line in this process."""
    words = [str(a) for a in argv]
    return CliRunner().invoke(build(words), words, catch_exceptions=False)


def test_the_commands(pair: Pair) -> None:
    """diff, show, verify and patch, of both kinds; what is wrong ends in a code."""
    made = command("diff", pair.base, pair.tuned, "-o", pair.delta, "--budget", "20%", "-q")
    assert made.exit_code == 0 and not made.output
    rows = json.loads(command("show", pair.delta, "--json").output)
    assert {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= {r["name"] for r in rows}
    assert command("verify", pair.delta).output.strip() == "whole"
    assert command("patch", pair.base, pair.delta, "-o", pair.out, "--dense", "-q").exit_code == 0
    assert (pair.out / "model.safetensors").is_file()
    assert command("diff", pair.base, pair.tuned, "-o", pair.delta, "--lossless").exit_code == 4
    made = command("diff", pair.base, pair.tuned, "-o", pair.delta, "--lossless", "--replace", "--json")
    assert json.loads(made.output)["kept"] == []
    assert "to the bit" in (pair.delta / "README.md").read_text()
    assert len(json.loads(command("show", pair.delta, "--json").output)) == len(
        load_file(pair.tuned / "model.safetensors")
    )
    assert command("patch", pair.base, pair.delta, "-o", pair.out, "--replace", "-q").exit_code == 0
    assert tensors(pair.out) == tensors(pair.tuned)
    assert command("diff", pair.base, pair.tuned, "-o", pair.delta, "--replace").exit_code == 2
