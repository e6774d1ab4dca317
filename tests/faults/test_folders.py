"""What a stranger's folder may hold: each fault is a WeftError that says everything, and no code runs."""

from __future__ import annotations

import json
import os
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.error import ChangedError, ConflictError, FormatError, NumericError, PathError, ShapeError, WeftError
from weft.learn.read import read
from weft.model import fingerprint, weave
from weft.store import load, save, verify
from weft.store.audit import header
from weft.store.files import parse_json, read_json, safe_name, write_json
from weft.store.tensors import read_tensors, write_tensors

from .edits import cut, entry, index, plain, raw, refused, safetensors, table, tensors, told, two, woven


def linked(folder: Path) -> None:
    """A single file that is a link to one outside."""
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "outside.safetensors")


def rename(old: str, new: str) -> Any:
    """Give a tensor another name."""
    return tensors(lambda t: t.update({new: t.pop(old)}))


def value(name: str, x: float) -> Any:
    """Put a number into a tensor."""
    return tensors(lambda t: t[name].view(-1)[-1].fill_(x))


def twice(folder: Path) -> None:
    """Two shards that both hold every tensor; the index names the first."""
    held = (folder / "model.safetensors").read_bytes()
    index(**dict.fromkeys(header(folder / "model.safetensors").tensors, "part.safetensors"))(folder)
    names = json.loads((folder / "model.safetensors.index.json").read_text())
    names["weight_map"]["lm_head.weight"] = "other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    (folder / "other.safetensors").write_bytes(held)


