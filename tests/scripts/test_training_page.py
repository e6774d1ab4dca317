"""The page on training: its commands, as they stand there, run one after another."""

from __future__ import annotations

from pathlib import Path

import pytest

from .shown import scores

HELD = '{"text": "#include <vector>\\nint main() {\\n  std::vector<int> x;\\n  for (int i = 0; i < 9; ++i) x.push_back(i);\\n}"}\n'


def test_a_model_is_tuned_in_4_bits_and_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command works; tuning lowers the score on the new domain; what is shipped is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held.jsonl").write_text(HELD)
    small = {"--steps": "16", "--eval-every": "8", "--save-every": "8", "--length": "96", "--limit": "2"}
    small |= {"--held-out": "held.jsonl"}
    more = {"gptq": ["--tokens", "512"], "eval": ["--json"]}
    before, after = scores("training.md", "Fine-tune a 4-bit model and ship it", small, more)
    assert after < before
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert all((tmp_path / n / "config.json").exists() for n in ("int4", "tuned", "one", "plain", "int4-for-peft"))
