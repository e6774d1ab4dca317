"""Fine-tunes of one base as deltas: bytes, seconds to restore, and how much of what tuning gained they keep.

    python benchmarks/deltas.py [--model ref-lm] [--count 10] [--steps 40] [--budgets 1% 2% 5%] [--write]

Members are tuned on the lab's tasks with short answers, all linear layers in float32, one seed after another, and saved in bfloat16. Each
is written as a delta within every budget, with and without texts of its task, and to the bit; restored; and scored on its task's test
examples: gain is how much lower the bits per byte of answers are than the base's, kept the share of it that is left. Restoring is
`weft.patch` onto a model in memory, of a lossless delta writing the folder. Beside them stands what is done otherwise: every weight's
difference as two bfloat16 factors of one rank, by SVD. `--write` puts the table into docs/training.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import weft
from weft.expr import total, unfrozen
from weft.lab import generated, metrics, models, tasks
from weft.learn.train import train
from weft.linalg.lowrank import truncate
from weft.model import expressions, match, set_expressions

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"
BATCH, LENGTH, RATE, TESTED = 8, 64, 5e-4, 100


def tuned(model: str, tokenizer: Any, name: str, seed: int, steps: int, out: Path) -> None:
    """Write a fine-tune of all linear layers, in bfloat16."""
    made = weft.load(model)
    set_expressions(made, {n: unfrozen(expressions(made)[n]) for n in match(made, "all-linear")})
    learned = tasks.task(name, seed=seed).train
    train(made, learned, tokenizer=tokenizer, steps=steps, batch=BATCH, length=LENGTH, lr=RATE, seed=seed)
    weft.merge(made, to="bf16")
    weft.export(made, out)


def bits(model: nn.Module, tokenizer: Any, name: str) -> float:
    """Bits per byte of answers on a task's test examples."""
    values, weights = metrics.response_bits(model, tokenizer, tasks.task(name).test[:TESTED], batch=32)
    return float((values * weights).sum() / weights.sum())


def truncated(base: nn.Module, tuned: nn.Module, rank: int) -> tuple[nn.Module, int]:
    """The base with every difference at one rank, and the bytes of the factors."""
    made, size = weft.fork(base), 0
    for name, expr in expressions(tuned).items():
        was = expressions(base)[name]
        gap = expr.dense().float() - was.dense().float()
        if gap.any():
            low = truncate(gap, rank)
            set_expressions(made, {name: total({"base": was, "adapter:svd": low})})
            size += low.nbytes()
    return made, size


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that something took, and what it gave."""
    begun = time.perf_counter()
    given = act()
    return time.perf_counter() - begun, given


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="ref-lm")
    options.add_argument("--count", type=int, default=10)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--budgets", nargs="*", default=["1%", "2%", "5%"])
    options.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="of the truncated SVDs")
    options.add_argument("--no-data", action="store_true", help="leave out the deltas that are weighed by texts")
    options.add_argument("--write", action="store_true", help="put the table into docs/training.md")
    given = options.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.resolve(given.model))
    base = weft.load(given.model)
    ways: dict[str, dict[str, Any]] = {b: {"budget": b} for b in given.budgets}
    ways |= {} if given.no_data else {f"{b}, texts": {"budget": b, "data": ""} for b in given.budgets}
    ways["to the bit"] = {"lossless": True}
    found: dict[str, list[tuple[float, ...]]] = {way: [] for way in [*ways, *(f"SVD, rank {r}" for r in given.ranks)]}
    sizes, names = list[int](), generated.names()
    with tempfile.TemporaryDirectory() as place:
        for i in range(given.count):
            name, folder = names[i % len(names)], Path(place) / f"tuned-{i}"
            tuned(given.model, tokenizer, name, i // len(names), given.steps, folder)
            sizes.append(sum(p.stat().st_size for p in folder.glob("*.safetensors")))
            whole = weft.load(folder)
            before, after = bits(base, tokenizer, name), bits(whole, tokenizer, name)
            print(f"{name}: {before:.3f} to {after:.3f} bits a byte of answers", flush=True)
            for way, how in ways.items():
                delta, out, model = Path(place) / "delta", Path(place) / "out", weft.load(given.model)
                about = {**how, "data": name} if "data" in how else how
                making, made = timed(lambda: weft.diff(given.model, folder, delta, replace=True, **about))  # noqa: B023
                if "lossless" in how:
                    seconds, _ = timed(lambda: weft.restore(given.model, delta, out, replace=True))  # noqa: B023
                    model = weft.load(out)
                else:
                    seconds, _ = timed(lambda: weft.patch(model, delta))  # noqa: B023
                kept = (before - bits(model, tokenizer, name)) / (before - after)
                found[way].append((made.bytes, making, seconds, kept))
                print(f"  {way}: {made.bytes} bytes, {making:.0f} s, {seconds:.2f} s, {kept:.1%} kept", flush=True)
            for rank in given.ranks:
                making, (model, size) = timed(lambda: truncated(base, whole, rank))  # noqa: B023
                kept = (before - bits(model, tokenizer, name)) / (before - after)
                found[f"SVD, rank {rank}"].append((size, making, 0.0, kept))
                print(f"  SVD, rank {rank}: {size} bytes, {kept:.1%} kept", flush=True)
    table = [
        f"{given.count} fine-tunes of {given.model} ({', '.join(names[: given.count])}; {given.steps} steps, all linear layers), "
        f"{statistics.mean(sizes):,.0f} bytes each as checkpoints.\n"
        "Means; kept is the share of the gain on the task, with the least of all in brackets. Seconds are of one thread\n"
        f"(`python benchmarks/deltas.py --count {given.count} --steps {given.steps} --ranks {' '.join(map(str, given.ranks))}`).",
        "",
        "| delta | bytes | of the checkpoint | seconds to make | to restore | kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, rows in found.items():
        size, making, seconds, kept = (statistics.mean(column) for column in zip(*rows, strict=True))
        least = min(k for *_, k in rows)
        share = size / statistics.mean(sizes)
        table.append(
            f"| {way} | {size:,.0f} | {share:.1%} | {making:.0f} | {f'{seconds:.2f}' if seconds else '-'} | {kept:.1%} ({least:.1%}) |"
        )
    print("\n".join(table))
    if given.write:
        text = PAGE.read_text("utf8")
        marks = "<!-- deltas, by benchmarks/deltas.py -->", "<!-- end of deltas -->"
        held = "\n".join([marks[0], "", *table, "", marks[1]])
        PAGE.write_text(re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: held, text, flags=re.DOTALL), "utf8")


if __name__ == "__main__":
    main()