PLAIN: dict[str, tuple[Edit, type[WeftError]]] = {
    "F14 no config": (lambda f: (f / "config.json").unlink(), PathError),
    "F14 no checkpoint": (lambda f: (f / "model.safetensors").unlink(), PathError),
    "F05 a pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), PathError),
    "F16 two checkpoints": (two, FormatError),
    "F12 truncated data": (cut("model.safetensors", -1), FormatError),
    "F12 truncated header": (cut("model.safetensors", 20), FormatError),
    "F12 empty file": (cut("model.safetensors", 0), FormatError),
    "F11 trailing bytes": (lambda f: (f / "model.safetensors").open("ab").write(b"x"), FormatError),
    "F14 config cut": (cut("config.json", 40), FormatError),
    "F14 config is a list": (raw("config.json", b"[]"), FormatError),
    "F09 config twice": (
        raw("config.json", b'{"architectures": ["LlamaForCausalLM"], "architectures": ["BertModel"]}'),
        FormatError,
    ),
    "F22 config with NaN": (raw("config.json", b'{"architectures": ["LlamaForCausalLM"], "x": NaN}'), FormatError),
    "F19 config of no width": (table("config.json", lambda c: c.update(hidden_size="wide")), FormatError),
    "F23 unknown architecture": (
        table("config.json", lambda c: c.update(architectures=["EvilForCausalLM"])),
        FormatError,
    ),
    "F23 no architecture": (table("config.json", lambda c: c.pop("architectures")), FormatError),
    "F23 architecture is a number": (table("config.json", lambda c: c.update(architectures=[7])), FormatError),
    "F23 architectures is a word": (
        table("config.json", lambda c: c.update(architectures="LlamaForCausalLM")),
        FormatError,
    ),
    "F23 a base class": (table("config.json", lambda c: c.update(architectures=["PreTrainedModel"])), FormatError),
    "F23 no model class": (table("config.json", lambda c: c.update(architectures=["AutoTokenizer"])), FormatError),
    "F23 a dotted class": (
        table("config.json", lambda c: c.update(architectures=["models.llama.LlamaModel"])),
        FormatError,
    ),
    "F18 missing tensor": (tensors(lambda t: t.pop("model.norm.weight")), FormatError),
    "F18 missing matrix": (tensors(lambda t: t.pop("lm_head.weight")), FormatError),
    "F18 unexpected tensor": (tensors(lambda t: t.update(extra=torch.ones(2))), FormatError),
    "F20 ill-shaped tensor": (tensors(lambda t: t.update({"model.norm.weight": torch.ones(3)})), FormatError),
    "F20 ill-shaped matrix": (tensors(lambda t: t.update({"lm_head.weight": torch.ones(96, 31)})), FormatError),
    "F14 index is a list": (lambda f: (index()(f), raw("model.safetensors.index.json", b"[]")(f)), FormatError),
    "F01 index leaves the folder": (index(a="../model.safetensors"), FormatError),
    "F02 index goes to the root": (index(a="/etc/model.safetensors"), FormatError),
    "F03 index names a pickle": (index(a="pytorch_model.bin"), FormatError),
    "F14 index names no shard": (index(a="absent.safetensors"), PathError),
    "F15 index and shard differ": (index(a="part.safetensors"), FormatError),
    "F14 generation config cut": (cut("generation_config.json", 9), FormatError),
    "F01 index climbs": (index(a="x/../../model.safetensors"), FormatError),
    "F04 shard is a link out": (linked, FormatError),
    "F07 header is not text": (raw("model.safetensors", struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc"), FormatError),
    "F10 name with a line break": (rename("model.norm.weight", "model.norm\nweight"), FormatError),
    "F13 a flipped bit is not finite": (value("model.norm.weight", float("nan")), NumericError),
    "F14 index is cut": (
        lambda f: (index()(f), raw("model.safetensors.index.json", b'{"weight_map": {')(f)),
        FormatError,
    ),
    "F14 index without a map": (lambda f: (index()(f), raw("model.safetensors.index.json", b"{}")(f)), FormatError),
    "F14 index nested": (
        lambda f: (index()(f), raw("model.safetensors.index.json", b'{"weight_map": ' + b"[" * 100_000)(f)),
        FormatError,
    ),
    "F15 a tensor in two shards": (twice, FormatError),
    "F16 a shard of an older save": (
        lambda f: (f / "model-00001-of-00002.safetensors").write_bytes((f / "model.safetensors").read_bytes()),
        FormatError,
    ),
    "F16 shards without an index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00001.safetensors"),
        PathError,
    ),
    "F17 infinity": (value("lm_head.weight", float("-inf")), NumericError),
    "F19 fewer layers": (table("config.json", lambda c: c.update(num_hidden_layers=1)), FormatError),
    "F19 more layers": (table("config.json", lambda c: c.update(num_hidden_layers=3)), FormatError),
    "F19 negative layers": (table("config.json", lambda c: c.update(num_hidden_layers=-1)), FormatError),
    "F19 no layers": (table("config.json", lambda c: c.update(num_hidden_layers=0)), FormatError),
    "F19 layers are true": (table("config.json", lambda c: c.update(num_hidden_layers=True)), FormatError),
    "F21 tied weights differ": (table("config.json", lambda c: c.update(tie_word_embeddings=True)), FormatError),
    "F22 a billion layers": (table("config.json", lambda c: c.update(num_hidden_layers=10**9)), FormatError),
    "F22 ten thousand layers": (table("config.json", lambda c: c.update(num_hidden_layers=10**4)), FormatError),
    "F22 a vocabulary of 2^40": (table("config.json", lambda c: c.update(vocab_size=1 << 40)), FormatError),
    "F22 a huge number": (raw("config.json", b'{"architectures": ["LlamaForCausalLM"], "x": 1e999}'), FormatError),
    "F14 manifest is a list": (raw("weft.json", b"[]"), FormatError),
}

