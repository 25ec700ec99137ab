"""Stages: which there are, in which order, and what changes their keys and what does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

from kdedge.data.load import load
from kdedge.data.splits import split
from kdedge.errors import DataError
from kdedge.plan import describe, in_order, parameters, plan, rows_to_print
from kdedge.recipe import Improve, Recipe
from kdedge.recipe_reader import parse_recipe, resolved_recipe

TEACHER, STUDENTS, HEAD = "fit teacher", "fit students", "fine-tune students.head"
ALL = {TEACHER, STUDENTS, HEAD}

# An assistant between teacher and students, and a network that has to do with none of them.
CHAIN = """
name: chain
data: {name: fashion-mnist}
networks:
  students:
    model: mlp-32
    count: 2
    learns: [{from: assistant, loss: mse}, {from: teacher, loss: kd, weight: 0.5}]
    head: {from: assistant}
  other: {model: mlp-10}
  assistant: {model: mlp-64, learns: [{from: teacher, loss: mse}], head: {from: teacher, fine_tune_epochs: 1}}
  teacher: {model: tcn-student-4}
"""


def keys(*overrides: str, data: str = "d", text: str = TINY) -> dict[str, str]:
    return {stage.name: stage.key for stage in plan(parse_recipe(text, overrides=overrides), data)}


def fingerprint(data_dir: Path) -> str:
    return f"{load('fashion-mnist', data_dir).fingerprint}/{split(700, 0, 100, 60).fingerprint}"


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_stages_are_in_order_with_their_parents() -> None:
    found = [(stage.name, stage.kind, stage.network, stage.parents) for stage in plan(parse_recipe(TINY), "d")]
    assert found == [
        (TEACHER, "fit", "teacher", ()),
        (STUDENTS, "fit", "students", (TEACHER,)),
        (HEAD, "fine-tune", "students", (STUDENTS,)),
    ]


def test_who_learns_from_a_network_learns_from_its_last_stage() -> None:
    found = [(stage.name, stage.parents) for stage in plan(parse_recipe(CHAIN), "d")]
    assert found == [
        ("fit teacher", ()),
        ("fit assistant", ("fit teacher",)),
        ("fine-tune assistant.head", ("fit assistant",)),
        ("fit students", ("fine-tune assistant.head", "fit teacher")),
        ("fit other", ()),
    ]
    assert in_order(parse_recipe(CHAIN)) == ["teacher", "assistant", "students", "other"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", ALL),
        ("networks.teacher.fit.augment.flip=false", ALL),
        ("networks.students.fit.augment.shift=1", {STUDENTS, HEAD}),
        ("networks.teacher.fit.epochs=3", ALL),
        ("networks.teacher.fit.weight_decay=0.1", ALL),
        ("networks.students.fit.epochs=3", {STUDENTS, HEAD}),
        ("networks.students.fit.lr=0.01", {STUDENTS, HEAD}),
        ("networks.students.fit.batch_size=8", {STUDENTS, HEAD}),
        ("networks.students.fit.optimizer=sgd", {STUDENTS, HEAD}),
        ("networks.students.learns[0].weight=2", {STUDENTS, HEAD}),
        ("networks.students.learns=[{from: teacher, loss: kd}]", {STUDENTS, HEAD}),
        ("networks.students.head.fine_tune_epochs=3", {HEAD}),
        ("networks.students.head.fine_tune_lr=0.1", {HEAD}),
        # What the weights do not depend on:
        ("name=another", set()),
        ("deploy.int8.max_drop_points=5", set()),
        ("bench.threads=2", set()),
        ("bench.seconds=3", set()),
        # Defaults written out:
        ("networks.teacher.fit.lr=1e-3", set()),
        ("networks.students.learns[0].weight=1", set()),
        ("networks.teacher.learns=[{loss: cross_entropy, label_smoothing: 0}]", set()),
        # These speak through the fingerprint of data and splits:
        ("data.split_seed=1", set()),
        ("data.limit=100", set()),
    ],
)
def test_what_changes_a_key(override: str, expected: set[str]) -> None:
    assert changed(keys(), keys(override)) == expected


def test_a_default_that_is_written_changes_no_key() -> None:
    assert keys("networks.students.split=chunks") == keys()


MERGED = """
name: merged
data: {name: fashion-mnist}
networks:
  all: {members: [pair, both.1, second], merge: mean}
  pair: {members: [second, first], merge: sum}
  both: {model: [mlp-20, mlp-30], split: none}
  first: {model: mlp-64}
  second: {model: tcn-student-4, head: {from: first, fine_tune_epochs: 1}}
