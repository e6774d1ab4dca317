"""Whatever happens during a save, the folder is the old one or the new one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import weft.store.files as files
import weft.store.swap as swap
import weft.store.tensors as written
from weft.engine.run import Step, apply
from weft.error import ChangedError, ConflictError, PathError, ResourceError
from weft.model import fingerprint, weave
from weft.store import load, may_write, save, verify
from weft.store.cache import Cache, clean, contents
from weft.store.files import MARK
from weft.store.lock import claimed
from weft.store.swap import amend

from .edits import refused, tree

saving = sys.modules["weft.store.save"]  # the package's attribute of that name is the function
STEPS = [
    (saving, "travel"),
    (saving, "card"),
    (saving, "write_shards"),
    (files, "sync"),
    (swap, "stream"),
    (written, "check_finite"),
    (written, "_words"),
    (swap, "digest"),
    (swap, "sync"),
    (swap, "write_json"),
    (swap, "exchange"),
]


class Stop(BaseException):
    """Not an Exception: nothing may catch it and go on."""


@pytest.fixture
def models(tiny: Any) -> tuple[nn.Module, nn.Module]:
    """An old and a new model that differ."""
    old, new = weave(tiny(seed=0)), weave(tiny(seed=1))
    apply(new, [Step.of("rtn")])
    return old, new


def wholes(models: tuple[nn.Module, nn.Module], folder: Path, *shards: int) -> list[str]:
    """What the folder of each model is, byte for byte: whole, and that model when it is loaded."""
    marks: list[str] = []
    for i, model in enumerate(models):
        with mock.patch.object(saving, "SHARD", shards[i] if shards else saving.SHARD):
            save(model, folder / f"whole-{i}")
        assert verify(folder / f"whole-{i}") == [] and fingerprint(load(folder / f"whole-{i}")) == fingerprint(model)
        marks.append(tree(folder / f"whole-{i}"))
    assert marks[0] != marks[1]
    return marks


def broken(monkeypatch: Any, at: int, *, after: bool) -> list[str]:
    """Make the save stop before or after its step number `at`; returns the steps that it took."""
    taken: list[str] = []
    for module, name in STEPS:
        plain = getattr(module, name)

        def act(*args: Any, plain: Any = plain, name: str = name, **named: Any) -> Any:
            taken.append(name)
            mine = len(taken)
            if mine == at and not after:
                raise Stop
            made = plain(*args, **named)
            if mine == at:
                raise Stop
            return made

        monkeypatch.setattr(module, name, act)
    return taken


def distinct(taken: list[str]) -> list[int]:
    """The first, second and last time of every step, by number from 1: the others differ by the file or tensor alone."""
    times = {name: [i for i, n in enumerate(taken, 1) if n == name] for name in dict.fromkeys(taken)}
    return sorted({i for t in times.values() for i in (*t[:2], t[-1])})


@pytest.mark.parametrize("swapped", ["atomic", "moved"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_at_any_step_leaves_old_or_new(
    after: bool, swapped: str, models: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Each distinct step in turn fails: the folder is whole, byte for byte one of the two, and nothing is left beside it."""
    if swapped == "moved":
        monkeypatch.setattr(swap.sys, "platform", "other")
    seen, place = set(), tmp_path / "place"
    marks, out = wholes(models, tmp_path), place / "out"
    save(models[0], out)
    with monkeypatch.context() as m:
        taken = broken(m, 0, after=after)
        save(models[1], out, replace=True)
    assert len(taken) > 12 and {n for _, n in STEPS} <= set(taken)
    for at in distinct(taken):
        if tree(out) != marks[0]:
            save(models[0], out, replace=True)
        with monkeypatch.context() as m:
            steps = broken(m, at, after=after)
            with pytest.raises(Stop):
                save(models[1], out, replace=True)
        seen.add(tree(out))
        assert steps == taken[: len(steps)] and seen <= set(marks), steps
        assert [p.name for p in place.iterdir()] == ["out"], steps
    assert seen == set(marks)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_first_save_leaves_nothing_or_all(after: bool, models: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Where there was no folder there is none, or a whole one."""
    absent, (_, mark), place = 0, wholes(models, tmp_path), tmp_path / "place"
    with monkeypatch.context() as m:
        taken = broken(m, 0, after=after)
        save(models[1], place / "first")
    for at in distinct(taken):
        out = place / f"out-{at}"
        with monkeypatch.context() as m:
            broken(m, at, after=after)
            with pytest.raises(Stop):
                save(models[1], out)
        absent += not out.exists()
        assert not out.exists() or tree(out) == mark
    assert len(taken) > 12 and absent > 10


def test_a_rename_that_fails_puts_the_old_folder_back(models: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Where folders cannot be exchanged in one step, a failed move is undone."""
    out, plain = tmp_path / "out", Path.rename
    save(models[0], out)

    def rename(self: Path, target: Path) -> Path:
        if Path(target) == out and ".old" not in self.name:
            raise OSError("no space")
        return plain(self, target)

    monkeypatch.setattr(swap.sys, "platform", "other")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PathError, match="no space"):
        save(models[1], out, replace=True)
    assert verify(out) == [] and fingerprint(load(out)) == fingerprint(models[0])


