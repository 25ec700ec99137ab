"""`distill` on real images: stages appear whole, nothing is done twice, and whatever stops it, it ends in the same bytes.

Where a process has to die, a real one does. All of them are forks of one that has imported torch already.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from kdedge import store
from kdedge.data.batches import Samples, normalise
from kdedge.data.catalog import DATASETS
from kdedge.data.load import load
from kdedge.data.splits import split
from kdedge.distillation import distill, summary
from kdedge.errors import Interrupted, KdedgeError, RunError, TrainingError
from kdedge.impressions import read_impressions
from kdedge.networks import finished_network
from kdedge.plan import parameters
from kdedge.progress import Quiet
from kdedge.recipe import Recipe
from kdedge.recipe_reader import parse_recipe
from kdedge.store import load_tensors, open_run, read_document, sha256
from kdedge.variants import quick

TEACHER, STUDENTS, HEAD = "fit teacher", "fit students", "fine-tune students.head"
WAIT_S = 60
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["kdedge.distillation", "torch._dynamo"])  # torch's first optimizer imports the latter


class Heard(Quiet):
    """Keeps what it is shown; at report number `at` it sends its own process a signal."""

    def __init__(self, at: int = 0, number: int = signal.SIGKILL) -> None:
        self.at, self.number = at, number
        self.notes: list[str] = []
        self.updates: list[tuple[str, int, int, str]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self, stage: str, done: int, total: int, detail: str) -> None:
        self.updates.append((stage, done, total, detail))
        if len(self.updates) == self.at:
            os.kill(os.getpid(), self.number)


def work(
    answer: Connection, runs: Path, data_dir: Path, heard: Heard, every_s: float, file_bytes: int, text: str
) -> None:
    """In a process of its own: distil, and answer with "" or the error."""
    torch.set_num_threads(1)
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        distill(
            parse_recipe(text), runs=runs, data_dir=data_dir, device="cpu", checkpoint_every_s=every_s, progress=heard
        )
        answer.send("")
    except KdedgeError as error:
        answer.send(f"{type(error).__name__}: {error}")


@contextmanager
def process(
    runs: Path, data_dir: Path, heard: Heard | None = None, every_s: float = 0, file_bytes: int = 0, text: str = TINY
) -> Iterator[tuple[ForkServerProcess, Connection]]:
    receive, send = FORKS.Pipe(duplex=False)
    child = FORKS.Process(target=work, args=(send, runs, data_dir, heard or Heard(), every_s, file_bytes, text))
    child.start()
    send.close()
    with receive:
        try:
            yield child, receive
        finally:
            child.kill()
            child.join()
            child.close()


def run_alone(runs: Path, data_dir: Path, **how: Any) -> str | None:
    """What distilling in another process came to: "" when finished, the error, or None when it was killed."""
    with process(runs, data_dir, **how) as (child, receive):
        child.join(WAIT_S)
        if child.exitcode == -signal.SIGKILL:
            return None
        assert child.exitcode == 0, f"exit code {child.exitcode}"
        return str(receive.recv())


def trained(runs: Path) -> dict[str, tuple[bytes, list[float]]]:
    """Weights and losses of every finished stage."""
    found = {}
    for folder in (runs / "tiny" / "stages").iterdir():
        if (folder / "stage.json").is_file() and not folder.name.startswith("."):
            losses = [epoch["loss"] for epoch in read_document(folder / "stage.json").get("history", [])]
            (content,) = [path for path in folder.iterdir() if path.name in ("weights.safetensors", "images.npz")]
            found[folder.name] = (content.read_bytes(), losses)
    return found


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The runs folder of a TINY that nothing has disturbed. Not to be changed."""
    runs = tmp_path_factory.mktemp("finished")
    assert run_alone(runs, data_dir, every_s=1e9) == ""
    return runs


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As `work` has it: the bits of sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stage_folder(runs: Path, name: str) -> Path:
    return open_run(runs / "tiny").stage(name)


# What is there in the end


def test_a_finished_run_holds_its_stages_and_nothing_half_done(finished: Path) -> None:
    run = open_run(finished / "tiny")
    assert [stage.name for stage in run.stages] == [TEACHER, STUDENTS, HEAD]
    files = [f"{stage.folder}/{name}" for stage in run.stages for name in ("stage.json", "weights.safetensors")]
    targets = f"targets/{run.stages[0].key[:16]}-flip1-shift0-dense"
    files += [f"{targets}/{name}" for name in ("outputs.json", "outputs.safetensors")]
    assert tree(finished / "tiny") == sorted([".lock", "run.json", *files])


def test_run_json_says_what_the_run_is_made_of(finished: Path) -> None:
    run = open_run(finished / "tiny")
    assert run.recipe == parse_recipe(TINY).resolved() and not run.quick
    assert (run.data["name"], run.data["train"], run.data["test"]) == ("fashion-mnist", 540, 200)
    validation, calibration = set(run.data["validation"]), set(run.data["calibration"])
    assert (len(validation), len(calibration), validation & calibration) == (100, 60, set())
    assert torch.__version__.startswith(run.versions["torch"])


