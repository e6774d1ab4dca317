"""Every claim has a proof of today's code, but for those that are said to have none."""

from __future__ import annotations

import json
from pathlib import Path

from weft.lab.prove import stale

PROOFS = Path(__file__).resolve().parents[2] / "proofs"


def test_proofs_are_of_todays_code() -> None:
    """`proofs/untried.json` lists the claims that were not tried on today's code: no more, and no fewer."""
    untried, found = json.loads((PROOFS / "untried.json").read_text()), stale(PROOFS)
    new, done = sorted(set(found) - set(untried)), sorted(set(untried) - set(found))
    assert not new, f"weft prove {' '.join(new)}, then python scripts/docs.py: {found}"
    assert not done, f"these have a proof, take them out of untried.json: {done}"
