"""Run folders: a file or folder is there whole or not at all, and nothing from outside is believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_export import STAGE, recorded_data

from kdedge.errors import RunError
from kdedge.store import (
    Run,
    StageRecord,
    check_place,
    exports_of,
    find_run,
    inside,
    load_tensors,
    lock,
    new_folder,
    newest_run,
    open_run,
    read_document,
    runs_of,
    save_tensors,
    sha256,
    sweep,
    write_bytes,
    write_json,
)

KEPT = "What was finished before is kept"


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def make_run(folder: Path, **changes: Any) -> Run:
    fields = {"name": "r", "quick": False, "recipe": {}, "data": recorded_data(), "stages": [STAGE], "versions": {}}
    return Run.model_validate(fields | {"path": folder} | changes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Files


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "b", b"old")
    write_bytes(tmp_path / "a" / "b", b"new")
    assert (tmp_path / "a" / "b").read_bytes() == b"new"
    assert names(tmp_path / "a") == ["b"]
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o644


def test_who_reads_the_old_file_while_it_is_replaced_reads_it_to_the_end(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old" * 1000)
    with (tmp_path / "a").open("rb", buffering=0) as file:
        start = file.read(3)
        write_bytes(tmp_path / "a", b"new" * 1000)
        assert start + file.read() == b"old" * 1000


def test_json_is_readable_and_comes_back(tmp_path: Path) -> None:
    document = {"name": "Träger", "n": 3, "accuracy": 91.5, "list": [1, None]}
    write_json(tmp_path / "a.json", document)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "Träger" in text and text.endswith("}\n") and text.count("\n") > 4
    assert read_document(tmp_path / "a.json") == json.loads(text) == document


# A limit on the size of files stops a write in its middle, as a full disk does.
FULL_DISK = """
import resource, sys
from pathlib import Path
from kdedge.errors import RunError
from kdedge.store import new_folder, write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
try:
    {action}
except RunError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    process = python(FULL_DISK.format(action="write_bytes(folder / 'a', bytes(5000))"), tmp_path)
    assert f"{tmp_path / 'a'} cannot be written: File too large. {KEPT}" in process.stdout, process.stderr
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("write", ["write_bytes(new / 'b', bytes(5000))", "(new / 'b').write_bytes(bytes(5000))"])
def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, write: str) -> None:
    write_bytes(tmp_path / "a" / "b", b"old")
    action = f"\n    with new_folder(folder / 'a') as new: {write}"
    process = python(FULL_DISK.format(action=action), tmp_path)
    assert "cannot be written: File too large" in process.stdout and KEPT in process.stdout, process.stderr
    assert (tmp_path / "a" / "b").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_what_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    """A file stands where the folder should be: the user's mistake, so no traceback."""
    (tmp_path / "runs").write_text("")
    place = tmp_path / "runs" / "r"
    with pytest.raises(RunError, match="cannot be written"):
        write_bytes(place / "a", b"")
    with pytest.raises(RunError, match="cannot be written"), new_folder(place):
        pass
    with pytest.raises(RunError, match="cannot be written"), lock(place):
        pass


# Folders


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "runs" / "a") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("b")
        assert folder.parent == tmp_path / "runs" and folder.name != "a"
        assert not (tmp_path / "runs" / "a").exists()
    assert (tmp_path / "runs" / "a" / "sub" / "b").read_text() == "b"
    assert names(tmp_path / "runs") == ["a"]
    assert (tmp_path / "runs" / "a").stat().st_mode & 0o777 == 0o755


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with new_folder(tmp_path / "a") as folder:
            (folder / name).write_text(name)
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_folder_stays_and_the_new_one_goes(tmp_path: Path, error: type[BaseException]) -> None:
    with new_folder(tmp_path / "a") as folder:
        (folder / "b").write_text("old")
    with pytest.raises(error), new_folder(tmp_path / "a") as folder:
        (folder / "b").write_text("half")
        raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "b").read_text() == "old"


