"""TRL's trainers run as they are on a woven model: adapters on a packed base learn, the base keeps every bit, the result is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft.learn.trainer import trainable

from .test_train import adapted, frozen, result, same

trl = pytest.importorskip("trl")
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
QUIET: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "bf16": False,
    "save_strategy": "steps", "save_steps": 3, "disable_tqdm": True, "logging_steps": 1, "gradient_checkpointing": False,
}  # fmt: skip
THINGS = ("cat", "dog", "bird", "hill")


def trainer(kind: str, model: Any, words: Any, out: Path) -> Any:
    """One of TRL's trainers on a few examples."""
    from datasets import Dataset

    talk = [{"role": "user", "content": "yes ?"}]
    rows: dict[str, list[dict[str, Any]]] = {
        "SFT": [{"messages": [*talk, {"role": "assistant", "content": f"the {a} sat ."}]} for a in THINGS],
        "DPO": [{"prompt": f"the {a} ", "chosen": "sat .", "rejected": "flew ."} for a in THINGS],
        "GRPO": [{"prompt": f"the {a} "} for a in THINGS],
    }
    more: dict[str, Any] = {"SFT": {}, "DPO": {}, "GRPO": {"num_generations": 2, "max_completion_length": 4}}[kind]
    given: dict[str, Any] = {"processing_class": words, "train_dataset": Dataset.from_list(rows[kind])}
    if kind == "GRPO":
        given["reward_funcs"] = lambda completions, **_: [float(len(set(c.split()))) for c in completions]
    if kind == "DPO":
        given["ref_model"] = weft.fork(model)  # shares the packed base
    config, make = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    return make(model=model, args=config(output_dir=str(out), **QUIET, **more), **given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_trl_trains_a_woven_model(kind: str, tiny: Any, words: Any, tmp_path: Path) -> None:
    """int4 with a low-rank adapter; what TRL saves is a folder that weft reads, with the trained values."""
    words = copy.deepcopy(words)
    words.chat_template = TEMPLATE
    model = adapted(tiny, "llama", ("rtn",))
    before, start = frozen(model), result(model)
    run = trainer(kind, model, words, tmp_path / "run")
    run.train()
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    assert len(losses) == 3 and all(torch.isfinite(torch.tensor(x)) for x in losses)
    assert same(frozen(model), before) and not same(result(model), start)
    run.save_model(str(tmp_path / "saved"))
    again = weft.load(tmp_path / "saved")
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert trainable(model)
