"""Try every adapter on every base through every stage of its life, against a float64 oracle, and write docs/adapters.md.

    python scripts/adapters.py [--check]

The oracle is the reader of docs/files.md, in numpy: what it makes of the tensors that are saved, in a plain model of float64.
A cell is right (every stage's promise was measured), refused (a WeftError; the reasons are listed), or wrong. `--check` tries
nothing: it only compares the page's rows and columns with the adapters and bases that exist.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from refusals import Reasons
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import weft
from weft.engine import get, names
from weft.error import ConflictError
from weft.expr import Dense, Expr, spec, tensors
from weft.model import branches, expressions, fingerprint, fork, places, set_expressions

DOCS = Path(__file__).parent.parent / "docs"
OUT = DOCS / "adapters.md"
N = 32
IDS = torch.randint(3, 96, (3, 8), generator=torch.Generator().manual_seed(1))
HEAD = """# Adapters on bases

Written by `python scripts/adapters.py`, which puts every adapter on every base of a small Llama and follows it through its life:
{stages}. A number says how many of the {count} stages are right, measured against an independent reading of the saved
tensors in float64; the letters say why others are refused, or not tried, with the reasons below. A wrong result or a crash would stand
here as `WRONG`.

"""

Steps = list[tuple[str, dict[str, Any]]]
BASES: dict[str, Steps] = {
    "fp32": [],
    "bf16": [],
    "int8": [("rtn", {"bits": 8, "group": 0})],
    "int4": [("rtn", {"bits": 4, "group": 16, "symmetric": False})],
    "nf4": [("nf4", {"group": 16, "double": True})],
    "fp8": [("mx", {"format": "mxfp8_e4m3"})],
    "mxfp4": [("mx", {"format": "mxfp4"})],
    "2:4": [("magnitude", {"pattern": "2:4"})],
    "50 %": [("magnitude", {"sparsity": 0.5})],
    "low rank": [("svd", {"keep": 0.8})],
    "int4 + low rank": [("rtn", {"bits": 4, "group": 16}), ("svd_residual", {"rank": 3})],
    "2:4 int4": [("magnitude", {"pattern": "2:4"}), ("rtn", {"bits": 4, "group": 16})],
}
"""int8: a scale a row; int4: groups of 16 with zero points; nf4: with double quantization; fp8 and mxfp4: OCP MX."""


@dataclass(frozen=True)
class Way:
    """A method with options: an adapter."""

    method: str
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Its name, and the options that make it another."""
        apart = {k: v for k, v in self.options.items() if v != SMALL.get(k)}
        shown = [str(v) if isinstance(v, str) else f"{k} {v}" if type(v) is int else k for k, v in apart.items()]
        return " ".join([self.method, *shown])


NAME = "default"
"""What adapters are called."""
SMALL = {
    "rank": 3,
    "features": 5,
    "width": 4,
    "length": 3,
    "count": 40,
    "block": 4,
    "factor": 4,
    "share": 0.5,
    "window": 4,
}
"""What options are called by which an adapter is made small, and the values they have here."""
SPECIAL: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {}, {"scaling": "root", "alpha": 3.0}, {"magnitude": True},
        *({"init": i} for i in ("pissa", "olora", "eva", "corda", "corda_last", "loftq", "lq")),
        {"init": "pissa", "magnitude": True},
    ],
    "lokr": [{}, {"rank": 2}],
    "bottleneck": [{}, {"form": "sequential"}],
    "lofit": [{"share": 1.0}],
}  # fmt: skip
"""Adapters with options that make them others."""


def ways() -> list[Way]:
    """Every adapter: of the verb adapt what is not for norms and biases alone, and does not train all weights."""
    held = [n for n in names() if get(n).verb == "adapt" and n not in ("full", "bitfit", "layernorm")]
    made: list[Way] = []
    for name in held:
        fields = get(name).options.model_fields
        small = {k: v for k, v in SMALL.items() if k in fields and not (name == "lokr" and k == "rank")}
        made += [Way(name, {**small, **more}) for more in SPECIAL.get(name, [{}])]
    return made


# --------------------------------------------------------------------------------------------------------------- oracle


