#!/usr/bin/env python3
"""Make the lab's language model again: a small Llama that reads Python.

    python scripts/ref_lm.py corpus --out out/corpus
    python scripts/ref_lm.py train --data out/corpus --out out/ref-lm --minutes 80
    python scripts/ref_lm.py train --data out/corpus --out out/ref-lm --minutes 160 --resume out/ref-lm.checkpoint
    python scripts/ref_lm.py evaluate out/ref-lm --data out/corpus

Needs torch, transformers, tokenizers and numpy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# ---------------------------------------------------------------- corpus

TRAIN = (
    "stdlib", "torch", "transformers", "numpy", "scipy", "sklearn", "sympy", "datasets", "accelerate", "peft",
    "huggingface_hub", "sentence_transformers", "pandas", "tokenizers", "safetensors",
)  # fmt: skip
HELD_OUT = ("networkx", "jinja2", "fsspec", "filelock", "yaml", "rich", "packaging", "tqdm")
"""Packages that the model never sees."""
SKIP = (
    "site-packages", "/tests/", "/test/", "idle_test", "lib2to3/tests", "ensurepip", "pydoc_data", "_sysconfigdata",
    "_vendor",
)  # fmt: skip
VOCAB, END, PAD = 4096, "<|end|>", "<|pad|>"
PIECES = r"\n[ \t]*| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z_0-9]+|\s+"
"""What a token may span: a line break with its indent, a word, a digit, a run of signs, white space."""
NEW_LINES = 0.6
"""A file is a near-duplicate if less than this share of its longer lines is new."""


def python_files(package: str) -> list[tuple[str, Path]]:
    """Name and path of a package's Python files, tests and vendored copies left out; nothing if it is not installed."""
    if package == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return []
        root = Path(next(iter(spec.submodule_search_locations)))
    named = ((f"/{p.relative_to(root).as_posix()}", p) for p in sorted(root.rglob("*.py")))
    return [(package + name, p) for name, p in named if not any(s in name for s in SKIP)]


