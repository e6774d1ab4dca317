"""What may go wrong while something runs: options, numbers, evidence, data, memory, order, and where files go."""

from __future__ import annotations

import ast
import gzip
import io
import json
import math
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import weft
from weft.cli.app import build
from weft.error import ConflictError, FormatError, NumericError, OptionError, PathError, ResourceError, WeftError
from weft.expr import LowRank, terms_of
from weft.learn.data import Chat, Pair, Response, Text, encode
from weft.learn.read import read
from weft.learn.text import LONGEST
from weft.learn.trainer import trainable
from weft.linalg.columns import inverse_factor
from weft.model import plain_tensors
from weft.stats import collect
from weft.store import cache as stored

from .edits import content, refused, tree, written

LINES = ["the cat sat on the mat .", "a dog ran under the old tree .", "the red bird flew over a hill ."]
ROWS = [{"text": " ".join(LINES[(i + k) % 3] for k in range(6)) + " the" * i} for i in range(24)]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., nn.Module], words: Any) -> dict[str, bytes]:
    """A tiny checkpoint with its tokenizer."""
    place = tmp_path_factory.mktemp("saved")
    tiny("llama-tied", dtype=torch.bfloat16).save_pretrained(place)
    words.save_pretrained(place)
    return content(place)


@pytest.fixture
def folder(tmp_path: Path, saved: dict[str, bytes]) -> Iterator[Path]:
    """That checkpoint, which no test may change."""
    place = written(tmp_path / "model", saved)
    before = tree(place)
    yield place
    assert tree(place) == before


@pytest.fixture
def model(folder: Path) -> nn.Module:
    """That checkpoint, woven."""
    return weft.load(folder)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twenty-four short texts."""
    return put(tmp_path / "texts.jsonl", *ROWS)


@pytest.fixture
def soon() -> Iterator[None]:
    """A test that waits for ever fails instead."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(path: Path, *records: Any) -> Path:
    """A file of records, one a line."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def tuned(model: nn.Module) -> nn.Module:
    """The model with an adapter."""
    weft.apply(model, "lora", rank=2, at="all-linear")
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of a model."""
    made = {n: t.detach().clone() for n, t in plain_tensors(model).items()}
    return made | {n: e.dense().detach().clone() for n, e in weft.expressions(model).items()}


def unchanged(act: Callable[[], Any], kind: type[WeftError], model: nn.Module) -> WeftError:
    """The error that `act` raises, of this kind with five fields, after which the model is bit for bit what it was."""
    before = state(model)
    error = refused(act, kind)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(t.nan_to_num(7), after[n].nan_to_num(7)) for n, t in before.items())
    return error


# F28: options


BAD = [
    ("rtn", {"bits": 9}, "bits"),
    ("rtn", {"bits": 1}, "bits"),
    ("rtn", {"bits": "8"}, "bits"),
    ("rtn", {"bits": 4.0}, "bits"),
    ("rtn", {"group": -1}, "group"),
    ("gptq", {"damp": 0.0}, "damp"),
    ("lora", {"rank": 0}, "rank"),
    ("lora", {"rank": "8"}, "rank"),
    ("eora", {"rank": 1 << 30}, "rank"),
    ("magnitude", {"sparsity": 1.0}, "sparsity"),
    ("magnitude", {"sparsity": 50}, "sparsity"),
    ("magnitude", {"sparsity": NAN}, "sparsity"),
    ("wanda", {"pattern": "3:4"}, "pattern"),
    ("rtn", {"bit": 4}, "bit"),
]


@pytest.mark.parametrize(("method", "options", "name"), BAD)
def test_f28_an_option_out_of_range_is_refused(
    method: str, options: dict[str, Any], name: str, model: nn.Module
) -> None:
    """By name, before any weight is touched; percent for a share and text for a number are out of range too."""
    error = unchanged(lambda: weft.apply(model, method, **options), OptionError, model)
    assert name in str(error.where) and str(next(iter(options.values()))) in str(error.got)


@pytest.mark.parametrize("group", [5, 31, 33, 1000])
def test_f28_a_group_that_does_not_divide_leaves_a_short_one(group: int, model: nn.Module, texts: Path) -> None:
    """Its last columns have a scale of their own: bytes are exact, and no column is lost."""
    for method, more in (("rtn", {}), ("gptq", {"data": str(texts), "tokens": 128})):
        (change,) = weft.apply(model, method, bits=8, group=group, at="*layers.0.mlp.up_proj*", **more)
        expr = weft.expressions(model)[change.name]
        assert change.after == f"int8[g{group}]" and expr.nbytes() == 48 * (32 + 2 * math.ceil(32 / group))
        assert change.error is None or change.error < 0.02


