"""The command line: every command's help, its texts, its exit codes, and JSON alone on stdout."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from tiny_export import recorded_data, write_data, write_run

from kdedge.cli import main
from kdedge.store import Run, StageRecord

ROOT = Path(__file__).parent.parent

GOOD = """
name: good
data: {name: fashion-mnist, validation: 200, calibration: 40}
networks:
  teacher: {model: mlp-32, fit: {epochs: 1}}
  student: {model: mlp-8, learns: [{from: teacher, loss: kd}], fit: {epochs: 1}}
deploy: {int8: {max_drop_points: 0}}
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run in an empty folder, so that the default places are theirs, with a recipe that is right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDEDGE_DATA", raising=False)
    Path("good.yaml").write_text(GOOD)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 400)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that holds the finished run of GOOD, made by the command line; nobody changes it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "good.yaml").write_text(GOOD)
    done = kdedge("distill", str(folder / "good.yaml"), "--runs", str(folder / "runs"), "--data-dir", str(data))
    assert done.exit_code == 0, done.output
    return folder / "runs"


def kdedge(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="kdedge")


def document(done: Result) -> Any:
    """The one JSON document that is all of stdout."""
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def unfinished(path: Path) -> Path:
    stage = StageRecord(name="fit only", network="only", key="0" * 64, folder="stages/fit-only-0000")
    recipe = {"name": path.name, "data": {"name": "mnist"}, "networks": {"only": {"model": "mlp-8"}}}
    path.mkdir(parents=True)
    Run(
        name=path.name, quick=False, recipe=recipe, data=recorded_data(), stages=[stage], versions={}, path=path
    ).write()
    return path


@pytest.mark.parametrize("command", main.commands.values(), ids=main.commands)
def test_every_command_and_option_is_explained(command: click.Command) -> None:
    assert command.help and command.help.splitlines()[0].endswith(".")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help.endswith("."), parameter.name
    shown = kdedge(command.name or "", "--help")
    assert shown.exit_code == 0
    assert f"Usage: kdedge {command.name}" in shown.stdout


def test_help_lists_every_command_in_a_real_interpreter() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "kdedge", "--help"], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - started < 10  # the promise is 0.4 s on an idle machine
    assert (done.returncode, done.stderr) == (0, "")
    assert "kdedge distill recipes/tcn4.yaml" in done.stdout
    for name, command in main.commands.items():
        assert f"  {name} " in done.stdout
        assert command.get_short_help_str(20).split()[0] in done.stdout


def test_the_version() -> None:
    assert kdedge("--version").stdout.startswith("kdedge, version ")


def test_check_says_nothing_is_wrong_and_how_large_the_networks_are() -> None:
    done = kdedge("check", "good.yaml")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "good.yaml: nothing wrong\n  teacher: 25,450 parameters\n  student: 6,370 parameters\n"
    assert document(kdedge("check", "good.yaml", "--json")) == {
        "recipe": "good.yaml",
        "ok": True,
        "problems": [],
        "parameters": {"teacher": 25_450, "student": 6_370},
    }


def test_check_says_which_variants_have_networks_of_which_size() -> None:
    variants = "variants: {half: {}, wide: {networks.student.model: mlp-16}, slow: {networks.student.fit.epochs: 2}}\n"
    Path("study.yaml").write_text(f"{GOOD}{variants}seeds: [0, 1]\n")
    assert kdedge("check", "study.yaml").stdout.splitlines() == [
        "study.yaml: nothing wrong in 6 runs",
        "  teacher: 25,450 parameters",
        "  student: 6,370 parameters in half, slow",
        "  student: 12,730 parameters in wide",
    ]


def test_check_lists_every_problem_with_its_line() -> None:
    Path("bad.yaml").write_text(GOOD.replace("mlp-8", "mlp8").replace("epochs: 1", "epoch: 1"))
    done = kdedge("check", "bad.yaml")
    assert (done.exit_code, done.stdout) == (1, "")
    said = done.stderr.splitlines()
    assert [line.split(": ")[:2] for line in said] == [
        ["bad.yaml:5", "networks.teacher.fit.epoch"],
        ["bad.yaml:6", "networks.student.model"],
        ["bad.yaml:6", "networks.student.fit.epoch"],
    ]
    assert "did you mean 'epochs'?" in said[0]

    with_json = kdedge("check", "bad.yaml", "--json")
    assert with_json.exit_code == 1
    problems = json.loads(with_json.stdout)["problems"]
    assert [(problem["line"], problem["path"]) for problem in problems] == [
        (5, "networks.teacher.fit.epoch"),
        (6, "networks.student.model"),
        (6, "networks.student.fit.epoch"),
    ]


def test_a_recipe_that_is_not_there() -> None:
    done = kdedge("check", "nowhere.yaml")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("nowhere.yaml: ")


