"""The documents keep their word: the reader in docs/files.md reads what weft writes; the commands they show exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from weft import __version__
from weft import apply as apply_method
from weft.engine.run import Step, apply
from weft.expr import (
    NM,
    Basis,
    Blocks,
    Codebook,
    Dense,
    Diagonal,
    Expr,
    Hadamard,
    Kronecker,
    LowRank,
    Masked,
    Permutation,
    Product,
    Quantized,
    Signs,
    SparseDelta,
    Sum,
)  # fmt: skip
from weft.grid import GRIDS, SCALES, grid
from weft.model import branches, expressions, plain_tensors, set_expressions, taps, weave
from weft.model.branch import branch_spec
from weft.store import save

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def quantized(m: int, n: int, name: str, group: int, symmetric: bool, scale: str = "bf16") -> Quantized:
    """Random codes on a grid, none of which is NaN or infinite."""
    top = grid(name).count if not name.startswith("fp8") else 120
    groups = -(-n // (group or n))
    zeros = None if symmetric else torch.randint(0, top, (m, groups), dtype=torch.uint8)
    codes = torch.randint(0, top, (m, n), dtype=torch.uint8)
    return Quantized.encode(codes, torch.rand(m, groups) + 0.1, zeros, grid=name, group=group, scale=scale)


def every_part(m: int, n: int) -> list[Expr]:
    """Expressions that use every part of the format; that every node is read is a law of nodes."""
    w = torch.randn(m, n)
    mask = torch.zeros(m, n, dtype=torch.bool).scatter_(1, torch.rand(m, n).argsort(1)[:, : n // 3], True)
    half = torch.rand(m, n // 4, 4).argsort(2).lt(2).flatten(1)
    eighths = torch.rand(m, n // 8, 8).argsort(2).lt(4).flatten(1)

    def low() -> LowRank:
        return LowRank(torch.randn(m, 3).bfloat16(), torch.randn(3, n).bfloat16())

    return [
        Dense(w.half()),
        *(quantized(m, n, f"int{b}", g, s) for b, g, s in [(2, 5, False), (3, 0, True), (4, 16, False), (8, 7, True)]),
        *(quantized(m, n, name, 12, True, list(SCALES)[i % 4]) for i, name in enumerate(GRIDS) if grid(name).levels),
        quantized(m, n, "fp4", 16, True, "e4m3"),
        quantized(m, n, "fp4", 32, True, "e8m0"),
        Codebook.of(torch.randint(0, 300, (m, n // 3, 2)), torch.randn(2, 300, 3), n),
        Codebook.of(torch.randint(0, 5, (m, n, 1)), torch.randn(1, 5, 1), n),
        SparseDelta.of(w, torch.rand(m, n) < 0.1),
        Signs.of(w.sign() * (torch.rand(m, n) < 0.002), w.std()),
        Kronecker(torch.randn(4, 6), torch.randn(m // 4, n // 6)),
        Kronecker(torch.randn(2, 3), torch.randn(m // 2, n // 3), -0.3),
        Blocks(quantized(m, n // 4, "int4", 0, True), 4),
        *(Basis(torch.randn(7), kind, 11, m, n) for kind in ("random", "cosine", "fourier", "fourier_mt19937")),
        Permutation(torch.randperm(n).int()),
        Hadamard.of(torch.randn(n).sign()),
        Masked.of(w, mask).rebuild(kept=quantized(m, n // 3, "int5", 4, False)),
        NM.of(w, half, 2, 4),
        NM.of(w, eighths, 4, 8).rebuild(kept=quantized(m, n // 2, "int3", 0, False)),
        Sum({"base": quantized(m, n, "int4", 0, True), "compensation": low(), "adapter:mine": Dense(w.clone())}),
        Product(Diagonal(torch.rand(m)), Sum({"base": Masked.of(w, mask), "adapter:a-b": low()})),
    ]


def tiny() -> nn.Module:
    """A small Llama with square weights, more of them than there are expressions."""
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=48, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4
    )
    return weave(transformers.LlamaForCausalLM(config))


def test_the_reader_in_the_document_reads_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny()
    sites = list(expressions(model))
    made = every_part(48, 48)
    assert len(made) <= len(sites)
    set_expressions(model, dict(zip(sites, made, strict=False)))
    save(model, tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "files.md").read_text("utf8"), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(code, "files.md", "exec"), space)
    found = space["read"](tmp_path / "out")
    assert set(found) == set(model.state_dict()) - {k for k in model.state_dict() if ".expr." in k} | set(sites)
    for name, expr in expressions(model).items():
        torch.testing.assert_close(torch.tensor(found[name]).float(), expr.dense().float(), rtol=1e-5, atol=1e-5)


def test_the_reader_in_the_document_reads_tapped_weights(tmp_path: Path) -> None:
    """As the matrices that multiply the inputs themselves."""
    torch.manual_seed(0)
    model = tiny()
    apply(model, [Step.of("online_hadamard"), Step.of("act_quant")], at="all-linear")
    apply(model, [Step.of("online_hadamard", block=8), Step.of("rtn", group=0)], at="*.mlp.*")
    save(model, tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "files.md").read_text("utf8"), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(code, "files.md", "exec"), space)
    found = space["read"](tmp_path / "out")
    assert {len(t.turns()) for t in taps(model).values()} == {1, 2}
    for name, tap in taps(model).items():
        want = tap.back(expressions(model)[name].dense())
        torch.testing.assert_close(torch.tensor(found[name]).float(), want, rtol=1e-4, atol=1e-5)


def test_the_reader_in_the_document_reads_branches(tmp_path: Path) -> None:
    """What the manifest says of each, in order, and its tensors."""
    model = tiny()
    apply_method(model, "prefix", length=2)
    apply_method(model, "prompt", length=3, name="two")
    save(model, tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "files.md").read_text("utf8"), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(code, "files.md", "exec"), space)
    found = list(space["branches"](tmp_path / "out"))
    assert [said for said, _ in found] == [branch_spec(b) for b in branches(model)]
    for branch, (_, held) in zip(branches(model), found, strict=True):
        want = dict(branch.named_parameters())
        assert held.keys() == want.keys()
        assert all(torch.equal(torch.tensor(t), want[n]) for n, t in held.items())
    assert set(space["read"](tmp_path / "out")) == set(plain_tensors(model)) | set(expressions(model))


def commands() -> list[tuple[str, str]]:
    """Page and name of every `weft NAME` that the documents show."""
    found: set[tuple[str, str]] = set()
    for page in [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "README.md"]:
        for code in re.findall(r"```.*?```|`[^`\n]+`", page.read_text("utf8"), re.DOTALL):
            found |= {(page.name, name) for name in re.findall(r"(?:^|`|bin/)weft ([a-z]\w*)", code, re.MULTILINE)}
    return sorted(found)


def test_every_command_in_the_documents_exists() -> None:
    from weft.cli.app import build

    known = {c.name for c in build().registered_commands}
    assert commands()
    assert not [(page, name) for page, name in commands() if name not in known]


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_calls_in_the_documents_exist(page: Path) -> None:
    import weft

    calls = re.findall(r"\bweft\.([a-z]\w*)\(", page.read_text("utf8"))
    assert not [c for c in calls if not hasattr(weft, c)]


def test_the_written_pages_are_fresh() -> None:
    """What scripts write into docs/ is what they would write now, in a process that has seen no test."""
    code = (
        "import runpy, sys; sys.path.insert(0, 'scripts')\n"
        "for name in ('docs', 'composition', 'adapters'):\n"
        "    sys.argv = [f'scripts/{name}.py', '--check']\n"
        "    try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as stop: assert not stop.code, stop.code"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_changes_name_this_version() -> None:
    assert f"## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text("utf8")
