"""What the demo shows while it works: the step it is at and for how long, then what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@dataclass(slots=True)
class Step:
    """One step under way; `result` is shown behind its line when it ends."""

    result: str = ""


class Steps:
    """Prints one line for each step that ended; on a terminal also the one under way."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, text: str) -> Iterator[Step]:
        step = Step()
        start = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(f"  {text} ...")
        try:
            with self._under_way(text):
                yield step
        except BaseException:
            self._end("[red]x[/]", text, start, "")
            raise
        self._end("[green]✓[/]", text, start, step.result)

    def note(self, text: str) -> None:
        self._console.print(f"  {text}")

    def _under_way(self, text: str) -> Progress:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        progress.add_task(text, total=None)
        return progress

    def _end(self, mark: str, text: str, start: float, result: str) -> None:
        seconds = time.monotonic() - start
        tail = f"  [dim]{result}[/]" if result else ""
        self._console.print(f"{mark} {text}  [dim]{seconds:.1f} s[/]{tail}")