def test_f28_a_rank_beyond_the_weights_is_clipped_where_that_is_exact_and_recorded(
    model: nn.Module, texts: Path
) -> None:
    """A compensation has at most the rank that an error can have, and the change says which; an adapter has what was asked."""
    ranks: dict[str, int] = {}
    for method, more in (("svd_residual", {}), ("eora", {"data": str(texts), "tokens": 128})):
        weft.apply(model, "rtn", bits=2, at="*layers.0.mlp.up_proj*")
        (change,) = weft.apply(model, method, rank=4096, at="*layers.0.mlp.up_proj*", **more)
        term = terms_of(weft.expressions(model)[change.name])["compensation"]
        ranks[method] = term.a.shape[0] if isinstance(term, LowRank) else 0
        assert f"LowRank({ranks[method]})" in change.after
    assert set(ranks.values()) == {32}
    (change,) = weft.apply(model, "lora", rank=100, at="*layers.0.mlp.up_proj*")
    assert "LowRank(100)" in change.after


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("steps", -1), ("steps", "4"), ("steps", 1.5), ("batch", 0), ("length", 0), ("length", 1), ("length", -3),
        ("lr", NAN), ("lr", INF), ("lr", -1.0), ("lr", 0.0), ("lr", "1"), ("seed", -1), ("seed", 1 << 40), ("save_every", 0),
    ],
)  # fmt: skip
def test_f28_training_refuses_numbers_out_of_range(name: str, value: Any, model: nn.Module, texts: Path) -> None:
    """Each by name, before the first step."""
    error = unchanged(lambda: weft.train(model, str(texts), **{name: value}), OptionError, tuned(model))
    assert name in str(error.where) and str(error.got) == str(value)


def test_f28_all_numbers_out_of_range_come_together(model: nn.Module, texts: Path) -> None:
    """In one error."""
    error = unchanged(lambda: weft.train(model, str(texts), steps=0, batch=0, lr=NAN), OptionError, tuned(model))
    assert all(name in error.what for name in ("steps", "batch", "lr"))


def test_f28_a_batch_is_at_most_all_examples(model: nn.Module, texts: Path, folder: Path) -> None:
    """A batch larger than the data is the data: the same bits, the same count of tokens, and no memory for the rest."""
    made = []
    for batch in (1000, 1 << 40):
        other = tuned(weft.load(folder))
        history = weft.train(other, str(texts), steps=2, batch=batch, length=64)
        made.append((history.losses, history.tokens, state(other)))
    assert made[0][:2] == made[1][:2] and all(torch.equal(t, made[1][2][n]) for n, t in made[0][2].items())


@pytest.mark.parametrize("tokens", [0, -5, "5", 1.5])
def test_f28_calibration_needs_a_token(tokens: Any, model: nn.Module, texts: Path) -> None:
    """Fewer than one, or what is no number of tokens, is refused."""
    error = unchanged(lambda: weft.apply(model, "gptq", data=str(texts), tokens=tokens), OptionError, model)
    assert error.where == "tokens"


@pytest.mark.parametrize("seed", ["x", -1, 1.5, None])
def test_f28_a_seed_is_a_whole_number(seed: Any, model: nn.Module, texts: Path) -> None:
    """For every rewrite, also one that draws nothing, and for training."""
    unchanged(lambda: weft.apply(model, "rtn", seed=seed), OptionError, model)
    unchanged(lambda: weft.train(tuned(model), str(texts), seed=seed), OptionError, model)


@pytest.mark.parametrize("count", [0, -1, "5"])
def test_f28_generating_takes_a_token(count: Any, model: nn.Module) -> None:
    """At least one."""
    unchanged(lambda: weft.generate(model, "the", max_new_tokens=count), OptionError, model)


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -1}, {"length": 0}, {"length": -1}])
def test_f28_a_score_is_of_something(options: dict[str, int], model: nn.Module, texts: Path) -> None:
    """Of at least one document and one token."""
    error = unchanged(lambda: weft.evaluate(model, str(texts), **options), OptionError, model)
    assert error.where == next(iter(options))


# F31: numbers that are not finite


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
@pytest.mark.parametrize("method", ["gptq", "sparsegpt", "wanda", "eora"])
def test_f31_an_activation_that_is_not_finite_stops_the_rewrite(
    method: str, value: float, model: nn.Module, texts: Path
) -> None:
    """NumericError with site, batch and sample; no weight is rounded in some other way instead."""
    norm: Any = model.get_submodule("model.layers.1.input_layernorm")
    norm.weight.data[0] = value
    error = unchanged(lambda: weft.apply(model, method, data=str(texts), tokens=512), NumericError, model)
    assert "model.layers.1.self_attn." in str(error.where) and "batch 0, sample 0" in str(error.where)


