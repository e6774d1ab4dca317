"""Whatever happens during a save, the folder is the old one or the new one."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import weft.store.files as files
import weft.store.swap as swap
from weft.engine.run import Step, apply
from weft.error import WeftError
from weft.model import fingerprint, weave
from weft.store import load, save, verify
from weft.store.cache import Cache

saving = sys.modules["weft.store.save"]  # the package's attribute of that name is the function
STEPS = [
    (saving, "write_json"),
    (saving, "write_tensors"),
    (files, "save_file"),
    (files, "sync"),
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


@pytest.mark.parametrize("swapped", ["atomic", "moved"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_at_any_step_leaves_old_or_new(
    after: bool, swapped: str, models: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Each step in turn fails: the folder is whole, and nothing is left beside it."""
    if swapped == "moved":
        monkeypatch.setattr(swap.sys, "platform", "other")
    old, new = models
    marks, seen, at, out = {fingerprint(old), fingerprint(new)}, set(), 0, tmp_path / "out"
    while True:
        at += 1
        save(old, out, replace=True)
        with monkeypatch.context() as m:
            taken = broken(m, at, after=after)
            try:
                save(new, out, replace=True)
                break
            except Stop:
                pass
        mark = fingerprint(load(out))
        seen.add(mark)
        assert mark in marks and verify(out) == [], taken
        assert [p.name for p in tmp_path.iterdir() if p.name != "weft-cache"] == ["out"], taken
    assert at > 12 and {n for _, n in STEPS} <= set(taken) and seen == marks


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_first_save_leaves_nothing_or_all(after: bool, models: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Where there was no folder there is none, or a whole one."""
    at, absent, out = 0, 0, tmp_path / "out"
    while True:
        at += 1
        with monkeypatch.context() as m:
            broken(m, at, after=after)
            try:
                save(models[1], out)
                break
            except Stop:
                pass
        absent += not out.exists()
        assert not out.exists() or (verify(out) == [] and fingerprint(load(out)) == fingerprint(models[1]))
        if out.exists():
            out.rename(tmp_path / f"done-{at}")
    assert at > 12 and absent > 10


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
    with pytest.raises(OSError, match="no space"):
        save(models[1], out, replace=True)
    assert verify(out) == [] and fingerprint(load(out)) == fingerprint(models[0])


def _save_forever(models: tuple[nn.Module, nn.Module], out: Path, started: Any) -> None:
    for i in range(10_000):
        save(models[i % 2], out, replace=True)
        started.set()


def test_sigkill_leaves_old_or_new(models: Any, tmp_path: Path) -> None:
    """A process that saves one model over the other, over and over, is killed six times; the next save sweeps up."""
    out, rng, fork = tmp_path / "deep" / "out", random.Random(0), multiprocessing.get_context("fork")
    marks, left = {fingerprint(m) for m in models}, 0
    for _ in range(6):
        started = fork.Event()
        child = fork.Process(target=_save_forever, args=(models, out, started), daemon=True)
        child.start()
        assert started.wait(30)
        time.sleep(rng.uniform(0.005, 0.12))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        left += len(list(out.parent.iterdir())) - 1
        assert verify(out) == [] and fingerprint(load(out)) in marks
    save(models[0], out, replace=True)
    assert [p.name for p in out.parent.iterdir()] == ["out"] and left > 0


def test_a_running_process_is_not_swept(models: Any, tmp_path: Path) -> None:
    """A stage of a live process stays; one of a dead process goes."""
    import socket

    live = tmp_path / f"out.weft-{socket.gethostname()}-{os.getppid()}"
    other = tmp_path / "out.weft-elsewhere-1"
    for p in (live, other):
        p.mkdir()
    save(models[0], tmp_path / "out")
    assert live.is_dir() and other.is_dir()


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


def test_a_damaged_cache_entry_is_an_error_not_a_result(tmp_path: Path) -> None:
    """Never silently used."""
    import torch

    cache = Cache(tmp_path)
    cache.tensors("kind", "name", lambda: {"x": torch.ones(4)})
    path = tmp_path / "kind" / "name.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeftError):
        cache.tensors("kind", "name", lambda: {"x": torch.ones(4)})
