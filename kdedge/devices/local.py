"""This machine as a device: the runner in a fresh process, in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdedge.errors import DeviceError
from kdedge.wording import shorten

RUNNER = Path(__file__).with_name("runner.py")
TIMEOUT_S = 3600  # a job that takes longer hangs
# The accuracy of all graphs on 10,000 images is one job, for which a slow machine needs hours, and an emulated one longer.
ACCURACY_S = 12 * 3600


def run(
    job: Mapping[str, Any],
    files: Mapping[str, Path],
    *,
    interpreter: Sequence[str | Path] = (sys.executable,),
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """The runner's answer to `job`. `files` maps the paths that the job uses to the files that belong there.

    `interpreter` is the command that runs Python here, with `environment` on top of this process's own. Raises DeviceError
    when the runner refuses the job, dies, takes longer than `timeout_s`, by default an hour, or half a day for accuracy, or
    answers with no JSON.
    """
    limit_s = timeout_s or (ACCURACY_S if job.get("task") == "accuracy" else TIMEOUT_S)
    with tempfile.TemporaryDirectory(prefix="kdedge-job-") as temporary:
        folder = Path(temporary).resolve()
        put(job, files, folder)
        try:
            done = subprocess.run(
                [*interpreter, RUNNER.name, "job.json"],
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{_what(job, files)} on this machine did not end within {limit_s:g} s") from None
        except OSError as error:
            raise DeviceError(f"{interpreter[0]} cannot be started: {error.strerror}") from None
    said = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode < 0:
        number = -done.returncode
        hint = ": not enough memory?" if number == signal.SIGKILL else ""
        message = f"{_what(job, files)} was killed by signal {number} ({signal.strsignal(number)}){hint}"
        raise DeviceError(f"{message} Last words: {said}" if said else message)
    if done.returncode > 0:
        raise DeviceError(f"{_what(job, files)} failed with exit code {done.returncode}: {said or 'it said nothing'}")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise DeviceError(f"{_what(job, files)} answered with no JSON: {done.stdout[:80]!r}") from None
    if not isinstance(answer, dict):
        raise DeviceError(f"{_what(job, files)} answered with {type(answer).__name__}, expected a JSON object")
    return answer


def put(job: Mapping[str, Any], files: Mapping[str, Path], folder: Path) -> None:
    """Copy the runner, the files and the job into `folder`. Raises DeviceError when one cannot go there."""
    try:
        shutil.copyfile(RUNNER, folder / RUNNER.name)
        for name, source in files.items():
            target = (folder / name).resolve()
            if not target.is_relative_to(folder) or target.exists():
                raise DeviceError(f"a job cannot have a file at {name!r}: it is taken, or out of the job's folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    except OSError as error:
        raise DeviceError(f"the job cannot be written to {folder}: {error}") from None


def _what(job: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    graphs = [name for name in files if name.endswith(".onnx")]
    of = (
        ""
        if not graphs
        else f" of {graphs[0]}"
        if len(graphs) == 1
        else f" of {len(graphs)} files ({shorten(', '.join(graphs))})"
    )
    return f"The {job.get('task')} job{of}"