@pytest.mark.parametrize("gradient", [True, False])
def test_f31_the_first_bad_batch_and_sample_are_named(gradient: bool, tiny: Any, batches: Any, tmp_path: Path) -> None:
    """One token of one sequence is enough, and what was walked before it is not kept as a result."""
    model = weft.weave(tiny())
    data = [{k: v.clone() for k, v in b.items()} for b in batches(count=4)]
    for b in data:
        b["input_ids"][b["input_ids"] == 90] = 2
    data[2]["input_ids"][1, 3] = data[3]["input_ids"][0, 3] = 90
    embed: Any = weft.expressions(model)["model.embed_tokens.weight"]
    embed.w.data[90, 5] = NAN
    error = refused(lambda: collect(model, data, tmp_path / "cache", gradient=gradient), NumericError)
    assert str(error.where).endswith(", batch 2, sample 1") and str(error.where).startswith("model.")
    assert not list(tmp_path.rglob("index.json"))


def test_f31_sums_of_squares_that_overflow_are_named(tiny: Any, batches: Any, tmp_path: Path) -> None:
    """Every value is finite and so is the output, but not the Gram."""
    model = weft.weave(tiny())
    v: Any = weft.expressions(model)["model.layers.1.self_attn.v_proj.weight"]
    v.w.data *= 1e20
    error = refused(lambda: collect(model, batches(), tmp_path / "cache", gradient=False), NumericError)
    assert str(error.where).startswith("model.layers.1.self_attn.o_proj.weight, batch 0, sample ")
    assert "values up to" in str(error.got)


def test_f31_an_infinite_diagonal_is_not_inverted() -> None:
    """The Cholesky factor of an infinite diagonal exists, so the Gram is looked at before it."""
    gram = torch.eye(8, dtype=torch.float64)
    gram[3, 3] = INF
    assert int(torch.linalg.cholesky_ex(gram).info) == 0
    assert refused(lambda: inverse_factor(gram, 0.01, "up_proj.gram"), NumericError).where == "up_proj.gram"


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("method", ["rtn", "nf4", "magnitude", "svd_residual", "gptq"])
def test_f31_a_weight_that_is_not_finite_is_not_rewritten(
    method: str, value: float, model: nn.Module, texts: Path
) -> None:
    """It becomes neither a code nor a factor."""
    name = "model.layers.0.mlp.up_proj.weight"
    dense: Any = weft.expressions(model)[name]
    dense.w.data = dense.w.data.clone()
    dense.w.data[3, 4] = value
    more: dict[str, Any] = {"data": str(texts), "tokens": 128} if method == "gptq" else {}
    error = unchanged(lambda: weft.apply(model, method, at=name, **more), NumericError, model)
    assert name in str(error.where)


@pytest.mark.parametrize(("lr", "norm", "step"), [(1e-3, NAN, "step 1"), (1e30, 1.0, "step 2")])
def test_f31_training_stops_at_the_first_loss_that_is_not_finite(
    lr: float, norm: float, step: str, model: nn.Module, texts: Path
) -> None:
    """And says at which step."""
    layer: Any = model.get_submodule("model.layers.1.input_layernorm")
    layer.weight.data[0] *= norm
    error = refused(lambda: weft.train(tuned(model), str(texts), steps=6, batch=2, length=32, lr=lr), NumericError)
    assert error.where == step


def test_f31_training_whose_last_step_breaks_a_weight_is_refused(model: nn.Module, texts: Path) -> None:
    """No later loss would show it."""
    before = list(trainable(tuned(model)))
    error = refused(lambda: weft.train(model, str(texts), steps=1, batch=2, length=32, lr=1e39), NumericError)
    assert error.where in before


@pytest.mark.parametrize("value", [NAN, 1e30])
def test_f31_a_score_that_is_not_finite_is_an_error(value: float, model: nn.Module, texts: Path) -> None:
    """Not a number in a table."""
    norm: Any = model.get_submodule("model.layers.1.input_layernorm")
    norm.weight.data[0] = value
    unchanged(lambda: weft.evaluate(model, str(texts)), NumericError, model)


# F32: poor evidence


