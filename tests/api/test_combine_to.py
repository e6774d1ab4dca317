"""Merged folders written weight by weight: the bytes of a saved merge, whatever stops it, in whatever order; little memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import weft
from weft.engine import get
from weft.error import NumericError
from weft.expr import Dense
from weft.model import Sources, expressions, plain_tensors, set_expressions
from weft.store import part, save, swap

MODELS = Callable[..., Path]
MERGES = ["soup", "task_arithmetic", "ties", "dare", "model_stock", "tsv", "compeft"]


@pytest.fixture
def family(folder: MODELS, tmp_path: Path) -> list[Path]:
    """A base and two folders of models that differ from it everywhere."""
    made = [folder()]
    for i in range(2):
        model, g = weft.load(made[0]), torch.Generator().manual_seed(i)
        changed = {
            n: Dense((e.dense() + 0.05 * torch.randn(e.shape, generator=g)).bfloat16())
            for n, e in expressions(model).items()
        }
        set_expressions(model, changed)
        for t in plain_tensors(model).values():
            if t.is_floating_point():
                t.data = t.data + 0.1 * (i + 1)
        weft.save(model, tmp_path / f"member{i}")
        made.append(tmp_path / f"member{i}")
    return made


def models(paths: list[Path]) -> list[nn.Module]:
    return [weft.load(p) for p in paths]


def sums(out: Path) -> dict[str, Any]:
    """What the manifest says of files of tensors."""
    return {n: d for n, d in swap.read_manifest(out)["files"].items() if n.endswith(".safetensors")}


def left(folder: Path) -> list[str]:
    """Hidden files and folders."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(".weft-"))


@pytest.mark.parametrize("name", MERGES)
def test_it_writes_what_saving_the_merge_writes(name: str, family: list[Path], tmp_path: Path) -> None:
    """The same bytes, plain or with terms, in either order of the members; and nothing is left beside it."""
    base, *two = models(family)
    made = weft.combined(two, name, base=base)
    weft.save(made.model, tmp_path / "saved")
    told = weft.combine_to(tmp_path / "streamed", two, name, base=base)
    weft.combine_to(tmp_path / "turned", two[::-1], name, base=base)
    assert sums(tmp_path / "saved") == sums(tmp_path / "streamed") == sums(tmp_path / "turned")
    assert not swap.verify(tmp_path / "streamed") and not left(tmp_path)
    key = lambda c: c.name  # noqa: E731
    assert sorted(told.changes, key=key) == sorted(made.changes, key=key)
    assert (name == "compeft") == bool(json.loads((tmp_path / "streamed" / "weft.json").read_text())["kind"] == "weft")


def test_members_of_other_forms_are_merged_as_they_are(family: list[Path], tmp_path: Path) -> None:
    """Quantized and dense ones beside each other; adapters on one base stay an adapter."""
    base, one, two = models(family)
    weft.apply(one, "rtn", bits=8)
    weft.save(weft.combine([one, two], "soup"), tmp_path / "saved")
    weft.combine_to(tmp_path / "streamed", [one, two], "soup")
    assert sums(tmp_path / "saved") == sums(tmp_path / "streamed")
    tuned = [weft.fork(base), weft.fork(base)]
    for i, model in enumerate(tuned):
        weft.apply(model, "lora", rank=2, seed=i)
    weft.combine_to(tmp_path / "adapters", tuned, "soup")
    assert "adapter:merged" in (tmp_path / "adapters" / "weft.json").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="what lies where is told by /proc")
