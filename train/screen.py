"""What a person sees of a run: bars on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

QUIET = 15.0
"""Seconds between lines where there is no terminal."""


class Screen:
    """Bars and words on standard error, or nothing on processes other than the first."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._last = float("-inf")
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        elif self.enabled:
            print(text, file=sys.stderr, flush=True)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total`."""
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total, note=note)
            self._bars.update(self._tasks[what], completed=done, total=total, note=note)
        elif self.enabled and (time.monotonic() - self._last > QUIET or (done == total and total > 0)):
            self._last = time.monotonic()
            print(f"{what} {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)