"""


def test_what_is_merged_comes_after_the_last_stages_of_its_members() -> None:
    found = [(stage.name, stage.kind, stage.parents) for stage in plan(parse_recipe(MERGED), "d")]
    assert found == [
        ("fit first", "fit", ()),
        ("fit second", "fit", ("fit first",)),
        ("fine-tune second.head", "fine-tune", ("fit second",)),
        ("merge pair", "merge", ("fine-tune second.head", "fit first")),
        ("fit both", "fit", ()),
        ("merge all", "merge", ("merge pair", "fit both", "fine-tune second.head")),
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("networks.pair.merge=mean", {"merge pair", "merge all"}),
        ("networks.pair.members=[first, second]", {"merge pair", "merge all"}),
        ("networks.all.members[1]=both.0", {"merge all"}),
        ("networks.both.fit.epochs=3", {"fit both", "merge all"}),
    ],
)
def test_what_changes_the_key_of_a_merge(override: str, expected: set[str]) -> None:
    assert changed(keys(text=MERGED), keys(override, text=MERGED)) == expected


def test_parameters_of_what_is_merged_are_those_of_all_members_and_one_head() -> None:
    recipe = parse_recipe(MERGED)
    pair = 785 * 64 + 22_168
    assert parameters(recipe, "pair") == pair + 128 * 10 + 10
    assert parameters(recipe, "all") == pair + 785 * 30 + 22_168 + (128 + 30 + 64) * 10 + 10


def test_a_merged_recipe_is_read_back_from_its_resolved_form() -> None:
    recipe = parse_recipe(MERGED)
    assert resolved_recipe(json.loads(json.dumps(recipe.resolved()))) == recipe


def test_another_model_changes_the_keys() -> None:
    before, after = keys(), keys("networks.students.model=mlp-16", "networks.students.count=4")
    assert changed(before, after) == {STUDENTS, HEAD}


def test_improving_is_a_stage_between_fit_and_fine_tuning_that_changes_no_other_fit() -> None:
    improve = "networks.students.improve={worst: 1, with: tcn-student-2}"
    text = TINY.replace("mlp-32", "mlp-128").replace("tcn-student-4", "tcn-teacher")
    stages = plan(parse_recipe(text, overrides=[improve]), "d")
    assert [(stage.name, stage.parents) for stage in stages] == [
        (TEACHER, ()),
        (STUDENTS, (TEACHER,)),
        ("improve students", (STUDENTS, TEACHER)),
        (HEAD, ("improve students",)),
    ]
    before, after = keys(text=text), keys(improve, text=text)
    assert [before[name] == after[name] for name in (TEACHER, STUDENTS, HEAD)] == [True, True, False]
    both = keys("networks.students.improve={worst: 2, with: tcn-student-2}", text=text)
    assert changed(after, both) == {"improve students", HEAD}


MADE = "networks.students={model: mlp-64, learns: [{from: teacher, loss: mse}], head: {from: teacher}, impressions: {from: teacher}}"


def test_impressions_are_a_stage_before_the_network_that_learns_on_them() -> None:
    found = [
        (stage.name, stage.kind, stage.network, stage.parents)
        for stage in plan(parse_recipe(TINY, overrides=[MADE]), "d")
    ]
    assert found == [
        (TEACHER, "fit", "teacher", ()),
        ("synthesize students.impressions", "synthesize", "students", (TEACHER,)),
        (STUDENTS, "fit", "students", (TEACHER, "synthesize students.impressions")),
    ]
    more = MADE.replace("}}", ", count: 3}}")
    assert changed(keys(MADE), keys(more)) == {"synthesize students.impressions", STUDENTS}
    assert changed(keys(MADE), keys(MADE, "networks.students.fit.epochs=3")) == {STUDENTS}
    assert keys(MADE)[TEACHER] == keys()[TEACHER]


TOGETHER = """
name: together
data: {name: fashion-mnist}
networks:
  student:
    model: mlp-32
    learns: [{from: teacher, loss: kd}, {from: other, loss: kd}]
    fit: {lr: 0.01, with: teacher}
  other: {model: mlp-10}
  teacher: {model: tcn-student-4}
