"""Progress: `bars.bar(label, total)` is a context that yields `step(n, note)`. Nothing heavy is imported here."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


class Step(Protocol):
    """Says that `n` more are done, and what to show beside them."""

    def __call__(self, n: int, note: str = "") -> None: ...


class Progress(Protocol):
    """Something that shows how far work is."""

    def bar(self, label: str, total: int) -> AbstractContextManager[Step]:
        """A context for `total` things to do; it yields `step(n, note)`."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def bar(self, label: str, total: int) -> Generator[Step]:
        yield lambda n, note="": None


class Bars:
    """Shows bars on standard error: live ones on a terminal, else a plain line after two seconds and then every ten."""

    first, every = 2.0, 10.0

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._live: RichProgress | None = None

    @contextmanager
    def bar(self, label: str, total: int) -> Generator[Step]:
        """A context for `total` things to do; it yields `step(n)`. Bars may be open at once."""
        with self._bar(label, total) if self.stream.isatty() else self._lines(label, total) as step:
            yield step

    @contextmanager
    def _bar(self, label: str, total: int) -> Generator[Step]:
        outer = self._live is None
        live = self._live = self._live or self._start()
        task = live.add_task(label, total=total)
        try:
            yield lambda n, note="": live.update(task, advance=n, description=f"{label}  {note}" if note else label)
        finally:
            live.remove_task(task)
            if outer:
                live.stop()
                self._live = None

    def _start(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import Progress as Live
        from rich.progress import TimeElapsedColumn

        live = Live(*Live.get_default_columns(), TimeElapsedColumn(), console=Console(file=self.stream), transient=True)
        live.start()
        return live

    @contextmanager
    def _lines(self, label: str, total: int) -> Generator[Step]:
        begun = time.monotonic()
        due = begun + self.first
        done, shown, said = 0, list[int](), ""

        def show() -> None:
            nonlocal due
            due = time.monotonic() + self.every
            shown.append(done)
            beside = f", {said}" if said else ""
            self.stream.write(f"{label}: {done}/{total}, {time.monotonic() - begun:.0f} s{beside}\n")
            self.stream.flush()

        def step(n: int, note: str = "") -> None:
            nonlocal done, said
            done, said = done + n, note
            if time.monotonic() >= due:
                show()

        yield step
        if time.monotonic() - begun >= self.first and shown[-1:] != [done]:
            show()
