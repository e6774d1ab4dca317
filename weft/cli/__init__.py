"""The shell: `weft COMMAND ...`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process; exits with its code."""
    try:
        from weft.cli.app import build

        build(sys.argv[1:])(prog_name="weft")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