WOVEN: dict[str, tuple[Edit, type[WeftError]]] = {
    "a newer format": (table("weft.json", lambda m: m.update(format=2)), FormatError),
    "no format": (table("weft.json", lambda m: m.pop("format")), FormatError),
    "a base without a path": (table("weft.json", lambda m: m.update(base={"seal": "x"})), FormatError),
    "a base that is a word": (table("weft.json", lambda m: m.update(base="x")), FormatError),
    "no sites": (table("weft.json", lambda m: m.pop("sites")), FormatError),
    "manifest cut": (cut("weft.json", -20), FormatError),
    "unknown node": (table("weft.json", lambda m: m["sites"]["lm_head.weight"].update(node="os.system")), FormatError),
    "unknown field": (table("weft.json", lambda m: m["sites"]["lm_head.weight"].update(bits=4)), FormatError),
    "unknown grid": (table("weft.json", lambda m: m["sites"]["lm_head.weight"].update(grid="int99")), WeftError),
    "a group of no size": (table("weft.json", lambda m: m["sites"]["lm_head.weight"].update(group="big")), ShapeError),
    "an expression is a word": (
        table("weft.json", lambda m: m["sites"].update({"lm_head.weight": "Dense"})),
        FormatError,
    ),
    "a sum of nothing": (
        table("weft.json", lambda m: m["sites"].update({"lm_head.weight": {"node": "Sum"}})),
        FormatError,
    ),
    "missing site": (table("weft.json", lambda m: m["sites"].pop("lm_head.weight")), FormatError),
    "unknown site": (
        table("weft.json", lambda m: m["sites"].update(nowhere=m["sites"]["lm_head.weight"])),
        FormatError,
    ),
    "missing term": (tensors(lambda t: t.pop("lm_head.weight:data"), "weft"), FormatError),
    "unexpected term": (tensors(lambda t: t.update({"lm_head.weight:extra": torch.ones(1)}), "weft"), FormatError),
    "ill-shaped term": (
        tensors(lambda t: t.update({"lm_head.weight:data": torch.zeros(95, 18, dtype=torch.uint8)}), "weft"),
        WeftError,
    ),
    "ill-typed term": (tensors(lambda t: t.update({"lm_head.weight:data": torch.zeros(96, 18)}), "weft"), ShapeError),
    "missing norm": (tensors(lambda t: t.pop("model.norm.weight"), "weft"), FormatError),
    "unexpected tensor": (tensors(lambda t: t.update(extra=torch.ones(1)), "weft"), FormatError),
    "ill-shaped norm": (tensors(lambda t: t.update({"model.norm.weight": torch.ones(3)}), "weft"), FormatError),
    "truncated": (cut("weft.safetensors", -8), FormatError),
    "no tensors": (lambda f: (f / "weft.safetensors").unlink(), PathError),
    "no config": (lambda f: (f / "config.json").unlink(), PathError),
}


@pytest.mark.parametrize("fault", PLAIN)
def test_a_faulty_checkpoint_is_refused(fault: str, tiny: Any, tmp_path: Path) -> None:
    """The right error, with what, where, got, want and fix."""
    folder = plain(tiny, tmp_path / "model")
    edit, kind = PLAIN[fault]
    edit(folder)
    refused(lambda: load(folder), kind, tmp_path)


@pytest.mark.parametrize("fault", WOVEN)
def test_a_faulty_weft_folder_is_refused(fault: str, tiny: Any, tmp_path: Path) -> None:
    """The right error, with what, where, got, want and fix."""
    folder = woven(tiny, tmp_path / "model")
    edit, kind = WOVEN[fault]
    edit(folder)
    refused(lambda: load(folder), kind, tmp_path)


