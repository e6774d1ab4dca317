"""Try every rewrite on every node through every stage of a model's life, and write docs/composition.md.

    python scripts/composition.py [--check]

A cell is right (what the stage promises was measured), refused (a WeftError; the reasons are listed), or wrong. `--check`
tries nothing: it only compares the page's rows and columns with the nodes, methods and stages that exist.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from refusals import Reasons
from torch import Tensor, nn

import weft
from weft.engine import get, names
from weft.engine.run import Step, apply
from weft.expr import NODES, Codebook, Dense, Expr, LowRank, Signs, SparseDelta, Sum, total
from weft.model import expressions, fingerprint, fork, set_expressions, unweave, weave
from weft.stats import Stats, collect

OUT = Path(__file__).parent.parent / "docs" / "composition.md"
SITE = "model.layers.0.self_attn.o_proj.weight"
N = 32
IDS = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(1))
REWRITES = [n for n in names() if get(n).kind == "rewrite" and "matrix" in get(n).sites]
HEAD = """# What goes with what

Written by `python scripts/composition.py`, which tries every rewrite (of those that go to all weights) on every node, then every
stage of a model's life. `+` is right: the promise in the stage's column was measured. A letter is a refusal, before anything
changed, with the reason below. There is nothing else: a wrong result or a crash would stand here as `WRONG`.

"""


def model() -> nn.Module:
    """A tiny language model, the same every time."""
    torch.manual_seed(0)
    size = {
        "hidden_size": N,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 96,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_key_value_heads=4)).eval()


def logits(m: nn.Module) -> Tensor:
    with torch.no_grad():
        return m.eval()(input_ids=IDS).logits


def near(a: Tensor, b: Tensor, by: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= by * float(b.abs().max())


# ---------------------------------------------------------------------------------------------------------------- nodes


def made(node: str, w: Tensor) -> Expr:
    """An expression with this node as (or in) its base, near w where the node can be."""
    by_method = {"Quantized": ("rtn", {}), "Masked": ("magnitude", {}), "NM": ("magnitude", {"pattern": "2:4"})}
    if node in by_method:
        m = weave(model())
        set_expressions(m, {SITE: Dense(w)})
        apply(m, [Step.of(by_method[node][0], **by_method[node][1])], at=SITE)
        return expressions(m)[SITE]
    rng = torch.Generator().manual_seed(2)
    thin = LowRank(0.1 * torch.randn(N, 3, generator=rng), 0.1 * torch.randn(3, N, generator=rng))
    match node:
        case "Dense":
            return Dense(w)
        case "Codebook":
            books = w.flatten().sort()[0][:: N * N // 16][:16].view(1, 16, 1)
            return Codebook.of((w.unsqueeze(-1) - books.view(1, 1, 16)).abs().argmin(-1).unsqueeze(-1), books, N)
        case "SoftQuantized":
            return NODES[node](w, w.abs().amax(1, keepdim=True) / 7, 4, 0)
        case "SparseDelta":
            return SparseDelta.of(w, w.abs() > w.abs().median())
        case "Signs":
            return Signs.of(w.sign() * (w.abs() > w.abs().median()), w.std())
        case "Sum":
            return total({"base": Dense(w), "adapter:given": thin})
        case "Routed":
            router = torch.randn(2, N, generator=rng)
            return Sum({"base": Dense(w), "adapter:given": NODES[node](router, [thin, thin.rebuild()], 1)})
        case "Product":
            return NODES[node](NODES["Diagonal"](1 + 0.1 * torch.rand(N, generator=rng)), Dense(w))
        case "Named":
            side = NODES["Diagonal"](1 + 0.1 * torch.rand(N, generator=rng))
            return NODES["Product"](Dense(w), NODES[node](side, "given"))
        case "Gated":
            return Sum({"base": Dense(w), "adapter:given": NODES[node](torch.full((1,), 0.5), thin)})
        case "Entrywise":
            return NODES[node]([Dense(w), Dense(1 + 0.1 * torch.rand(N, N, generator=rng))])
        case "WeightNorm":
            return NODES[node](1 + 0.1 * torch.rand(N, generator=rng), Sum({"base": Dense(w), "adapter:given": thin}))
        case _:
            return _plain(node, rng)


def _plain(node: str, rng: torch.Generator) -> Expr:
    """Of the nodes that a matrix is not made of: random numbers."""
    thin: dict[str, Callable[[], Expr]] = {
        "LowRank": lambda: NODES[node](torch.randn(N, 8, generator=rng) / 8, torch.randn(8, N, generator=rng) / 8),
        "Kronecker": lambda: NODES[node](torch.randn(4, 4, generator=rng) / 4, torch.randn(8, 8, generator=rng) / 4),
        "Diagonal": lambda: NODES[node](torch.rand(N, generator=rng)),
        "Permutation": lambda: NODES[node](torch.randperm(N, generator=rng).int()),
        "Hadamard": lambda: NODES[node].of(torch.ones(N)),  # type: ignore[attr-defined]
        "Blocks": lambda: NODES[node](Dense(torch.randn(N, 8, generator=rng) / 4), 4),
        "Basis": lambda: NODES[node](torch.randn(6, generator=rng) / 20, "random", 1, N, N),
        "Cosines": lambda: NODES[node](
            torch.randn(6, generator=rng) / 20, *(torch.randint(0, N, (2, 6), generator=rng).int()), N, N
        ),
        "Cayley": lambda: NODES[node](torch.randn(4, 28, generator=rng) / 4, 8),
        "Mixed": lambda: NODES[node](
            torch.randn(2, N, 8, generator=rng) / 8,
            torch.randn(2, 8, N, generator=rng) / 8,
            torch.randn(2, 2, generator=rng),
        ),
    }
    if node not in thin:
        raise SystemExit(f"scripts/composition.py knows no example of the node {node}: add one to `made`")
    return thin[node]()


# --------------------------------------------------------------------------------------------------------------- stages


def runs(m: nn.Module, work: Path) -> bool:
    """The output is that of the weight's value (or, of what has none, finite), with gradients for the input."""
    e = expressions(m)[SITE]
    x = torch.randn(5, N, generator=torch.Generator().manual_seed(3)).requires_grad_()
    tap = weft.model.taps(m).get(SITE)
    y = e(x)
    y.square().sum().backward()
    good = bool(torch.isfinite(logits(m)).all()) and x.grad is not None and tap is tap
    return good and (not e.is_matrix or near(y, x @ e.dense().detach().float().T))