KILLED = """
import os, sys
from pathlib import Path
from kdedge.store import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "b").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_what_a_kill_leaves_is_not_the_folder_and_is_swept_away(tmp_path: Path) -> None:
    write_bytes(tmp_path / "stages" / "done" / "b", b"whole")
    for place in ("stages/a", "targets/a"):
        assert python(KILLED, tmp_path / place).returncode == -9
    assert len(names(tmp_path / "stages")) == 2 and len(names(tmp_path / "targets")) == 1
    assert not (tmp_path / "stages" / "a").exists() and not (tmp_path / "targets" / "a").exists()
    (tmp_path / "stages" / ".a.checkpoint.x1").write_text("half")
    sweep(tmp_path)
    assert names(tmp_path / "stages") == ["done"] and names(tmp_path / "targets") == []
    assert (tmp_path / "stages" / "done" / "b").read_bytes() == b"whole"


@pytest.mark.parametrize("path", ["../other", "/etc/passwd", "a/../../other", "link/x", "circle/x"])
def test_paths_that_leave_their_folder_are_refused(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "circle").symlink_to(folder / "circle")
    with pytest.raises(RunError, match=f"'{path}' leads out of"):
        inside(folder, path)
    with pytest.raises(RunError, match="leads out of"):
        inside(folder, "a\0b")
    assert inside(folder, "stages/a") == folder / "stages" / "a"


# The lock

HOLD = """
import sys
from pathlib import Path
from kdedge.store import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_belongs_to_one_process_and_a_kill_sets_it_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="is in use by another kdedge process"), lock(tmp_path / "run"):
            pass
        other.kill()
        other.wait()
        with lock(tmp_path / "run"):
            pass
    with lock(tmp_path / "run"):
        pass


# Tensors


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4, requires_grad=True), "b": torch.arange(6).view(2, 3).T, "c": torch.tensor(True)}
    tensors["d"] = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    save_tensors(tmp_path / "t.safetensors", tensors)
    found = load_tensors(tmp_path / "t.safetensors", sha256(tmp_path / "t.safetensors"))
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    """Whatever their memory format and the order of their names."""
    tensor = torch.randn(2, 3, 4, 4)
    save_tensors(tmp_path / "1", {"a": tensor, "b": torch.ones(2)})
    save_tensors(tmp_path / "2", {"b": torch.ones(2), "a": tensor.contiguous(memory_format=torch.channels_last)})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_tensors_of_another_hash_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t", {"a": torch.zeros(3)})
    with pytest.raises(RunError, match=f"t was changed: expected SHA-256 {'0' * 64}, found [0-9a-f]{{64}}"):
        load_tensors(tmp_path / "t", "0" * 64)


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t", {"a": torch.zeros(300)})
    whole = (tmp_path / "t").read_bytes()
    for content in (b"", whole[:5], whole[:40], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:], b"{}" * 99):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(RunError, match="t is damaged"):
            load_tensors(tmp_path / "t")
    with pytest.raises(RunError, match="nothing is missing"):
        load_tensors(tmp_path / "nothing")


# Runs and exports


def test_a_run_comes_back(tmp_path: Path) -> None:
    stages = [StageRecord(name="fit a", network="a", key="k", folder="stages/fit-a-k")]
    run = make_run(tmp_path / "r", stages=stages, recipe={"seed": 1}, data=recorded_data() | {"validation": [1, 2]})
    run.write()
    assert open_run(tmp_path / "r") == run
    assert "path" not in read_document(tmp_path / "r" / "run.json")


def test_a_stage_is_finished_when_its_record_is_there(tmp_path: Path) -> None:
    run = make_run(tmp_path, stages=[StageRecord(name="fit a", network="a", key="k", folder="stages/fit-a-k")])
    with pytest.raises(RunError, match="stage 'fit a' is not finished"):
        run.stage("fit a")
    write_json(tmp_path / "stages" / "fit-a-k" / "stage.json", {})
    assert run.stage("fit a") == tmp_path / "stages" / "fit-a-k"
    with pytest.raises(RunError, match="has no stage 'fit b'"):
        run.stage("fit b")


def test_a_stage_outside_its_run_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "elsewhere" / "stage.json", {})
    run = make_run(tmp_path / "r", stages=[StageRecord(name="fit a", network="a", key="k", folder="../elsewhere")])
    with pytest.raises(RunError, match="leads out of"):
        run.stage("fit a")


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run: it has no run.json. Make one with `kdedge distill RECIPE`"):
        open_run(tmp_path)
    with pytest.raises(RunError, match="No run in .*Make one with"):
        newest_run(tmp_path)
    with pytest.raises(RunError, match="No run in .*Make one with"):
        newest_run(tmp_path / "nowhere")


