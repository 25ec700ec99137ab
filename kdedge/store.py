"""Run directories: what is in them, and how it gets there whole or not at all.

    runs/tcn4/
        run.json                        recipe, splits, versions and the stages this run consists of
        stages/fit-teacher-3fa9.../     weights.safetensors, stage.json; the directory exists, or the stage did not happen
                                        (images.npz and images.png where images were made)
        targets/9c41...-flip0-shift0-dense/  outputs of a finished network over the training views (a cache: may be deleted)
        export/                         ONNX files and manifest.json
        validation.json, predictions.npz, bench.json    measurements of the export, see MEASUREMENTS
        cpu_classes.json                its int8 files on CPU classes
        diagnosis/NETWORK.json, .png    what int8 does to the layers of a network

Everything is written beside its final place, flushed to the disk, and renamed. Nothing here knows what a network is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator

from kdedge.errors import RunError
from kdedge.wording import given, nearest

if TYPE_CHECKING:
    from torch import Tensor

_Document = TypeVar("_Document", bound=BaseModel)

MEASUREMENTS = ("validation.json", "predictions.npz", "bench.json")  # what `bench` writes of an export, in this order
CPU_CLASSES = "cpu_classes.json"  # what `validate` writes

_HELD = {  # what a finished stage or cache holds, by the key of its hash
    "weights_sha256": "weights.safetensors",
    "images_sha256": "images.npz",
    "outputs_sha256": "outputs.safetensors",
}


class StageRecord(BaseModel):
    """One stage of a run, as the plan has it; the folder is relative to the run."""

    name: str
    network: str
    key: str
    folder: str


class Run(BaseModel):
    """run.json: what this run is made of. `path` is where it was found and is not part of the file."""

    format: Literal[1] = 1
    name: str
    quick: bool
    recipe: dict[str, Any]  # resolved: every default written out
    data: dict[str, Any]  # name, origin, fingerprint, and the sample numbers of the validation and calibration splits
    stages: list[StageRecord] = Field(min_length=1)
    versions: dict[str, str]
    path: Path = Path()

    @field_validator("data")
    @classmethod
    def _whole(cls, data: dict[str, Any]) -> dict[str, Any]:
        if missing := {"name", "fingerprint", "train", "validation", "calibration"} - data.keys():
            raise ValueError(f"missing: {', '.join(sorted(missing))}")
        return data

    def write(self) -> None:
        """Write run.json into the run's folder, in one piece."""
        write_json(self.path / "run.json", self.model_dump(mode="json", exclude={"path"}))

    def stage(self, name: str) -> Path:
        """Folder of the finished stage `name`. Raises RunError when it is not finished or not part of the run."""
        for record in self.stages:
            if record.name == name:
                folder = inside(self.path, record.folder)
                if not (folder / "stage.json").is_file():
                    raise RunError(f"{self.path}: stage '{name}' is not finished. Run `kdedge distill` again to go on.")
                return folder
        raise RunError(f"{self.path}: this run has no stage '{name}'")


def open_run(path: Path) -> Run:
    """The run in folder `path`. Raises RunError when there is none, or when run.json is not one of ours."""
    file = path / "run.json"
    if not file.is_file():
        raise RunError(f"{path} is not a run: it has no run.json. Make one with `kdedge distill RECIPE`.")
    return Run.model_validate({**read_as(file, Run).model_dump(), "path": path})


def find_run(run: Path | None, runs: Path) -> Path:
    """The folder of a run, or of a recipe's runs, by its path or by its name in `runs`; the newest for None. Raises RunError."""
    if run is None:
        return newest_run(runs)
    if found := next(filter(_holds_runs, (run, runs / run)), None):
        return found
    if run.suffix in (".yaml", ".yml"):
        raise RunError(f"{run} is a recipe, not a run. Make its run with `kdedge distill {run}`, and name that.")
    beside = {one.name: one for place in (run, runs / run) for one in place.parent.glob("*") if _holds_runs(one)}
    guess = f"; did you mean {beside[meant]}?" if (meant := nearest(run.name, sorted(beside))) else "."
    raise RunError(f"{run} is no run, and {runs} has none of that name{guess} Make one with `kdedge distill RECIPE`.")


def _holds_runs(folder: Path) -> bool:
    return (folder / "run.json").is_file() or any(folder.glob("*/run.json"))


def newest_run(runs: Path) -> Path:
    """The folder in `runs` in which a run.json was written last. Raises RunError when there is none."""
    found = sorted([*runs.glob("*/run.json"), *runs.glob("*/*/run.json")], key=lambda file: file.stat().st_mtime_ns)
    if not found:
        raise RunError(f"No run in {runs}/. Make one with `kdedge distill RECIPE`, or name the run's folder.")
    return runs / found[-1].relative_to(runs).parts[0]


