"""A training step and its memory beside peft or Unsloth: LoRA, DoRA, IA3, and LoRA on 4-bit NormalFloat, in one run.

    python benchmarks/train_step.py [--model ref-lm] [--peer peft] [--rounds 10] [--length 512] [--only lora] [--markdown FILE]

Both adapt the same model with the same tensors, in float32: a step is a forward pass, a backward pass and one of AdamW, on one
thread, the two timed in turns by the process's own clock; the ratio is the geometric mean over rounds with its 95 % interval. Memory is
the peak of what a process of its own holds beyond what it held before the step and no file backs, in steps alone: the median of some
processes, which differ by a few percent. `qwen3-0.6b`: random weights of that model's shapes, a quarter of its layers. Time to the first
step is of a process from its start, imports and all.

Beside NF4 + LoRA stands peft's LoRA on the NF4 weights of bitsandbytes, where that is installed, else on dense weights; `make bench-peers`
makes such an environment: `PYTHONPATH=. .venv-peers/bin/python benchmarks/train_step.py`.

`--peer unsloth`, where that is installed: what it has without a GPU, all but IA3. It changes transformers when it is imported, so both
have a process of their own, and take turns step by step. Steps take the losses of `weft.train` and of Unsloth's trainer, which make a
part of the logits at once; peft's takes the model's own, as transformers' trainer does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

Step = Callable[[], object]
RANK = 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WAYS = ("lora", "dora", "ia3", "nf4 + lora")
BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def plain(name: str) -> nn.Module:
    """The model, as transformers has it."""
    if name == "qwen3-0.6b":
        torch.manual_seed(0)
        size = {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        }
        config = transformers.Qwen3Config(**size, num_hidden_layers=7, vocab_size=151936, tie_word_embeddings=True)
        return transformers.Qwen3ForCausalLM(config)
    from weft.lab import models

    return transformers.AutoModelForCausalLM.from_pretrained(models.resolve(name), dtype=torch.float32)


def ours(name: str, way: str) -> nn.Module:
    """The model with this adapter, by weft."""
    import weft

    model = weft.weave(plain(name))
    if way.startswith("nf4"):
        weft.apply(model, "nf4", at="all-linear")
    if way == "ia3":
        weft.apply(model, "ia3")
    else:
        weft.apply(model, "lora", rank=RANK, magnitude=way == "dora")
    return model


def theirs(name: str, way: str) -> nn.Module:
    """The model with this adapter, by peft."""
    import peft

    if way == "ia3":
        where = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        return peft.get_peft_model(plain(name), peft.IA3Config(**where))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR, use_dora=way == "dora")
    return peft.get_peft_model(rounded(name) if way.startswith("nf4") and BITSANDBYTES else plain(name), config)


def unsloth(name: str, way: str) -> nn.Module:
    """The model with this adapter, by Unsloth, which is imported before transformers; its loss is that of its trainer."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    from weft.lab import models

    with tempfile.TemporaryDirectory() as folder:
        plain(name).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(models.resolve("ref-lm")).save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(folder, dtype=torch.float32, load_in_4bit=way.startswith("nf4"))
    how = {"lora_alpha": RANK, "use_dora": way == "dora", "use_gradient_checkpointing": False}
    model = FastLanguageModel.get_peft_model(model, r=RANK, target_modules=LINEAR, **how)
    model.config.use_cache = False
    for module in model.modules():
        if "_unsloth_cpu_chunked_ce" in vars(module):
            module._unsloth_cpu_chunked_ce_active = True  # in other steps than its trainer's it is off
    return model


SIDES = {"ours": ours, "theirs": theirs, "unsloth": unsloth}


def rounded(name: str) -> nn.Module:
    """The model with NF4 weights, by bitsandbytes."""
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    with tempfile.TemporaryDirectory() as folder:
        plain(name).save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, **how),
            dtype=torch.float32,
            device_map={"": "cpu"},
        )


def step_of(model: nn.Module, length: int, side: str) -> Step:
    """A step of training on one row of tokens: weft's with the loss of `weft.train`, others' with what the model gives."""
    from weft.learn.likelihood import likelihood_of

    free = [p for p in model.parameters() if p.requires_grad]
    moves = torch.optim.AdamW(free, lr=1e-3)
    words = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    ids = torch.randint(0, words, (1, length), generator=torch.Generator().manual_seed(0))
    model.train()
    likelihood = likelihood_of(model) if side == "ours" else None

    def step() -> None:
        if likelihood is None:
            loss = model(input_ids=ids, labels=ids).loss
        else:
            loss = likelihood(model, {"input_ids": ids}, ids, None, 0.0)
        loss.backward()
        moves.step()
        moves.zero_grad()

    return step


