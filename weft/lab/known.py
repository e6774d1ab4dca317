"""Known answers: orderings that the field agrees on. A lab model on which one fails is not used for the claims that it guards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weft.lab.claims import Claim, Lab, Steps

DOWN = ("*down_proj*", "*layer.[0-9].output.dense*")
"""The projection out of a feed-forward part, where inputs have outliers."""


@dataclass(frozen=True)
class Known:
    """An answer that is known before it is tried, and the verb whose claims it guards."""

    verb: str
    text: str
    tried: Callable[[Lab], Claim]


def _less(
    verb: str, text: str, ours: Steps, baseline: Steps, *, factor: float = 1.0, at: tuple[str, ...] = ("*",)
) -> Known:
    """`ours` is less than `factor` times as far from the original as `baseline`."""
    return Known(verb, text, lambda lab: lab.compare(ours=ours, baseline=baseline, factor=factor, at=at))


def _gains(verb: str, text: str, ours: Steps, baseline: Steps, *, share: float) -> Known:
    """`ours`, tuned, gains at least `share` of what `baseline` gains."""
    return Known(verb, text, lambda lab: lab.tune(ours=ours, baseline=baseline, share=share))


def _rtn(bits: int, **options: Any) -> Steps:
    return [("rtn", {"bits": bits, **options})]


def _gptq(**options: Any) -> Steps:
    return [("gptq", {"bits": 3, **options})]


def _after_rtn(method: str, **options: Any) -> Steps:
    return [*_rtn(3), (method, options)]


KNOWN: dict[str, Known] = {
    "gptq": _less("quantize", "GPTQ loses less than rounding at 3 bits", _gptq(), _rtn(3)),
    "groups": _less("quantize", "smaller groups lose less at 3 bits", _rtn(3, group=32), _rtn(3, group=128)),
    "asymmetric": _less("quantize", "zero points help at 3 bits", _rtn(3, symmetric=False), _rtn(3)),
    "nf4": _less("quantize", "NF4 loses less than 4-bit integers", [("nf4", {})], _rtn(4)),
    "order": _less("quantize", "activation order helps GPTQ at 3 bits", _gptq(), _gptq(order=False)),
    "scales": _less("quantize", "searched scales help GPTQ at 3 bits", _gptq(), _gptq(search_scale=False)),
    "8-bit": _less("quantize", "8 bits cost less than a hundredth of what 4 cost", _rtn(8), _rtn(4), factor=0.01),
    "bits": _less("quantize", "4 bits cost less than half of what 3 cost", _rtn(4), _rtn(3), factor=0.5),
    "wanda": _less(
        "prune", "Wanda loses less than magnitude on down-projections at 50 %", [("wanda", {})], [("magnitude", {})], at=DOWN
    ),
    "sparsegpt": _less(
        "prune", "SparseGPT loses less than Wanda at 2:4", [("sparsegpt", {"pattern": "2:4"})], [("wanda", {"pattern": "2:4"})]
    ),
    "free": _less(
        "prune", "50 % anywhere loses less than 2:4 (Wanda)", [("wanda", {})], [("wanda", {"pattern": "2:4"})]
    ),
    "eora": _less(
        "factor", "EoRA restores more than plain SVD after 3-bit rounding", _after_rtn("eora"), _after_rtn("svd_residual")
    ),
    "rank": _less(
        "factor", "rank 32 restores more than rank 8", _after_rtn("svd_residual", rank=32), _after_rtn("svd_residual", rank=8)
    ),
    "full": _gains(
        "adapt", "LoRA of rank 256 gains at least 80 % of what full fine-tuning gains", [("lora", {"rank": 256})], [("full", {})], share=0.8
    ),
    "soup": Known(
        "merge",
        "a soup of members with other seeds gains at least what their mean does",
        lambda lab: lab.merge(ours=("soup", {}), baseline="mean", members="seeds"),
    ),
    "copying": Known(
        "decode",
        "drafts copied from the prompt change no token of greedy decoding",
        lambda lab: lab.decode(ours={"prompt_lookup_num_tokens": 4}, baseline={"do_sample": True}, factor=1e-4),
    ),
}  # fmt: skip


def failed(held: Mapping[str, Any], verb: str) -> dict[str, list[str]]:
    """By lab model, the known answers of a verb that came out the other way, in what `known.json` holds."""
    made: dict[str, list[str]] = {}
    for name, claim in held.items():
        for finding in claim["models"] if claim["verb"] == verb else ():
            if finding["verdict"] == "contradicted":
                made.setdefault(finding["model"], []).append(name)
    return made