def saves(m: nn.Module, work: Path) -> bool:
    """What is loaded is the same to the last bit."""
    weft.save(m, work / "saved")
    back = weft.load(work / "saved")
    return fingerprint(back) == fingerprint(m) and torch.equal(logits(back), logits(m))


def copies(m: nn.Module, work: Path) -> bool:
    """A fork and a deep copy are equal, and changing them leaves the model as it was."""
    was = fingerprint(m)
    for other in (fork(m), copy.deepcopy(m)):
        if fingerprint(other) != was:
            return False
        set_expressions(other, {SITE: Dense(torch.zeros(N, N))})
    return fingerprint(m) == was


def _adapted(m: nn.Module) -> None:
    """Add an adapter that changes something."""
    apply(m, [Step.of("lora", rank=2, name="more")], at=SITE)
    rng = torch.Generator().manual_seed(4)
    for n, p in m.named_parameters():
        if n.endswith("adapter:more.b"):
            p.data = 0.02 * torch.randn(p.shape, generator=rng)


def trains(m: nn.Module, work: Path) -> bool:
    """After one more adapter, a step moves adapters, and what trained before, alone."""
    own = {id(p) for p in m.parameters() if p.requires_grad}
    apply(m, [Step.of("lora", rank=2, name="more")], at=SITE)
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    free = [p for p in m.parameters() if p.requires_grad]
    m(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(free, lr=1.0).step()
    moved = {n: p for n, p in m.named_parameters() if not torch.equal(p, before[n])}
    return bool(moved) and all("adapter:" in n or id(p) in own for n, p in moved.items())


def speeds(m: nn.Module, work: Path) -> bool:
    """On dense copies the output stays."""
    before = logits(m)
    weft.mode(m, "speed")
    return near(logits(m), before)


def merges(m: nn.Module, work: Path) -> bool:
    """With a trained adapter: one plain matrix, the same output."""
    _adapted(m)
    before = logits(m)
    weft.merge(m, to="dense", at=SITE)
    return isinstance(expressions(m)[SITE], Dense) and near(logits(m), before)


def regrids(m: nn.Module, work: Path) -> bool:
    """With a trained adapter: one rounding onto the base's own grid, no sum left, and the loss is told."""
    _adapted(m)
    value = expressions(m)[SITE].dense().detach()
    (told,) = weft.merge(m, to="grid", at=SITE)
    now = expressions(m)[SITE]
    gap = float((now.dense() - value).norm() / value.norm())
    return not isinstance(now, Sum) and now.is_matrix and 0 < gap < 0.5 and abs(told.error - gap) < 1e-3


def unweaves(m: nn.Module, work: Path) -> bool:
    """A plain model with the same output."""
    before = logits(m)
    return near(logits(unweave(m)), before)


def exports(m: nn.Module, work: Path) -> bool:
    """transformers reads it to the same output, up to the checkpoint's dtype."""
    weft.export(m, work / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(work / "hf", dtype=torch.float32)
    return near(logits(back), logits(m), 1e-4)


def pefts(m: nn.Module, work: Path) -> bool:
    """Attached to what it was made for, the adapters give the same output."""
    weft.export(m, work / "adapter", to="peft", base=work / "rest")
    base = weft.load(work / "rest" if (work / "rest").exists() else work.parent / "base")
    weft.attach(base, work / "adapter", unverified_base=True)
    return near(logits(base), logits(m), 1e-3)


def packs(m: nn.Module, work: Path) -> bool:
    """A folder of the format is written."""
    weft.export(m, work / "packed", to="compressed-tensors")
    return (work / "packed" / "config.json").exists()


STAGES: dict[str, Callable[[nn.Module, Path], bool]] = {
    "run": runs, "save": saves, "copy": copies, "train": trains, "speed": speeds, "merge": merges, "merge to grid": regrids,
    "unweave": unweaves, "hf": exports, "peft": pefts, "compressed": packs,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- trying


def cell(act: Callable[[], bool], reasons: Reasons) -> str:
    """`+`, the letter of a refusal, or WRONG."""
    try:
        return "+" if act() else "WRONG"
    except weft.WeftError as e:
        return reasons(e)
    except Exception as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return "WRONG"


def row(start: nn.Module, rewrite: str, stats: Stats, folder: Path, reasons: Reasons) -> list[str]:
    """The rewrite, then every stage after it; each stage on a fork of its own."""
    m, was = fork(start), fingerprint(start)
    options = {k: v for k, v in (("group", 8), ("rank", 4)) if k in get(rewrite).options.model_fields}

    def rewrites() -> bool:
        apply(m, [Step.of(rewrite, **options)], at=SITE, stats=stats)
        return expressions(m)[SITE].shape == (N, N) and fingerprint(start) == was

    cells = [cell(rewrites, reasons)]
    if cells[0] != "+":
        return cells + [""] * len(STAGES)
    for stage in STAGES.values():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            cells.append(cell(lambda s=stage, p=place: s(fork(m), Path(p)), reasons))
    return cells


def page() -> tuple[str, int]:
    """The page, and how many cells are wrong."""
    reasons, parts, wrong = Reasons(), [HEAD], 0
    columns = ["rewrite", "works", *STAGES]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model().save_pretrained(folder / "base")
        for node in sorted(NODES):
            start = weft.load(folder / "base")
            set_expressions(start, {SITE: made(node, expressions(start)[SITE].dense().detach().clone())})
            try:
                stats = collect(start, [{"input_ids": IDS}], folder / "stats")
            except weft.WeftError:
                stats = collect(weft.load(folder / "base"), [{"input_ids": IDS}], folder / "stats")
            lines = [f"## {node}", "", f"| {' | '.join(columns)} |", f"| --- {'| :-: ' * (len(columns) - 1)}|"]
            for rewrite in REWRITES:
                made_cells = row(start, rewrite, stats, folder, reasons)
                wrong += made_cells.count("WRONG")
                lines.append(f"| {rewrite} | {' | '.join(made_cells)} |")
            print(f"{node}: {wrong} wrong so far", file=sys.stderr)
            parts.append("\n".join(lines) + "\n\n")
    told = ["## The stages", ""] + [f"- **{n}**: {(s.__doc__ or '').splitlines()[0]}" for n, s in STAGES.items()]
    told += ["", "## The refusals", ""] + [f"- **{letter}**: {what}." for what, letter in reasons.of.items()]
    return "".join([*parts, "\n".join(told), "\n"]), wrong


def covers(text: str) -> list[str]:
    """What exists and is not on the page."""
    held = [f"## {node}" for node in NODES] + [f"| {r} |" for r in REWRITES] + [f"**{s}**" for s in STAGES]
    return [h for h in held if h not in text]


def main() -> int:
    """Write or check the page; 1 if a cell is wrong or something is missing."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="only compare the page with what exists")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.parse_args().check:
        missing = covers(OUT.read_text("utf8")) + ["WRONG"] * OUT.read_text("utf8").count("| WRONG")
        if missing:
            print(f"{OUT.name} lacks these: run python scripts/composition.py (minutes)", *missing, sep="\n")
        return bool(missing)
    text, wrong = page()
    OUT.write_text(text, "utf8")
    print(f"{OUT}: {wrong} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
