"""The shell: `weft COMMAND ...`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process; exits with its code."""
    try:
        from weft.cli.app import build

        build(sys.argv[1:])(prog_name="weft")
    except (Exception, KeyboardInterrupt) as e:  # before the command itself, which sees to its own
        from weft.cli.guard import told

        raise SystemExit(told(e)) from None
