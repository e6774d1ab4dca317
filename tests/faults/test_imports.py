"""`weft import`: pickles that a stranger made, and checkpoints with something to mend."""

from __future__ import annotations

import json
import os
import pickle
import resource
import socket
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from weft.error import ConflictError, FormatError, NumericError, OptionError, PathError, WeftError
from weft.store import import_, load, unpickle, verify

from .edits import plain, refused, table, tensors

BIN = "pytorch_model.bin"


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.mark), "w")


def pickled(tiny: Any, folder: Path, save: Callable[[Mapping[str, torch.Tensor], Path], Any] = torch.save) -> Path:
    """A folder whose weights are in a pickle only."""
    plain(tiny, folder)
    save(load_file(folder / "model.safetensors"), folder / BIN)
    (folder / "model.safetensors").unlink()
    return folder


def same(folder: Path, out: Path, tiny: Any) -> None:
    """The imported folder is whole and holds the model."""
    assert verify(out) == []
    model, tokens = load(out), torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, tiny().eval()(tokens).logits)


@pytest.mark.parametrize("zipped", [True, False])
def test_f05_a_pickle_is_imported_apart(zipped: bool, tiny: Any, tmp_path: Path) -> None:
    """Both of torch's formats; nothing is left beside the result."""
    folder = pickled(tiny, tmp_path / "model", lambda t, p: torch.save(t, p, _use_new_zipfile_serialization=zipped))
    assert "weft import" in str(refused(lambda: load(folder), PathError, tmp_path))
    assert import_(folder, tmp_path / "out") == []
    same(folder, tmp_path / "out", tiny)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_pickled_shards_and_training_states(tiny: Any, tmp_path: Path, forked: None) -> None:
    """Shards with their index; and a state dict inside a table."""
    folder = pickled(tiny, tmp_path / "model")
    held = torch.load(folder / BIN, weights_only=True)
    (folder / BIN).unlink()
    files = {n: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, n in enumerate(held)}
    for file in set(files.values()):
        torch.save({"epoch": 3, "state_dict": {n: held[n] for n in held if files[n] == file}}, folder / file)
    (folder / f"{BIN}.index.json").write_text(json.dumps({"weight_map": files}))
    assert import_(folder, tmp_path / "out") == []
    same(folder, tmp_path / "out", tiny)


def bomb(path: Path) -> None:
    """A small archive of a large tensor."""
    torch.save({"a": torch.zeros(1 << 22)}, path)
    with zipfile.ZipFile(path) as z:
        members = {m.filename: z.read(m) for m in z.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, raw in members.items():
            z.writestr(name, raw)


PICKLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "F05 a pickle that runs code": (lambda p: p.write_bytes(pickle.dumps({"a": Evil(p.parent / "ran")})), "tensors by"),
    "F05 code in torch's archive": (lambda p: torch.save({"a": Evil(p.parent / "ran")}, p), "open"),
    "F05 code in torch's old format": (
        lambda p: torch.save({"a": Evil(p.parent / "ran")}, p, _use_new_zipfile_serialization=False),
        "open",
    ),
    "F05 a whole module": (lambda p: torch.save(torch.nn.Linear(2, 2), p), "Linear"),
    "F05 a list": (lambda p: torch.save([torch.ones(2)], p), "list"),
    "F05 an optimizer's state": (lambda p: torch.save({"state": {}, "param_groups": [1]}, p), "dict"),
    "F05 nothing": (lambda p: torch.save({}, p), "state dict"),
    "F05 words": (lambda p: p.write_bytes(b"hello"), "tensors by name"),
    "F05 an empty file": (lambda p: p.write_bytes(b""), "tensors by name"),
    "F05 a name with a line break": (lambda p: torch.save({"a\nb": torch.ones(2)}, p), "not plain"),
    "F06 a bomb": (bomb, "compressed"),
    "F06 a tensor larger than its file": (
        lambda p: torch.save({"a": torch.zeros(1).expand(1 << 28)}, p),
        "1,073,741,824",
    ),
    "F12 an archive cut off": (
        lambda p: (torch.save({"a": torch.ones(9999)}, p), p.write_bytes(p.read_bytes()[:-500])),
        "archive",
    ),
}


