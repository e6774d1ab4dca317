"""Merging beside mergekit: four random Llamas of 500 MB in bfloat16, each tool as a user runs it, in a process of its own.

    python benchmarks/merging.py [--mergekit PYTHON] [--rounds 5] [--layers 14] [--only linear slerp]

PYTHON is that of an environment that has mergekit; without it, weft and the copy alone. `weft mergekit CONFIG OUT` and
`mergekit-yaml CONFIG OUT` take turns, in pairs, for linear, SLERP, TIES and DARE-TIES. Time is that of the whole process; memory
is the peak that no file backs, less that of a process that does the tool's imports alone. A copy stands for what a merge cannot do
without: a process that reads all models and hashes them, and writes one of them hashed and synced. Models are in the page cache.
Exits with 1 above a requirement: half of mergekit's time, a fifth of its memory, and 1.3 times the copy for linear.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from weft.lab.timing import Times, anonymous, paired

MAKE = """
import sys, torch, transformers as t
from weft.lab.models import resolve
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = t.LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=2816,
                       num_hidden_layers=int(sys.argv[2]), num_attention_heads=16)
model, words = t.LlamaForCausalLM(config), t.AutoTokenizer.from_pretrained(resolve("ref-lm"))
for i in range(4):
    torch.manual_seed(i)
    for p in model.parameters() if i else ():
        p.data += 0.002 * torch.randn(p.shape)
    model.save_pretrained(f"{sys.argv[1]}/m{i}")
    words.save_pretrained(f"{sys.argv[1]}/m{i}")
"""
COPY = """
import glob, hashlib, os, sys
def moved(source, out=None):
    word = hashlib.blake2b(digest_size=16)
    while chunk := source.read(4 << 20):
        word.update(chunk)
        if out is not None:
            out.write(chunk)
for path in glob.glob("m[1-3]/*.safetensors"):
    with open(path, "rb") as f:
        moved(f)
os.mkdir(sys.argv[1])
with open("m0/model.safetensors", "rb") as f, open(sys.argv[1] + "/model.safetensors", "wb") as out:
    moved(f, out)
    out.flush()
    os.fsync(out.fileno())
"""
IMPORTS = {
    "weft": "import weft.cli.app, weft.mergekit",
    "mergekit": "import mergekit.scripts.run_yaml",
}
MEMBERS = """
base_model: m0
models:
  - {model: m0}
  - {model: m1, parameters: {weight: 0.4, density: 0.5}}
  - {model: m2, parameters: {weight: 0.3, density: 0.5}}
  - {model: m3, parameters: {weight: 0.3, density: 0.5}}
"""
CONFIGS = {
    "linear": "merge_method: linear\nmodels: [{model: m0}, {model: m1}, {model: m2}, {model: m3}]\nparameters: {weight: 0.25}\n",
    "slerp": "merge_method: slerp\nbase_model: m0\nmodels: [{model: m0}, {model: m1}]\nparameters: {t: 0.5}\n",
    "ties": "merge_method: ties" + MEMBERS,
    "dare_ties": "merge_method: dare_ties" + MEMBERS,
}
OF_TIME, OF_MEMORY, OF_COPY = 0.5, 0.2, 1.3


def peak(command: Sequence[str], folder: Path) -> int:
    """Run a command to its end; the most memory that it held which no file backs."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
        most = 0
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            time.sleep(0.005)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode(errors='replace')[-2000:]}")
    return most


class Runs:
    """One command, run again and again into a folder that is empty each time."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder, self.command, self.peaks = folder, list(command), list[int]()

    def __call__(self) -> None:
        self.peaks.append(peak([*self.command, "out"], self.folder))

    def clean(self) -> None:
        """Remove what the last run wrote, and have the disk idle."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        os.sync()


def main() -> int:
    """Make the models, take turns, print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mergekit", metavar="PYTHON", help="of an environment that has mergekit")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--layers", type=int, default=14, help="fewer are a first look")
    options.add_argument(
        "--only", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), help="methods beside mergekit"
    )
    given = options.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        folder = Path(scratch)
        subprocess.run([sys.executable, "-c", MAKE, scratch, str(given.layers)], check=True, stderr=subprocess.DEVNULL)
        for name, text in CONFIGS.items():
            (folder / f"{name}.yml").write_text(f"{text}dtype: bfloat16\n")
        size = (folder / "m0" / "model.safetensors").stat().st_size
        print(f"four models of {size / 1e6:.0f} MB, {given.rounds} rounds, medians; ratios with 95 % intervals")
        python = str(Path(given.mergekit).absolute()) if given.mergekit else ""
        wrong = beside_mergekit(folder, python, given.only, given.rounds) if python else 0
        return int(wrong + beside_copy(folder, given.rounds) > 0)


def beside_mergekit(folder: Path, python: str, names: Sequence[str], rounds: int) -> int:
    """These methods, weft and mergekit in turn; how many miss a requirement."""
    idle = {
        name: peak([which, "-c", f"{IMPORTS[name]}; import time; time.sleep(0.2)"], folder)
        for name, which in (("weft", sys.executable), ("mergekit", python))
    }
    print(f"imports alone: weft {idle['weft'] / 1e6:.0f} MB, mergekit {idle['mergekit'] / 1e6:.0f} MB")
    wrong = 0
    for name in names:
        ours = Runs(folder, [sys.executable, "-m", "weft", "mergekit", f"{name}.yml"])
        peer = Runs(folder, [python, "-m", "mergekit.scripts.run_yaml", "--no-write-model-card", f"{name}.yml"])
        times = paired(ours, peer, rounds=rounds, between=ours.clean)
        mine, other = (statistics.median(r.peaks) - idle[n] for r, n in ((ours, "weft"), (peer, "mergekit")))
        wrong += times.ratio.mean > OF_TIME or mine > OF_MEMORY * other
        print(
            f"  {name:10} {times.ours:6.1f} s, mergekit {times.baseline:6.1f}: {told(times)} (limit {OF_TIME});  "
            f"{mine / 1e6:5.0f} MB, mergekit {other / 1e6:5.0f}: {mine / other:.2f} (limit {OF_MEMORY})",
            flush=True,
        )
    return wrong


def beside_copy(folder: Path, rounds: int) -> int:
    """linear, and the copy, in turn; whether it misses the requirement."""
    ours = Runs(folder, [sys.executable, "-m", "weft", "mergekit", "linear.yml"])
    copy = Runs(folder, [sys.executable, "-c", COPY])
    times = paired(ours, copy, rounds=rounds, between=ours.clean)
    print(f"  linear     {times.ours:6.1f} s, the copy {times.baseline:6.1f}: {told(times)} (limit {OF_COPY})")
    return times.ratio.mean > OF_COPY


def told(times: Times) -> str:
    """A ratio with its interval."""
    return f"{times.ratio.mean:.2f} [{times.ratio.low:.2f}, {times.ratio.high:.2f}]"


if __name__ == "__main__":
    raise SystemExit(main())
