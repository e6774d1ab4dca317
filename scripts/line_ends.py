"""Mend text files: no spaces at the end of a line, exactly one newline at the end. Fails if it changed any."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def mended(text: bytes) -> bytes:
    """The text with its line ends in order; an empty file stays empty."""
    body = re.sub(rb"[ \t\r]+$", b"", text, flags=re.MULTILINE).rstrip(b"\n")
    return body + b"\n" if body else b""


if __name__ == "__main__":
    changed = [p for p in map(Path, sys.argv[1:]) if (text := p.read_bytes()) != mended(text)]
    for path in changed:
        path.write_bytes(mended(path.read_bytes()))
        print(f"mended {path}")
    sys.exit(bool(changed))