def test_plain_results_of_other_forms_lie_on_disk(family: list[Path], tmp_path: Path) -> None:
    """Whose they are is known only once they are made; memory does not hold them all until they are written."""
    base, one, two = models(family)
    weft.apply(one, "rtn", bits=8)
    merge, seen = weft.merging.planned([one, two], "ties", base=base), list[bool]()

    def looked(model: nn.Module, out: Path, **how: Any) -> None:
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        spans = [[int(n, 16) for n in m[0].split("-")] for m in maps if m[-1] == "(deleted)" and str(tmp_path) in m[-2]]
        where = [e.w.data_ptr() for e in expressions(model).values() if isinstance(e, Dense)]
        seen.extend(any(a <= at < b for a, b in spans) for at in where)
        save(model, out, **how)

    with mock.patch("weft.merging.save", looked):
        merge.write(tmp_path / "new" / "out")
    assert len(seen) == len(expressions(base)) and all(seen)
    assert not left(tmp_path) and [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_an_interrupted_run_makes_only_what_was_not_made(stop: int, family: list[Path], tmp_path: Path) -> None:
    """The same bytes at the end, and each weight is merged once; a run with other weights makes all of them."""
    base, *two = models(family)
    weft.combine_to(tmp_path / "want", two, "ties", base=base)
    count, real = len(expressions(base)), Sources.by_slices
    made: list[str] = []

    def counted(s: Sources, make: Any, **given: Any) -> Dense:
        if s.name in expressions(base):
            if len(made) == stop:
                raise KeyboardInterrupt
            made.append(s.name)
        return real(s, make, **given)

    with mock.patch.object(Sources, "by_slices", counted), pytest.raises(KeyboardInterrupt):
        weft.combine_to(tmp_path / "out", two, "ties", base=base)
    assert not (tmp_path / "out").exists() and len(made) == stop and left(tmp_path)
    first, made, stop = made, [], -1
    with mock.patch.object(Sources, "by_slices", counted):
        weft.combine_to(tmp_path / "out", two, "ties", base=base)
    assert not set(first) & set(made) and len(first) + len(made) == count
    assert sums(tmp_path / "out") == sums(tmp_path / "want") and not left(tmp_path)


@pytest.mark.parametrize("change", ["weights", "damage", "torn notes", "other layout", "link"])
def test_what_was_left_of_something_else_is_not_taken(change: str, family: list[Path], tmp_path: Path) -> None:
    """Another merge, damaged bytes, torn notes, a file of other tensors, a link out of the folder: the result is what it should be."""
    base, *two = models(family)
    how: dict[str, Any] = {"weights": [3.0, 1.0]} if change == "weights" else {}
    weft.combine_to(tmp_path / "want", two, "ties", base=base, **how)
    real = part.Part.over
    with (
        mock.patch.object(part.Part, "over", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)),
        pytest.raises(KeyboardInterrupt),
    ):
        weft.combine_to(tmp_path / "out", two, "ties", base=base)
    assert part.Part.over is real
    (name,) = left(tmp_path)
    file = tmp_path / name / "model.safetensors"
    notes = file.with_name("model.safetensors.made")
    assert len(notes.read_text().splitlines()) == len(expressions(base))
    if change == "damage":
        raw = bytearray(file.read_bytes())
        raw[-7] ^= 64
        file.write_bytes(raw)
    elif change == "torn notes":
        notes.write_text(notes.read_text()[:-30])
    elif change == "other layout":
        file.write_bytes(b"\0" * 8 + file.read_bytes())
        (tmp_path / name / "model-00001-of-00002.safetensors").write_bytes(b"left")
    elif change == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    weft.combine_to(tmp_path / "out", two, "ties", base=base, **how)
    assert sums(tmp_path / "out") == sums(tmp_path / "want") and not swap.verify(tmp_path / "out")
    assert not left(tmp_path)


def test_another_write_to_the_place_removes_what_was_left(family: list[Path], tmp_path: Path) -> None:
    """And an error, unlike a kill, leaves nothing."""
    base, *two = models(family)
    with (
        mock.patch.object(part.Part, "over", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)),
        pytest.raises(KeyboardInterrupt),
    ):
        weft.combine_to(tmp_path / "out", two, "soup")
    assert left(tmp_path)
    weft.save(base, tmp_path / "out")
    assert not left(tmp_path)
    site = next(iter(expressions(two[0])))
    broken = expressions(two[0])[site].dense().clone()
    broken[0, 0] = float("nan")
    set_expressions(two[0], {site: Dense(broken)})
    with pytest.raises(NumericError, match=site.replace(".", r"\.")):
        weft.combine_to(tmp_path / "other", two, "soup")
    assert not left(tmp_path) and not (tmp_path / "other").exists()


KILLED = """
import os, signal, sys
import weft
from weft.model import Sources
real, seen = Sources.by_slices, []
def by_slices(s, make, **given):
    seen.append(s.name)
    if len(seen) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(s, make, **given)
Sources.by_slices = by_slices
base, *two = [weft.load(p) for p in sys.argv[3:]]
weft.combine_to(sys.argv[2], two, "dare", base=base)
"""


def test_a_killed_process_is_gone_on_with_by_another(family: list[Path], tmp_path: Path) -> None:
    """Under another hash seed and with other threads, to the same bytes."""
    base, *two = models(family)
    weft.combine_to(tmp_path / "want", two, "dare", base=base)
    vectors = sum(isinstance(t, nn.Parameter) for t in plain_tensors(base).values())
    for turn, kill in enumerate((vectors + 4, 0)):
        env = {**os.environ, "PYTHONHASHSEED": str(turn), "OMP_NUM_THREADS": str(1 + turn)}
        argv = [sys.executable, "-c", KILLED, str(kill), str(tmp_path / "out"), *map(str, family)]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == (0 if turn else -signal.SIGKILL), done.stderr[-800:]
        assert bool(left(tmp_path)) == (not turn)
    assert sums(tmp_path / "out") == sums(tmp_path / "want")


@pytest.mark.parametrize("name", ["soup", "task_arithmetic", "ties", "dare", "model_stock", "slerp"])
def test_memory_is_of_slices(name: str) -> None:
    """A merge of one weight holds the result, and no second matrix of its size: all else is in slices of rows."""
    m, n, small = 1200, 1000, 100 * 1000
    s = Sources(
        name="w",
        members=tuple(Dense(torch.randn(m, n, generator=torch.Generator().manual_seed(i)).bfloat16()) for i in (1, 2)),
        weights=(1.0, 2.0),
        dtype=torch.bfloat16,
        base=Dense(torch.zeros(m, n, dtype=torch.bfloat16)),
    )
    large: set[tuple[int, str]] = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes() > 8 * small:
                large.add((made.untyped_storage().data_ptr(), f"{func.__name__} {made.dtype} {list(made.shape)}"))
            return made

    given = {e.w.untyped_storage().data_ptr() for e in (*s.members, s.base) if isinstance(e, Dense)}
    with mock.patch("weft.model.sources.SLICE", small), Watch():
        get(name)(s)
    assert len({at for at, _ in large} - given) <= 1, [said for at, said in large if at not in given]
