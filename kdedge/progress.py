"""What a person sees while stages run: bars in a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY_S = 10.0


class Quiet:
    """Shows nothing: the default of the Python API."""

    def note(self, text: str) -> None:
        """One finished or skipped thing, in a line that stays."""

    def update(self, stage: str, done: int, total: int, detail: str) -> None:
        """`stage` has done `done` of `total` steps. `detail` is shown beside it, as it is."""

    def finish(self) -> None:
        """The current stage is over."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


class Lines(Quiet):
    """A line every ten seconds of a stage, and one at its end: for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage = ""
        self._latest = ""
        self._began = self._shown = 0.0

    def note(self, text: str) -> None:
        self.finish()
        print(text, file=self._stream, flush=True)

    def update(self, stage: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self.finish()
            self._stage, self._began, self._shown = stage, now, now
        self._latest = (
            f"{stage}: {100 * done // total:3d}%  {detail}  {_clock(_left(now - self._began, done, total))} left"
        )
        if now - self._shown >= LINE_EVERY_S:
            print(self._latest, file=self._stream, flush=True)
            self._shown = now

    def finish(self) -> None:
        if self._stage:
            took = _clock(time.monotonic() - self._began)
            print(f"{self._latest.rsplit('  ', 1)[0]}  took {took}", file=self._stream, flush=True)
            self._stage = ""


class Bars(Quiet):
    """A bar a stage, with what is left of the time: for terminals."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        # In a narrow terminal only the end of the details may go, which is why they come last.
        details = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            TextColumn("{task.fields[detail]}", table_column=details),
            console=Console(stderr=True),
            expand=True,
        )
        self._stage = ""
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        self.finish()
        self._bars.console.print(text, highlight=False, soft_wrap=True)

    def update(self, stage: str, done: int, total: int, detail: str) -> None:
        if stage != self._stage:
            self.finish()
            self._stage = stage
            self._bars.start()
            self._task = self._bars.add_task(stage, total=total, detail=detail)
        assert self._task is not None
        self._bars.update(self._task, completed=done, detail=detail)

    def finish(self) -> None:
        if self._task is not None:
            self._bars.stop_task(self._task)
            self._bars.stop()
            self._task, self._stage = None, ""


def progress(quiet: bool = False) -> Quiet:
    """The display that suits stderr."""
    if quiet:
        return Quiet()
    return Bars() if sys.stderr.isatty() else Lines(sys.stderr)


def _left(elapsed_s: float, done: int, total: int) -> float:
    return elapsed_s * (total - done) / max(1, done)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