HEADERS: dict[str, bytes] = {
    "F09 duplicate name": safetensors(f'{{"a": {entry()}, "a": {entry()}}}'),
    "F09 duplicate field": safetensors(
        '{"a": {"dtype": "F32", "dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}'
    ),
    "F11 overlap": safetensors(f'{{"a": {entry()}, "b": {entry(shape=[1], offsets=[8, 12])}}}'),
    "F11 the same bytes twice": safetensors(f'{{"a": {entry()}, "b": {entry()}}}'),
    "F11 hole": safetensors(f'{{"a": {entry(shape=[1], offsets=[0, 4])}, "b": {entry(shape=[2], offsets=[8, 16])}}}'),
    "F11 bytes left over": safetensors(f'{{"a": {entry(shape=[1], offsets=[0, 4])}}}'),
    "F12 past the end": safetensors(f'{{"a": {entry(shape=[8], offsets=[0, 32])}}}'),
    "F11 before the start": safetensors(f'{{"a": {entry(offsets=[-16, 0])}}}'),
    "F11 backwards": safetensors(f'{{"a": {entry(offsets=[16, 0])}}}'),
    "F11 size and shape differ": safetensors(f'{{"a": {entry(shape=[3])}}}'),
    "F11 huge shape": safetensors(f'{{"a": {entry(shape=[2**40, 2**40])}}}'),
    "negative shape": safetensors(f'{{"a": {entry(shape=[-2, -2])}}}'),
    "shape of booleans": safetensors(f'{{"a": {entry(shape=[4, True])}}}'),
    "offsets are floats": safetensors(f'{{"a": {entry(offsets=[0.0, 16.0])}}}'),
    "three offsets": safetensors(f'{{"a": {entry(offsets=[0, 8, 16])}}}'),
    "unknown dtype": safetensors(f'{{"a": {entry(dtype="F31")}}}'),
    "dtype is a list": safetensors(f'{{"a": {entry(dtype=["F32"])}}}'),
    "extra field": safetensors('{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], "code": 1}}'),
    "entry is a number": safetensors('{"a": 7}'),
    "F07 header is a list": safetensors("[]", b""),
    "F07 header is not JSON": safetensors("{nonsense", b""),
    "F07 header is not text": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    "F07 header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "F07 header of no length": struct.pack("<Q", 0),
    "F07 seven bytes": b"\0" * 7,
    "F07 header over 25 MB": struct.pack("<Q", 26 << 20) + b"{" + b" " * (26 << 20),
    "F07 a mark before it": safetensors("\ufeff{}", b""),
    "F08 too many tensors": safetensors(
        "{" + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(100_001)) + "}", b""
    ),
    "F08 nine dimensions": safetensors(f'{{"a": {entry(shape=[1] * 8 + [4])}}}'),
    "F08 a dimension of 2^60": safetensors(f'{{"a": {entry(shape=[0, 1 << 60], offsets=[0, 0])}}}', b""),
    "F10 name climbs": safetensors(f'{{"../../etc/x y": {entry()}}}'),
    "F10 name with NUL": safetensors(f'{{"a\\u0000": {entry()}}}'),
    "F10 name with escape": safetensors(f'{{"a\\u001b[31m": {entry()}}}'),
    "F10 name of 10 kB": safetensors(f'{{"{"a" * 10_000}": {entry()}}}'),
    "F10 name not in normal form": safetensors(f'{{"e\\u0301": {entry()}}}'),
    "notes are no texts": safetensors(f'{{"__metadata__": {{"a": 1}}, "a": {entry()}}}'),
    "F14 deep nesting": safetensors("[" * 200_000, b""),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_faulty_header_is_refused_before_mapping(fault: str, tmp_path: Path) -> None:
    """The audit alone refuses it, and so does reading."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[fault])
    for act in (header, read_tensors):
        refused(lambda act=act: act(path), FormatError, tmp_path)


def test_a_good_header_passes(tmp_path: Path) -> None:
    """Empty tensors, scalars, metadata and every common dtype are fine."""
    held = {
        d: torch.ones(3).to(getattr(torch, d))
        for d in ("float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool")
    }
    held |= {"none": torch.empty(0, 4), "one": torch.tensor(2.0)}
    write_tensors(tmp_path / "x.safetensors", held)
    found = read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == held.keys() and all(
        torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in held.items()
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_weights_that_are_no_floats_are_refused_by_name(
    name: str, dtype: torch.dtype, tiny: Any, tmp_path: Path
) -> None:
    """Codes of some other tool's checkpoint are never taken for weights."""
    folder = plain(tiny, tmp_path / "model")
    tensors(lambda t: t.update({name: torch.ones_like(t[name]).to(dtype)}))(folder)
    with pytest.raises(WeftError, match=name):
        load(folder)


def test_all_problems_of_a_checkpoint_come_together(tiny: Any, tmp_path: Path) -> None:
    """Missing, unexpected and ill-shaped tensors in one error."""
    folder = plain(tiny, tmp_path / "model")
    change: dict[str, Any] = {
        "extra.one": torch.ones(1),
        "extra.two": torch.ones(1),
        "model.norm.weight": torch.ones(3),
    }
    tensors(lambda t: (t.pop("lm_head.weight"), t.update(change)))(folder)
    with pytest.raises(FormatError) as e:
        load(folder)
    assert e.value.what.startswith("4 problems") and all(n in str(e.value.what) for n in ("lm_head.weight", *change))


def test_all_problems_of_a_weft_folder_come_together(tiny: Any, tmp_path: Path) -> None:
    """Of expressions and plain tensors alike."""
    folder = woven(tiny, tmp_path / "model")
    gone = ("lm_head.weight:data", "model.layers.0.mlp.up_proj.weight:data", "model.norm.weight")
    tensors(lambda t: ([t.pop(n) for n in gone], t.update(extra=torch.ones(1))), "weft")(folder)
    with pytest.raises(FormatError) as e:
        load(folder)
    assert all(n.removesuffix(":data") in e.value.what for n in (*gone, "extra"))


