"""PEFT's weight adapters on dense and quantized bases, stage by stage, against a float64 oracle; weft's numbers beside them.

    make bench-peers                             # in an environment of its own, writes docs/peers.md
    python benchmarks/peers.py [--write FILE] [--only lora ia3]

The oracle is PEFT itself with the same numbers in float64, on the dense model of what the base's layers hold: it shows what
goes wrong between an adapter and its base, not what an adapter is. An error is wrong where it is above three times the base's own
(its kernels against float64 on the same weights) and 5 % of what the adapter does, 2 % on fp32; of a merge onto a grid also above one
and a half times the error of rounding the exact sum once.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata as metadata
import importlib.util
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(
    prefix="peers-"
)  # BOFT builds one, behind a lock that outlives it

import peft  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

SIZE, VOCAB = 64, 96
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
AT = {"target_modules": ["q_proj", "v_proj"]}
PAIR = {**AT, "r": 4}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**PAIR),
    "lora rsLoRA": lambda: peft.LoraConfig(**PAIR, use_rslora=True),
    "lora DoRA": lambda: peft.LoraConfig(**PAIR, use_dora=True),
    "lora PiSSA": lambda: peft.LoraConfig(**PAIR, init_lora_weights="pissa"),
    "lora OLoRA": lambda: peft.LoraConfig(**PAIR, init_lora_weights="olora"),
    "adalora": lambda: peft.AdaLoraConfig(**AT, target_r=4, init_r=4, total_step=100),
    "adamss": lambda: peft.AdamssConfig(**AT, r=4),
    "beft": lambda: peft.BeftConfig(**AT),
    "boft": lambda: peft.BOFTConfig(**AT),
    "c3a": lambda: peft.C3AConfig(**AT, block_size=8),
    "deft": lambda: peft.DeftConfig(**PAIR),
    "delora": lambda: peft.DeloraConfig(**PAIR),
    "fourierft": lambda: peft.FourierFTConfig(**AT, n_frequency=40),
    "frod": lambda: peft.FrodConfig(**AT, progressbar=False),
    "glora": lambda: peft.GloraConfig(**PAIR),
    "gralora": lambda: peft.GraloraConfig(**PAIR),
    "hira": lambda: peft.HiraConfig(**PAIR),
    "hra": lambda: peft.HRAConfig(**PAIR),
    "ia3": lambda: peft.IA3Config(**AT, feedforward_modules=[]),
    "lily": lambda: peft.LilyConfig(**PAIR),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "loha": lambda: peft.LoHaConfig(**PAIR),
    "lokr": lambda: peft.LoKrConfig(**PAIR),
    "miss": lambda: peft.MissConfig(**PAIR),
    "oft": lambda: peft.OFTConfig(**AT, oft_block_size=8),
    "osf": lambda: peft.OSFConfig(**AT),
    "peanut": lambda: peft.PeanutConfig(**PAIR),
    "poly": lambda: peft.PolyConfig(**PAIR, task_type="CAUSAL_LM"),
    "psoft": lambda: peft.PsoftConfig(**PAIR),
    "pvera": lambda: peft.PveraConfig(**PAIR),
    "randlora": lambda: peft.RandLoraConfig(**PAIR),
    "road": lambda: peft.RoadConfig(**AT),
    "shira": lambda: peft.ShiraConfig(**PAIR, random_seed=0),
    "supertuning": lambda: peft.SupertuningConfig(**AT),
    "tinylora": lambda: peft.TinyLoraConfig(**AT),
    "unilora": lambda: peft.UniLoraConfig(**PAIR),
    "vblora": lambda: peft.VBLoRAConfig(**PAIR, vector_length=32),
    "vera": lambda: peft.VeraConfig(**PAIR),
    "waveft": lambda: peft.WaveFTConfig(**AT, n_frequency=40),
}
"""PEFT's types that change weights, small, and what LoRA's options make of it."""
STAGES = ("attach", "train", "save", "load", "merge", "unmerge")
OUTCOMES = {
    "R": "right",
    "F": "refused",
    "C": "crash",
    "W": "silently wrong",
    "w": "wrong, with a warning",
    "-": "not reached",
}


# ---------------------------------------------------------------------------------------------------------------- bases


def folder() -> Path:
    """A small Llama's checkpoint, the same every time."""
    global _FOLDER
    if _FOLDER is None:
        torch.manual_seed(0)
        size = {"hidden_size": SIZE, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(
            **size, num_key_value_heads=4, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1
        )
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 if p.dim() == 1 else 5)
        _FOLDER = Path(tempfile.mkdtemp(prefix="peers-"))
        model.save_pretrained(_FOLDER)
    return _FOLDER


_FOLDER: Path | None = None


