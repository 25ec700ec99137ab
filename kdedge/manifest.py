"""manifest.json, the table of contents of an export folder: what its files are, and whether they still are that.

`format` goes up when who knows only the old one would misunderstand the new one. What a manifest says in addition, and
an older one does not, has a default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from kdedge.data.catalog import As
from kdedge.errors import RunError
from kdedge.recipe_values import Calibration
from kdedge.store import Run, inside, read_as, sha256

Role = Literal["teacher", "member", "head", "merged", "plain"]  # of a group in one file: for the device, and as trained
Precision = Literal["fp32", "int8", "int8-u8u8", "int8-u8u8-tensor", "int8-repaired"]
INT8: tuple[Precision, ...] = get_args(Precision)[1:]
FORMS = INT8[:-1]  # that the whole of a network can have, as exporters/int8.py has them, in the order of trying
Way = Literal["one graph", "one graph as trained", "members"]  # to run a group; members: their files, then the head's
Place = tuple[str, str]  # a network, and the role of the file that gives its logits


class TensorInfo(BaseModel):
    """One input or output of an exported file; a free axis is given by its name."""

    name: str
    dtype: str
    shape: list[int | str]


class Repair(BaseModel):
    """How a file in `int8-repaired` was made of one that failed its gate."""

    form: Precision  # of the layers in int8
    calibrated_by: Calibration
    in_float: list[str]  # nodes of the float32 graph that were kept as they are


class ExportedFile(BaseModel):
    """One ONNX file of an export, with everything needed to check and run it."""

    network: str  # "teacher", "students", or "students.0" for a member
    role: Role
    precision: Precision
    path: str  # relative to the export folder
    sha256: str
    bytes: int
    parameters: int  # of the network as it was trained; the file of a whole network may hold fewer numbers
    weight_bits: int | None = None  # the fewest that the weights of a layer are stored in: 32, 8, 4 or 2
    opset: int | None = None  # which may be newer than the manifest's, where weights have 4 or 2 bits
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    # On validation images, of fp32, and of int8 that was trained quantized: the largest difference of an output.
    difference_to_torch: float | None = None
    agreement_with_torch: float | None = None  # of the latter: percent of images that get the same class
    float_nodes: list[str] | None = None  # of int8: nodes that onnxruntime still computes in float
    repair: Repair | None = None  # of int8-repaired


class ValidationRow(BaseModel):
    """Accuracy of one graph on one split."""

    network: str
    role: str
    precision: str
    cpu_class: str
    split: str
    n: int
    correct: int
    accuracy: float  # percent
    accuracy_ci95: tuple[float, float]  # percent, Wilson


class GateResult(BaseModel):
    """Whether int8 lost too much against fp32; the figures are null when there was nothing to compare."""

    network: str
    role: str
    precision: Precision = "int8"
    cpu_class: str | None = None  # where int8 was run; null: on the machine that exported
    drop_points: float | None
    upper95_points: float | None  # upper end of the two-sided 95% interval of the paired drop
    max_drop_points: float
    passed: bool
    only_fp32: int  # images that only fp32 gets right
    only_int8: int
    n: int
    reason: str  # one sentence

    @property
    def place(self) -> Place:
        """What was judged."""
        return self.network, self.role


class Repaired(BaseModel):
    """What holds the gate of a network since its repair, and what that costs on the machine that exported.

    Times are of both, in turns, at batch 1; bytes are of all their files.
    """

    network: str
    role: str
    form: Precision  # of the layers in int8
    calibrated_by: Calibration
    # `name (operator)` of each layer, with its file's network where there are several, and the signal-to-noise ratio of
    # the output, in dB, with this layer alone in int8; null without noise
    in_float: dict[str, float | None]
    layers: int  # in all
    bytes: int
    int8_bytes: int  # of the form `int8`, which failed
    latency_ms_p50: float
    int8_latency_ms_p50: float
    latency_ratio: float  # geometric mean over rounds
    latency_ratio_ci95: tuple[float, float] | None
    threads: int
    cpu_class: str


class Recommended(BaseModel):
    """How to run a network on a device, as `bench` measured it there."""

    network: str
    form: Way
    precision: Precision
    threads: int
    files: list[str]
    latency_ms_p50: float
    cpu: str | None
    cpu_class: str
    why: str  # what was chosen among, whether int8 is worth it, and what did not count


class DataRecord(BaseModel):
    """The dataset of the run, as run.json has it: with the sample numbers of the manifest it gives the same images."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: str
    as_: As | None = Field(None, alias="as")
    fingerprint: str


class Manifest(BaseModel):
    """The table of contents of an export folder."""

    format: Literal[1] = 1
    recipe: str
    files: list[ExportedFile]
    quick: bool = False
    stages: dict[str, str] = {}  # name and key of the stages that the weights come from
    opset: int = 20
    data: DataRecord | None = None
    calibration: list[int] = []  # sample numbers of the training set
    calibrated_by: str = "minmax"  # how int8 ranges were found on them
    validation: list[int] = []  # the same, of the images that `accuracy` and `gates` are on
    versions: dict[str, str] = {}
    accuracy: list[ValidationRow] = []
    gates: list[GateResult] = []  # the verdict on each int8 network on each CPU class, in every form that was tried
    repaired: list[Repaired] = []  # networks that no form of int8 did for
    ships: dict[str, list[str]] = {}  # for each CPU class, the int8 files that are for it: they passed on it
    recommended: list[Recommended] = []  # the latest for each CPU that it was measured on

    @property
    def refused(self) -> list[GateResult]:
        """The verdicts on what passed in no form on a CPU class that it is for. A group as trained may fail: the merged one
        ships."""
        passed = {(gate.network, gate.role, gate.cpu_class) for gate in self.gates if gate.passed}
        judged = [gate for gate in self.gates if gate.role != "plain"]
        return [gate for gate in judged if (gate.network, gate.role, gate.cpu_class) not in passed]


def read_manifest(export: Path) -> Manifest:
    """The manifest of an export folder. Raises RunError when there is none, or when it is damaged or of another format."""
    file = export / "manifest.json"
    if not file.is_file():
        raise RunError(f"{export} is no export: it has no manifest.json. Make one with `kdedge export --int8`.")
    return read_as(file, Manifest)


def manifest_of(run: Run) -> Manifest:
    """The manifest of the run's export. Raises RunError when there is none, or when it holds other weights than the run."""
    manifest = read_manifest(run.path / "export")
    if manifest.stages != {stage.name: stage.key for stage in run.stages}:
        raise RunError(
            f"{run.path / 'export'} holds other weights than the run has now. "
            f"Export again: kdedge export {run.path} --int8"
        )
    return manifest


def check_file(export: Path, file: ExportedFile) -> Path:
    """Path of an exported file, after its size and SHA-256 were compared with the manifest. Raises RunError."""
    path = inside(export, file.path)
    try:
        if not path.is_file():
            raise RunError(f"{path} is missing, though the manifest lists it. Export again.")
        size = path.stat().st_size
        digest = sha256(path) if size == file.bytes else None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    if digest is None:
        raise RunError(
            f"{path} was changed: the manifest says {file.bytes:,} bytes, the file has {size:,}. Export again."
        )
    if digest != file.sha256:
        raise RunError(
            f"{path} was changed: the manifest says SHA-256 {file.sha256}, the file has {digest}. Export again."
        )
    return path
