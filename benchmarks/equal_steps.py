"""Held-out loss after equal steps beside peft: LoRA, DoRA, IA3, and LoRA on 4-bit NormalFloat, in one run.

    python benchmarks/equal_steps.py [--model ref-lm] [--steps 40] [--seeds 3] [--markdown FILE]

Both adapt the same model, see the same batches, take the same steps of AdamW under the same schedule, and choose from the same learning
rates on the same select set. What is told apart is held-out bits a byte, document by document: the difference with its 95 % interval over
seeds and documents. They start alike in what they change (nothing), not in their random numbers. Beside NF4 + LoRA stands peft's LoRA on
dense weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from train_step import WAYS, ours, theirs

from weft.lab import metrics, models, tasks
from weft.lab.bootstrap import interval
from weft.lab.tuning import lowest

RATES = (1e-4, 4e-4, 1.6e-3, 6.4e-3, 2.56e-2, 1.024e-1)
TASK = "cpp"
ROWS, LENGTH = 4, 128
SELECT, TEST, PAGE = 24, 56, 512


def windows(texts: list[str], tokenizer: Any, seed: int, steps: int) -> list[torch.Tensor]:
    """The batches of a run [rows length], the same for both sides."""
    ids = torch.cat([torch.tensor(tokenizer(t)["input_ids"]) for t in texts])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randint(0, len(rows), (steps, ROWS), generator=torch.Generator().manual_seed(seed))
    return [rows[chosen] for chosen in order]


def tuned(make: Any, name: str, way: str, rate: float, batches: list[torch.Tensor], seed: int) -> nn.Module:
    """A model after one step a batch."""
    torch.manual_seed(seed)
    model = make(name, way)
    moves = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    slower = transformers.get_cosine_schedule_with_warmup(moves, len(batches) // 20 + 1, len(batches))
    model.train()
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        moves.step()
        slower.step()
        moves.zero_grad()
    return model.eval()


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="ref-lm")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--markdown", type=Path, help="write the table here, too")
    given = options.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.resolve(given.model))
    task = tasks.task(TASK, seed=0)
    texts = {part: metrics.texts_of(getattr(task, part)) for part in ("train", "select", "test")}
    select, test = ([t[:PAGE] for t in texts[part][:n]] for part, n in (("select", SELECT), ("test", TEST)))

    def bits(model: nn.Module, on: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            return metrics.bits_per_byte(model, tokenizer, on, length=256)

    lines = [
        "| adapter | weft, bits a byte | peft, bits a byte | difference, 95 % | weft, rate | peft, rate |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for way in WAYS:
        found: dict[str, tuple[float, np.ndarray, np.ndarray]] = {}
        for side, make in (("weft", ours), ("peft", theirs)):

            def score(rate: float, make: Any = make, way: str = way) -> float:
                batches = windows(texts["train"], tokenizer, 0, given.steps)
                values, weights = bits(tuned(make, given.model, way, rate, batches, 0), select)
                return float((values * weights).sum() / weights.sum())

            rate = lowest(RATES, score)
            made = [
                bits(tuned(make, given.model, way, rate, windows(texts["train"], tokenizer, s, given.steps), s), test)
                for s in range(given.seeds)
            ]
            found[side] = rate, np.stack([v for v, _ in made]), np.stack([w for _, w in made])
        (rate, ours_, weights), (other, theirs_, _) = found["weft"], found["peft"]
        gap = interval(ours_ - theirs_, weights)
        means = [float((v * weights).sum() / weights.sum()) for v in (ours_, theirs_)]
        lines.append(
            f"| {way} | {means[0]:.4f} | {means[1]:.4f} | {gap.mean:+.4f} ({gap.low:+.4f} to {gap.high:+.4f}) | {rate:g} | {other:g} |"
        )
        print(lines[-1], flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