def dense(dtype: torch.dtype, place: Path | None = None) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(place or folder(), dtype=dtype).eval()


def bnb(place: Path | None = None, **how: Any) -> nn.Module:
    config = transformers.BitsAndBytesConfig(**how)
    kind = transformers.LlamaForCausalLM
    return kind.from_pretrained(
        place or folder(), quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    ).eval()


def hqq(place: Path | None = None) -> nn.Module:
    """Layers of hqq, put in by hand: transformers 5 has no configuration for them."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = dense(torch.float32, place)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, leaf = path.rpartition(".")
            made = HQQLinear(
                module, BaseQuantizeConfig(nbits=4, group_size=64), compute_dtype=torch.float32, device="cpu"
            )
            setattr(model.get_submodule(parent), leaf, made)
    return model


BASES: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "fp32": ("", lambda place=None: dense(torch.float32, place)),
    "bf16": ("", lambda place=None: dense(torch.bfloat16, place)),
    "int8 (bitsandbytes)": ("bitsandbytes", lambda place=None: bnb(place, load_in_8bit=True)),
    "nf4 (bitsandbytes)": (
        "bitsandbytes",
        lambda place=None: bnb(
            place, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    ),
    "4-bit (hqq)": ("hqq", hqq),
}
"""By name: the library that it needs, and the base, of a folder's weights."""


def held(module: nn.Module) -> Tensor | None:
    """The matrix that a quantized layer holds."""
    kind = type(module).__name__
    if kind == "Linear8bitLt":
        codes, scale = module.weight.data, getattr(module.weight, "SCB", None)
        return codes.double() * (module.state.SCB if scale is None else scale).double()[:, None] / 127
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, module.weight.quant_state).double()
    if kind == "HQQLinear":
        return module.dequantize().double()
    return module.weight.double() if isinstance(module, nn.Linear) else None


def exact(base: nn.Module) -> nn.Module:
    """The dense model of a base's weights in float64."""
    made = dense(torch.float64)
    with torch.no_grad():
        for path, module in made.named_modules():
            if isinstance(module, nn.Linear) and (w := held(base.get_submodule(path))) is not None:
                module.weight.copy_(w)
        plain = dict(base.named_parameters())
        for name, p in made.named_parameters():
            if p.dim() == 1 or "embed" in name:
                p.copy_(plain[name].double())
    for module in made.modules():
        if "Norm" in type(module).__name__:
            module.forward = exactly.__get__(module)
    return made


def exactly(norm: Any, x: Tensor) -> Tensor:
    """The norms' forward without the step through float32."""
    return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


# --------------------------------------------------------------------------------------------------------------- stages


@dataclass
class Bench:
    """A base, and what it is measured by."""

    name: str
    make: Callable[..., nn.Module]
    truth: nn.Module
    plain: Tensor
    """The outputs of the dense model in float64."""
    own: float
    """The base's own error."""
    merged: dict[str, float] = field(default_factory=dict[str, float])


def bench(name: str) -> Bench:
    make = BASES[name][1]
    base = make()
    truth = exact(base)
    plain = logits(truth)
    return Bench(name, make, truth, plain, gap(logits(base), plain))


def logits(m: nn.Module) -> Tensor:
    with torch.no_grad():
        return called(m.eval()).double()


def called(m: nn.Module) -> Tensor:
    """The outputs; Poly asks of every text which task it is of."""
    poly = getattr(getattr(m, "active_peft_config", None), "peft_type", None) == "POLY"
    return m(input_ids=IDS, **({"task_ids": torch.zeros(len(IDS), dtype=torch.long)} if poly else {})).logits


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if bool(torch.isfinite(a).all()) else float("inf")