@pytest.mark.parametrize("method", ["gptq", "sparsegpt", "wanda", "eora"])
def test_f32_fewer_tokens_than_columns_are_enough(method: str, model: nn.Module, texts: Path) -> None:
    """A Gram of rank 4 of 32: the damped problem is solved as it is, and nothing has to be declared."""
    before = state(model)
    if method == "eora":
        weft.apply(model, "rtn", bits=3, at="all-linear")
    made = weft.apply(model, method, data=str(texts), tokens=4, at="all-linear")
    assert made.fallbacks == [] and all(c.error is not None and c.error < 0.7 for c in made)
    assert all(torch.isfinite(t).all() for t in state(model).values()) and before.keys() == state(model).keys()


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_f32_weights_of_dead_inputs_are_kept(method: str, model: nn.Module, texts: Path) -> None:
    """Columns that no calibration token uses are rounded as any other, not set to zero."""
    norm: Any = model.get_submodule("model.layers.0.post_attention_layernorm")
    dead = [3, 17]
    norm.weight.data[dead] = 0
    name = "model.layers.0.mlp.up_proj.weight"
    before = weft.expressions(model)[name].dense().float()
    more: dict[str, Any] = {"data": str(texts), "tokens": 256, "search_scale": False} if method == "gptq" else {}
    made = weft.apply(model, method, bits=8, group=0, at=name, **more)
    after = weft.expressions(model)[name].dense().float()
    step = before.abs().amax(1, keepdim=True) / 127
    assert made.fallbacks == [] and bool(((after - before)[:, dead].abs() <= 0.51 * step + 1e-6).all())
    assert int((after[:, dead] == 0).sum()) < 0.05 * after[:, dead].numel()


@pytest.mark.parametrize("method", ["gptq", "sparsegpt", "wanda", "eora"])
def test_f32_a_site_that_no_data_reaches_is_declared(method: str, folder: Path, tiny: Any, texts: Path) -> None:
    """It is rewritten as if every input counted alike, and the result says so by its name."""
    plain = tiny("llama-tied")
    plain.spare = nn.Linear(32, 8)
    plain.config._name_or_path = str(folder)
    model = weft.weave(plain)
    made = weft.apply(model, method, data=str(texts), tokens=128, at=["spare.weight", "*layers.0.mlp.up_proj*"])
    assert made.fallbacks == [("spare.weight", "no input was seen: every feature counts alike")]
    assert bool(torch.isfinite(weft.expressions(model)["spare.weight"].dense()).all())


