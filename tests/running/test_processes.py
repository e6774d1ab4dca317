"""A woven model in two processes: under FSDP2 packed weights are sharded and saved folders complete; DDP; equal training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft.error import WeftError
from weft.expr import tensors
from weft.learn.data import Text
from weft.learn.train import train
from weft.model import expressions, fingerprint, fork, gathered, plain_tensors, unweave

from .processes import IDS, adapted, both, step

BASE = ("magnitude", "rtn")


def _nbytes(model: Any, *, packed: bool = False) -> int:
    held = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(p.nbytes for p in held if not packed or p.dtype == torch.uint8)


def _work(rank: int, folder: Path) -> dict[str, Any]:
    return _fsdp(rank, folder) | _ddp(rank)


def _ddp(rank: int) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = DistributedDataParallel(adapted(*BASE))
        for _ in range(2):
            _, grads = step(model, IDS[2 * rank : 2 * rank + 2])
    told = [str(w.message) for w in said if "unused" in str(w.message) or "buffer" in str(w.message)]
    return {"ddp": grads, "ddp warnings": told, "ddp buffers": [n for n, _ in model.named_buffers()]}


def _fsdp(rank: int, folder: Path) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    made: dict[str, Any] = {}
    half = adapted(*BASE, family="llama-tied")
    for part in (*half.model.layers, half):
        fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        made["half"] = half(input_ids=IDS).logits.float()

    model = adapted(*BASE)
    for part in (*model.model.layers, model):
        fully_shard(part)
    made["bytes"], made["packed"] = _nbytes(model), _nbytes(model, packed=True)
    refused = {
        "save": lambda: weft.save(model, folder / f"never-{rank}"),
        "save_pretrained": lambda: model.save_pretrained(folder / f"never-{rank}"),
        "export": lambda: weft.export(model, folder / f"never-{rank}"),
        "peft": lambda: weft.export(model, folder / f"never-{rank}", to="peft", base=folder / "base"),
        "fork": lambda: fork(model),
        "unweave": lambda: unweave(model),
        "train": lambda: train(model, [Text("the")], tokenizer=None),
        "rewrite": lambda: weft.apply(model, "rtn"),
    }
    for name, act in refused.items():
        with pytest.raises(WeftError, match="spread over processes"):
            act()
        made[name] = True
    made["logits"], _ = step(model, IDS[2 * rank : 2 * rank + 2])
    with gathered(model):
        made["mark"] = fingerprint(model)
        if rank == 0:
            weft.save(model, folder / "saved")
            weft.export(model, folder / "adapter", to="peft", base=folder / "base")
    assert made["bytes"] == _nbytes(model)
    with torch.no_grad():
        made["after"] = model(input_ids=IDS).logits
    return made


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder, and what both processes saw."""
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, both(_work, folder)


def test_a_process_holds_half_of_the_bytes(ran: Any) -> None:
    """Of all parameters, and of the packed ones; rows are dealt out whole."""
    model = adapted(*BASE)
    for name, packed in (("bytes", False), ("packed", True)):
        held, whole = [r[name] for r in ran[1]], _nbytes(model, packed=packed)
        assert sum(held) == whole and max(held) < 0.52 * whole
    assert _nbytes(model, packed=True) > 0 and not [b for e in expressions(model).values() for b in e.buffers()]


def test_training_is_that_of_one_process(ran: Any) -> None:
    """Logits of each process's half of the batch, and after the step the adapters of the joined batch."""
    model = adapted(*BASE)
    logits, _ = step(model, IDS)
    with torch.no_grad():
        after = model(input_ids=IDS).logits
    for rank, seen in enumerate(ran[1]):
        torch.testing.assert_close(seen["logits"], logits[2 * rank : 2 * rank + 2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen["after"], after, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, logits, rtol=1e-5, atol=1e-5)


def test_ddp_gives_the_gradients_of_the_joined_batch(ran: Any) -> None:
    """In the second step too; no packed weight is a buffer, which DDP would send before every step."""
    model = adapted(*BASE)
    for _ in range(2):
        model.zero_grad()
        _, want = step(model, IDS)
    for seen in ran[1]:
        assert not seen["ddp warnings"] and not [n for n in seen["ddp buffers"] if ".expr." in n]
        assert {n.removeprefix("module.") for n in seen["ddp"]} == want.keys() and len(want) == 28
        for name, g in seen["ddp"].items():
            torch.testing.assert_close(g, want[name.removeprefix("module.")], rtol=1e-4, atol=1e-6)


def test_lower_precision_leaves_packed_bytes_alone(ran: Any) -> None:
    """Parameters gathered in bfloat16: the output of the model in bfloat16."""
    with torch.no_grad():
        want = adapted(*BASE, family="llama-tied").to(torch.bfloat16)(input_ids=IDS).logits.float()
    assert all(torch.allclose(seen["half"], want, rtol=0.05, atol=0.05) for seen in ran[1])


def test_what_is_saved_is_complete(ran: Any) -> None:
    """The folder and the adapter hold the trained values of both processes' parts."""
    folder, seen = ran
    model = adapted(*BASE)
    step(model, IDS)
    back = weft.load(folder / "saved")
    assert fingerprint(back) == seen[0]["mark"] == seen[1]["mark"] and type(back).__name__ == "LlamaForCausalLM"
    want = {n: t for s, e in expressions(model).items() for n, t in ((f"{s}:{k}", v) for k, v in tensors(e).items())}
    held = {n: t for s, e in expressions(back).items() for n, t in ((f"{s}:{k}", v) for k, v in tensors(e).items())}
    assert held.keys() == want.keys()
    for name, t in (want | plain_tensors(model)).items():
        torch.testing.assert_close((held | plain_tensors(back))[name], t.detach(), rtol=1e-5, atol=1e-6)
    other = weft.load(folder / "base")
    weft.attach(other, folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)


def test_every_refusal_was_seen(ran: Any) -> None:
    """Each in both processes, before anything was written."""
    names = {"save", "save_pretrained", "export", "peft", "fork", "unweave", "train", "rewrite"}
    assert all(names <= set(seen) for seen in ran[1]) and not list(ran[0].glob("never*"))