def test_stage_json_says_how_the_weights_came_to_be(finished: Path) -> None:
    run = open_run(finished / "tiny")
    for stage, size in zip(run.stages, (22_818, 50_890, 50_890), strict=True):
        folder = run.stage(stage.name)
        record = read_document(folder / "stage.json")
        assert (record["name"], record["key"], record["parameters"]) == (stage.name, stage.key, size)
        assert record["weights_sha256"] == sha256(folder / "weights.safetensors")
        assert [sorted(epoch) for epoch in record["history"]] == [["loss", "seconds", "validation_accuracy"]] * 2


def test_students_get_the_teachers_head_and_fine_tuning_changes_nothing_else(finished: Path) -> None:
    weights = {
        name: load_tensors(stage_folder(finished, name) / "weights.safetensors") for name in (TEACHER, STUDENTS, HEAD)
    }
    for name in ("head.weight", "head.bias"):
        assert torch.equal(weights[STUDENTS][name], weights[TEACHER][name])
        assert not torch.equal(weights[HEAD][name], weights[TEACHER][name])
    for name in weights[STUDENTS]:
        assert name.startswith("head.") or torch.equal(weights[STUDENTS][name], weights[HEAD][name])


def test_summary_has_each_network_once_as_its_last_stage_left_it(finished: Path) -> None:
    document = summary(open_run(finished / "tiny"))
    head = document["stages"][2]["history"][-1]["validation_accuracy"]
    assert [(network["name"], network["parameters"]) for network in document["networks"]] == [
        ("teacher", 22_818),
        ("students", 50_890),
    ]
    assert document["networks"][1]["validation_accuracy"] == head
    assert document["data"].keys() == {"name", "origin", "fingerprint", "train", "test"}
    json.dumps(document)


# Nothing is done twice


def test_a_second_call_does_nothing(copied: Path, data_dir: Path, tiny: Recipe) -> None:
    before = {
        path: path.stat() for path in (copied / "tiny").rglob("*") if path.name not in ("run.json", ".lock", "tiny")
    }
    heard = Heard()
    run = distill(tiny, runs=copied, data_dir=data_dir, device="cpu", progress=heard)
    assert heard.notes == [f"{stage}: finished before" for stage in (TEACHER, STUDENTS, HEAD)] and not heard.updates
    for path, stat in before.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert run == open_run(copied / "tiny")


def test_another_recipe_takes_the_teacher_and_its_outputs_over(copied: Path, data_dir: Path) -> None:
    heard = Heard()
    other = parse_recipe(TINY, overrides=["name=other", "networks.students.fit.epochs=3"])
    run = distill(other, runs=copied, data_dir=data_dir, device="cpu", progress=heard)
    assert heard.notes == [f"{TEACHER}: taken over from {copied / 'tiny' / run.stages[0].folder}"]
    assert {stage for stage, *_ in heard.updates} == {STUDENTS, HEAD, "outputs of students"}
    assert (run.stage(TEACHER) / "weights.safetensors").read_bytes() == trained(copied)[run.stage(TEACHER).name][0]
    assert run.stages[1].key != open_run(copied / "tiny").stages[1].key
    shutil.rmtree(copied / "tiny")  # runs do not lean on each other
    assert summary(run)["networks"]


def test_students_learn_from_their_teachers_outputs_over_their_own_views(copied: Path, data_dir: Path) -> None:
    """Two views of the teacher's are on disk; students without flips need only the images as they are."""
    straight = parse_recipe(TINY, overrides=["networks.students.fit.augment.flip=false"])
    run = distill(straight, runs=copied, data_dir=data_dir, device="cpu")
    key = run.stages[0].key[:16]
    both, one = (
        load_tensors(run.path / "targets" / f"{key}-flip{flip}-shift0-dense" / "outputs.safetensors") for flip in (1, 0)
    )
    assert (both["dense"].shape, one["dense"].shape) == ((2, 540, 64), (1, 540, 64))
    torch.testing.assert_close(one["dense"][0], both["dense"][0], rtol=1e-4, atol=1e-5)


def test_students_that_see_half_of_the_images_learn_the_teachers_outputs_for_those(
    copied: Path, data_dir: Path
) -> None:
    half = parse_recipe(TINY, overrides=["networks.students.view.fraction=0.5"])
    run = distill(half, runs=copied, data_dir=data_dir, device="cpu")
    assert run.stages[0].key == open_run(copied / "tiny").stages[0].key
    key = run.stages[0].key[:16]
    all_of_them, first_half = (
        load_tensors(run.path / "targets" / f"{key}-flip1-shift0{which}-dense" / "outputs.safetensors")
        for which in ("", "-fraction0.5")
    )
    assert (all_of_them["dense"].shape[1], first_half["dense"].shape[1]) == (540, 270)
    torch.testing.assert_close(first_half["dense"], all_of_them["dense"][:, :270], rtol=1e-4, atol=1e-5)


