"""Speed of the store beside its peers: save and load 2 GB of bfloat16 weights, in one run, as ratios of medians.

    python benchmarks/store.py [--gb 2] [--rounds 5]

Saving, everything synced to disk: weft (streamed, checked, summed, hashed, synced, exchanged); safetensors' save_file, then a
sync; and a copy of the same file that is hashed and synced (`shutil.copyfile`, blake2b, fsync). Loading, every byte read once
after it: weft's audited, checked and mapped tensors, and safetensors' load_file; with the file in memory, and cold (dropped
from the page cache). Their order is drawn anew in every round. Exits with 1 if saving takes more than 1.3 times the copy, or
loading cold more than 1.2 times safetensors.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from weft.store.checkpoint import checkpoint
from weft.store.save import write_shards
from weft.store.swap import staged
from weft.store.tensors import examine


def sync(path: Path) -> None:
    """Force a file to disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(act: Callable[[], None]) -> float:
    """Seconds."""
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def touched(tensors: dict[str, torch.Tensor]) -> None:
    """Read every byte."""
    for t in tensors.values():
        t.view(torch.int64).sum()


def main() -> int:
    """Make the tensors, take turns, print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gb", type=float, default=2.0)
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    rng = torch.Generator().manual_seed(0)
    count = max(1, int(given.gb * 1e9 / (2 * 4096 * 4096)))
    content = {f"model.layers.{i}.weight": torch.randn(4096, 4096, generator=rng).bfloat16() for i in range(count)}
    size = sum(t.numel() * 2 for t in content.values())
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        root = Path(scratch)
        plain, copy, out = root / "plain.safetensors", root / "copy.safetensors", root / "out"

        def weft_save() -> None:
            with staged(out, replace=True, manifest={"format": 1}) as stage:
                write_shards(stage, content, "model")

        def peer_save() -> None:
            save_file(content, plain)
            sync(plain)

        def copy_save() -> None:
            shutil.copyfile(plain, copy)
            word = hashlib.blake2b(digest_size=16)
            with copy.open("rb") as f:
                while chunk := f.read(4 << 20):
                    word.update(chunk)
            sync(copy)

        def weft_load() -> None:
            held = checkpoint(out, "model").read()
            if examine(held)[1]:
                raise SystemExit("not finite")
            touched(held)

        def peer_load() -> None:
            touched(load_file(plain))

        peer_save()
        weft_save()
        order = random.Random(0)
        took: dict[str, list[float]] = {}
        for _ in range(given.rounds):
            saves = [("save weft", weft_save), ("save safetensors", peer_save), ("save copy", copy_save)]
            for name, act in order.sample(saves, 3):
                os.sync()
                took.setdefault(name, []).append(timed(act))
            for heat in ("warm", "cold"):
                for name, act in order.sample([("weft", weft_load), ("safetensors", peer_load)], 2):
                    for path in [plain, *out.glob("*.safetensors")]:
                        if heat == "cold":
                            drop(path)
                    took.setdefault(f"load {heat} {name}", []).append(timed(act))
    middle = {name: statistics.median(t) for name, t in took.items()}
    print(f"{size / 1e9:.1f} GB, {given.rounds} rounds, medians")
    for name, seconds in middle.items():
        print(f"  {name:24} {seconds:6.2f} s  {size / 1e9 / seconds:5.2f} GB/s")
    ratios = {
        "save / copy that hashes and syncs": middle["save weft"] / middle["save copy"],
        "save / safetensors and sync": middle["save weft"] / middle["save safetensors"],
        "load cold / safetensors": middle["load cold weft"] / middle["load cold safetensors"],
        "load warm / safetensors": middle["load warm weft"] / middle["load warm safetensors"],
    }
    for name, ratio in ratios.items():
        print(f"  {name:36} {ratio:.2f}")
    print(
        f"  peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB, of which the tensors {size / 1e9:.1f}"
    )
    return int(ratios["save / copy that hashes and syncs"] > 1.3 or ratios["load cold / safetensors"] > 1.2)


if __name__ == "__main__":
    raise SystemExit(main())
