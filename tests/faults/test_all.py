"""Each of the forty faults has a test that names it."""

from __future__ import annotations

import re
from pathlib import Path


def test_every_fault_has_a_test() -> None:
    """F01 to F40, as a test's name or as the name of one of its cases."""
    text = "\n".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    found = {int(a or b) for a, b in re.findall(r'def test_f(\d\d)_|"F(\d\d) ', text)}
    assert found == set(range(1, 41)), sorted(set(range(1, 41)) ^ found)