SHARDS = (9_000, 2 << 30)
"""One model is saved in shards, the other in a single file."""
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "shutil.rmtree", "open")


def _save_killed(model: nn.Module, shard: int, out: Path, log: Path, at: int) -> None:
    """Save; write down every change of files right before it is made, and be killed before the one of this number."""
    saving.SHARD, count, seen = shard, 0, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def look(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        path = given[event in ("os.rename", "os.link")] if event in CHANGES else None
        if not isinstance(path, str | Path) or (event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if Path(path).is_absolute() and out.parent not in Path(path).parents:
            return
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        name = re.sub(rf"{re.escape(MARK)}[^/]*?(\.part|\.old)?(?=/|$)", r"temporary\1", Path(path).name)
        os.write(seen, f"{event} {name}\n".encode())

    sys.addaudithook(look)
    save(model, out, replace=True)


def _killed(fork: Any, how: Callable[..., None], given: tuple[Any, ...]) -> bool:
    """Whether a process that does this was killed by itself."""
    child = fork.Process(target=how, args=given, daemon=True)
    child.start()
    child.join(30)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.parametrize("new", [0, 1], ids=["shards over a file", "a file over shards"])
def test_f34_sigkill_at_any_change_of_a_file_leaves_old_or_new(new: int, models: Any, tmp_path: Path) -> None:
    """What a killed save leaves is decided by the changes it had made, so right before each is a moment of its own.

    Killed at every one (of tensors' shards at the first two and the last), the folder is one whole model, every byte of it; the
    next save sweeps up what was left beside it.
    """
    out, log, fork = tmp_path / "deep" / "out", tmp_path / "log", multiprocessing.get_context("fork")
    marks, left, seen = wholes(models, tmp_path, *SHARDS), 0, {0: 0, 1: 0}

    def again() -> None:
        with mock.patch.object(saving, "SHARD", SHARDS[1 - new]):
            save(models[1 - new], out, replace=True)

    again()
    assert not _killed(fork, _save_killed, (models[new], SHARDS[new], out, log, 0))
    changes = [re.sub(r"-\d+-of-\d+", "", line) for line in log.read_text().splitlines()]
    for at in distinct(changes):
        again()
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        assert _killed(fork, _save_killed, (models[new], SHARDS[new], out, log, at)), changes[at - 1]
        left += len([*out.parent.iterdir()]) > 1
        seen[marks.index(tree(out))] += 1
    assert min(seen.values()) > 0 and left > 10


def _save_forever(models: tuple[nn.Module, nn.Module], out: Path, started: Any, first: int) -> None:
    for i in range(first, 10_000):
        saving.SHARD = SHARDS[i % 2]
        save(models[i % 2], out, replace=True)
        started.set()


def test_f34_forty_sigkills_leave_old_or_new(models: Any, tmp_path: Path) -> None:
    """A process that saves one model over the other is killed at random points: in the middle of what it writes, too."""
    out, rng, fork = tmp_path / "deep" / "out", random.Random(0), multiprocessing.get_context("fork")
    marks, left, seen = wholes(models, tmp_path, *SHARDS), 0, {0: 0, 1: 0}
    for kill in range(40):
        started = fork.Event()
        child = fork.Process(target=_save_forever, args=(models, out, started, kill), daemon=True)
        child.start()
        assert started.wait(30)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        left += any(p.name != "out" for p in out.parent.iterdir())
        seen[marks.index(tree(out))] += 1
    save(models[0], out, replace=True)
    assert [p.name for p in out.parent.iterdir()] == ["out"] and left > 4 and min(seen.values()) > 0


def test_a_running_process_is_not_swept(models: Any, tmp_path: Path) -> None:
    """A stage of a live process stays; one of a dead process goes."""
    live = tmp_path / f".weft-{socket.gethostname()}-{os.getppid()}-00000000"
    other = tmp_path / ".weft-elsewhere-1-00000000"
    dead = tmp_path / f".weft-{socket.gethostname()}-{2**22 + 1}-00000000"
    for p in (live, other, dead):
        p.mkdir()
    save(models[0], tmp_path / "out")
    assert live.is_dir() and other.is_dir() and not dead.exists()


def test_the_cache_makes_a_result_once(tmp_path: Path) -> None:
    """A result that failed half way is made again; one that is there is not."""
    cache, calls = Cache(tmp_path), []

    def make() -> dict[str, int]:
        calls.append(1)
        if len(calls) == 1:
            raise Stop
        return {"x": 1}

    with pytest.raises(Stop):
        cache.json("kind", "name", make)
    assert [cache.json("kind", "name", make) for _ in range(3)] == [{"x": 1}] * 3
    assert len(calls) == 2 and cache.hits == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "torn"])