def test_all_problems_of_a_header_come_together(tmp_path: Path) -> None:
    """Every bad tensor is named."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(f'{{"a": 7, "b": {entry(dtype="F31")}, "c": {entry()}}}'))
    with pytest.raises(FormatError) as e:
        header(path)
    assert (
        "x.safetensors: a" in e.value.what
        and "x.safetensors: b" in e.value.what
        and "x.safetensors: c" not in e.value.what
    )


def test_no_code_of_a_folder_runs(tiny: Any, tmp_path: Path) -> None:
    """auto_map and Python files are left alone: the model is transformers' own class."""
    folder = plain(tiny, tmp_path / "model")
    mark = tmp_path / "ran"
    for name in ("modeling_llama.py", "configuration_llama.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(
            f"from pathlib import Path\nPath({str(mark)!r}).write_text('x')\nclass LlamaForCausalLM: ...\n"
        )
    table(
        "config.json",
        lambda c: c.update(
            auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}, trust_remote_code=True
        ),
    )(folder)
    model = load(folder)
    assert type(model).__module__.startswith("transformers.") and fingerprint(model) == fingerprint(weave(tiny()))
    table(
        "config.json",
        lambda c: c.update(architectures=["EvilModel"], auto_map={"AutoModel": "modeling_llama.EvilModel"}),
    )(folder)
    with pytest.raises(FormatError):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("at", [0, 9, -1])
@pytest.mark.parametrize("name", ["weft.safetensors", "config.json"])
def test_verify_finds_a_flipped_bit(name: str, at: int, tiny: Any, tmp_path: Path) -> None:
    """One bit of any file."""
    folder = woven(tiny, tmp_path / "model")
    assert verify(folder) == []
    content = bytearray((folder / name).read_bytes())
    content[at] ^= 1
    (folder / name).write_bytes(content)
    assert len(problems := verify(folder)) == 1 and problems[0].startswith(f"{name}: content differs from the manifest")


def test_verify_finds_missing_added_and_escaping_files(tiny: Any, tmp_path: Path) -> None:
    """Each difference from the manifest is named."""
    folder = woven(tiny, tmp_path / "model")
    (folder / "config.json").unlink()
    (folder / "new.py").write_text("x")
    (tmp_path / "secret").write_text("x")
    assert sorted(verify(folder)) == ["config.json: missing", "new.py: not in the manifest"]
    (folder / "new.py").unlink()
    (folder / "config.json").symlink_to(tmp_path / "secret")
    assert verify(folder) == ["config.json: leaves the folder"]
    table("weft.json", lambda m: m["files"].update({"../secret": {"size": 1, "blake2b": ""}}))(folder)
    refused(lambda: verify(folder), FormatError, tmp_path)


def test_verify_needs_a_manifest(tiny: Any, tmp_path: Path) -> None:
    """A folder without one is no weft folder; one without a list of files is not whole."""
    with pytest.raises(PathError) as e:
        verify(plain(tiny, tmp_path / "model"))
    told(e.value)
    (tmp_path / "model" / "weft.json").write_text("{}")
    refused(lambda: verify(tmp_path / "model"), FormatError, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"b": {"a": 1, "a": 1}}',
        "[NaN]",
        "[Infinity]",
        "[-Infinity]",
        "{",
        "",
        "\0",
        "[1,]",
        "\ufeff x",
    ],
)
def test_json_is_strict(text: str) -> None:
    """Duplicate keys at any depth, numbers that are none, and what is no JSON."""
    with pytest.raises(FormatError) as e:
        parse_json(text.encode(), "x.json")
    told(e.value)


