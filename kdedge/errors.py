"""The exceptions that a user can cause, and what each means.

KdedgeError                 one to a few lines: what, where, what was given, what to do next (exit code 1)
 |- RecipeError             the recipe says something that cannot be done; lists every problem found
 |- DataError               a dataset is missing, damaged or not what it claims to be
 |- RunError                a run directory is missing, unfinished, changed, in use or cannot be written
 |- PackageError            an export folder is not what its manifest says; lists every problem found
 |- TrainingError           training stopped making sense (a loss that is not a number)
 |- Interrupted             the user pressed Ctrl-C; says what is kept (exit code 130)
 |- DeviceError             the runner could not do its job on the device
 `- GateError               an exported file lost more accuracy than the recipe allows (exit code 3)

Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass


class KdedgeError(Exception):
    """A mistake or a state of the world that the user can mend; `str()` is the whole message."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a recipe: where it stands, what was given and what to write instead."""

    path: str  # "networks.students.learns[0].loss"; empty when the file as a whole is wrong
    message: str
    line: int | None = None  # 1-based; None when the value came from --set or was never written


class RecipeError(KdedgeError):
    """Every problem of a recipe at once, so that one round of corrections is enough."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = problems
        lines = []
        for problem in problems:
            where = f"{source}:{problem.line}" if problem.line is not None else source
            path = f"{problem.path}: " if problem.path else ""
            lines.append(f"{where}: {path}{problem.message}")
        super().__init__("\n".join(lines))


class DataError(KdedgeError):
    """A dataset is missing, damaged or not what it claims to be."""


class RunError(KdedgeError):
    """A run directory is missing, unfinished, changed, in use or cannot be written."""


class PackageError(KdedgeError):
    """Every problem of an export folder that the same step of its check has found."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class TrainingError(KdedgeError):
    """Training stopped making sense; says where, and which checkpoint is the last good one."""


class Interrupted(KdedgeError):
    """The user stopped us; says what is kept and how to go on."""

    exit_code = 130


class DeviceError(KdedgeError):
    """The runner could not do its job on the device."""


class GateError(KdedgeError):
    """An exported file lost more accuracy than the recipe allows. The files are left in place."""

    exit_code = 3