def test_a_specialist_sees_the_images_of_its_classes(copied: Path, data_dir: Path) -> None:
    some = parse_recipe(TINY, overrides=["networks.students.view={classes: [Bag, 0]}"])
    run = distill(some, runs=copied, data_dir=data_dir, device="cpu")
    assert run.stages[0].key == open_run(copied / "tiny").stages[0].key
    dataset = load("fashion-mnist", data_dir)
    labels = dataset.train_labels[split(700, 0, 100, 60).train]
    folder = run.path / "targets" / f"{run.stages[0].key[:16]}-flip1-shift0-classesBag+0-dense"
    assert load_tensors(folder / "outputs.safetensors")["dense"].shape[1] == np.isin(labels, [0, 8]).sum()


def test_a_student_may_start_with_the_mean_of_an_ensembles_heads(tmp_path: Path, data_dir: Path) -> None:
    text = "name: tiny\ndata: {name: fashion-mnist, validation: 100, calibration: 10, limit: 200}\nnetworks:\n"
    text += "  pair: {model: mlp-8, count: 2, split: none, fit: {epochs: 1}}\n"
    text += "  s: {model: mlp-16, learns: [{from: pair, loss: mse}], fit: {epochs: 1}, head: {from: pair}}\n"
    recipe = parse_recipe(text)
    run = distill(recipe, runs=tmp_path, data_dir=data_dir, device="cpu")
    heads = finished_network(run, recipe, "pair", "fit pair").heads()
    ours = finished_network(run, recipe, "s", "fit s").head
    torch.testing.assert_close(ours.weight, torch.cat([head.weight for head in heads], 1) / 2)
    torch.testing.assert_close(ours.bias, (heads[0].bias + heads[1].bias) / 2)


def test_each_member_of_an_ensemble_starts_with_the_teachers_head(copied: Path, data_dir: Path) -> None:
    """And without a lesson on logits keeps it."""
    changes = ["model=mlp-64", "split=none", "head.fine_tune_epochs=0", "fit.epochs=1"]
    ensemble = parse_recipe(TINY, overrides=[f"networks.students.{change}" for change in changes])
    run = distill(ensemble, runs=copied, data_dir=data_dir, device="cpu")
    teacher, students = (load_tensors(run.stage(name) / "weights.safetensors") for name in (TEACHER, STUDENTS))
    for number in (0, 1):
        for name in ("weight", "bias"):
            assert torch.equal(students[f"head.members.{number}.{name}"], teacher[f"head.{name}"])


def test_a_student_and_who_learned_the_rest_come_nearer_to_the_teacher_together(copied: Path, data_dir: Path) -> None:
    """The pair is made without training, and its dense vectors in sum are those of both."""
    text = (
        TINY[: TINY.index("  students:")]
        + """
  student: {model: mlp-64, learns: [{from: teacher, loss: mse}], head: {from: teacher}, fit: {epochs: 2, batch_size: 16}}
  rest: {model: tcn-student-4, learns: [{from: teacher, minus: student, loss: mse}], fit: {epochs: 2, batch_size: 16}}
  pair: {members: [student, rest], merge: sum}
"""
    )
    recipe = parse_recipe(text)
    run = distill(recipe, runs=copied, data_dir=data_dir, device="cpu")
    student, rest, pair, teacher = (
        finished_network(run, recipe, name, f"{kind} {name}")
        for kind, name in (("fit", "student"), ("fit", "rest"), ("merge", "pair"), ("fit", "teacher"))
    )
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    together = student.dense(images) + rest.dense(images)
    torch.testing.assert_close(pair(images), student.head(together))

    dataset = load("fashion-mnist", data_dir)
    cut = split(700, 0, 100, 60)
    seen = Samples.to(
        torch.device("cpu"), dataset.train_images[cut.train], dataset.train_labels[cut.train], dataset.info
    )
    images = seen.seen(torch.arange(len(seen)), torch.zeros(len(seen), dtype=torch.int64))
    wanted, given = teacher.dense(images), student.dense(images)
    assert (wanted - given - rest.dense(images)).square().mean() < 0.9 * (wanted - given).square().mean()
    record = read_document(run.stage("merge pair") / "stage.json")
    assert (record["parents"], record["parameters"]) == (["fit student", "fit rest"], parameters(recipe, "pair"))
    assert [list(entry) for entry in record["history"]] == [["validation_accuracy"]]


def test_one_member_of_an_ensemble_can_be_taken_out(copied: Path, data_dir: Path) -> None:
    text = (
        TINY[: TINY.index("  students:")]
        + """
  both: {model: mlp-9, count: 2, split: none, learns: [{from: peers, loss: kd}], fit: {epochs: 1}}
  second: {members: [both.1], merge: mean}
"""
    )
    recipe = parse_recipe(text)
    run = distill(recipe, runs=copied, data_dir=data_dir, device="cpu")
    both, second = (
        load_tensors(run.stage("fit both") / "weights.safetensors"),
        finished_network(run, recipe, "second", "merge second"),
    )
    for name in ("weight", "bias"):
        assert torch.equal(second.head.get_parameter(name), both[f"head.members.1.{name}"])
        assert torch.equal(second.members[0].get_parameter(f"1.{name}"), both[f"members.1.1.{name}"])


