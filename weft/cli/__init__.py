"""The shell: `weft COMMAND ...`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import atexit
import gc
import sys

from weft.memory import importing


def main() -> None:
    """Run the command line of this process; exits with its code."""
    atexit.register(gc.freeze)  # what is left goes with the process, and is not looked through
    try:
        with importing():
            from weft.cli.app import build

            app = build(sys.argv[1:])
        app(prog_name="weft")
    except (Exception, KeyboardInterrupt) as e:  # before the command itself, which sees to its own
        from weft.cli.guard import told

        raise SystemExit(told(e)) from None