def loss_of(m: nn.Module) -> Tensor:
    return F.cross_entropy(called(m)[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten())


def attached(b: Bench, adapter: str) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(b.make(), ADAPTERS[adapter]())


def moved(m: nn.Module) -> nn.Module:
    """What trains, as if it had been trained."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad:
                p.add_((0.05 * torch.randn(p.shape, generator=rng)).to(p.dtype))
    return m.eval()


def oracle(b: Bench, adapter: str, m: nn.Module) -> nn.Module:
    """The same adapter with the same numbers in float64, on the dense model."""
    torch.manual_seed(0)
    try:
        made = peft.get_peft_model(copy.deepcopy(b.truth), ADAPTERS[adapter](), autocast_adapter_dtype=False).double()
    except TypeError:  # some start from a weight that is not in float64
        torch.manual_seed(0)
        made = peft.get_peft_model(copy.deepcopy(b.truth).float(), ADAPTERS[adapter]()).double()
    plain = {f"base_model.model.{n}" for n in b.truth.state_dict()}
    theirs = m.state_dict()
    for name, t in made.state_dict().items():
        if name not in plain and ".base_layer." not in name and name in theirs and theirs[name].shape == t.shape:
            t.copy_(theirs[name].to(t.dtype))
    return made.eval()


def bits(m: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in m.named_parameters() if not p.requires_grad}


def attach(b: Bench, a: str, m: nn.Module) -> bool:
    """The output is the oracle's."""
    want = logits(oracle(b, a, m))
    return gap(logits(m), want) <= slack(b, gap(want, b.plain))


def train(b: Bench, a: str, m: nn.Module) -> bool:
    """What trains has the oracle's gradient, the base none and no other bits; with other numbers the output is the oracle's."""
    other = oracle(b, a, moved(m))
    before = bits(m)
    for one in (m, other):
        for module in one.modules():  # in evaluation the fast path of some backends has no gradients
            module.training = "bitsandbytes" in type(module).__module__
        loss_of(one).backward()
    held = dict(m.named_parameters())
    pairs = [
        (held[n].grad, q.grad) for n, q in other.named_parameters() if q.grad is not None and held[n].requires_grad
    ]
    if any(p is None for p, _ in pairs) or any(not torch.equal(t, bits(m)[n]) for n, t in before.items()):
        return False
    mine, theirs = (torch.cat([pair[i].double().flatten() for pair in pairs]) for i in (0, 1))
    want = logits(other)
    along = float(F.cosine_similarity(mine, theirs, dim=0))
    return along > (0.999 if b.name == "fp32" else 0.9) and gap(logits(m), want) <= slack(b, gap(want, b.plain))


def free(m: nn.Module) -> list[nn.Parameter]:
    return [p for p in m.parameters() if p.requires_grad]


def save(b: Bench, a: str, m: nn.Module) -> bool:
    """The file has every number that trains."""
    with tempfile.TemporaryDirectory() as place:
        moved(m).save_pretrained(place)
        kept = [t.double() for t in load_file(Path(place) / "adapter_model.safetensors").values()]
    return all(any(t.shape == p.shape and torch.equal(t, p.detach().double()) for t in kept) for p in free(m))


def load(b: Bench, a: str, m: nn.Module) -> bool:
    """What is loaded gives the same."""
    with tempfile.TemporaryDirectory() as place:
        moved(m).save_pretrained(place)
        again = peft.PeftModel.from_pretrained(b.make(), place)
        want = logits(m)
        return gap(logits(again), want) <= slack(b, gap(want, b.plain))


def merge(b: Bench, a: str, m: nn.Module) -> bool:
    """The merged model gives the oracle's output, but for one rounding onto the base's own grid."""
    truth = oracle(b, a, moved(m))
    want = logits(truth)
    m.merge_adapter()
    return gap(logits(m), want) <= slack(b, gap(want, b.plain)) + 1.5 * rounding(b, truth, want)


def rounding(b: Bench, truth: nn.Module, want: Tensor) -> float:
    """The error of the exact sum, rounded once as the base is."""
    if b.name == "fp32":
        return 0.0
    with tempfile.TemporaryDirectory() as place:
        copy.deepcopy(truth).merge_and_unload().float().save_pretrained(place)
        return gap(logits(b.make(Path(place))), want)


def unmerge(b: Bench, a: str, m: nn.Module) -> bool:
    """After a merge is undone the model gives what it gave, with the adapter and without."""
    want, bare = logits(moved(m)), without(m)
    m.merge_adapter()
    m.unmerge_adapter()
    return max(gap(logits(m), want), gap(without(m), bare)) <= slack(b, gap(want, bare))


def without(m: nn.Module) -> Tensor:
    """The outputs with the adapter turned off."""
    with m.disable_adapter():
        return logits(m)


def slack(b: Bench, effect: float) -> float:
    return 3 * b.own + (0.02 if b.name == "fp32" else 0.05) * effect + 1e-5 * float(b.plain.abs().max())


STEPS: dict[str, Callable[[Bench, str, nn.Module], bool]] = {
    "attach": attach, "train": train, "save": save, "load": load, "merge": merge, "unmerge": unmerge,
}  # fmt: skip


def outcome(b: Bench, a: str, stage: str) -> tuple[str, str]:
    """How a stage ends, by its letter, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            m = attached(b, a)
            before = len(said)
            if STEPS[stage](b, a, m):
                return "R", ""
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            said_so = (last.line or "").startswith("raise") and "peft" in Path(last.filename).parts and str(e)
            meant = said_so or isinstance(e, NotImplementedError)
            return "F" if meant else "C", f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        told = [str(w.message) for w in said[before:] if issubclass(w.category, UserWarning) and "oracle" not in str(w)]
        return ("w", told[0]) if any("inaccurate" in t or "rounding" in t for t in told) else ("W", "")


def row(b: Bench, a: str) -> tuple[str, list[str]]:
    """The letters of an adapter's stages on a base, and what was said."""
    made, said = "", list[str]()
    for stage in STAGES:
        letter, text = ("-", "") if made[:1] in ("F", "C") else outcome(b, a, stage)
        made += letter
        said += [f"{stage}: {text}"] if text else []
    return made, said


# ----------------------------------------------------------------------------------------------------------------- page


def ours() -> list[list[str]]:
    """What docs/adapters.md says of weft: right, refused or not tried, and wrong, by base."""
    text = (ROOT / "docs" / "adapters.md").read_text("utf8")
    count = int((re.search(r"how many of the (\d+)\s+stages", text) or [0, 0])[1])
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if line[0] == "adapter")
    body = [
        line for line in lines[lines.index(head) + 2 :] if len(line) == len(head) and re.match(r"\d|WRONG", line[1])
    ]
    made: list[list[str]] = []
    for i, base in enumerate(head[1:], 1):
        right = sum(int(n[0]) for line in body if (n := re.match(r"\d+", line[i])))
        wrong = sum("WRONG" in line[i] for line in body)
        made.append([base, str(len(body)), str(right), str(count * len(body) - right - wrong), str(wrong)])
    return made


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(r) + " |" for r in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def page(cells: dict[str, dict[str, str]], missing: dict[str, str], said: dict[str, list[str]], seconds: float) -> str:
    bases = list(cells)
    libraries = ("peft", "torch", "transformers", "bitsandbytes", "hqq")
    have = ", ".join(f"{n} {metadata.version(n)}" for n in libraries if importlib.util.find_spec(n))
    rows = [["adapter", *bases], *([a, *(f"`{cells[b][a]}`" for b in bases)] for a in cells[bases[0]])]
    totals = [["base", "adapters", "whole life right", *OUTCOMES.values()]]
    by_stage = [["stage", *OUTCOMES.values()]]
    for b in bases:
        letters = Counter("".join(cells[b].values()))
        whole = sum(set(c) == {"R"} for c in cells[b].values())
        totals.append([b, str(len(cells[b])), str(whole), *(str(letters[k]) for k in OUTCOMES)])
    totals += [[b, why, *[""] * (1 + len(OUTCOMES))] for b, why in missing.items()]
    for i, stage in enumerate(STAGES):
        letters = Counter(c[i] for b in bases for c in cells[b].values())
        by_stage.append([stage, *(str(letters[k]) for k in OUTCOMES)])
    words = [
        f"- **{k}**: {len(v)}, such as {', '.join(v[:3])}" for k, v in sorted(said.items(), key=lambda p: -len(p[1]))
    ]
    letters_ = ", ".join(f"`{k}` {v}" for k, v in OUTCOMES.items())
    about = " ".join((__doc__ or "").split("\n\n")[-1].split())
    return "\n\n".join([
        "# PEFT on the same bases",
        f"Written by `make bench-peers` on {datetime.date.today().isoformat()} with {have}, on one CPU core in {seconds / 60:.0f} minutes. "
        "It follows PEFT's weight adapters, with their default options, through their life on the bases that its users have: "
        f"{', '.join(STAGES)}. {about}",
        "## PEFT", table(totals), table(by_stage),
        f"Stage by stage ({', '.join(STAGES)}): {letters_}.", table(rows),
        "What was said, and how often:", "\n".join(words[:20]),
        "## weft",
        "From [Adapters on bases](adapters.md): stages of all adapters, against an independent reading of the saved tensors in float64. "
        "The stages are others, and more; what is refused or not tried there is told with its reason.",
        table([["base", "adapters", "stages right", "refused or not tried", "wrong"], *ours()]),
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page to write; without it everything is printed")
    parser.add_argument("--only", nargs="*", help="adapters", choices=list(ADAPTERS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    begun, cells, missing, said = time.time(), dict[str, dict[str, str]](), dict[str, str](), dict[str, list[str]]()
    for name, (library, _) in BASES.items():
        try:
            if library:
                importlib.import_module(library)
            b = bench(name)
        except Exception as e:
            missing[name] = f"not here: {library} ({type(e).__name__})"
            continue
        cells[name] = {}
        for a in given.only or ADAPTERS:
            cells[name][a], words = row(b, a)
            for text in words:
                stage, _, what = text.partition(": ")
                said.setdefault(re.sub(r"\d+", "N", what)[:110].replace("|", "/"), []).append(
                    f"{a} on {name} ({stage})"
                )
            print(f"{name:22} {a:14} {cells[name][a]}", *words[:1], file=sys.stderr, flush=True)
    text = page(cells, missing, said, time.time() - begun)
    if given.write:
        given.write.write_text(text, "utf8")
    print(text)


if __name__ == "__main__":
    main()