@functools.cache
def reader() -> dict[str, Any]:
    """What the reader in docs/files.md defines."""
    text = (DOCS / "files.md").read_text("utf8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(code, "files.md", "exec"), space)
    return space


def read(e: Expr) -> Tensor:
    """The value of an expression as that reader makes it of its tensors, in float64."""
    held = {k: t.detach().double() if t.is_floating_point() else t.detach() for k, t in tensors(e).items()}
    return torch.as_tensor(reader()["value"](spec(e), lambda path: held[path].numpy())).double()


def oracle(m: nn.Module) -> Tensor:
    """The logits in float64 of the model whose weights that reader makes, with the branches that the model has."""
    other = fork(m)
    for name, e in expressions(other).items():
        set_expressions(other, {name: Dense(read(e))})
    return logits(other.double())


def logits(m: nn.Module) -> Tensor:
    with torch.no_grad():
        return m.eval()(input_ids=IDS).logits


def loss_of(m: nn.Module) -> Tensor:
    """Cross-entropy of the next tokens, in the model's dtype."""
    return F.cross_entropy(m(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def exactly(norm: nn.Module, x: Tensor) -> Tensor:
    """The norms' forward without the step through float32, so that float64 is."""
    return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def near(a: Tensor, b: Tensor, by: float = 3e-5) -> bool:
    return float((a.double() - b.double()).abs().max()) <= by * float(b.abs().max())


# --------------------------------------------------------------------------------------------------------------- stages


def added(base: nn.Module, way: Way) -> nn.Module:
    """A fork of the base with the adapter."""
    m = fork(base)
    weft.apply(m, way.method, data=str(TEXTS), tokens=128, cache=CACHE, **way.options)
    return m


def shaken(m: nn.Module, seed: int = 4, by: float = 0.03) -> nn.Module:
    """With what trains as if it had been trained."""
    rng = torch.Generator().manual_seed(seed)
    for p in m.parameters():
        if p.requires_grad:
            p.data += by * torch.randn(p.shape, generator=rng)
    return m


def base_bits(m: nn.Module) -> dict[str, Tensor]:
    """Every frozen tensor of every weight that no adapter has."""
    return {
        f"{n}:{k}": t.detach().clone()
        for n, e in expressions(m).items()
        for k, t in tensors(e).items()
        if not t.requires_grad and "adapter:" not in k
    }


def attaches(base: nn.Module, way: Way) -> bool:
    """The model gives what the oracle gives; an adapter that starts at nothing leaves the output and the bits of the base."""
    m = added(base, way)
    good = near(logits(m), oracle(m))
    if way.options.get("init") in ("loftq", "lq") or way.method in ("prompt", "prefix", "cpt", "lofit", "generative"):
        return good
    return good and near(logits(m), logits(base))


def trains(base: nn.Module, way: Way) -> bool:
    """A step moves what trains and nothing else, and the gradient is the loss's slope, measured in float64 along one direction."""
    m = shaken(added(base, way))
    free, fixed = [p for p in m.parameters() if p.requires_grad], base_bits(m)
    m.train()
    loss_of(m).backward()
    grads = [p.grad.double() for p in free if p.grad is not None]
    if len(grads) != len(free):
        return False
    rng = torch.Generator().manual_seed(9)
    way_ = [torch.randn(p.shape, generator=rng).double() for p in free]
    slope = sum(float((g * w).sum()) for g, w in zip(grads, way_, strict=True))
    measured = _slope(m, way_, 1e-6)
    torch.optim.SGD(free, lr=0.1).step()
    still = all(torch.equal(t, base_bits(m)[k]) for k, t in fixed.items())
    exact = (
        way.options.get("magnitude") is None and way.method != "lofit"
    )  # lengths are constants, a penalty is no loss
    return still and abs(slope) > 0 and (not exact or abs(measured - slope) <= 1e-3 * max(abs(slope), 0.1))


def _slope(m: nn.Module, way_: list[Tensor], step: float) -> float:
    """The loss's slope along a direction of what trains, by central differences in float64."""
    sides: list[float] = []
    for sign in (1, -1):
        other = fork(m).double()
        for p, w in zip([p for p in other.parameters() if p.requires_grad], way_, strict=True):
            p.data += sign * step * w
        with torch.no_grad():
            sides.append(float(loss_of(other.eval())))
    return (sides[0] - sides[1]) / (2 * step)


def saves(base: nn.Module, way: Way) -> bool:
    """What is loaded holds the same to the last bit, and gives the same."""
    m = shaken(added(base, way))
    with tempfile.TemporaryDirectory() as place:
        weft.save(m, Path(place) / "saved")
        back = weft.load(Path(place) / "saved", dtype=torch.float32)
        return fingerprint(back) == fingerprint(m) and near(logits(back), logits(m), 1e-6)


def combines(base: nn.Module, way: Way) -> bool:
    """With another adapter beside it the model is what the oracle says."""
    m = shaken(added(base, way))
    weft.apply(m, "lora", name="other", rank=2)
    shaken(m, 5)
    return near(logits(m), oracle(m))


def blends(base: nn.Module, way: Way) -> bool:
    """At a strength of its own it is what the oracle says, and as a blend with another one the same."""
    m = shaken(added(base, way))
    weft.apply(m, "lora", name="other", rank=2)
    shaken(m, 5)
    weights = {NAME: 0.5, "other": -2.0}
    weft.activate(m, weights)
    both = logits(m)
    weft.blend_adapters(m, weights, "blend")
    weft.activate(m, "blend")
    return near(both, oracle(m)) and near(logits(m), both)


def merges(base: nn.Module, way: Way) -> bool:
    """One plain matrix a weight, with the same output."""
    m = _in_weights(shaken(added(base, way)))
    want = oracle(m)
    weft.merge(m, to="dense")
    return near(logits(m), want, 2e-2 if float_bits(m) == 16 else 3e-5)


def float_bits(m: nn.Module) -> int:
    """Bits of the checkpoint's floats, to which a merge rounds."""
    return 16 if any(p.dtype == torch.bfloat16 for p in places(m).values()) else 32


def regrids(base: nn.Module, way: Way) -> bool:
    """One rounding onto the base's own grid, whose loss is told."""
    m = _in_weights(shaken(added(base, way)))
    values = {n: read(e) for n, e in expressions(m).items()}
    told = weft.merge(m, to="grid", at=["*self_attn.k_proj*", "*mlp.down_proj*"])
    gaps = {c.name: float((read(expressions(m)[c.name]) - values[c.name]).norm() / values[c.name].norm()) for c in told}
    return bool(told) and all(c.error is not None and abs(c.error - gaps[c.name]) <= 1e-4 for c in told)


def undoes(base: nn.Module, way: Way) -> bool:
    """After a merge is undone the model is what it was, to the bit."""
    m = _in_weights(shaken(added(base, way)))
    before, was = logits(m), fingerprint(m)
    weft.merge(m, to="dense").undo()
    return fingerprint(m) == was and torch.equal(logits(m), before)


def leaves(base: nn.Module, way: Way) -> bool:
    """Deleted, it leaves the base's output, to the bit."""
    m = shaken(added(base, way))
    if way.options.get("init") in ("loftq", "lq"):
        raise _not_for(way.title, "it has rounded the base anew")
    weft.delete_adapter(m, NAME)
    return torch.equal(logits(m), logits(base))


def _in_weights(m: nn.Module) -> nn.Module:
    if branches(m):
        raise _not_for(branches(m)[0].describe(), "a branch is no part of a weight")
    return m


def _not_for(where: str, what: str) -> weft.WeftError:
    return ConflictError(f"not tried: {what}", where=where, got="", want="", fix="")


STAGES: dict[str, Callable[[nn.Module, Way], bool]] = {
    "attach": attaches, "train": trains, "save and load": saves, "combine": combines, "weigh and blend": blends, "merge": merges,
    "merge to the grid": regrids, "undo": undoes, "delete": leaves,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- trying

CACHE = Path(tempfile.gettempdir()) / "unset"
TEXTS = CACHE


def model(dtype: torch.dtype) -> nn.Module:
    """A small Llama, the same every time, in this dtype."""
    torch.manual_seed(0)
    size = {
        "hidden_size": N,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 96,
    }
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_key_value_heads=4)).eval()
    return made.to(dtype).float() if dtype == torch.bfloat16 else made


def based(folder: Path, name: str) -> nn.Module:
    """The model on this base, in float32; bf16: of a checkpoint in bfloat16."""
    place = folder / ("half" if name == "bf16" else "full")
    m = weft.load(place, dtype=torch.float32)
    for method, options in BASES[name]:
        weft.apply(m, method, at="all-linear", **options)
    return m


def written(folder: Path) -> None:
    """The checkpoints, with a tokenizer and texts to calibrate on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    for name, dtype in {"full": torch.float32, "half": torch.bfloat16}.items():
        torch.manual_seed(0)
        model(dtype).to(dtype).save_pretrained(folder / name)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2"
        )
        tokenizer.save_pretrained(folder / name)
    rng = torch.Generator().manual_seed(2)
    rows = [" ".join(f"w{i}" for i in torch.randint(3, 96, (24,), generator=rng).tolist()) for _ in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))


def cell(base: nn.Module, way: Way, reasons: Reasons) -> str:
    """How many stages are right and the letters of those that are refused, or WRONG with the stages that are."""
    right, letters, wrong = 0, list[str](), list[str]()
    for name, stage in STAGES.items():
        try:
            if stage(base, way):
                right += 1
            else:
                wrong.append(name)
        except weft.WeftError as e:
            letters.append(reasons(e))
        except Exception as e:
            print(f"{way.title}, {name}: {type(e).__name__}: {e}", file=sys.stderr)
            wrong.append(name)
    if wrong:
        return f"WRONG: {', '.join(wrong)}"
    return f"{right}{''.join(f' {x}' for x in dict.fromkeys(letters))}"


def page(chosen: list[Way], bases: list[str]) -> tuple[str, int, int]:
    """The page, how many cells are wrong, and how many there are."""
    global CACHE, TEXTS
    reasons, wrong, count = Reasons(), 0, 0
    lines = [f"| adapter | {' | '.join(bases)} |", f"| --- {'| :-: ' * len(bases)}|"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        CACHE, TEXTS = folder / "cache", folder / "texts.jsonl"
        written(folder)
        held = {name: based(folder, name) for name in bases}
        for way in chosen:
            cells = [cell(held[name], way, reasons) for name in bases]
            wrong, count = wrong + sum("WRONG" in c for c in cells), count + len(cells)
            lines.append(f"| {way.title} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr)
    told = ["", "## The stages", ""] + [f"- **{n}**: {(s.__doc__ or '').splitlines()[0]}" for n, s in STAGES.items()]
    told += ["", "## The bases", "", f"{BASES_SAY}", "", "## The letters", ""]
    told += [f"- **{letter}**: {what}." for what, letter in reasons.of.items()] or ["None."]
    head = HEAD.format(stages=", ".join(STAGES), count=len(STAGES))
    return head + "\n".join([*lines, *told, ""]), wrong, count


BASES_SAY = """int8 has a scale a row, int4 groups of 16 columns with zero points, nf4 double-quantized scales; fp8 and mxfp4 are
OCP MX formats."""


def covers(text: str) -> list[str]:
    """What exists and is not on the page."""
    held = [f"| {w.title} |" for w in ways()] + [f"| {b} |" for b in BASES if f" {b} |" not in text]
    return [h for h in held if h not in text] + ["WRONG"] * text.count("WRONG:")


def main() -> int:
    """Write or check the page; 1 if a cell is wrong or something is missing."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="only compare the page with what exists")
    options.add_argument("--only", help="adapters whose name begins so, and write nothing")
    given = options.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    LlamaRMSNorm.forward = exactly  # type: ignore[method-assign]
    if given.check:
        missing = covers(OUT.read_text("utf8"))
        if missing:
            print(f"{OUT.name} lacks these: run python scripts/adapters.py (minutes)", *missing, sep="\n")
        return bool(missing)
    chosen = [w for w in ways() if w.title.startswith(given.only or "")]
    text, wrong, count = page(chosen, list(BASES))
    if given.only is None:
        OUT.write_text(text, "utf8")
    print(f"{OUT}: {wrong} of {count} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