# F33, F05, F06: data


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def zipped(nbytes: int = 64 << 20) -> bytes:
    """A zip archive a thousand times smaller than what it holds."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("data.npy", bytes(nbytes))
    return out.getvalue()


GOOD = b'{"text": "the cat"}\n'
FILES: dict[str, tuple[str, bytes, type[WeftError], str]] = {
    "empty text": ("d.txt", b"", FormatError, "d.txt"),
    "white text": ("d.txt", b" \n \n\t", FormatError, "d.txt"),
    "empty records": ("d.jsonl", b"", FormatError, "d.jsonl"),
    "blank records": ("d.jsonl", b"\n\n\n", FormatError, "d.jsonl"),
    "no rows": ("d.csv", b"text\n", FormatError, "d.csv"),
    "empty list": ("d.json", b"[]", FormatError, "d.json"),
    "bad UTF-8": ("d.jsonl", GOOD + b'{"text": "\xff"}\n', FormatError, "d.jsonl line 2"),
    "bad UTF-8 in text": ("d.txt", b"the cat\n\nsat \xc3\x28\n", FormatError, "d.txt line 3"),
    "UTF-16": ("d.txt", "the cat".encode("utf-16"), FormatError, "d.txt line 1"),
    "a zero byte": ("d.csv", b"text\nthe \x00 cat\n", FormatError, "d.csv line 2"),
    "half a character": ("d.jsonl", GOOD + b'{"text": "\\ud800 cat"}\n', FormatError, "d.jsonl line 2"),
    "a key twice": ("d.jsonl", GOOD + b'{"text": "a", "text": "b"}\n', FormatError, "d.jsonl line 2"),
    "NaN": ("d.jsonl", GOOD + b'{"text": "a", "w": NaN}\n', FormatError, "d.jsonl line 2"),
    "infinity": ("d.json", b'[{"text": "a", "w": -Infinity}]', FormatError, "d.json"),
    "half a line": ("d.jsonl", GOOD + b'{"text": "a"', FormatError, "d.jsonl line 2"),
    "no known field": ("d.jsonl", GOOD + b'{"txt": "a"}\n', FormatError, "d.jsonl line 2"),
    "empty responses": ("d.jsonl", b'{"prompt": "the cat", "response": ""}\n' * 30, FormatError, "d.jsonl line 1"),
    "two kinds": ("d.jsonl", GOOD + b'{"query": "a", "positive": "b"}\n', FormatError, "d.jsonl"),
    "deep": ("d.jsonl", GOOD + b'{"text": ' + b"[" * 100_000 + b"\n", FormatError, "d.jsonl line 2"),
    "gzip as records": ("d.jsonl", gzip.compress(GOOD * 1000), FormatError, "d.jsonl line 1"),
    "zip as text": ("d.txt", zipped(1 << 20), FormatError, "d.txt line 1"),
    "pickle": ("d.pkl", b"", PathError, "d.pkl"),
    "torch": ("d.pt", zipped(1 << 20), PathError, "d.pt"),
    "numpy": ("d.npz", zipped(1 << 20), PathError, "d.npz"),
    "binary": ("d.bin", b"\x00\x01", PathError, "d.bin"),
    "archive": ("d.zip", zipped(1 << 20), PathError, "d.zip"),
    "packed records": ("d.jsonl.gz", gzip.compress(GOOD), PathError, "d.jsonl.gz"),
}


@pytest.mark.parametrize("fault", FILES)
def test_f33_data_that_cannot_be_used_is_refused(fault: str, model: nn.Module, tmp_path: Path) -> None:
    """Training names the file, and the line where there is one, before the first step."""
    name, content, kind, where = FILES[fault]
    place = tmp_path / "data"
    place.mkdir()
    marker = tmp_path / "ran"
    (place / name).write_bytes(pickle.dumps(Bomb(marker)) if fault == "pickle" else content)
    error = unchanged(lambda: weft.train(model, place / name, steps=1), kind, tuned(model))
    assert where in f"{error.where} {error.what}" and not marker.exists()
    assert refused(
        lambda: read(place / name) if fault != "empty responses" else weft.train(model, place / name), kind, place
    )


@pytest.mark.parametrize("fault", ["empty text", "bad UTF-8", "empty responses", "packed records", "a key twice"])
def test_f33_calibration_and_scores_refuse_it_too(fault: str, model: nn.Module, tmp_path: Path) -> None:
    """By the same error."""
    name, content, kind, _ = FILES[fault]
    (tmp_path / name).write_bytes(content)
    unchanged(lambda: weft.evaluate(model, str(tmp_path / name)), kind, model)
    if fault != "empty responses":  # a prompt alone calibrates
        unchanged(lambda: weft.apply(model, "gptq", data=str(tmp_path / name), tokens=64), kind, model)


def test_f33_what_is_no_file_is_refused_and_not_waited_for(
    soon: None, model: nn.Module, texts: Path, tmp_path: Path
) -> None:
    """Nothing there, a pipe, a link to nowhere, a folder without data, names that cannot be: alone or inside a folder."""
    pipe, link, bare, mixed = (tmp_path / n for n in ("pipe.jsonl", "link.jsonl", "bare", "mixed"))
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "nowhere")
    (bare / "inner.txt").mkdir(parents=True)
    (bare / "readme.md").write_text("the cat")
    tuned(model)
    for path in (pipe, link, tmp_path / "no.jsonl", "x" * 5000, "a\0b.txt", ""):
        unchanged(lambda path=path: weft.train(model, path, steps=1), PathError, model)
    assert refused(lambda: weft.train(model, bare, steps=1), FormatError, bare).where == str(bare)
    mixed.mkdir()
    texts.rename(mixed / "texts.jsonl")
    assert len(read(mixed)) == len(ROWS)
    os.mkfifo(mixed / "pipe.txt")
    (mixed / "link.csv").symlink_to(tmp_path / "nowhere")
    error = refused(lambda: weft.train(model, mixed, steps=1), PathError, mixed)
    assert "pipe.txt" in error.what and "link.csv" in error.what


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".json"])
def test_f33_a_line_without_end_is_not_read_to_its_end(suffix: str, model: nn.Module, tmp_path: Path) -> None:
    """A gigabyte in one line: refused after a few megabytes, by its name."""
    path = tmp_path / f"data{suffix}"
    with path.open("wb") as f:
        f.write(b'[{"text": "')
        f.truncate(1 << 30)
    error = unchanged(lambda: weft.train(model, path, steps=1), FormatError, tuned(model))
    assert path.name in str(error.where) and "bytes" in str(error.got)


def test_f33_a_long_line_of_real_text_is_refused(model: nn.Module, tmp_path: Path) -> None:
    """Twenty megabytes as one record; the longest line that is allowed is read."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b'{"text": "' + b"the cat " * (20 << 17) + b'"}\n')
    error = unchanged(lambda: weft.train(model, path, steps=1), FormatError, tuned(model))
    assert error.where == "data.jsonl line 2" and str(LONGEST) in str(error.got)
    text = tmp_path / "data.txt"
    text.write_bytes(b"a" * (LONGEST - 1) + b"\nb")
    assert [len(e.text) for e in read(text) if isinstance(e, Text)] == [LONGEST + 1]


