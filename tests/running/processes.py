"""Two processes that talk over gloo, and the small model that they share."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import build_tiny
from torch import Tensor, nn

from weft.engine.run import Step, apply
from weft.model import weave

IDS = torch.randint(2, 96, (4, 9), generator=torch.Generator().manual_seed(3))


def adapted(*base: str, family: str = "llama") -> nn.Module:
    """A woven model with these steps' base and adapters that already do something."""
    model = weave(build_tiny(family))
    apply(model, [Step.of(name) for name in base])
    apply(model, [Step.of("lora", rank=2)], at="all-linear")
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=rng) * 0.1)
    return model


def step(model: nn.Module, ids: Tensor, lr: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of training: the logits before it, and the gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    optimizer.zero_grad()
    made = model(input_ids=ids, labels=ids, use_cache=False)
    made.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return made.logits.detach(), grads


def _one(rank: int, work: Callable[[int, Path], dict[str, Any]], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    where = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", where, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _launched(rank: int, work: Callable[[int, Path], dict[str, Any]], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


def launched(work: Callable[[int, Path], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What `work(rank, folder)` returns in each of two processes that have the environment which torchrun gives them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(_launched, (work, folder, port), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def both(work: Callable[[int, Path], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What `work(rank, folder)` returns in each of two processes."""
    torch.multiprocessing.start_processes(_one, (work, folder), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