"""


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("networks.student.fit.with=null", {"fit student"}),
        ("networks.student.fit.lr=0.02", {"fit student"}),
        ("networks.teacher.fit.lr=0.02", {"fit student", TEACHER}),
    ],
)
def test_who_trains_with_another_network_is_keyed_by_how_that_one_trains(override: str, expected: set[str]) -> None:
    assert changed(keys(text=TOGETHER), keys(override, text=TOGETHER)) == expected


def test_the_plan_says_who_trains_with_whom(tmp_path: Path) -> None:
    (document,) = describe([parse_recipe(TOGETHER)], tmp_path, tmp_path / "nowhere")
    assert [stage["trains_with"] for stage in document["stages"]] == [None, None, "teacher"]
    assert [row[0] + ": " + row[3] for row in rows_to_print(document)] == [
        "fit teacher: ",
        "fit other: ",
        "fit student: with fit teacher, after fit other",
    ]
    assert "with" not in document["recipe"]["networks"]["teacher"]["fit"]
    assert resolved_recipe(document["recipe"]) == parse_recipe(TOGETHER)


def test_other_data_change_every_key() -> None:
    assert changed(keys(data="d"), keys(data="e")) == ALL


def test_the_order_of_the_networks_changes_no_key() -> None:
    recipe = parse_recipe(CHAIN)
    turned = recipe.model_copy(update={"networks": dict(reversed(recipe.networks.items()))})
    assert {stage.name: stage.key for stage in plan(turned, "d")} == keys(text=CHAIN)


def test_a_network_that_is_added_changes_no_other_key() -> None:
    before = keys()
    after = keys(text=TINY + "  other: {model: mlp-10}\n")
    assert after.items() > before.items() and after.keys() - before.keys() == {"fit other"}


def test_equal_networks_of_two_names_are_two_draws() -> None:
    found = keys(text="name: x\ndata: {name: mnist}\nnetworks: {a: {model: mlp-10}, b: {model: mlp-10}}")
    assert found["fit a"] != found["fit b"]


def test_folders_name_the_stage_and_its_key() -> None:
    for stage in plan(parse_recipe(TINY), "d"):
        assert stage.folder == f"stages/{stage.name.replace(' ', '-')}-{stage.key[:16]}"
        assert len(stage.key) == 64 and set(stage.key) <= set("0123456789abcdef")
    assert plan(parse_recipe(TINY), "d")[2].folder.startswith("stages/fine-tune-students.head-")


def test_keys_are_the_same_in_every_process_and_need_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(CHAIN)
    code = (
        "import json, sys\n"
        "from kdedge.plan import plan\n"
        "from kdedge.variants import load_recipe\n"
        "stages = plan(load_recipe(sys.argv[1]), 'd')\n"
        "heavy = [name for name in ('torch', 'torchvision', 'onnx', 'onnxruntime', 'numpy') if name in sys.modules]\n"
        "print(json.dumps([{stage.name: stage.key for stage in stages}, heavy]))\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    process = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(process.stdout) == [keys(text=CHAIN), []]


def test_parameters_are_those_of_members_and_head() -> None:
    recipe = parse_recipe(
        "name: tcn4\ndata: {name: fashion-mnist}\nnetworks:\n"
        "  teacher: {model: tcn-teacher}\n"
        "  students: {model: tcn-student-4, count: 4, learns: [{from: teacher, loss: mse}], head: {from: teacher}}\n"
    )
    assert (parameters(recipe, "teacher"), parameters(recipe, "students")) == (2_380_938, 91_242)
    improve = recipe.networks["students"].model_copy(update={"improve": Improve(worst=3, model="tcn-student-4x")})
    improved = recipe.model_copy(update={"networks": {**recipe.networks, "students": improve}})
    assert parameters(improved, "students") == 22_168 + 3 * 85_744 + 2_570  # Malik et al. 2021, Table 4


def test_describe_shows_keys_and_what_is_finished(tiny: Recipe, data_dir: Path, tmp_path: Path) -> None:
    stages = plan(tiny, fingerprint(data_dir))
    (tmp_path / "tiny" / stages[0].folder).mkdir(parents=True)
    (found,) = describe([tiny], tmp_path, data_dir)
    assert [(stage["name"], stage["key"], stage["finished"]) for stage in found["stages"]] == [
        (stage.name, stage.key, stage is stages[0]) for stage in stages
    ]
    assert found["note"] is None and found["recipe"] == tiny.resolved()
    assert found["parameters"] == {"teacher": 22_818, "students": 50_890}
    json.dumps(found)


def test_describe_without_the_data_has_no_keys(tiny: Recipe, tmp_path: Path) -> None:
    (found,) = describe([tiny], tmp_path, tmp_path / "nowhere")
    assert [stage["name"] for stage in found["stages"]] == [TEACHER, STUDENTS, HEAD]
    assert {(stage["key"], stage["finished"]) for stage in found["stages"]} == {(None, False)}
    assert "nowhere" in found["note"]


def test_describe_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KDEDGE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("kdedge.data.load._download", lambda *_: pytest.fail("plan downloads"))
    recipe = parse_recipe("name: x\ndata: {name: cifar10}\nnetworks: {t: {model: lenet5}}")
    (found,) = describe([recipe], tmp_path, None)
    cache = tmp_path / "cache" / "kdedge" / "cifar10"
    assert found["note"] == (f"Without the data the stages have no keys yet. Dataset 'cifar10' is in none of {cache}.")


def test_data_that_are_fewer_than_the_recipe_keeps_are_no_missing_data(data_dir: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(TINY, overrides=["data.validation=690"])
    with pytest.raises(DataError, match="^Cannot cut 700 training samples into 690 for validation, 60 for calibration"):
        describe([recipe], tmp_path, data_dir)


def test_describe_tells_which_run_has_a_stage_already_or_makes_it_first(data_dir: Path, tmp_path: Path) -> None:
    runs = [parse_recipe(TINY, overrides=[f"name=tiny/{name}"]) for name in ("one", "two")]
    runs.append(parse_recipe(TINY, overrides=["name=tiny/three", "networks.students.fit.epochs=3"]))

    def told() -> list[list[str | None]]:
        documents = describe(runs, tmp_path, data_dir)
        return [[stage["taken_over_from"] or stage["shared_with"] for stage in one["stages"]] for one in documents]

    first = "tiny/one"
    assert told() == [[None] * 3, [first] * 3, [first, None, None]]
    folder = plan(runs[0], fingerprint(data_dir))[0].folder
    (tmp_path / "other" / folder).mkdir(parents=True)
    other = str(tmp_path / "other")
    assert told() == [[other, None, None], [other, first, first], [other, None, None]]
    (tmp_path / "tiny" / "two" / folder).mkdir(parents=True)
    assert told()[1] == [None, first, first]
    assert describe(runs, tmp_path, data_dir)[1]["stages"][0]["finished"]
    unknown = describe(runs, tmp_path, tmp_path / "nowhere")[1]["stages"]
    assert [stage["shared_with"] for stage in unknown] == [first] * 3


def test_runs_on_other_data_share_nothing(tmp_path: Path) -> None:
    runs = [parse_recipe(TINY, overrides=[f"name=tiny/{limit}", f"data.limit={limit}"]) for limit in (100, 200)]
    second = describe(runs, tmp_path, tmp_path / "nowhere")[1]["stages"]
    assert [stage["shared_with"] for stage in second] == [None] * 3