def test_classes_have_names_in_a_recipe_and_numbers_in_a_lesson(copied: Path, data_dir: Path) -> None:
    """Two ways to write the same lesson teach the same."""
    lesson = "networks.students.learns=[{{from: teacher, loss: mse}}, {{from: teacher, loss: kd, classes: {}}}]"
    found = []
    for name, classes in (("names", "[Shirt, Bag, Coat]"), ("numbers", "[6, 8, 4]")):
        recipe = parse_recipe(TINY, overrides=[f"name={name}", lesson.format(classes)])
        run = distill(recipe, runs=copied, data_dir=data_dir, device="cpu")
        found.append((run.stage(STUDENTS) / "weights.safetensors").read_bytes())
    assert found[0] == found[1]


def test_a_deleted_stage_is_made_anew_with_the_same_bytes(copied: Path, finished: Path, data_dir: Path) -> None:
    shutil.rmtree(stage_folder(copied, STUDENTS))
    shutil.rmtree(copied / "tiny" / "targets")
    assert run_alone(copied, data_dir) == ""
    assert trained(copied) == trained(finished)


def test_progress_tells_epoch_loss_speed_and_accuracy(copied: Path, data_dir: Path, tiny: Recipe) -> None:
    shutil.rmtree(stage_folder(copied, STUDENTS))
    shutil.rmtree(copied / "tiny" / "targets")
    heard = Heard()
    distill(tiny, runs=copied, data_dir=data_dir, device="cpu", progress=heard)
    outputs = [update for update in heard.updates if update[0] == "outputs of teacher"]
    assert [done for _, done, *_ in outputs] == [512, 540, 1052, 1080] and outputs[0][3].endswith(" img/s")
    students = [update for update in heard.updates if update[0] == STUDENTS]
    assert [(done, total) for _, done, total, _ in students] == [(step, 68) for step in (20, 34, 34, 54, 68, 68)]
    words = students[-1][3].split()
    assert (words[0], words[1], words[2], words[5], words[6]) == ("epoch", "2/2", "loss", "img/s", "val")
    assert words[7].endswith("%") and float(words[3]) > 0 and int(words[4].replace(",", "")) > 0


def test_the_members_that_learned_worst_make_way_for_better_ones(copied: Path, data_dir: Path) -> None:
    """Of the two students the one with the higher loss goes, the other stays to the last byte, and a kill changes nothing."""
    improve = "networks.students.improve={worst: 1, with: tcn-student-8}"
    before = read_document(stage_folder(copied, STUDENTS) / "stage.json")
    losses = before["member_losses"]
    assert len(losses) == 2 and before["models"] == ["mlp-32", "mlp-32"]
    worst = max((0, 1), key=lambda member: losses[member])

    heard = Heard()
    run = distill(parse_recipe(TINY, overrides=[improve]), runs=copied, data_dir=data_dir, device="cpu", progress=heard)
    said = f"improve students: tcn-student-8 replaces students.{worst} (loss {losses[worst]:.4f})"
    assert heard.notes == [f"{TEACHER}: finished before", f"{STUDENTS}: finished before", said]
    record = read_document(run.stage("improve students") / "stage.json")
    assert record["replaced"] == [worst] and record["models"][worst] == "tcn-student-8"
    assert record["member_losses"][1 - worst] == pytest.approx(losses[1 - worst])
    assert record["member_losses"][worst] != pytest.approx(losses[worst])

    names = (STUDENTS, "improve students", HEAD)
    first, second, third = (load_tensors(run.stage(name) / "weights.safetensors") for name in names)
    kept = [name for name in first if not name.startswith(f"members.{worst}.")]
    assert all(torch.equal(first[name], second[name]) for name in kept)
    assert all(torch.equal(second[name], third[name]) for name in second if not name.startswith("head."))
    students = summary(run)["networks"][1]
    assert students["parameters"] == parameters(parse_recipe(TINY, overrides=[improve]), "students")
    assert (students["replaced"], students["models"]) == ([worst], record["models"])

    whole = trained(copied)
    shutil.rmtree(run.stage("improve students"))
    text = TINY.replace(
        "    head: {from: teacher,", "    improve: {worst: 1, with: tcn-student-8}\n    head: {from: teacher,"
    )
    assert run_alone(copied, data_dir, heard=Heard(at=2), text=text) is None
    assert run_alone(copied, data_dir, text=text) == ""
    assert trained(copied) == whole


def test_members_of_several_models_learn_and_are_found_again(copied: Path, data_dir: Path) -> None:
    recipe = parse_recipe(TINY.replace("model: mlp-32\n    count: 2", "model: [mlp-32, tcn-student-8]"))
    run = distill(recipe, runs=copied, data_dir=data_dir, device="cpu")
    assert finished_network(run, recipe, "students", HEAD).models == ["mlp-32", "tcn-student-8"]
    assert summary(run)["networks"][1]["parameters"] == parameters(recipe, "students")


# Images made from a network alone

