"""Progress at the terminal: what is being done, how far it is, at what rate, and how long it will take."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

QUIET_S = 1.0
"""Work shorter than this leaves no line behind."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {task.fields['unit']}/s" if speed else "", style="cyan")


class TerminalProgress:
    """Implements `types.Progress`: a bar at a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task = None
        self._what, self._total, self._done, self._unit = "", 0, 0, ""
        self._started = self._last_line = 0.0

    def start(self, what: str, total: int, unit: str) -> None:
        self.finish()
        self._what, self._total, self._done, self._unit = what, total, 0, unit
        self._started = self._last_line = time.monotonic()
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, unit=unit)  # type: ignore[assignment]

    def advance(self, amount: int = 1, **numbers: float) -> None:
        self._done += amount
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=amount)
        elif time.monotonic() - self._last_line >= 10:
            self._last_line = time.monotonic()
            self._line()

    def _line(self) -> None:
        seconds = max(1e-9, time.monotonic() - self._started)
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        self.console.print(
            f"  {self._what}: {self._done}/{self._total} {self._unit}, {rate:.1f} {self._unit}/s, {left:.0f} s left"
        )

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._what and time.monotonic() - self._started >= QUIET_S:
            seconds = time.monotonic() - self._started
            rate = f", {self._done / seconds:.1f} {self._unit}/s" if seconds > 0 else ""
            self.console.print(f"  {self._what}: {self._done} {self._unit} in {seconds:.1f} s{rate}")
        self._bar, self._task, self._what = None, None, ""


def is_interactive() -> bool:
    """True where a person can be asked."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