def test_plan_needs_no_data_but_then_has_no_keys(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDEDGE_DATA", str(data / "nothing"))
    without = kdedge("plan", "good.yaml")
    assert without.exit_code == 0
    assert "Without the data the stages have no keys yet." in without.stderr
    assert without.stdout == (
        "fit teacher  -  to do\n"  #
        "fit student  -  to do  after fit teacher\n"
    )


def test_plan_tells_what_is_finished(data: Path, finished: Path) -> None:
    arguments = ("plan", "good.yaml", "--data-dir", str(data), "--json")
    before, after = document(kdedge(*arguments)), document(kdedge(*arguments, "--runs", str(finished)))
    assert list(before) == ["recipe", "parameters", "stages", "note"]
    assert [stage["finished"] for stage in before["stages"]] == [False, False]
    assert [stage["finished"] for stage in after["stages"]] == [True, True]
    changed = document(kdedge(*arguments, "--runs", str(finished), "--set", "networks.student.fit.epochs=2"))
    assert [stage["finished"] for stage in changed["stages"]] == [True, False]
    assert changed["recipe"]["networks"]["student"]["fit"]["epochs"] == 2
    other = kdedge("plan", "good.yaml", "--data-dir", str(data), "--runs", str(finished), "--set", "name=other")
    assert f"  taken over from {finished / 'good'}\n" in other.stdout


def test_plan_full_writes_every_default_out(data: Path) -> None:
    done = kdedge("plan", "good.yaml", "--full", "--data-dir", str(data))
    recipe, _, stages = done.stdout.partition("\n\n")
    Path("full.yaml").write_text(recipe)
    assert (
        document(kdedge("plan", "full.yaml", "--json", "--data-dir", str(data)))["recipe"]
        == (document(kdedge("plan", "good.yaml", "--json", "--data-dir", str(data)))["recipe"])
    )
    assert "temperature: 4.0" in recipe and "rounds: 5" in recipe
    assert stages.startswith("fit teacher")


def test_schema_is_one_json_document() -> None:
    schema = document(kdedge("schema"))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"name", "data", "networks"} == set(schema["required"])


