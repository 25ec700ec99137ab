"""What a person sees: exact lines in a log, and bars in a real terminal (a pseudo-terminal)."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kdedge import progress as module
from kdedge.progress import Bars, Lines, Quiet, progress


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_lines_of_a_run(clock: Clock) -> None:
    """One every ten seconds with what is left of the time, one at the end of a stage with what it took."""
    stream = io.StringIO()
    with Lines(stream) as lines:
        lines.note("fit teacher: finished before")
        for done in range(0, 101, 10):
            lines.update("fit students", done, 100, f"epoch 1/1  loss {1 - done / 200:.4f}  3,000 img/s")
            clock.now_s += 4
        lines.update("fine-tune students.head", 1, 3, "epoch 1/1  loss 0.5000  9 img/s")
        clock.now_s += 125
    assert stream.getvalue().splitlines() == [
        "fit teacher: finished before",
        "fit students:  30%  epoch 1/1  loss 0.8500  3,000 img/s  0:28 left",
        "fit students:  60%  epoch 1/1  loss 0.7000  3,000 img/s  0:16 left",
        "fit students:  90%  epoch 1/1  loss 0.5500  3,000 img/s  0:04 left",
        "fit students: 100%  epoch 1/1  loss 0.5000  3,000 img/s  took 0:44",
        "fine-tune students.head:  33%  epoch 1/1  loss 0.5000  9 img/s  took 2:05",
    ]


def test_a_note_ends_the_stage_before_it(clock: Clock) -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    lines.update("outputs of teacher", 5, 5, "7 img/s")
    lines.note("next")
    lines.finish()
    lines.finish()
    assert stream.getvalue() == "outputs of teacher: 100%  7 img/s  took 0:00\nnext\n"


def test_lines_when_an_error_ends_the_stage(clock: Clock) -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError), Lines(stream) as lines:
        lines.update("fit a", 1, 2, "x")
        raise ValueError
    assert stream.getvalue() == "fit a:  50%  x  took 0:00\n"


SHOW = """
from kdedge.progress import progress
with progress() as shown:
    shown.note("fit teacher: finished before")
    for step in (0, 50, 100):
        shown.update("fit students", step, 100, f"epoch {1 + step // 100}/2  loss 0.{step:04}  20,123 img/s")
    shown.update("fit other", 1, 1, "epoch 1/1  loss 0.7000  9 img/s  val 91.25%")
print("on stdout")
"""


def in_terminal(columns: int) -> tuple[str, str]:
    """stdout, and what a terminal of that width was sent on stderr, without colours and cursor movements."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24"}
    with subprocess.Popen(
        [sys.executable, "-c", SHOW], stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as child:
        os.close(theirs)
        sent = b""
        try:
            while chunk := os.read(ours, 4096):
                sent += chunk
        except OSError:  # how Linux reports that the other end was closed
            pass
        os.close(ours)
        assert child.stdout is not None
        printed = child.stdout.read().decode()
    assert child.returncode == 0, sent.decode()
    return printed, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.decode())


@pytest.mark.parametrize("columns", [80, 120])
def test_bars_in_a_terminal(columns: int) -> None:
    printed, shown = in_terminal(columns)
    assert printed == "on stdout\n"
    assert "fit teacher: finished before" in shown
    lines = re.split(r"[\r\n]+", shown)
    finished = [line for line in lines if line.startswith("fit students") and "epoch 2/2" in line]
    assert finished and "loss 0.0100" in finished[-1] and "20,123 img/s" in finished[-1]
    assert "━" in finished[-1] and "left" in finished[-1]
    assert any(line.startswith("fit other") and "val 91.25%" in line for line in lines)


def test_the_display_suits_stderr() -> None:
    """stderr is no terminal while pytest captures it."""
    assert type(progress()) is Lines
    assert type(progress(quiet=True)) is Quiet
    assert issubclass(Bars, Quiet)