def times(name: str, way: str, length: int, rounds: int, side: str = "theirs") -> dict[str, float]:
    """Both in this process, in turns; beside Unsloth in processes of their own."""
    from weft.lab.timing import paired

    if side == "unsloth":
        held = [Apart(name, way, length, s) for s in ("ours", side)]
        found = paired(held[0].step, held[1].step, rounds=rounds, warm=2, clock=lambda: sum(h.spent for h in held))
        for h in held:
            h.process.kill()
    else:
        both = [step_of(SIDES[s](name, way), length, s) for s in ("ours", side)]
        found = paired(both[0], both[1], rounds=rounds, warm=2, clock=time.process_time)
    r = found.ratio
    return {"ours": found.ours, "peft": found.baseline, "ratio": r.mean, "low": r.low, "high": r.high}


def code(side: str, call: str) -> list[str]:
    """A command that makes this call of a function here."""
    first = "import unsloth; " if side == "unsloth" else ""
    here = str(Path(__file__).parent)
    return [sys.executable, "-c", f"{first}import sys; sys.path.insert(0, {here!r}); import train_step as t; {call}"]


class Apart:
    """A process that takes a step when it is asked to."""

    def __init__(self, name: str, way: str, length: int, side: str) -> None:
        command = code(side, f"t.serve({name!r}, {way!r}, {length}, {side!r})")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.spent = 0.0

    def step(self) -> None:
        """A step, whose processor time is added to `spent`."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        while not (said := self.process.stdout.readline()).startswith("took "):
            if not said:
                raise SystemExit("a process that takes steps has ended")
        self.spent += float(said.split()[1])


def serve(name: str, way: str, length: int, side: str) -> None:
    """Take a step for every line that is read, and tell the processor time that it took."""
    torch.set_num_threads(1)
    step = step_of(SIDES[side](name, way), length, side)
    for _ in sys.stdin:
        begun = time.process_time()
        step()
        print(f"took {time.process_time() - begun}", flush=True)


def memory(name: str, way: str, length: int, side: str) -> int:
    """The peak that steps add, in a process of its own."""
    command = code(side, f"print(t.peak({name!r}, {way!r}, {length}, {side!r}))")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def peak(name: str, way: str, length: int, side: str) -> int:
    """What this process holds at most beyond imports and the plain model, while it trains."""
    from weft.lab.timing import anonymous
    from weft.memory import release

    torch.set_num_threads(1)
    model = SIDES[side](name, way)
    step, most, done = step_of(model, length, side), [0], threading.Event()
    release(models=True)  # what making the model left behind is no room for the step
    before = anonymous()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    for _ in range(3):
        step()
    done.set()
    watching.join()
    return most[0] - before


def first(name: str, way: str, length: int, side: str) -> float:
    """Seconds from a process's start to the end of its first step."""
    command = code(
        side, f"t.torch.set_num_threads(1); t.step_of(t.SIDES[{side!r}]({name!r}, {way!r}), {length}, {side!r})()"
    )
    begun = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="ref-lm")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--tries", type=int, default=5, help="processes that memory is the median of")
    options.add_argument("--peer", choices=("peft", "unsloth"), default="peft")
    options.add_argument("--only", nargs="+", choices=WAYS)
    options.add_argument("--markdown", type=Path, help="write the table here, too")
    given = options.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    heads = [
        "adapter",
        *(f"{who}, {what}" for what in ("s a step", "MB", "first step s") for who in ("weft", given.peer)),
    ]
    heads.insert(3, "ratio, 95 %")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    peer = "theirs" if given.peer == "peft" else given.peer
    for way in given.only or (w for w in WAYS if given.peer == "peft" or w != "ia3"):
        t = times(given.model, way, given.length, given.rounds, peer)
        held = {
            side: statistics.median(memory(given.model, way, given.length, side) / 1e6 for _ in range(given.tries))
            for side in ("ours", peer)
        }
        start = {side: first(given.model, way, given.length, side) for side in ("ours", peer)}
        lines.append(
            f"| {way} | {t['ours']:.3f} | {t['peft']:.3f} | {t['ratio']:.3f} ({t['low']:.3f} to {t['high']:.3f}) | {held['ours']:.0f} "
            f"| {held[peer]:.0f} | {start['ours']:.1f} | {start[peer]:.1f} |"
        )
        print(lines[-1], flush=True)
        print(json.dumps({"adapter": way, **t, **held}), file=sys.stderr)
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