def test_distill_says_how_to_go_on_and_repeats_nothing(finished: Path, data: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(finished, tmp_path / "runs")
    done = kdedge("distill", "good.yaml", "--data-dir", str(data))
    assert done.exit_code == 0
    assert (
        done.stdout.splitlines()[-1] == f"Finished: {Path('runs/good')}. Next: kdedge export {Path('runs/good')} --int8"
    )
    assert "fit teacher: finished before" in done.stderr and "fit student: finished before" in done.stderr

    told = document(kdedge("distill", "good.yaml", "--data-dir", str(data), "--json"))
    assert [network["parameters"] for network in told["networks"]] == [25_450, 6_370]
    assert [stage["name"] for stage in told["stages"]] == ["fit teacher", "fit student"]
    assert sorted(path.name for path in runs.iterdir()) == ["good"]


def test_a_gate_exits_with_3_and_prints_the_manifest_all_the_same(finished: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs")
    done = kdedge("export", "--int8", "--data-dir", str(data), "--json")
    assert done.exit_code == 3
    assert "Error: The int8 export could not be validated:" in done.stderr
    manifest = json.loads(done.stdout)
    assert manifest == json.loads(Path("runs/good/export/manifest.json").read_text())
    assert not all(gate["passed"] for gate in manifest["gates"])

    without = kdedge("export", "--data-dir", str(data))
    assert without.exit_code == 0
    lines = without.stdout.splitlines()
    assert lines[0].split() == ["file", "parameters", "weight", "bits", "kB", "validation", "%", "float", "nodes"]
    assert [line.split()[0] for line in lines[1:3]] == ["teacher.fp32.onnx", "student.merged.fp32.onnx"]
    assert lines[-1].endswith("Next: kdedge bench runs/good --device cpu")


def test_a_run_that_fails_hides_nothing_of_the_others(finished: Path, data: Path, tmp_path: Path) -> None:
    unfinished(tmp_path / "runs" / "study" / "a")
    for name in ("b", "c"):
        shutil.copytree(finished / "good", tmp_path / "runs" / "study" / name)
    done = kdedge("export", "study", "--int8", "--data-dir", str(data), "--json")
    assert done.exit_code == 3
    assert f"Error: {Path('runs/study/a')}" in done.stderr and "is not finished" in done.stderr
    assert all(f"The files are in {Path('runs/study') / name / 'export'};" in done.stderr for name in ("b", "c"))
    assert [manifest["recipe"] for manifest in json.loads(done.stdout)["runs"]] == ["good", "good"]


@pytest.mark.parametrize("command", ["export", "bench"])
def test_without_a_name_the_newest_run_is_taken(command: str) -> None:
    for name, changed_at_s in (("a", 100), ("b", 300), ("c", 200)):
        os.utime(unfinished(Path("runs") / name) / "run.json", (changed_at_s, changed_at_s))
    done = kdedge(command)
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"runs{os.sep}b" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["export"], 1, "Error: No run in runs/. Make one with `kdedge distill RECIPE`, or name the run's folder.\n"),
        (["bench"], 1, "Error: No run in runs/. Make one with `kdedge distill RECIPE`, or name the run's folder.\n"),
        (
            ["export", "there"],
            1,
            "Error: there is no run, and runs has none of that name. Make one with `kdedge distill RECIPE`.\n",
        ),
        (["distill", "good.yaml", "--data-dir", "none"], 1, "Error: --data-dir 'none' is not a folder"),
        (["distill", "good.yaml", "--set", "networks.teacher.fit.epoch=2"], 1, "did you mean 'epochs'?"),
        (["check"], 2, "Missing argument 'RECIPE'"),
        (["distill", "good.yaml", "--device", "tpu"], 2, "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["bench", "--threads", "0"], 2, "Invalid value for '--threads'"),
        (["bench", "--thread", "1"], 2, "No such option"),
        (["distil"], 2, "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_words_with_their_exit_code(arguments: list[str], exit_code: int, message: str) -> None:
    done = kdedge(*arguments)
    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["export", "bench"])
def test_a_run_may_be_named_alone(command: str) -> None:
    unfinished(Path("elsewhere") / "small")
    Path("small").mkdir()
    done = kdedge(command, "small", "--runs", "elsewhere")
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"Error: {Path('elsewhere/small')}" in done.stderr


def test_an_unknown_device_is_named(finished: Path, data: Path) -> None:
    done = kdedge("bench", str(finished / "good"), "--device", "gpu", "--data-dir", str(data))
    assert (done.exit_code, done.stderr) == (1, "Error: There is no device 'gpu'. Devices: cpu.\n")


def test_devices_lists_every_cpu_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdedge.devices.here", lambda: {"cpu": "a CPU", "cpu_class": "x86-avx2"})
    monkeypatch.setattr("kdedge.devices.emulated.problem", lambda name: f"no {name} here.")
    assert kdedge("devices").stdout.splitlines() == [
        "x86-vnni       not here  no x86-vnni here.",
        "x86-avx2       native    a CPU",
        "x86-sse        not here  no x86-sse here.",
        "arm64-dotprod  not here  no arm64-dotprod here.",
        "arm64          not here  no arm64 here.",
    ]
    told = document(kdedge("devices", "--json"))["cpu_classes"]
    assert told[1] == {"name": "x86-avx2", "status": "native", "how": "a CPU"}


def test_setup_says_what_is_missing_and_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    missing = kdedge("devices", "setup", "arm64")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr.startswith("Error: qemu-aarch64-static is not installed.")
    monkeypatch.setattr("kdedge.devices.arm64.setup", lambda say: Path("there"))
    assert kdedge("devices", "setup", "arm64").stdout == "Made: there\n"
    assert kdedge("devices", "setup", "x86-vnni").exit_code == 2


def test_validate_prints_a_table_or_one_document(data: Path) -> None:
    write_run(Path("runs/tiny"), data)
    arguments = ("validate", "--cpu-class", "x86-vnni", "--data-dir", str(data))
    done = kdedge(*arguments)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["graph", "CPU", "class", "run", "on", "accuracy", "%", "as", "fp32", "as", "here"]
    assert len(lines[0]) <= 80 and lines[-1] == f"Written: {Path('runs/tiny/cpu_classes.json')}"
    assert document(kdedge(*arguments, "--json")) == json.loads(Path("runs/tiny/cpu_classes.json").read_text())
    assert document(kdedge(*arguments, "--images", "3", "--json"))["n"] == 3
    both = kdedge("validate", "--images", "3", "--full")
    assert (both.exit_code, "name one of the two" in both.stderr) == (2, True)
    unknown = kdedge("validate", "--cpu-class", "vnni")
    assert (unknown.exit_code, unknown.stderr[:32]) == (1, "Error: There is no CPU class 'vn")


def test_bench_before_export_says_what_to_do_first(finished: Path, data: Path) -> None:
    done = kdedge("bench", str(finished / "good"), "--data-dir", str(data))
    assert done.exit_code == 1
    assert "is no export: it has no manifest.json. Make one with `kdedge export --int8`." in done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("kdedge.variants.load_recipes", broken)
    assert isinstance(kdedge("check", "good.yaml").exception, ZeroDivisionError)


def test_ctrl_c_exits_with_130_and_says_what_is_kept(data: Path) -> None:
    command = [sys.executable, "-m", "kdedge", "distill", "good.yaml", "--data-dir", str(data), "--device", "cpu"]
    command += ["--set", "networks.student.fit.epochs=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(Path("runs/good/stages").glob("fit-teacher-*/stage.json")), process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert "Error: Stopped in 'fit student'. Kept in runs/good: fit teacher" in stderr
    assert "Run the same command again to go on from there." in stderr


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