ZERO_SHOT = (
    TINY.partition("  students:")[0]
    + """
  student:
    model: mlp-32
    learns: [{from: teacher, loss: kd, alpha: 1, temperature: 20}]
    fit: {epochs: 2, batch_size: 16}
    impressions: {from: teacher, count: 44, steps: 3, batch_size: 20, lr: 0.05}
"""
)
MADE, STUDENT = "synthesize student.impressions", "fit student"


def test_a_student_on_impressions_learns_from_those_images_alone(copied: Path, data_dir: Path) -> None:
    run = distill(parse_recipe(ZERO_SHOT), runs=copied, data_dir=data_dir, device="cpu")
    made = run.stage(MADE)
    assert sorted(path.name for path in made.iterdir()) == ["images.npz", "images.png", "stage.json"]
    record = read_document(made / "stage.json")
    assert record["images"] == 44 and 0 < record["divergence"] < record["divergence_noise"]
    keys = {stage.name: stage.key[:16] for stage in run.stages}
    (outputs,) = (run.path / "targets").glob(f"{keys[TEACHER]}-{keys[MADE]}-*")
    teacher = finished_network(run, parse_recipe(ZERO_SHOT), "teacher", TEACHER)
    images = torch.from_numpy(read_impressions(made))
    expected = teacher(normalise(images, DATASETS["fashion-mnist"]))
    torch.testing.assert_close(load_tensors(outputs / "outputs.safetensors")["logits"][0], expected)
    assert [network["name"] for network in summary(run)["networks"]] == ["teacher", "student"]
    assert "validation_accuracy" in summary(run)["networks"][1]


def test_impressions_do_not_change_when_killed(data_dir: Path, tmp_path: Path) -> None:
    """Report 8 is that of the second of three batches."""
    assert run_alone(tmp_path / "whole", data_dir, text=ZERO_SHOT) == ""
    assert run_alone(tmp_path / "killed", data_dir, heard=Heard(at=8), text=ZERO_SHOT) is None
    (checkpoint,) = (tmp_path / "killed").glob("tiny/stages/*.checkpoint")
    assert checkpoint.name.startswith("synthesize-student")
    assert run_alone(tmp_path / "killed", data_dir, text=ZERO_SHOT) == ""
    assert trained(tmp_path / "killed") == trained(tmp_path / "whole")
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    picture = next((tmp_path / "whole").glob("tiny/stages/synthesize-*/images.png"))
    assert picture.read_bytes() == next((tmp_path / "killed").glob("tiny/stages/synthesize-*/images.png")).read_bytes()


# A network that learns from one that is still training

TOGETHER = (
    TINY.partition("  students:")[0]
    + """
  apprentice:
    model: tcn-student-8
    learns: [{from: teacher, loss: kd, temperature: 1, alpha: 0.5}]
    fit: {epochs: 2, batch_size: 16, lr: 3.0e-3, augment: {flip: true}, with: teacher}
    quantize: {observe_steps: 40}
"""
)
APPRENTICE = "fit apprentice"


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The runs folder of a TOGETHER that nothing has disturbed. Not to be changed."""
    runs = tmp_path_factory.mktemp("together")
    assert run_alone(runs, data_dir, every_s=1e9, text=TOGETHER) == ""
    return runs


def test_a_teacher_and_its_apprentice_come_out_of_one_fit(finished: Path, tmp_path: Path, data_dir: Path) -> None:
    heard = Heard()
    run = distill(parse_recipe(TOGETHER), runs=tmp_path, data_dir=data_dir, device="cpu", progress=heard)
    assert {stage for stage, *_ in heard.updates} == {"fit teacher + apprentice"} and heard.notes == []
    records = [read_document(run.stage(name) / "stage.json") for name in (TEACHER, APPRENTICE)]
    assert [record["parents"] for record in records] == [[], [TEACHER]]
    told = heard.updates[-1][3]
    assert f"val {records[1]['history'][-1]['validation_accuracy']:.2f}%" in told
    assert stage_folder(finished, TEACHER).name == run.stage(TEACHER).name
    assert sorted(path.name for path in (tmp_path / "tiny" / "stages").iterdir()) == sorted(
        run.stage(name).name for name in (TEACHER, APPRENTICE)
    )


def test_the_teacher_of_an_apprentice_is_the_one_that_trains_alone(finished: Path, together: Path) -> None:
    """To the byte, so its stage has the same key, and other recipes may take it over."""
    one, other = (stage_folder(runs, TEACHER) for runs in (finished, together))
    assert one.name == other.name
    assert trained(finished)[one.name] == trained(together)[one.name]


def test_a_finished_teacher_goes_its_way_once_more(
    finished: Path, together: Path, data_dir: Path, tmp_path: Path
) -> None:
    """And so the apprentice is the same as of one fit; so it is when a kill came between the two folders."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert run_alone(tmp_path, data_dir, text=TOGETHER) == ""
    folder = stage_folder(together, APPRENTICE).name
    assert trained(tmp_path)[folder] == trained(together)[folder]
    killed = shutil.copytree(together, tmp_path / "killed")
    shutil.rmtree(killed / "tiny" / "stages" / folder)
    assert run_alone(killed, data_dir, text=TOGETHER) == ""
    assert trained(killed) == trained(together) and tree(killed) == tree(together)