def runs_of(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs in it: a recipe's variants and seeds. Raises RunError."""
    if (folder / "run.json").is_file():
        check_place(folder)
        return [folder]
    found = [file.parent for file in sorted(folder.glob("*/run.json"))]
    if not found:
        raise RunError(f"{folder} is not a run: it has no run.json. Make one with `kdedge distill RECIPE`.")
    return found


def check_place(run: Path) -> None:
    """Refuse a run within another one: nobody could tell which of them is meant. Raises RunError."""
    run = run.absolute()  # "." has a parent as well
    inner = [run] if (run.parent / "run.json").is_file() else [file.parent for file in run.glob("*/run.json")]
    if inner:
        raise RunError(
            f"{inner[0].parent} cannot be a single run and the folder of runs such as {inner[0]} at once. Move one of them "
            "elsewhere, or give the new one another name: --set name=NAME."
        )


def exports_of(folder: Path | None, runs: Path) -> list[Path]:
    """The folder itself if it is an export, else the exports of what `find_run` finds. Raises RunError."""
    if folder is None or not (folder / "manifest.json").is_file():
        try:
            return [run / "export" for run in runs_of(find_run(folder, runs))]
        except RunError as error:
            raise RunError(f"{error} Or name an export's folder, which holds its manifest.json.") from None
    return [folder]


def drop_measurements(run: Path) -> None:
    """Remove what was measured of an export that is replaced."""
    for name in (*MEASUREMENTS, CPU_CLASSES):
        (run / name).unlink(missing_ok=True)


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object that kdedge wrote. Raises RunError when it cannot be read as one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(document, ensure_ascii=False).encode()  # refuses halves of characters, which cannot be printed
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise RunError(f"{path} is damaged: expected a JSON object, found {type(document).__name__}")
    return document


def read_as(path: Path, model: type[_Document]) -> _Document:
    """A document of kdedge's in the form `model`. Raises RunError when it is damaged or of another format."""
    document, format_ = read_document(path), model.model_fields.get("format")
    if format_ is not None and (found := document.get("format")) != format_.default:
        raise RunError(
            f"{path}: expected format {format_.default}, found {given(found)}. Use the kdedge that wrote it."
        )
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = {"missing": "missing", "too_short": "empty", "value_error": str(first.get("ctx", {}).get("error"))}
        what = said.get(first["type"]) or f"did not expect {given(first['input'])}"
        raise RunError(f"{path} is damaged: {where}: {what}") from None


def inside(folder: Path, relative: str) -> Path:
    """`folder / relative`, refused when it would leave the folder: run files may come from somewhere else."""
    try:
        leaves = not (folder / relative).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, names that no file system takes
        leaves = True
    if leaves:
        raise RunError(f"{relative!r} leads out of {folder}")
    return folder / relative


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document in one piece, readable by people, with a final newline."""
    write_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk and rename it: readers see the old file or the new one.

    Raises RunError when the disk is full or the folder cannot be written; nothing of the attempt is left behind.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}. What was finished before is kept."
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and disappears when it does not.

    A folder that was there before is replaced. Files written by others into the block's folder are flushed as well.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            _flush(file)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            path.replace(old)
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}. What was finished before is kept."
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def is_unchanged(folder: Path) -> bool:
    """Whether a finished folder can be read, and what it holds has the SHA-256 that was written down beside it."""
    try:
        record = {key: value for file in folder.glob("*.json") for key, value in read_document(file).items()}
    except RunError:
        return False
    held = [(folder / name, record[key]) for key, name in _HELD.items() if key in record]
    return bool(held) and all(file.is_file() and sha256(file) == digest for file, digest in held)


def sweep(run: Path) -> None:
    """Remove what killed processes left half-written among stages and targets, and the checkpoints of stages that are
    finished all the same. Only for whoever holds the lock.
    """
    working = [*run.glob("stages/*.checkpoint"), *run.glob("stages/*.dense")]
    done = [path for path in working if path.with_suffix("").is_dir()]
    for path in [*run.glob("stages/.*"), *run.glob("targets/.*"), *done]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the run for this process. The lock goes with the process, so a kill leaves nothing to clean up."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("w")
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}. Choose another --runs.") from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder} is in use by another kdedge process. Wait, or choose another --runs.") from None
        yield


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, in one piece."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: Path, digest: str | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises RunError when it is missing, damaged or not the one expected."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RunError(f"{path} is missing. Delete its folder and run `kdedge distill` again to make it anew.")
    if digest is not None and (found := sha256(path)) != digest:
        raise RunError(
            f"{path} was changed: expected SHA-256 {digest}, found {found}. Delete its folder and distil again."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RunError(f"{path} is damaged: {error}") from None