def test_f33_a_large_list_is_sent_to_records(tmp_path: Path) -> None:
    """A JSON list has to be read whole; beyond what is allowed the error says what to use."""
    path = tmp_path / "data.json"
    path.write_bytes(b"[" + b'{"text": "the cat"},\n' * (30 << 16) + b"{}]")
    assert ".jsonl" in refused(lambda: read(path), FormatError).fix


@pytest.mark.parametrize("use", ["train", "evaluate", "gptq", "rows"])
def test_f33_a_token_beyond_the_vocabulary_is_refused(
    use: str, folder: Path, tiny: Any, words: Any, texts: Path, tmp_path: Path
) -> None:
    """A tokenizer of another model: before a step, a score or a statistic."""
    place = tmp_path / "small"
    tiny("llama", vocab_size=12).save_pretrained(place)
    words.save_pretrained(place)
    model = tuned(weft.load(place))
    acts: dict[str, Callable[[], Any]] = {
        "train": lambda: weft.train(model, str(texts), steps=1),
        "evaluate": lambda: weft.evaluate(model, str(texts)),
        "gptq": lambda: weft.apply(model, "gptq", data=str(texts), tokens=64),
        "rows": lambda: collect(model, [{"input_ids": torch.tensor([[3, -1]])}], tmp_path / "cache"),
    }
    error = unchanged(acts[use], FormatError, model)
    assert error.want == "0 to 11" and str(error.got).startswith("token ")


def test_f33_pairs_of_another_vocabulary_are_refused(tiny: Any, words: Any, tmp_path: Path) -> None:
    """Where texts become tokens batch by batch, each batch is looked at."""
    place = tmp_path / "small"
    tiny("bert", vocab_size=12).save_pretrained(place)
    words.save_pretrained(place)
    model = tuned(weft.load(place))
    data = [Pair(f"question {t}", f"answer the {t}") for t in ("cat", "dog", "bird", "mat")]
    unchanged(lambda: weft.train(model, data, steps=1, batch=2), FormatError, model)


@pytest.mark.parametrize("gradient", [True, False])
def test_f33_padding_alone_is_refused(gradient: bool, tiny: Any, batches: Any, tmp_path: Path) -> None:
    """A sequence without a token, and no batch at all: before any work, by batch and sample."""
    model, data = weft.weave(tiny()), batches()
    data[1]["attention_mask"][1] = 0
    error = refused(lambda: collect(model, data, tmp_path / "cache", gradient=gradient), FormatError)
    assert error.where == "batch 1, sample 1"
    refused(lambda: collect(model, [], tmp_path / "cache", gradient=gradient), FormatError)
    assert not (tmp_path / "cache").exists()


def test_f33_texts_of_white_space_do_not_calibrate(model: nn.Module, tmp_path: Path) -> None:
    """Many records and not one word; among others they are left out."""
    blank = put(tmp_path / "blank.jsonl", *({"text": " " * i} for i in range(1, 40)))
    unchanged(lambda: weft.apply(model, "gptq", data=str(blank), tokens=64), FormatError, model)
    unchanged(lambda: weft.train(model, str(blank), steps=1), FormatError, tuned(model))


def test_f33_chats_without_a_template_or_against_it_are_refused(model: nn.Module, words: Any, tmp_path: Path) -> None:
    """In calibration as in training; what a template raises names the record."""
    rows = [{"messages": [{"role": "user", "content": f"the cat {'the ' * i}"}]} for i in range(30)]
    chats = put(tmp_path / "chats.jsonl", *rows)
    for act in (
        lambda: weft.apply(model, "gptq", data=str(chats), tokens=64),
        lambda: weft.train(tuned(model), str(chats), steps=1),
    ):
        assert "chats.jsonl line" in str(refused(act, FormatError).where)
    import copy

    strict = copy.deepcopy(words)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    turns = (("user", "the cat"), ("assistant", "yes"))
    error = refused(lambda: encode([Chat(turns, "d.jsonl line 4")], strict, length=16), FormatError)
    assert error.where == "d.jsonl line 4" and "roles must alternate" in str(error.got)


def test_f33_responses_that_no_length_holds_are_refused(model: nn.Module) -> None:
    """No target, by example."""
    data = [Response("the cat", "", "d.jsonl line 3"), Response("a dog", "", "d.jsonl line 9")]
    error = unchanged(lambda: weft.train(model, data, steps=1), FormatError, tuned(model))
    assert error.where == "d.jsonl line 3 to d.jsonl line 9"


# F38: memory


def weft_(*argv: str) -> Any:
    """The command line in this process."""
    return CliRunner().invoke(build(argv), list(argv), catch_exceptions=False)