def unlike(files: Sequence[tuple[str, Path]], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """Name and text of the files that are mostly new. `seen` holds hashes of lines and grows."""
    for name, path in files:
        try:
            text = path.read_text("utf8")
        except (UnicodeDecodeError, OSError):
            continue
        if not 200 < len(text) < 400_000:
            continue
        longer = (s for line in text.splitlines() if len(s := line.strip()) > 20)
        lines = [hashlib.blake2b(s.encode(), digest_size=8).digest() for s in longer]
        if lines and sum(h not in seen for h in lines) >= NEW_LINES * len(lines):
            seen.update(lines)
            yield name, text


def new_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of at most `VOCAB` tokens; <|end|> is 0, <|pad|> is 1."""
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, PAD]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """All texts as one row of uint16 tokens, <|end|> after each."""
    end = tokenizer.token_to_id(END)
    rows: list[np.ndarray] = []
    for i in range(0, len(texts), 256):
        rows += [np.array([*e.ids, end], dtype=np.uint16) for e in tokenizer.encode_batch(list(texts[i : i + 256]))]
    return np.concatenate(rows)


def write_corpus(
    out: Path, train: Sequence[str], held_out: Sequence[str], *, most: int | None, tokenizer: Path | None
) -> dict[str, Any]:
    """Collect, tokenize and write train.npz, held_out.npz, tokenizer.json and corpus.json, whose content it returns."""
    seen: set[bytes] = set()
    files = [f for name in train for f in python_files(name)]
    random.Random(0).shuffle(files)
    texts = {"train": list(unlike(files, seen))[:most]}
    texts["held_out"] = list(unlike([f for name in held_out for f in python_files(name)], seen))[:most]
    for part, found in texts.items():
        if not found:
            raise SystemExit(f"no Python files for {part}: are the packages installed?")
    words = Tokenizer.from_file(str(tokenizer)) if tokenizer else new_tokenizer([t for _, t in texts["train"][:4000]])
    about: dict[str, Any] = {}
    with folder(out) as stage:
        words.save(str(stage / "tokenizer.json"))
        for part, found in texts.items():
            tokens = encode([t for _, t in found], words)
            np.savez_compressed(stage / f"{part}.npz", tokens=tokens)
            packages = sorted({name.split("/")[0] for name, _ in found})
            size = sum(len(t.encode()) for _, t in found)
            about[part] = {"packages": packages, "files": len(found), "bytes": size, "tokens": len(tokens)}
        (stage / "corpus.json").write_text(json.dumps(about, indent=1) + "\n", "utf8")
    return about


@dataclass(frozen=True)
class Corpus:
    """A corpus folder as it was written."""

    train: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float
    """Of the held-out text."""
    tokenizer: Path

    @classmethod
    def read(cls, path: Path) -> Corpus:
        """The corpus in a folder."""
        if not (path / "corpus.json").exists():
            raise SystemExit(f"{path} holds no corpus: make one with `ref_lm.py corpus --out {path}`")
        about = json.loads((path / "corpus.json").read_text("utf8"))["held_out"]
        parts = [np.load(path / f"{name}.npz")["tokens"] for name in ("train", "held_out")]
        return cls(parts[0], parts[1], about["bytes"] / about["tokens"], path / "tokenizer.json")


class Windows:
    """Windows of length + 1 tokens, each token a target once an epoch; their order depends on the seed alone."""

    def __init__(self, tokens: np.ndarray, length: int, seed: int = 0) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.count = (len(tokens) - 1) // length - 1
        """Windows an epoch: one fewer than fit, so that every epoch can start at another offset."""
        if self.count < 1:
            raise SystemExit(f"{len(tokens)} tokens are too few for windows of {length}")
        self._epoch, self._offset, self._order = -1, 0, np.empty(0, np.int64)

    def batch(self, position: int, size: int) -> Tensor:
        """Windows position, position + 1, ... as int64 [size, length + 1]."""
        return torch.from_numpy(np.stack([self._window(position + i) for i in range(size)]).astype(np.int64))

    def _window(self, position: int) -> np.ndarray:
        epoch, i = divmod(position, self.count)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch, self._offset, self._order = epoch, int(rng.integers(self.length)), rng.permutation(self.count)
        at = self._offset + int(self._order[i]) * self.length
        return self.tokens[at : at + self.length + 1]


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Settings:
    """The recipe. Progress is a share of `tokens`, or of `minutes` of training time summed over resumed runs."""

    tokens: int | None = None
    minutes: float | None = None
    batch: int = 8
    length: int = 512
    lr: float = 4e-3
    warm_up: int = 40
    """Steps of linear warm-up."""
    decay: float = 0.45
    """The share at the end over which the rate falls to zero."""
    seed: int = 0


def config() -> LlamaConfig:
    """The architecture: 7.34 M parameters."""
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        pad_token_id=1,
    )  # fmt: skip


def rate(settings: Settings, step: int, progress: float) -> float:
    """The learning rate's factor: warm up, stay, decay."""
    rest = (1 - progress) / settings.decay if settings.decay else 1.0
    return min(1.0, (step + 1) / settings.warm_up, max(rest, 1e-3))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: with M = U S Vᵀ, W -= lr (0.2 sqrt(max(m, n)) U Vᵀ + decay W).

    U Vᵀ comes from five Newton-Schulz steps, matrices of one shape together; in bfloat16 where that is fast (PyTorch's
    own always is, which costs seconds a step on most CPUs).
    """

    def __init__(self, params: Sequence[Tensor], *, lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                alike.setdefault(p.shape, []).append(p)
            for shape, held in alike.items():
                updates: list[Tensor] = []
                for p in held:
                    mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(mean, group["momentum"]))
                size = 0.2 * math.sqrt(max(shape))
                for p, u in zip(held, orthogonal(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(u.to(p.dtype), alpha=-group["lr"] * size)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ of x [k m n]."""
    x = x.bfloat16() if fast_bfloat16(x.device) else x
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32."""
    return device.type == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def nats(net: Callable[..., Any], batch: Tensor) -> Tensor:
    """Mean negative log likelihood of every token of the windows but the first."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=fast_bfloat16(batch.device)):
        logits = net(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


class Run:
    """A model in training: its weights, its optimizers, and where it is in the data."""

    def __init__(self, corpus: Corpus, settings: Settings, device: str, *, compiled: bool = False) -> None:
        torch.manual_seed(settings.seed)
        self.corpus, self.settings, self.device = corpus, settings, device
        self.model = LlamaForCausalLM(config()).to(device)
        self.net = torch.compile(self.model) if compiled else self.model
        self.data = Windows(corpus.train, settings.length, settings.seed)
        named = dict(self.model.named_parameters())
        matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in named.items() if p.ndim != 2 or "embed" in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=settings.lr),
            torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.steps = self.windows = 0
        self.seconds = 0.0

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.windows * self.settings.length

    @property
    def progress(self) -> float:
        """The share of the run that is done."""
        s = self.settings
        return self.tokens / s.tokens if s.tokens else self.seconds / (60 * (s.minutes or 1))

    def step(self) -> Tensor:
        """One batch. Returns its loss in nats a token."""
        start = time.monotonic()
        s = self.settings
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = s.lr * rate(s, self.steps, self.progress)
        loss = nats(self.net, self.data.batch(self.windows, s.batch).to(self.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for o in self.optimizers:
            o.step()
        self.model.zero_grad(set_to_none=True)
        self.steps += 1
        self.windows += s.batch
        self.seconds += time.monotonic() - start
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write the checkpoint whole."""
        path.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "steps": self.steps,
            "windows": self.windows,
            "seconds": self.seconds,
            "length": self.settings.length,
        }
        part = path / "checkpoint.part"
        with part.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path / "checkpoint.pt")

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        file = path / "checkpoint.pt"
        if not file.exists():
            raise SystemExit(f"{path} holds no checkpoint")
        state = torch.load(file, map_location=self.device, weights_only=True)
        if state["length"] != self.settings.length:
            length = state["length"]
            raise SystemExit(f"the checkpoint was trained on windows of {length} tokens: pass --length {length}")
        self.model.load_state_dict(state["model"])
        for o, held in zip(self.optimizers, state["optimizers"], strict=True):
            o.load_state_dict(held)
        self.steps, self.windows, self.seconds = state["steps"], state["windows"], state["seconds"]


def train(
    run: Run, out: Path, checkpoint: Path, *, every: float = 300, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train to the end and write the model; a checkpoint every `every` seconds, and when interrupted."""
    saved = time.monotonic()
    try:
        while run.progress < 1:
            loss = run.step()
            if run.steps % 100 == 0:
                log(_line(run, float(loss)))
            if time.monotonic() - saved > every:
                run.save(checkpoint)
                saved = time.monotonic()
    except KeyboardInterrupt:
        run.save(checkpoint)
        log(f"stopped at {run.progress:.0%}; go on with --resume {checkpoint}")
        raise SystemExit(130) from None
    run.save(checkpoint)
    bits = bits_per_byte(run.model, run.corpus, run.device)
    about = {
        "held_out_bits_per_byte": round(bits, 4),
        "tokens": run.tokens,
        "steps": run.steps,
        "minutes": round(run.seconds / 60, 1),
        "settings": asdict(run.settings),
    }
    write_model(run.model, run.corpus.tokenizer, out, about)
    return about


def _line(run: Run, loss: float) -> str:
    if not math.isfinite(loss):
        raise SystemExit(f"step {run.steps}: the loss is {loss}; lower --lr")
    speed = run.tokens / max(run.seconds, 1e-9)
    line = f"step {run.steps}  {run.progress:.0%}  {run.tokens / 1e6:.1f} M tokens  {speed:.0f}/s  {loss:.3f} nats"
    if run.steps % 500 == 0:
        line += f"  held-out {bits_per_byte(run.model, run.corpus, run.device, most=32_768):.3f} bits/byte"
    return line


def write_model(model: LlamaForCausalLM, tokenizer: Path, out: Path, about: dict[str, Any]) -> None:
    """The model in bfloat16 and its tokenizer as an ordinary checkpoint, with training.json."""
    with folder(out) as stage:
        small = LlamaForCausalLM(model.config)
        small.load_state_dict(model.state_dict())
        small.to(torch.bfloat16).save_pretrained(stage)
        PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token=END, pad_token=PAD).save_pretrained(stage)
        (stage / "training.json").write_text(json.dumps(about, indent=1) + "\n", "utf8")


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, corpus: Corpus, device: str, *, length: int = 512, most: int | None = None
) -> float:
    """Bits a byte of the held-out text (of its first `most` tokens): every token but the first is predicted once."""
    tokens = torch.from_numpy(corpus.held_out[:most].astype(np.int64))
    training = model.training
    model.eval()
    total = 0.0
    whole = (len(tokens) - 1) // length
    rows = tokens[: whole * length + 1].unfold(0, length + 1, length) if whole else tokens[:0].view(0, length + 1)
    for batch in rows.split(16):
        total += float(nats(model, batch.to(device))) * batch.shape[0] * length
    rest = tokens[whole * length :]
    if len(rest) > 1:
        total += float(nats(model, rest[None].to(device))) * (len(rest) - 1)
    model.train(training)
    return total / max(1, len(tokens) - 1) / corpus.bytes_per_token / math.log(2)


def evaluate(path: Path, corpus: Corpus, device: str, most: int | None) -> float:
    """Bits a byte of a saved model, which must use the corpus's tokenizer."""
    mine, theirs = (Tokenizer.from_file(str(p)).get_vocab() for p in (path / "tokenizer.json", corpus.tokenizer))
    if mine != theirs:
        raise SystemExit(f"{path} has another tokenizer: make the corpus with --tokenizer {path / 'tokenizer.json'}")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    return bits_per_byte(model, corpus, device, most=most)


# ---------------------------------------------------------------- shell


class folder:
    """A folder to write into that takes its place, whole, at the end; an older one is replaced."""

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        self.stage = self.out.with_name(f".{self.out.name}.{os.getpid()}.part")

    def __enter__(self) -> Path:
        self.stage.mkdir(parents=True)
        return self.stage

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is None:
            old = self.stage.with_suffix(".old")
            if self.out.exists():
                self.out.rename(old)
            self.stage.rename(self.out)
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.stage, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description="Make the lab's language model again.")
    commands = top.add_subparsers(dest="command", required=True)

    corpus = commands.add_parser("corpus", help="collect Python source and tokenize it")
    corpus.add_argument("--out", type=Path, required=True, help="folder to write")
    packages: dict[str, Any] = {"nargs": "+", "metavar": "PACKAGE"}
    corpus.add_argument("--train", **packages, default=TRAIN, help="packages to train on, and stdlib")
    corpus.add_argument("--held-out", **packages, default=HELD_OUT, help="packages to test on")
    corpus.add_argument("--files", type=int, help="at most this many files of each")
    corpus.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use instead of a new one")

    fit = commands.add_parser("train", help="train, then write the model in bfloat16")
    fit.add_argument("--data", type=Path, required=True, help="a corpus folder")
    fit.add_argument("--out", type=Path, required=True, help="model folder to write")
    length = fit.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="training time, over all resumed runs")
    length.add_argument("--tokens", type=int, help="tokens to train on, over all resumed runs")
    fit.add_argument("--resume", type=Path, metavar="FOLDER", help="go on from the checkpoint there")
    where = "where to keep checkpoints (default: --resume, or OUT.checkpoint)"
    fit.add_argument("--checkpoint", type=Path, metavar="FOLDER", help=where)
    fit.add_argument("--device", default="cpu", help="cpu or cuda")
    fit.add_argument("--batch", type=int, help="windows a step (default: 8, on cuda 64)")
    fit.add_argument("--length", type=int, default=512, help="tokens a window")
    fit.add_argument("--lr", type=float, default=Settings.lr, help="peak learning rate")
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile (default: on cuda)")

    test = commands.add_parser("evaluate", help="bits per byte on the held-out packages")
    test.add_argument("model", type=Path)
    test.add_argument("--data", type=Path, required=True, help="a corpus folder")
    test.add_argument("--device", default="cpu")
    test.add_argument("--tokens", type=int, help="only the first so many tokens")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command."""
    a = parser().parse_args(argv)
    if a.command == "corpus":
        about = write_corpus(a.out, a.train, a.held_out, most=a.files, tokenizer=a.tokenizer)
        for part, d in about.items():
            size = f"{d['files']} files, {d['bytes'] / 1e6:.1f} MB, {d['tokens'] / 1e6:.2f} M tokens"
            print(f"{part}: {size} of {', '.join(d['packages'])}")
    elif a.command == "train":
        cuda = a.device.startswith("cuda")
        settings = Settings(a.tokens, a.minutes, a.batch or (64 if cuda else 8), a.length, a.lr, seed=a.seed)
        torch.set_float32_matmul_precision("high")
        run = Run(Corpus.read(a.data), settings, a.device, compiled=cuda if a.compile is None else a.compile)
        if a.resume:
            run.resume(a.resume)
        checkpoint = a.checkpoint or a.resume or a.out.with_name(f"{a.out.name}.checkpoint")
        about = train(run, a.out, checkpoint, log=lambda line: print(line, flush=True))
        print(f"{a.out}: {about['held_out_bits_per_byte']} bits/byte after {about['tokens'] / 1e6:.1f} M tokens")
    else:
        print(f"{evaluate(a.model, Corpus.read(a.data), a.device, a.tokens):.4f} bits/byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
