"""What a stranger's folder may hold: each fault is a WeftError that says everything, and no code runs."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weft.engine.run import Step, apply
from weft.error import ConflictError, FormatError, PathError, ShapeError, WeftError
from weft.model import fingerprint, weave
from weft.store import load, save, verify
from weft.store.files import header, parse_json, read_json, read_tensors, write_json, write_tensors

Edit = Callable[[Path], Any]


def told(e: WeftError) -> WeftError:
    """All five fields are there, and the text shows each."""
    assert all(isinstance(x, str) and x for x in (e.what, e.fix)) and str(e.where) and str(e.want) and e.got != ""
    assert all(f"  {k}" in str(e) for k in ("where", "got", "want", "fix"))
    return e


def plain(tiny: Any, folder: Path) -> Path:
    """An ordinary checkpoint."""
    tiny().save_pretrained(folder)
    return folder


def woven(tiny: Any, folder: Path) -> Path:
    """A weft folder."""
    model = weave(tiny())
    apply(model, [Step.of("rtn")])
    save(model, folder)
    return folder


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], stem: str = "model") -> Edit:
    """Edit a checkpoint's tensors."""

    def edit(folder: Path) -> None:
        held = {k: t.clone() for k, t in load_file(folder / f"{stem}.safetensors").items()}
        change(held)
        save_file(held, folder / f"{stem}.safetensors", {"format": "pt"})

    return edit


def table(name: str, change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Edit a JSON file."""

    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def raw(name: str, content: bytes) -> Edit:
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, size: int) -> Edit:
    """Shorten a file; a negative size leaves out that much of the end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def safetensors(entries: str, data: bytes = b"\0" * 16) -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(entries)) + entries.encode() + data


def two(folder: Path) -> None:
    """An index beside a single file."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))


def index(**weight_map: str) -> Edit:
    """An index instead of a single file."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> str:
    """One tensor's description."""
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


PLAIN: dict[str, tuple[Edit, type[WeftError]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), PathError),
    "no checkpoint": (lambda f: (f / "model.safetensors").unlink(), PathError),
    "a pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), PathError),
    "two checkpoints": (two, FormatError),
    "truncated data": (cut("model.safetensors", -1), FormatError),
    "truncated header": (cut("model.safetensors", 20), FormatError),
    "empty file": (cut("model.safetensors", 0), FormatError),
    "trailing bytes": (lambda f: (f / "model.safetensors").open("ab").write(b"x"), FormatError),
    "config cut": (cut("config.json", 40), FormatError),
    "config is a list": (raw("config.json", b"[]"), FormatError),
    "config twice": (
        raw("config.json", b'{"architectures": ["LlamaForCausalLM"], "architectures": ["BertModel"]}'),
        FormatError,
    ),
    "config with NaN": (raw("config.json", b'{"architectures": ["LlamaForCausalLM"], "x": NaN}'), FormatError),
    "config of no width": (table("config.json", lambda c: c.update(hidden_size="wide")), FormatError),
    "unknown architecture": (table("config.json", lambda c: c.update(architectures=["EvilForCausalLM"])), FormatError),
    "no architecture": (table("config.json", lambda c: c.pop("architectures")), FormatError),
    "architecture is a number": (table("config.json", lambda c: c.update(architectures=[7])), FormatError),
    "architectures is a word": (
        table("config.json", lambda c: c.update(architectures="LlamaForCausalLM")),
        FormatError,
    ),
    "a base class": (table("config.json", lambda c: c.update(architectures=["PreTrainedModel"])), FormatError),
    "no model class": (table("config.json", lambda c: c.update(architectures=["AutoTokenizer"])), FormatError),
    "a dotted class": (
        table("config.json", lambda c: c.update(architectures=["models.llama.LlamaModel"])),
        FormatError,
    ),
    "missing tensor": (tensors(lambda t: t.pop("model.norm.weight")), FormatError),
    "missing matrix": (tensors(lambda t: t.pop("lm_head.weight")), FormatError),
    "unexpected tensor": (tensors(lambda t: t.update(extra=torch.ones(2))), FormatError),
    "ill-shaped tensor": (tensors(lambda t: t.update({"model.norm.weight": torch.ones(3)})), FormatError),
    "ill-shaped matrix": (tensors(lambda t: t.update({"lm_head.weight": torch.ones(96, 31)})), FormatError),
    "index is a list": (lambda f: (index()(f), raw("model.safetensors.index.json", b"[]")(f)), FormatError),
    "index leaves the folder": (index(a="../model.safetensors"), FormatError),
    "index goes to the root": (index(a="/etc/model.safetensors"), FormatError),
    "index names a pickle": (index(a="pytorch_model.bin"), FormatError),
    "index names no shard": (index(a="absent.safetensors"), PathError),
    "index and shard differ": (index(a="part.safetensors"), FormatError),
    "generation config cut": (cut("generation_config.json", 9), FormatError),
    "manifest is a list": (raw("weft.json", b"[]"), FormatError),
}

