"""The page on training: its commands, as they stand there, run one after another."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weft.cli.app import build

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def commands() -> list[list[str]]:
    """The commands of the section that fine-tunes a 4-bit model and ships it."""
    section = PAGE.read_text(encoding="utf-8").split("\n## ")[1]
    blocks = section.split("```")[1::2]
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("weft ")]


def test_a_model_is_tuned_in_4_bits_and_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command works; tuning lowers the score on the new domain; what is shipped is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held.jsonl").write_text(
        '{"text": "#include <vector>\\nint main() {\\n  std::vector<int> x;\\n  for (int i = 0; i < 9; ++i) x.push_back(i);\\n}"}\n'
    )
    small = {
        "--steps": "16",
        "--eval-every": "8",
        "--save-every": "8",
        "--length": "96",
        "--limit": "2",
        "--held-out": "held.jsonl",
    }
    scores: list[float] = []
    for words in commands():
        given = [small.get(before, word) for before, word in zip(["", *words], words, strict=False)][1:]
        given += ["--tokens", "512"] if given[0] == "gptq" else []
        scored = given[0] == "eval"
        made = CliRunner().invoke(build(given), [*given, *(["--json"] if scored else [])], catch_exceptions=False)
        assert made.exit_code == 0, (given, made.output)
        scores += [json.loads(made.stdout)[0]["mean"]] if scored else []
    assert len(scores) == 2 and scores[1] < scores[0]
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert all((tmp_path / n / "config.json").exists() for n in ("int4", "tuned", "one", "plain", "int4-for-peft"))
