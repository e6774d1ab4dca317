"""What tests run in forks of a process that knows nothing of theirs."""

from __future__ import annotations

import sys
from pathlib import Path


def read_pickle(argv: list[str], said: Path) -> None:
    """The process that reads a pickle, from its command line on."""
    from weft.store import unpickle

    sys.argv, sys.stderr = argv, said.open("w")
    sys.exit(unpickle.main())