WOVEN: dict[str, tuple[Edit, type[WeftError]]] = {
    "a newer format": (table("weft.json", lambda m: m.update(format=2)), FormatError),
    "no format": (table("weft.json", lambda m: m.pop("format")), FormatError),
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
    with pytest.raises(WeftError) as e:
        load(folder)
    assert isinstance(told(e.value), kind)


@pytest.mark.parametrize("fault", WOVEN)
def test_a_faulty_weft_folder_is_refused(fault: str, tiny: Any, tmp_path: Path) -> None:
    """The right error, with what, where, got, want and fix."""
    folder = woven(tiny, tmp_path / "model")
    edit, kind = WOVEN[fault]
    edit(folder)
    with pytest.raises(WeftError) as e:
        load(folder)
    assert isinstance(told(e.value), kind)


HEADERS: dict[str, bytes] = {
    "duplicate name": safetensors(f'{{"a": {entry()}, "a": {entry()}}}'),
    "duplicate field": safetensors('{"a": {"dtype": "F32", "dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}'),
    "overlap": safetensors(f'{{"a": {entry()}, "b": {entry(shape=[1], offsets=[8, 12])}}}'),
    "the same bytes twice": safetensors(f'{{"a": {entry()}, "b": {entry()}}}'),
    "hole": safetensors(f'{{"a": {entry(shape=[1], offsets=[0, 4])}, "b": {entry(shape=[2], offsets=[8, 16])}}}'),
    "bytes left over": safetensors(f'{{"a": {entry(shape=[1], offsets=[0, 4])}}}'),
    "past the end": safetensors(f'{{"a": {entry(shape=[8], offsets=[0, 32])}}}'),
    "before the start": safetensors(f'{{"a": {entry(offsets=[-16, 0])}}}'),
    "backwards": safetensors(f'{{"a": {entry(offsets=[16, 0])}}}'),
    "size and shape differ": safetensors(f'{{"a": {entry(shape=[3])}}}'),
    "huge shape": safetensors(f'{{"a": {entry(shape=[2**40, 2**40])}}}'),
    "negative shape": safetensors(f'{{"a": {entry(shape=[-2, -2])}}}'),
    "shape of booleans": safetensors(f'{{"a": {entry(shape=[4, True])}}}'),
    "offsets are floats": safetensors(f'{{"a": {entry(offsets=[0.0, 16.0])}}}'),
    "three offsets": safetensors(f'{{"a": {entry(offsets=[0, 8, 16])}}}'),
    "unknown dtype": safetensors(f'{{"a": {entry(dtype="F31")}}}'),
    "dtype is a list": safetensors(f'{{"a": {entry(dtype=["F32"])}}}'),
    "extra field": safetensors('{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], "code": 1}}'),
    "entry is a number": safetensors('{"a": 7}'),
    "header is a list": safetensors("[]", b""),
    "header is not JSON": safetensors("{nonsense", b""),
    "header is not text": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "header of no length": struct.pack("<Q", 0),
    "seven bytes": b"\0" * 7,
    "deep nesting": safetensors("[" * 200_000, b""),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_faulty_header_is_refused_before_mapping(fault: str, tmp_path: Path) -> None:
    """The audit alone refuses it, and so does reading."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[fault])
    for read in (header, read_tensors):
        with pytest.raises(FormatError) as e:
            read(path)
        told(e.value)


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
    assert verify(folder) == [f"{name}: content differs from the manifest"]


def test_verify_finds_missing_added_and_escaping_files(tiny: Any, tmp_path: Path) -> None:
    """Each difference from the manifest is named."""
    folder = woven(tiny, tmp_path / "model")
    (folder / "config.json").unlink()
    (folder / "new.py").write_text("x")
    (tmp_path / "secret").write_text("x")
    table("weft.json", lambda m: m["files"].update({"../secret": {"size": 1, "blake2b": ""}}))(folder)
    assert sorted(verify(folder)) == [
        "../secret: leaves the folder",
        "config.json: missing",
        "new.py: not in the manifest",
    ]


def test_verify_needs_a_manifest(tiny: Any, tmp_path: Path) -> None:
    """A folder without one is no weft folder; one without a list of files is not whole."""
    with pytest.raises(PathError) as e:
        verify(plain(tiny, tmp_path / "model"))
    told(e.value)
    (tmp_path / "model" / "weft.json").write_text("{}")
    assert verify(tmp_path / "model")


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