def exhaust_python() -> None:
    raise MemoryError


def exhaust_torch() -> None:
    torch.empty(1 << 50)


def exhaust_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def exhaust_numpy() -> None:
    import numpy as np

    np.zeros(1 << 50)


@pytest.mark.parametrize("exhaust", [exhaust_python, exhaust_torch, exhaust_gpu, exhaust_numpy])
def test_f38_out_of_memory_is_told_as_that(
    exhaust: Callable[[], None], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 5, no traceback, nothing written; never `a bug in weft`."""
    monkeypatch.setattr("weft.engine.run.rewritten", lambda *_: exhaust())
    made = weft_("rtn", str(folder), "--out", str(tmp_path / "out"), "--quiet")
    assert made.exit_code == 5, made.output
    assert "memory" in made.stderr and "bug" not in made.stderr and "Traceback" not in made.stderr
    assert not (tmp_path / "out").exists()


# F39: the same bytes


def rewrite(folder: Path, texts: Path, out: Path, cache: Path) -> None:
    """Round, adapt, train and save: what runs must agree on."""
    model = weft.load(folder)
    weft.apply(model, "gptq", bits=3, group=16, data=str(texts), tokens=512, cache=cache)
    weft.apply(model, "eora", rank=2, at="*.mlp.*", data=str(texts), tokens=512, cache=cache)
    weft.apply(model, "lora", rank=2)
    weft.train(model, str(texts), steps=4, batch=2, length=32, save_every=2, out=cache / "train")
    weft.save(model, out)


class Stop:
    """Progress that interrupts training after three steps."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def step(count: int, note: str = "") -> None:
            nonlocal done
            done += count
            if done == 3:
                raise KeyboardInterrupt

        yield step


def test_f39_another_hash_seed_two_threads_and_optimised_python_give_the_same_bytes(
    folder: Path, texts: Path, tmp_path: Path
) -> None:
    """Every file that is saved, manifest included: two threads, no `assert`, no terminal, another order of sets."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from faults.test_runs import rewrite; rewrite(*map(Path, sys.argv[2:]))"
    )
    root = Path(weft.__file__).parent.parent
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    given = [str(p) for p in (root / "tests", folder, texts, tmp_path / "there", tmp_path / "cache-there")]
    env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(root)}
    there = subprocess.Popen(
        [sys.executable, "-O", "-c", code, *given], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    rewrite(folder, texts, tmp_path / "here", tmp_path / "cache-here")
    said, _ = there.communicate()
    assert there.returncode == 0, said
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_f39_an_interrupted_run_ends_with_the_bytes_of_a_straight_one(
    folder: Path, texts: Path, tmp_path: Path
) -> None:
    """Stopped during training and run again with the same cache."""
    rewrite(folder, texts, tmp_path / "straight", tmp_path / "cache-a")
    model = weft.load(folder)
    cache = tmp_path / "cache-b"
    weft.apply(model, "gptq", bits=3, group=16, data=str(texts), tokens=512, cache=cache)
    weft.apply(model, "eora", rank=2, at="*.mlp.*", data=str(texts), tokens=512, cache=cache)
    weft.apply(model, "lora", rank=2)
    how: dict[str, Any] = {"steps": 4, "batch": 2, "length": 32, "save_every": 2, "out": cache / "train"}
    with pytest.raises(KeyboardInterrupt):
        weft.train(model, str(texts), progress=Stop(), **how)
    assert (cache / "train" / "checkpoint-2").is_dir() and not (cache / "train" / "checkpoint-4").exists()
    rewrite(folder, texts, tmp_path / "resumed", cache)
    assert tree(tmp_path / "straight") == tree(tmp_path / "resumed")


def test_f39_the_order_of_sites_changes_no_byte(folder: Path, tmp_path: Path) -> None:
    """All at once, or one by one from the last to the first."""
    one, other = weft.load(folder), weft.load(folder)
    for method, options in (
        ("magnitude", {}),
        ("rtn", {"bits": 3}),
        ("svd_residual", {"rank": 2}),
        ("lora", {"rank": 2}),
    ):
        weft.apply(one, method, at="all-linear", **options)
    names = [r.name for r in weft.show(one) if "adapter" in r.expression]
    for name in reversed(names):
        for method, options in (
            ("magnitude", {}),
            ("rtn", {"bits": 3}),
            ("svd_residual", {"rank": 2}),
            ("lora", {"rank": 2}),
        ):
            weft.apply(other, method, at=name, **options)
    weft.save(one, tmp_path / "one")
    weft.save(other, tmp_path / "other")
    assert len(names) == 14 and tree(tmp_path / "one") == tree(tmp_path / "other")


# F40: places


@pytest.mark.parametrize("umask", [0o077, 0o002, 0o022])
@pytest.mark.parametrize("method", [None, "rtn"])
def test_f40_files_have_the_mode_that_the_umask_gives(
    method: str | None, umask: int, model: nn.Module, tmp_path: Path
) -> None:
    """0600 or 0664, as any file that is made here: of plain and of weft folders, first saved and replaced."""
    if method:
        weft.apply(model, method)
    before = os.umask(umask)
    try:
        for replace in (False, True):
            weft.save(model, tmp_path / "out", replace=replace)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert len(modes) >= 5 and set(modes.values()) == {0o666 & ~umask}, modes
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


NAMES = [
    "with space",
    "ünï 猫",
    "e\u0301",
    "n" * 255,
    "é" * 127,
    "-dash",
    "quo'te\"$HOME",
    "new\nline",
    "colon:",
    "dot.",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_f40_any_name_that_a_folder_can_have_is_fine(name: str, model: nn.Module, tmp_path: Path) -> None:
    """Spaces, other alphabets, 255 bytes: saved, replaced, checked and loaded."""
    out = tmp_path / name
    weft.apply(model, "rtn", group=16)
    for replace in (False, True):
        weft.save(model, out, replace=replace)
    assert weft.verify(out) == [] and [p.name for p in out.parent.iterdir() if p.name.startswith(".weft")] == []
    again = weft.load(out)
    assert all(torch.equal(t, state(again)[n]) for n, t in state(model).items())


def test_f40_a_name_that_is_no_text_is_refused(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    """Such a path cannot be opened as a model, so nothing is written there."""
    place = tmp_path / "\udcff"
    unchanged(lambda: weft.save(model, place / "out"), PathError, model)
    assert not place.exists()
    shutil.copytree(folder, place)
    refused(lambda: weft.load(place), PathError)


@pytest.mark.parametrize("name", ["with space", "ünï 猫", "n" * 249, "-dash"], ids=ascii)
def test_f40_data_and_cache_too(name: str, model: nn.Module, texts: Path, tmp_path: Path) -> None:
    """Data files and the cache may have such names."""
    data = texts.rename(tmp_path / f"{name}.jsonl")
    made = weft.apply(model, "gptq", data=str(data), tokens=64, cache=tmp_path / name)
    assert made.fallbacks == [] and list((tmp_path / name / "evidence").glob("*/index.json"))


@pytest.mark.parametrize("use", ["apply", "train"])
def test_f40_a_cache_that_cannot_be_written_is_a_path_error(
    use: str, model: nn.Module, texts: Path, tmp_path: Path
) -> None:
    """Naming the place; here it would lie below a file, which not even a superuser can do."""
    (tmp_path / "file").write_text("x")
    place = tmp_path / "file" / "cache"
    tuned(model)
    acts: dict[str, Callable[[], Any]] = {
        "apply": lambda: weft.apply(model, "gptq", data=str(texts), tokens=64, cache=place),
        "train": lambda: weft.train(model, str(texts), steps=1, out=place),
    }
    assert str(place) in str(unchanged(acts[use], PathError, model).where)


def test_f40_no_home_is_no_fault(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without $HOME everything runs that is told where its cache is; where no home can be found, the error says what to set."""
    for name in ("HOME", "XDG_CACHE_HOME", "WEFT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    model = weft.load(folder)
    weft.apply(model, "rtn")
    weft.save(model, tmp_path / "out")
    assert weft.generate(weft.load(tmp_path / "out"), "the cat", 2) is not None

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert "WEFT_CACHE" in refused(stored.default, ResourceError).fix
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    assert stored.default() == tmp_path / "cache"


def test_f40_a_local_model_leaves_the_hubs_cache_alone(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    """It is neither needed nor made."""
    hub = Path(os.environ["HF_HOME"])
    before = tree(hub) if hub.exists() else None
    weft.apply(weft.load(folder), "rtn")
    assert weft.tokenizer(model) is not None and (tree(hub) if hub.exists() else None) == before


def test_f40_no_check_is_an_assert() -> None:
    """`python -O` would drop it."""
    files = sorted(Path(weft.__file__).parent.rglob("*.py"))
    found = [f.name for f in files for node in ast.walk(ast.parse(f.read_text("utf8"))) if isinstance(node, ast.Assert)]
    assert len(files) > 40 and found == []


def test_f40_the_same_refusals_in_python(model: nn.Module, tmp_path: Path, texts: Path) -> None:
    """An output that is there is not written over, whatever it is called."""
    weft.save(model, tmp_path / "a b")
    refused(lambda: weft.save(model, tmp_path / "a b"), ConflictError, tmp_path / "a b")