def test_json_is_written_whole(tmp_path: Path) -> None:
    """What is written reads back; a value that is no JSON leaves the old file and no scrap."""
    path = tmp_path / "x.json"
    write_json(path, {"b": [1, 2.5, None, "ü"], "a": {}})
    assert read_json(path) == {"b": [1, 2.5, None, "ü"], "a": {}}
    for bad in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert read_json(path)["b"] == [1, 2.5, None, "ü"] and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_error_survives_a_process_boundary() -> None:
    """Pickling keeps the type and all fields; control characters are shown, not printed."""
    import pickle

    e = ConflictError("what", where="a\x1b[31mb", got=[1, 2], want="x" * 500, fix="fix")
    back = pickle.loads(pickle.dumps(e))
    assert type(back) is ConflictError and (back.what, back.where, back.got, back.want, back.fix) == (
        e.what,
        e.where,
        e.got,
        e.want,
        e.fix,
    )
    assert "\x1b" not in str(e) and all(len(line) < 250 for line in str(e).splitlines())


UNSAFE = [
    "../x", "..", "/etc/x", "C:\\x", "C:x", "\\\\host\\share\\x", "\\x", "a/C:\\x", "a/../../x", "a\\..\\x", "", "a//x", "./x", "a/",
    "x\0", "x\n", "a./x", "x ", "CON:",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_f02_names_that_must_not_become_paths(name: str, tiny: Any, tmp_path: Path) -> None:
    """Absolute, climbing, of other systems: refused on every system, in an index and in a manifest."""
    assert not safe_name(name) and safe_name("model-00001-of-00002.safetensors") and safe_name("1_Pooling/config.json")
    folder = plain(tiny, tmp_path / "model")
    index(**{"lm_head.weight": f"{name}.safetensors" if name[-1:] not in "/ ." else name})(folder)
    e = refused(lambda: load(folder), FormatError, tmp_path)
    assert "model.safetensors.index.json" in str(e) and "lm_head.weight" in str(e)
    kept = woven(tiny, tmp_path / "kept")
    table("weft.json", lambda m: m["files"].update({name: {"size": 0, "blake2b": ""}}))(kept)
    refused(lambda: verify(kept), FormatError, tmp_path)
    refused(lambda: load(kept), FormatError, tmp_path)


def test_f12_a_cut_file_says_where(tiny: Any, tmp_path: Path) -> None:
    """The file, what it should hold and holds, and the first tensor that is cut."""
    folder = plain(tiny, tmp_path / "model")
    cut("model.safetensors", -1000)(folder)
    e = refused(lambda: load(folder), FormatError, tmp_path)
    assert "model.safetensors: model" in str(e.where) and "ends at byte" in str(e.got)


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_f13_a_flipped_bit_is_named(bit: int, tiny: Any, tmp_path: Path) -> None:
    """With a manifest, loading names the tensor, and so does verifying; nothing else is blamed."""
    model = weave(tiny())
    save(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    name, at = "model.layers.1.mlp.up_proj.weight", header(path).tensors["model.layers.1.mlp.up_proj.weight"].start
    content = bytearray(path.read_bytes())
    content[header(path).offset + at + 5] ^= 1 << bit
    path.write_bytes(content)
    e = refused(lambda: load(tmp_path / "model"), ChangedError, tmp_path)
    assert e.where == name
    assert verify(tmp_path / "model") == [f"model.safetensors: content differs from the manifest, in {name}"]


def test_f14_all_problems_of_a_folder_come_together(tiny: Any, tmp_path: Path) -> None:
    """Of the index, of each shard and of the configuration, before anything is mapped."""
    folder = plain(tiny, tmp_path / "model")
    names = dict.fromkeys(header(folder / "model.safetensors").tensors, "part.safetensors")
    index(**names, **{"ghost.a": "absent-1.safetensors", "ghost.b": "absent-2.safetensors"})(folder)
    cut("part.safetensors", -1)(folder)
    table("config.json", lambda c: c.update(hidden_size=-4))(folder)
    text = str(refused(lambda: load(folder), WeftError, tmp_path))
    assert all(w in text for w in ("absent-1", "absent-2", "part.safetensors", "hidden_size", "4 problems"))


def test_f15_the_three_sets_are_told(tiny: Any, tmp_path: Path) -> None:
    """What only the index names, what only the shards hold, what lies elsewhere."""
    folder = plain(tiny, tmp_path / "model")
    names = dict.fromkeys(header(folder / "model.safetensors").tensors, "part.safetensors")
    del names["lm_head.weight"]
    index(**names, ghost="part.safetensors")(folder)
    text = str(refused(lambda: load(folder), FormatError, tmp_path))
    assert "in the index only: ghost" in text and "in the shards only: lm_head.weight" in text


def test_f16_two_checkpoints_are_listed_with_their_times(tiny: Any, tmp_path: Path) -> None:
    """The files and when each was written."""
    folder = plain(tiny, tmp_path / "model")
    two(folder)
    os.utime(folder / "model.safetensors", (0, 0))
    text = str(refused(lambda: load(folder), FormatError, tmp_path))
    assert "model.safetensors of 1970-01-01" in text and "model.safetensors.index.json of 2" in text


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_f17_weights_that_are_not_finite_are_counted(name: str, tiny: Any, tmp_path: Path) -> None:
    """Which, how many, and where the first is; in plain folders and weft folders, and never written."""
    folder = plain(tiny, tmp_path / "model")
    tensors(lambda t: t[name].view(-1)[1:4:2].fill_(float("nan")))(folder)
    e = refused(lambda: load(folder), NumericError, tmp_path)
    assert e.where == name and str(e.got).startswith("2 of ") and str(e.got).endswith("1]")
    model = weave(tiny())
    with torch.no_grad():
        dict(model.named_parameters())[name if "norm" in name else name.replace("weight", "expr.w")].view(-1)[0] = (
            torch.inf
        )
    refused(lambda: save(model, tmp_path / "out"), NumericError, tmp_path)
    assert not (tmp_path / "out").exists()


def test_f17_scales_inside_packed_rows_are_finite(tiny: Any, tmp_path: Path) -> None:
    """NaN hides in bytes, too."""
    folder = woven(tiny, tmp_path / "model")
    tensors(lambda t: t["lm_head.weight:data"][:, -2:].fill_(0xFF), "weft")(folder)
    assert "lm_head.weight, scales" in str(refused(lambda: load(folder), NumericError, tmp_path))


def test_f18_the_nearest_name_is_told(tiny: Any, tmp_path: Path) -> None:
    """A misspelt tensor and the place that lacks it point at each other."""
    folder = plain(tiny, tmp_path / "model")
    rename("model.norm.weight", "model.nrom.weight")(folder)
    text = str(refused(lambda: load(folder), FormatError, tmp_path))
    assert "nearest: model.norm.weight" in text and "nearest: model.nrom.weight" in text


def test_f21_tied_weights_stored_twice_alike_are_fine(tiny: Any, tmp_path: Path) -> None:
    """Two copies of one value are one value."""
    tiny("llama-tied").save_pretrained(tmp_path / "model")
    want = fingerprint(load(tmp_path / "model"))
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path / "model")
    assert fingerprint(load(tmp_path / "model")) == want


def test_f22_a_bomb_takes_no_time(tiny: Any, tmp_path: Path) -> None:
    """Neither the configuration nor the model that it asks for is built."""
    folder = plain(tiny, tmp_path / "model")
    for change in ({"num_hidden_layers": 9_000}, {"max_position_embeddings": 1 << 45}, {"layer_types": ["x"] * 10**5}):
        before = (folder / "config.json").read_bytes()
        table("config.json", lambda c, change=change: c.update(change))(folder)
        begun = time.process_time()
        refused(lambda: load(folder), FormatError, tmp_path)
        assert time.process_time() - begun < 5
        (folder / "config.json").write_bytes(before)
    tiny("bert").save_pretrained(tmp_path / "bert")
    table("config.json", lambda c: c.update(max_position_embeddings=1 << 36))(tmp_path / "bert")
    refused(lambda: load(tmp_path / "bert"), FormatError, tmp_path)


@pytest.mark.parametrize("name", ["bomb.npz", "bomb.pt", "bomb.zip", "pytorch_model.bin"])
def test_f06_a_bomb_is_not_opened(name: str, tiny: Any, tmp_path: Path) -> None:
    """A small archive of a large nothing, as data or in place of a checkpoint: refused by its name, unread."""
    folder = plain(tiny, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as f:
        f.writestr("data", bytes(50 << 20))
    begun = time.process_time()
    refused(lambda: load(folder), PathError, tmp_path)
    refused(lambda: read(folder / name), PathError, tmp_path)
    assert time.process_time() - begun < 1.5