WHOLE = json.dumps(make_run(Path()).model_dump(mode="json")).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b'{"format": 1, "name": "r"', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"format": 1, "name": "\\ud800"}', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "expected a JSON object, found list"),
        (b"{}", "expected format 1, found nothing. Use the kdedge that wrote it."),
        (b'{"format": 2, "name": "r"}', "expected format 1, found 2. Use the kdedge that wrote it."),
        (b'{"format": 1}', "is damaged: name: missing"),
        (WHOLE.replace(b'"data": {', b'"data": {}, "left": {'), "data: missing: calibration, fingerprint, name"),
        (WHOLE.replace(b'"stages": [', b'"stages": [], "left": ['), "stages: empty"),
        (WHOLE.replace(b'"quick": false', b'"quick": "slow"'), "quick: did not expect 'slow'"),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunError) as error:
        open_run(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "run.json")) and said in str(error.value)


def test_exports_are_a_folder_itself_or_those_of_its_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / "table" / name, name=name).write()
    exports = [tmp_path / "table" / name / "export" for name in ("a", "b")]
    assert exports_of(Path("table"), tmp_path) == exports_of(None, tmp_path) == exports
    assert exports_of(tmp_path / "table" / "b", tmp_path) == exports[1:]
    write_json(exports[0] / "manifest.json", {})
    assert exports_of(exports[0], tmp_path) == exports[:1]
    with pytest.raises(RunError, match=r"is no run, .* Or name an export's folder, which holds its manifest\.json"):
        exports_of(exports[1], tmp_path)


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("small", "runs/small"),
        ("runs/small", "runs/small"),
        ("study", "runs/study"),
        ("study/kd.seed0", "runs/study/kd.seed0"),
        ("here", "here"),
        (None, "runs/study"),
    ],
)
def test_a_run_is_found_by_its_path_or_its_name(
    named: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/small", "here", "runs/here", "runs/study/kd.seed0"):
        make_run(Path(folder)).write()
    Path("small").mkdir()  # no run
    assert find_run(Path(named) if named else None, Path("runs")) == Path(found)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("runs/smal", "runs/smal is no run, and runs has none of that name; did you mean runs/small? Make one with"),
        ("smal", "smal is no run, and runs has none of that name; did you mean runs/small? Make one with"),
        ("other", "other is no run, and runs has none of that name. Make one with `kdedge distill RECIPE`."),
        (
            "small.yaml",
            "small.yaml is a recipe, not a run. Make its run with `kdedge distill small.yaml`, and name that.",
        ),
    ],
)
def test_a_run_that_is_not_there(named: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/small")).write()
    with pytest.raises(RunError) as caught:
        find_run(Path(named), Path("runs"))
    assert str(caught.value).startswith(said)


def test_the_newest_run_is_the_one_written_last(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "c", "a")):
        make_run(tmp_path / name, name=name).write()
        os.utime(tmp_path / name / "run.json", (number, number))
    (tmp_path / "no-run").mkdir()
    assert newest_run(tmp_path) == tmp_path / "a"
    make_run(tmp_path / "b", name="b").write()
    assert newest_run(tmp_path) == tmp_path / "b"


def test_a_single_run_and_runs_of_variants_or_seeds_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = "top cannot be a single run and the folder of runs such as .*top/seed0 at once"
    make_run(tmp_path / "top", name="top").write()
    check_place(tmp_path / "top")
    monkeypatch.chdir(tmp_path / "top")
    assert runs_of(Path()) == [Path()]
    with pytest.raises(RunError, match=both):
        check_place(tmp_path / "top" / "seed0")
    make_run(tmp_path / "top" / "seed0", name="top/seed0").write()
    with pytest.raises(RunError, match=both):
        check_place(tmp_path / "top")
    for name in ("top", "top/seed0"):
        with pytest.raises(RunError, match=both):
            runs_of(tmp_path / name)
    (tmp_path / "top" / "run.json").unlink()
    assert runs_of(tmp_path / "top") == [tmp_path / "top" / "seed0"]
