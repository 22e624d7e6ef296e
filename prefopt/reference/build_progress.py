"""How far a build is: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY = 30.0
"""Seconds between two lines where there is no bar."""


class BuildProgress:
    """Computed tokens of a build, those of the processes it shares the work with included."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._total = self._done = self._own = 0
        self._began = self._said = time.monotonic()
        self._bar: Progress | None = None

    def start(self, *, completions: int, tokens: int) -> None:
        """Say what is about to be scored."""
        self.console.print(f"scoring {completions:,} completions with the reference ({tokens:,} tokens to compute)")
        self._total, self._done, self._own = tokens, 0, 0
        self._began = self._said = time.monotonic()
        self._stop()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                _Rate(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._bar.add_task("reference log-probs", total=tokens)

    def advance(self, tokens: int, *, own: bool = True) -> None:
        """Count computed tokens; `own` is False for those that another process computed."""
        self._done += tokens
        self._own += tokens if own else 0
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], tokens)
        elif time.monotonic() - self._said > LINE_EVERY:
            self._said = time.monotonic()
            self.console.print(self._line())

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line)

    def _line(self) -> str:
        seconds = time.monotonic() - self._began
        left = seconds * (self._total - self._done) / max(self._done, 1)
        return (
            f"  {self._done / max(self._total, 1):4.0%} of {self._total:,} tokens, "
            f"{self._own / max(seconds, 1e-9):,.0f} tokens/s here, about {_duration(left)} left"
        )

    def __enter__(self) -> BuildProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Show computed tokens per second."""
        return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes > 1 else f"{60 * minutes + rest} s"