@pytest.mark.parametrize("fault", PICKLES)
def test_pickles_that_are_refused(fault: str, tiny: Any, tmp_path: Path, forked: None) -> None:
    """Said in one error; nothing ran, nothing is written, nothing is left."""
    edit, said = PICKLES[fault]
    folder = plain(tiny, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    edit(folder / BIN)
    assert said in str(refused(lambda: import_(folder, tmp_path / "out"), FormatError, tmp_path))
    assert not (folder / "ran").exists()


INDEXES: dict[str, dict[str, Any]] = {
    "F01 a file outside": {"weight_map": {"a": "../model.bin"}},
    "F02 an absolute file": {"weight_map": {"a": "/etc/passwd.bin"}},
    "F03 no pickle": {"weight_map": {"a": "model.pt"}},
    "F14 no map": {},
    "F14 a map of numbers": {"weight_map": {"a": 3}},
}


@pytest.mark.parametrize("fault", INDEXES)
def test_indexes_of_pickles(fault: str, tiny: Any, tmp_path: Path) -> None:
    """They may name pickled files of their folder, nothing else."""
    folder = pickled(tiny, tmp_path / "model")
    (folder / f"{BIN}.index.json").write_text(json.dumps(INDEXES[fault]))
    refused(lambda: import_(folder, tmp_path / "out"), FormatError, tmp_path)


def test_f15_a_tensor_in_two_pickles(tiny: Any, tmp_path: Path, forked: None) -> None:
    """Refused, both files named."""
    folder = pickled(tiny, tmp_path / "model")
    os.link(folder / BIN, folder / "pytorch_model-2.bin")
    (folder / f"{BIN}.index.json").write_text(json.dumps({"weight_map": {"a": BIN, "b": "pytorch_model-2.bin"}}))
    e = refused(lambda: import_(folder, tmp_path / "out"), FormatError, tmp_path)
    assert BIN in str(e) and "pytorch_model-2.bin" in str(e)


def _limited(said: Path) -> None:
    before = len(socket.if_nameindex())
    unpickle.limit(1000)
    limits = [resource.getrlimit(x)[0] for x in (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)]
    seen = [*limits, before, len(socket.if_nameindex())]
    try:
        bytearray(1 << 33)
    except MemoryError:
        said.write_text(json.dumps([*seen, "full"]))


def test_the_process_is_limited(tmp_path: Path, fresh: ForkServerContext) -> None:
    """Memory, processor time, written bytes; and where the system can, no network."""
    process = fresh.Process(target=_limited, args=(tmp_path / "said",))
    process.start()
    process.join(60)
    cpu, written, core, before, after, last = json.loads((tmp_path / "said").read_text())
    assert (cpu, written, core) == (60, 2000 + (64 << 20), 0) and after <= before and last == "full"


def test_secrets_stay_outside(tiny: Any, tmp_path: Path, forked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets no token."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    seen: list[dict[str, str]] = []
    run = subprocess.run

    def spy(*args: Any, **how: Any) -> Any:
        seen.append(how["env"])
        return run(*args, **how)

    monkeypatch.setattr(subprocess, "run", spy)
    import_(pickled(tiny, tmp_path / "model"), tmp_path / "out")
    assert seen and all("HF_TOKEN" not in env for env in seen)


def damage(t: dict[str, torch.Tensor]) -> None:
    """One tensor too many, two missing, one not finite."""
    t["extra.weight"] = torch.ones(3)
    del t["model.norm.weight"], t["model.layers.1.mlp.up_proj.weight"]
    t["lm_head.weight"][1, 2:4] = float("nan")


ALL: dict[str, Any] = {
    "drop": ["extra.*"],
    "init": ["model.norm.weight", "*.up_proj.weight"],
    "zero": ["lm_head.weight"],
}


def test_f18_mending_what_is_named(tiny: Any, tmp_path: Path) -> None:
    """Each mend is listed in the result and in the manifest; what is not named is still refused."""
    folder, out = plain(tiny, tmp_path / "model"), tmp_path / "out"
    tensors(damage)(folder)
    for left, kind in (("drop", FormatError), ("init", FormatError), ("zero", NumericError)):
        some = {k: v for k, v in ALL.items() if k != left}
        assert f"--{left}" in str(refused(lambda some=some: import_(folder, out, **some), kind, tmp_path))
    done = import_(folder, out, **ALL)
    assert dict(done) == {
        "extra.weight": "dropped",
        "model.norm.weight": "fresh values",
        "model.layers.1.mlp.up_proj.weight": "fresh values",
        "lm_head.weight": "2 values set to zero",
    }
    assert json.loads((out / "weft.json").read_text())["imported"] == {
        "from": "model",
        "mended": [list(pair) for pair in done],
    }
    old, new = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(new["model.norm.weight"].float(), torch.ones(len(new["model.norm.weight"])))
    fresh = new["model.layers.1.mlp.up_proj.weight"]
    assert 0.5 < fresh.std() / load(out).config.initializer_range < 1.5
    assert torch.equal(new["lm_head.weight"], old["lm_head.weight"].nan_to_num(0.0))
    assert all(torch.equal(new[n].float(), old[n].float()) for n in set(old) & set(new) - {"lm_head.weight"})


def test_fresh_values_come_from_the_seed(tiny: Any, tmp_path: Path) -> None:
    """The same again, others from another seed, and torch's own generator is left alone."""
    folder = plain(tiny, tmp_path / "model")
    tensors(damage)(folder)
    state = torch.get_rng_state()
    made = []
    for i, seed in enumerate((0, 0, 1)):
        import_(folder, tmp_path / f"out{i}", **ALL, seed=seed)
        made.append(load_file(tmp_path / f"out{i}" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_f21_tied_weights_that_differ(tiny: Any, tmp_path: Path) -> None:
    """The first is kept, or both: the configuration says which."""
    folder = plain(tiny, tmp_path / "model")
    table("config.json", lambda c: c.update(tie_word_embeddings=True))(folder)
    assert "--tie" in str(refused(lambda: import_(folder, tmp_path / "out"), FormatError, tmp_path))
    old = load_file(folder / "model.safetensors")
    for tie in (True, False):
        out = tmp_path / f"tie-{tie}"
        assert [n for n, _ in import_(folder, out, tie=tie)] == ["lm_head.weight"]
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tie
        assert set(load_file(out / "model.safetensors")) == set(old) - ({"lm_head.weight"} if tie else set())
        assert (load(out).get_output_embeddings() is not None) and verify(out) == []


OPTIONS: dict[str, tuple[dict[str, Any], type[WeftError]]] = {
    "nothing to drop": ({"drop": ["lm_head.*"]}, OptionError),
    "nothing to make": ({"init": ["lm_head.*"]}, OptionError),
    "nothing to zero": ({"zero": ["*"]}, OptionError),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_glob_with_nothing_to_mend(case: str, tiny: Any, tmp_path: Path) -> None:
    """A slip, and said."""
    options, kind = OPTIONS[case]
    folder = plain(tiny, tmp_path / "model")
    refused(lambda: import_(folder, tmp_path / "out", **options), kind, tmp_path)


def test_a_model_without_tied_weights(tiny: Any, tmp_path: Path) -> None:
    """Cannot be tied."""
    folder = tmp_path / "model"
    tiny("bert").save_pretrained(folder)
    refused(lambda: import_(folder, tmp_path / "out", tie=True), OptionError, tmp_path)


def test_f35_a_place_that_is_taken(tiny: Any, tmp_path: Path) -> None:
    """Refused before a pickle is opened."""
    folder = pickled(tiny, tmp_path / "model", lambda t, p: p.write_bytes(pickle.dumps(1)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(lambda: import_(folder, tmp_path / "out"), ConflictError, tmp_path)
