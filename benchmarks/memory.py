"""Peak anonymous memory and time of `weft fit` on a random Llama with the shapes of Qwen3-0.6B, within 27 % of its size.

    python benchmarks/memory.py [--limit-gb 2] [--layers 28]

Few candidates and calibration tokens: memory depends on shapes, time on both. Exits with 1 above the limit.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from weft.lab.timing import anonymous

MAKE = """
import sys, torch, transformers as t
from weft.lab.models import resolve
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = t.LlamaConfig(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=int(sys.argv[2]),
                       num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
                       tie_word_embeddings=True)
t.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
t.AutoTokenizer.from_pretrained(resolve("ref-lm")).save_pretrained(sys.argv[1])
"""
FIT = """
import sys
from pathlib import Path
from weft import Bars
from weft.fitting.fit import fit
from weft.fitting.settings import Settings
small = Settings(seeds=1, tokens=1024, select_tokens=512, bits=(3, 4), groups=(64,), tries=1)
report = fit(sys.argv[1], sys.argv[2], budget="27%", settings=small, cache=Path(sys.argv[3]), progress=Bars())
for s in report.steps:
    print(f"{s.name:12} {s.seconds:8.1f} s  {s.detail}")
"""


def main() -> int:
    """Make the model, fit it in a process of its own, watch that process."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--limit-gb", type=float, default=2.0)
    options.add_argument("--layers", type=int, default=28, help="fewer are a first look")
    given = options.parse_args()
    limit = given.limit_gb * 1e9
    with tempfile.TemporaryDirectory() as scratch:
        model, out, cache = (str(Path(scratch) / n) for n in ("model", "out", "cache"))
        subprocess.run([sys.executable, "-c", MAKE, model, str(given.layers)], check=True)
        begun, peak, said = time.monotonic(), 0, 0
        process = subprocess.Popen([sys.executable, "-c", FIT, model, out, cache])
        while process.poll() is None:
            now = anonymous(process.pid)
            peak = max(peak, now)
            if peak > said + 1e8:
                print(f"{time.monotonic() - begun:6.0f} s  {peak / 1e9:.2f} GB", file=sys.stderr, flush=True)
                said = peak
            time.sleep(0.05)
    wall, used = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"peak anonymous memory {peak / 1e9:.2f} GB (limit {limit / 1e9:.1f}), {wall / 60:.0f} min, of processors "
        f"{(used.ru_utime + used.ru_stime) / 60:.0f} min, exit {process.returncode}"
    )
    return int(process.returncode != 0 or peak > limit)


if __name__ == "__main__":
    raise SystemExit(main())