def test_killed_again_and_again_teacher_and_apprentice_end_in_the_same_bytes(
    together: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Before the ranges of the apprentice stay, in the 40th of 68 steps, and after it."""
    for starts in range(1, 20):
        if (said := run_alone(tmp_path, data_dir, heard=Heard(at=3), text=TOGETHER)) is not None:
            break
        (checkpoint,) = (tmp_path / "tiny" / "stages").glob("*.checkpoint")
        assert checkpoint.name.startswith("fit-apprentice")
    assert said == "" and starts > 3
    assert trained(tmp_path) == trained(together)
    assert tree(tmp_path) == tree(together)


def test_a_teacher_that_was_begun_alone_ends_alone(together: Path, data_dir: Path, tmp_path: Path) -> None:
    """Else its checkpoint would be of no use, and stay for ever."""
    assert run_alone(tmp_path, data_dir, heard=Heard(at=3)) is None
    (checkpoint,) = (tmp_path / "tiny" / "stages").glob("*.checkpoint")
    assert checkpoint.name.startswith("fit-teacher")
    assert run_alone(tmp_path, data_dir, text=TOGETHER) == ""
    assert trained(tmp_path) == trained(together)
    assert not checkpoint.exists()


def test_an_apprentice_that_waits_for_another_network_repeats_its_teacher(
    together: Path, data_dir: Path, tmp_path: Path
) -> None:
    text = TOGETHER + "  other: {model: mlp-32, learns: [{from: teacher, loss: kd}], fit: {epochs: 1}}\n"
    text = text.replace("alpha: 0.5}]", "alpha: 0.5}, {from: other, loss: kd}]")
    heard = Heard()
    run = distill(parse_recipe(text), runs=tmp_path, data_dir=data_dir, device="cpu", progress=heard)
    fits = list(dict.fromkeys(stage for stage, *_ in heard.updates if stage.startswith("fit")))
    assert fits == [TEACHER, "fit other", "fit teacher + apprentice"]
    assert [stage.name for stage in run.stages] == [TEACHER, "fit other", APPRENTICE]


def test_a_group_learns_the_dense_vector_of_a_network_that_trains_with_it(data_dir: Path, tmp_path: Path) -> None:
    """Each member's loss is told against the teacher as it is in the end, which has no folder yet, or has one."""
    text = TINY.replace("networks:\n", "networks:\n  other: {model: mlp-64, fit: {epochs: 1}}\n")
    text = text.replace(
        "{flip: true}}\n    head: {from: teacher,", "{flip: true}, with: teacher}\n    head: {from: other,"
    )
    told = []
    for stage in (None, STUDENTS):
        if stage is not None:
            shutil.rmtree(stage_folder(tmp_path, stage))
        heard = Heard()
        run = distill(parse_recipe(text), runs=tmp_path, data_dir=data_dir, device="cpu", progress=heard)
        assert "fit teacher + students" in {name for name, *_ in heard.updates}
        told.append(read_document(run.stage(STUDENTS) / "stage.json")["member_losses"])
    assert len(told[0]) == 2 and told[0] == pytest.approx(told[1])


# Kill -9, and run again


def test_killed_again_and_again_it_ends_in_the_same_bytes(finished: Path, data_dir: Path, tmp_path: Path) -> None:
    """At every fifth report: in the middle of an epoch, at its end, while outputs are computed."""
    for starts in range(1, 20):
        if (said := run_alone(tmp_path, data_dir, heard=Heard(at=5))) is not None:
            break
    assert said == "" and starts > 4
    assert trained(tmp_path) == trained(finished)
    assert tree(tmp_path) == tree(finished)


def test_lessons_with_parts_go_on_from_where_they_were_killed_and_leave_no_part_behind(
    data_dir: Path, tmp_path: Path
) -> None:
    text = TINY.replace(
        "learns: [{from: teacher, what: dense, loss: mse}]", "learns: [{from: teacher, loss: adversarial}]"
    )
    assert text != TINY and run_alone(tmp_path / "whole", data_dir, text=text) == ""
    for starts in range(1, 20):
        if (said := run_alone(tmp_path / "killed", data_dir, heard=Heard(at=5), text=text)) is not None:
            break
    assert said == "" and starts > 2
    assert trained(tmp_path / "killed") == trained(tmp_path / "whole")
    file = stage_folder(tmp_path / "whole", STUDENTS) / "weights.safetensors"
    names = load_tensors(file, sha256(file))
    assert {name.split(".")[0] for name in names} == {"members", "head"}


def test_killed_at_random_moments_it_ends_in_the_same_bytes(finished: Path, data_dir: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    began = time.monotonic()
    assert run_alone(tmp_path / "whole", data_dir) == ""
    took_s = time.monotonic() - began
    for _ in range(6):
        with process(tmp_path / "killed", data_dir) as (child, _receive):
            child.join(moments.uniform(0, took_s))
    assert run_alone(tmp_path / "killed", data_dir) == ""
    assert trained(tmp_path / "killed") == trained(tmp_path / "whole") == trained(finished)
    assert tree(tmp_path / "killed") == tree(finished)


def test_what_a_kill_left_half_written_is_removed(copied: Path, finished: Path, data_dir: Path, tiny: Recipe) -> None:
    """Teachers' outputs may have hundreds of megabytes, and nobody would look for them."""
    for left in ("stages/.fit-teacher-1.x", "targets/.1-flip0-shift0.x"):
        store.write_bytes(copied / "tiny" / left / "outputs.safetensors", b"half")
    done = stage_folder(copied, HEAD).relative_to(copied)
    store.write_bytes(copied / f"{done}.checkpoint", b"of a stage that was finished all the same")
    store.write_bytes(copied / f"{done}.dense" / "outputs.safetensors", b"of its frozen members")
    distill(tiny, runs=copied, data_dir=data_dir, device="cpu")
    assert tree(copied) == tree(finished)


# Ctrl-C


@pytest.mark.parametrize(
    ("number", "at", "stopped_in", "kept"),
    [
        (signal.SIGINT, 1, TEACHER, f"'{TEACHER}' up to its last checkpoint"),
        (signal.SIGINT, 3, TEACHER, f"'{TEACHER}' up to its last checkpoint"),  # at the end of an epoch
        (signal.SIGINT, 8, STUDENTS, TEACHER),  # while the teacher's outputs are computed
        (signal.SIGTERM, 12, STUDENTS, f"{TEACHER}, '{STUDENTS}' up to its last checkpoint"),
    ],
)
def test_a_stop_says_what_is_kept_and_goes_on_from_there(
    finished: Path, data_dir: Path, tmp_path: Path, number: signal.Signals, at: int, stopped_in: str, kept: str
) -> None:
    said = run_alone(tmp_path, data_dir, heard=Heard(at, number), every_s=1e9)
    assert said == (
        f"Interrupted: Stopped in '{stopped_in}'. Kept in {tmp_path / 'tiny'}: {kept}. "
        "Run the same command again to go on from there."
    )
    assert run_alone(tmp_path, data_dir, every_s=1e9) == ""
    assert trained(tmp_path) == trained(finished)
    assert tree(tmp_path) == tree(finished)


def test_a_stop_in_a_stage_that_does_not_look_is_heard_after_it(copied: Path, data_dir: Path) -> None:
    """Or whoever distils several runs would go on with the next one."""
    text = TINY + "  both: {members: [teacher, students], merge: mean}\n"
    ensemble = parse_recipe(text.replace("name: tiny", "name: two"))

    class Stopped(Heard):
        def note(self, text: str) -> None:
            if text.startswith("merge both:"):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"^Stopped after 'merge both'\. Run the same command again to go on"):
        distill(ensemble, runs=copied, data_dir=data_dir, device="cpu", progress=Stopped())
    run = distill(ensemble, runs=copied, data_dir=data_dir, device="cpu")
    assert summary(run)["networks"][-1]["name"] == "both"


def test_ctrl_c_in_the_terminal(data_dir: Path, tmp_path: Path) -> None:
    """The command, stopped by a signal in the middle of a long training: exit code 130 and one message."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY)
    command = [sys.executable, "-c", "from kdedge.cli import main; main()", "distill", str(recipe), "--device", "cpu"]
    command += ["--runs", str(tmp_path / "runs"), "--data-dir", str(data_dir), "--checkpoint-every", "0"]
    command += ["--set", "networks.students.fit.epochs=100000", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + WAIT_S
        while not list(tmp_path.glob("runs/tiny/stages/fit-students-*.checkpoint")) and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=WAIT_S)
    assert (child.returncode, stdout) == (Interrupted.exit_code, "")
    assert "Traceback" not in stderr
    kept = f"Kept in {tmp_path / 'runs' / 'tiny'}: {TEACHER}, '{STUDENTS}' up to its last checkpoint."
    assert f"Stopped in '{STUDENTS}'. {kept} Run the same command again" in stderr


# A full disk. Weights of the teacher have 91 kB, its checkpoint 280 kB, its outputs 320 kB.


@pytest.mark.parametrize(
    ("file_bytes", "every_s", "left"),
    [
        (1000, 1e9, 0),  # not even run.json
        (50_000, 1e9, 0),
        (150_000, 0, 0),  # the teacher's first checkpoint
        (150_000, 1e9, 1),  # its outputs
    ],
)
def test_a_full_disk_loses_nothing_that_was_finished(
    finished: Path, data_dir: Path, tmp_path: Path, file_bytes: int, every_s: float, left: int
) -> None:
    said = run_alone(tmp_path, data_dir, every_s=every_s, file_bytes=file_bytes)
    assert said is not None and said.startswith("RunError: ")
    assert "cannot be written: File too large. What was finished before is kept." in said
    kept = trained(tmp_path) if left else {}
    assert len(kept) == left and kept.items() <= trained(finished).items()
    stages = tmp_path / "tiny" / "stages"
    assert len(list(stages.iterdir()) if stages.is_dir() else []) == left
    assert not list((tmp_path / "tiny").glob("targets/*"))

    assert run_alone(tmp_path, data_dir) == ""
    assert trained(tmp_path) == trained(finished)
    assert tree(tmp_path) == tree(finished)


# What is refused


def test_a_teacher_that_was_changed_teaches_nobody(copied: Path, finished: Path, data_dir: Path, tiny: Recipe) -> None:
    """The message says what to do, and that helps."""
    file = stage_folder(copied, TEACHER) / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    shutil.rmtree(stage_folder(copied, STUDENTS))
    with pytest.raises(RunError, match=r"weights\.safetensors was changed.*Delete its folder and distil again"):
        distill(tiny, runs=copied, data_dir=data_dir, device="cpu")
    shutil.rmtree(file.parent)
    assert run_alone(copied, data_dir) == ""
    assert trained(copied) == trained(finished)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("damaged", ["stages/fit-teacher-*", "targets/*"])
def test_what_is_damaged_in_another_run_is_made_anew(
    copied: Path, finished: Path, data_dir: Path, damaged: str
) -> None:
    """Else its message, to delete the folder, would bring the same damage back from there."""
    (folder,) = (copied / "tiny").glob(damaged)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(b"x" + file.read_bytes()[1:])
    heard = Heard()
    other = parse_recipe(TINY.replace("name: tiny", "name: other"))
    shutil.rmtree(stage_folder(copied, STUDENTS))  # so that the teacher's outputs are needed
    run = distill(other, runs=copied, data_dir=data_dir, device="cpu", progress=heard)
    assert f"{folder} is damaged and not taken over" in heard.notes
    assert sha256(run.stage(STUDENTS) / "weights.safetensors") == sha256(
        stage_folder(finished, STUDENTS) / "weights.safetensors"
    )


def test_one_image_alone_teaches_batch_norm_nothing(tmp_path: Path, data_dir: Path) -> None:
    text = "name: tiny\ndata: {name: fashion-mnist, validation: 100, calibration: 10, limit: 111}\n"
    text += "networks:\n  s: {model: compact-4, fit: {epochs: 1, batch_size: 10}}\n"
    said = (
        "networks.s.fit.batch_size: 10 leaves one of 111 images alone in the last batch, and batch norm learns nothing from "
        "one image. Choose another batch size."
    )
    with pytest.raises(TrainingError, match=f"^{said}$"):
        distill(parse_recipe(text), runs=tmp_path, data_dir=data_dir, device="cpu")
    distill(parse_recipe(text.replace("size: 10}", "size: 9}")), runs=tmp_path, data_dir=data_dir, device="cpu")


def test_a_loss_that_is_no_number_keeps_the_stages_before_it(copied: Path, finished: Path, data_dir: Path) -> None:
    too_fast = parse_recipe(TINY, overrides=["networks.students.fit={batch_size: 16, lr: 1e+30, schedule: constant}"])
    with pytest.raises(TrainingError, match=r"at step 2 of 340 \(epoch 1\), learning rate 1e\+30\."):
        distill(too_fast, runs=copied, data_dir=data_dir, device="cpu")
    assert trained(copied) == trained(finished)
    with pytest.raises(RunError, match=f"stage '{STUDENTS}' is not finished"):
        summary(open_run(copied / "tiny"))


def test_a_run_in_use_is_left_alone(copied: Path, data_dir: Path, tiny: Recipe) -> None:
    before = (copied / "tiny" / "run.json").stat().st_mtime_ns
    with store.lock(copied / "tiny"), pytest.raises(RunError, match="is in use by another kdedge process"):
        distill(tiny, runs=copied, data_dir=data_dir, device="cpu")
    assert (copied / "tiny" / "run.json").stat().st_mtime_ns == before


def test_signals_are_as_before_afterwards(copied: Path, data_dir: Path, tiny: Recipe) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    distill(tiny, runs=copied, data_dir=data_dir, device="cpu")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path: Path, data_dir: Path, tiny: Recipe) -> None:
    with pytest.raises(KdedgeError, match="--device cuda: torch finds no usable GPU here. Use --device cpu"):
        distill(tiny, runs=tmp_path, data_dir=data_dir, device="cuda")


def test_a_quick_run_is_that_of_the_recipe_made_small_and_says_so(tmp_path: Path, data_dir: Path) -> None:
    recipe = parse_recipe(TINY, overrides=["networks.teacher.fit.epochs=1000", "data.limit=200"])
    run = distill(recipe, runs=tmp_path, data_dir=data_dir, device="cpu", quick=True)
    assert run.quick and open_run(tmp_path / "tiny").quick
    assert run.recipe == quick(recipe).resolved() and run.data["train"] == 200
    epochs = quick(recipe).networks["teacher"].fit.epochs
    assert len(summary(run)["stages"][0]["history"]) == epochs < 10


def test_a_seed_in_the_folder_of_a_single_run_is_refused_before_the_data_is_read(tmp_path: Path) -> None:
    store.write_json(tmp_path / "top" / "run.json", {})
    recipe = parse_recipe(TINY).model_copy(update={"name": "top/seed0"})
    with pytest.raises(RunError, match="cannot be a single run and the folder of runs such as"):
        distill(recipe, runs=tmp_path, data_dir=tmp_path / "nowhere")