def test_f37_a_damaged_cache_entry_is_made_again(damage: str, tmp_path: Path) -> None:
    """Never used, never in the way."""
    cache, made = Cache(tmp_path), []

    def tensors() -> dict[str, torch.Tensor]:
        made.append("tensors")
        return {"x": torch.ones(4)}

    def value() -> dict[str, float]:
        made.append("json")
        return {"x": 0.1}

    for _ in range(3):
        assert torch.equal(cache.tensors("kind", "name", tensors)["x"], torch.ones(4))
        assert cache.json("kind", "name", value) == {"x": 0.1}
    assert made == ["tensors", "json"]
    for path in (tmp_path / "kind").iterdir():
        raw = path.read_bytes()
        at = raw.rfind(b"1") if path.suffix == ".json" else len(raw) - 2
        flipped = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        path.unlink() if damage == "gone" else path.write_bytes(
            {"cut": raw[:-4], "flipped": flipped, "torn": raw[:20]}[damage]
        )
    assert torch.equal(cache.tensors("kind", "name", tensors)["x"], torch.ones(4))
    assert cache.json("kind", "name", value) == {"x": 0.1} and sorted(made) == ["json", "json", "tensors", "tensors"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("at", range(1, 9))
def test_f34_a_disk_that_fails_leaves_the_old_folder(
    at: int, code: int, models: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The write or sync number `at` fails: the error says what is full or broken, and the old model is whole."""
    out, count, plain = tmp_path / "out", 0, os.fsync
    save(models[0], out)

    def fsync(fd: int) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(code, os.strerror(code))
        plain(fd)

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", fsync)
        refused(lambda: save(models[1], out, replace=True), PathError if code == errno.EIO else ResourceError)
    assert count == at and verify(out) == [] and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert fingerprint(load(out)) in {fingerprint(m) for m in models}


def test_f34_room_is_checked_before_anything_is_written(models: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Free and wanted bytes are told."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    e = refused(lambda: save(models[0], tmp_path / "new" / "out"), ResourceError, tmp_path)
    assert "100 bytes free" in str(e.got) and not (tmp_path / "new").exists()
    refused(lambda: may_write(models[0], tmp_path / "out", replace=False, nbytes=101), ResourceError)


def test_f35_what_must_not_be_overwritten(models: Any, tmp_path: Path) -> None:
    """A folder that is there, one with files of others, a file, the model's own parent or child; asked for, it is swapped."""
    out = tmp_path / "out"
    save(models[0], out)
    refused(lambda: save(models[1], out), ConflictError, out)
    source = load(out)
    refused(lambda: save(source, out / "inner"), ConflictError, out)
    (tmp_path / "file").write_text("x")
    refused(lambda: save(source, tmp_path / "file"), ConflictError, tmp_path)
    refused(lambda: save(source, tmp_path / "file" / "out"), PathError, tmp_path)
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in str(refused(lambda: save(models[1], out, replace=True), ConflictError, out).got)
    (out / "notes.txt").unlink()
    save(source, out, replace=True)
    assert fingerprint(load(out)) == fingerprint(models[0]) == fingerprint(source)
    (tmp_path / "link").symlink_to(out)
    save(models[1], tmp_path / "link", replace=True)
    assert (tmp_path / "link").is_symlink() and fingerprint(load(out)) == fingerprint(models[1])
    around = tmp_path / "around"
    save(models[0], around)
    (around / "base").mkdir()
    save(models[0], tmp_path / "other")
    (tmp_path / "other").rename(around / "base" / "model")
    refused(lambda: save(load(around / "base" / "model"), around, replace=True), ConflictError, around)


def test_f36_a_second_writer_is_refused_and_a_dead_ones_lock_is_not_heeded(models: Any, tmp_path: Path) -> None:
    """The lock names its owner; without its process it means nothing."""
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()

    def hold() -> None:
        with claimed(out):
            ready.set()
            done.wait(60)

    child = fork.Process(target=hold, daemon=True)
    child.start()
    assert ready.wait(30)
    e = refused(lambda: save(models[0], out), ConflictError)
    assert str(child.pid) in str(e.got) and not out.exists()
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(30)
    assert any(tmp_path.glob(".weft-lock-*"))
    save(models[0], out)
    assert verify(out) == [] and not any(tmp_path.glob(".weft-*"))
    for text in ("", "{", "[]", '{"pid": "x"}', '{"pid": -5, "host": 3}'):
        with claimed(out):
            lock = next(tmp_path.glob(".weft-lock-*"))
        lock.write_text(text)
        save(models[1], out, replace=True)


def _share(folder: Path, seed: int, out: Any) -> None:
    cache = Cache(folder)
    for i in range(100):
        name = str((i * 7 + seed) % 20)
        value = cache.json("kind", name, lambda name=name: {"name": name, "pad": "x" * 5000})
        held = cache.tensors("kind", name, lambda name=name: {"x": torch.full((999,), float(name))})
        if value["name"] != name or not bool((held["x"] == float(name)).all()):
            out.put("wrong")
    out.put("done")


def test_f36_processes_share_a_cache(tmp_path: Path, fresh: ForkServerContext) -> None:
    """Three at once, the same names: each reads what was meant. While one is at work nothing is cleaned out."""
    found = fresh.Queue()
    workers = [fresh.Process(target=_share, args=(tmp_path / "c", seed, found)) for seed in range(3)]
    for w in workers:
        w.start()
    assert [found.get(timeout=300) for _ in workers] == ["done"] * 3
    for w in workers:
        w.join(60)
    assert len(contents(tmp_path / "c")) == 40 and not list((tmp_path / "c").rglob("*.part"))


def test_a_cache_is_limited_by_last_use_and_cleaned(tmp_path: Path) -> None:
    """The least recently used goes first; a busy cache is refused; scraps of dead processes go, too."""
    cache, folder = Cache(tmp_path / "c"), tmp_path / "c"
    for i in range(5):
        cache.json("kind", str(i), lambda: "x" * 1000)
        os.utime(folder / "kind" / f"{i}.json", (i, i))
    cache.json("kind", "0", dict)
    (cache.path("work", "w")).mkdir(parents=True)
    (folder / "work" / "w" / "part").write_text("y" * 100)
    scrap = folder / "kind" / f".weft-{socket.gethostname()}-{2**22 + 1}-00000000.part"
    scrap.write_text("z")
    size = contents(folder)[0].bytes
    assert clean(folder, 2 * size + 100) == (3, 3 * size) and not scrap.exists()
    assert {p.name for p in (folder / "kind").iterdir()} == {"0.json", "4.json"}
    busy = folder / ".users" / f".weft-{socket.gethostname()}-{os.getppid()}-00000000"
    busy.touch()
    refused(lambda: clean(folder), ConflictError, folder / "kind")
    busy.unlink()
    clean(folder)
    assert contents(folder) == []


def test_amended_folders_stay_whole(models: Any, tmp_path: Path) -> None:
    """One text is replaced, the manifest knows it, the tensors are the same files."""
    save(models[0], tmp_path / "out", files={"report.html": "old"})
    before = (tmp_path / "out" / "model.safetensors").stat().st_ino
    amend(tmp_path / "out", {"report.html": "new"})
    assert (tmp_path / "out" / "report.html").read_text() == "new" and verify(tmp_path / "out") == []
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == before


def test_a_base_that_changed_during_a_save_is_noticed(models: Any, tmp_path: Path) -> None:
    """Of a folder that weft wrote, every tensor is compared with what was written."""
    save(models[1], tmp_path / "out")
    path = tmp_path / "out" / "weft.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 128
    path.write_bytes(raw)
    refused(lambda: load(tmp_path / "out"), ChangedError, tmp_path)
