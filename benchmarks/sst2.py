"""Six ways to tune MiniLM on SST-2: accuracy on the development set after equal steps.

    python benchmarks/sst2.py --data FOLDER [--steps 200] [--seeds 3] [--only lora ia3] [--markdown FILE]

FOLDER holds stsa.binary.train and stsa.binary.dev, a line a sentence, its label first; without it nothing is measured. Every way
trains the classifier, which is new, and what it is called after; learning rates are chosen on sentences of the training file that
are not trained on, by the first seed. The interval is over seeds and sentences. The trainer is `weft.Trainer`, transformers' own but
for its checkpoints.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

import weft
from weft.lab import models
from weft.lab.bootstrap import interval
from weft.lab.tuning import lowest
from weft.model import expressions

WAYS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "classifier alone": None,
    "full": ("full", {}),
    "bitfit": ("bitfit", {}),
    "lora": ("lora", {"rank": 8}),
    "dora": ("lora", {"rank": 8, "magnitude": True}),
    "ia3": ("ia3", {}),
    "sparse": ("sparse", {}),
}
RATES = (6.25e-5, 2.5e-4, 1e-3, 4e-3, 1.6e-2)
BATCH, LENGTH, SELECT = 8, 64, 400


def read(path: Path) -> list[tuple[str, int]]:
    """Sentences with their labels."""
    lines = path.read_text("latin-1").splitlines()
    return [(line[2:].strip(), int(line[0])) for line in lines if line]


def woven(folder: str, way: tuple[str, dict[str, Any]] | None, seed: int) -> nn.Module:
    """MiniLM with a new classifier, and what is trained."""
    torch.manual_seed(seed)
    model = weft.weave(transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=2))
    head = [n for n in expressions(model) if n.startswith("classifier")]
    if way is not None:
        weft.apply(model, way[0], **way[1])
    weft.apply(model, "full", at=head)
    return model


def tuned(
    model: nn.Module, rows: list[dict[str, Any]], tokenizer: Any, rate: float, steps: int, seed: int
) -> nn.Module:
    """The model after so many steps."""
    with tempfile.TemporaryDirectory() as scratch:
        args = transformers.TrainingArguments(
            scratch, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate, lr_scheduler_type="cosine",
            warmup_steps=steps // 20, seed=seed, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        collate = transformers.DataCollatorWithPadding(tokenizer)
        run = weft.Trainer(model=model, args=args, train_dataset=rows, data_collator=collate)
        run.remove_callback(transformers.PrinterCallback)
        run.train()
    return model.eval()


@torch.no_grad()
def right(model: nn.Module, rows: list[dict[str, Any]], tokenizer: Any) -> np.ndarray:
    """Whether each sentence was told right."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    made = np.zeros(len(rows))
    for start in range(0, len(order), BATCH):
        lot = order[start : start + BATCH]
        batch = tokenizer.pad([rows[i] for i in lot], return_tensors="pt")
        labels = batch.pop("labels")
        made[lot] = (model(**batch).logits.argmax(1) == labels).numpy()
    return made


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    options.add_argument("--markdown", type=Path, help="write the table here, too")
    given = options.parse_args()
    if given.data is None:
        print("no data: give --data")
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = models.resolve("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def encoded(part: list[tuple[str, int]]) -> list[dict[str, Any]]:
        cut = tokenizer([text for text, _ in part], truncation=True, max_length=LENGTH)["input_ids"]
        return [{"input_ids": ids, "labels": label} for ids, (_, label) in zip(cut, part, strict=True)]

    whole = read(given.data / "stsa.binary.train")
    np.random.default_rng(0).shuffle(whole)
    select, train = encoded(whole[:SELECT]), encoded(whole[SELECT:])
    test = encoded(read(given.data / "stsa.binary.dev"))

    lines = ["| way | trained | accuracy, 95 % | rate |", "| --- | ---: | --- | --- |"]
    for name, way in ((n, WAYS[n]) for n in given.only):

        def wrong(rate: float, way: Any = way) -> float:
            made = tuned(woven(folder, way, 0), train, tokenizer, rate, given.steps, 0)
            return 1 - float(right(made, select, tokenizer).mean())

        rate = lowest(RATES, wrong)
        made = [tuned(woven(folder, way, s), train, tokenizer, rate, given.steps, s) for s in range(given.seeds)]
        found = interval(np.stack([right(m, test, tokenizer) for m in made]))
        free = sum(p.numel() for p in made[0].parameters() if p.requires_grad)
        lines.append(f"| {name} | {free:,} | {found.mean:.3f} ({found.low:.3f} to {found.high:.3f}) | {rate:g} |")
        print(lines[-1], flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
