"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from bad_recipes import HEAD, TCN4, network, problems
from pydantic import ValidationError

from kdedge.errors import RecipeError
from kdedge.losses import LOSSES
from kdedge.losses.logits import KD, CrossEntropy
from kdedge.models import catalog
from kdedge.recipe import json_schema
from kdedge.recipe_reader import _CLASSES, parse_recipe, resolved_recipe
from kdedge.variants import load_recipe, load_recipes, quick
from kdedge.wording import expected, keys
from kdedge.yaml_reader import read

LOSS_NAMES = ", ".join(LOSSES)
RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))

# What is read


def test_the_recipe_of_the_design_page() -> None:
    recipe = parse_recipe(TCN4)
    teacher, students = recipe.networks.values()
    assert list(recipe.networks) == ["teacher", "students"]
    assert (teacher.models, teacher.is_group, teacher.widths, teacher.sources) == (("tcn-teacher",), False, (256,), ())
    assert teacher.learns == (CrossEntropy(),)
    assert (students.models, students.is_group, students.widths) == (("tcn-student-4",) * 4, True, (64,) * 4)
    assert students.sources == ("teacher",)
    assert students.head is not None and students.head.fine_tune_epochs == 10


def test_every_default() -> None:
    assert parse_recipe(TCN4).resolved() == {
        "name": "tcn4",
        "seed": 0,
        "seeds": [],
        "variants": {},
        "data": {
            "name": "fashion-mnist",
            "split_seed": 0,
            "validation": 5000,
            "calibration": 512,
            "limit": None,
        },
        "networks": {
            "teacher": {
                "model": "tcn-teacher",
                "count": None,
                "learns": [
                    {"from": "labels", "weight": 1.0, "what": "logits", "loss": "cross_entropy", "label_smoothing": 0.0}
                ],
                "fit": _fit(12),
                "head": None,
            },
            "students": {
                "model": "tcn-student-4",
                "count": 4,
                "learns": [{"from": "teacher", "weight": 1.0, "what": "dense", "loss": "mse"}],
                "fit": _fit(10),
                "head": {"from": "teacher", "fine_tune_epochs": 10, "fine_tune_lr": 1e-3},
            },
        },
        "deploy": {"int8": {"max_drop_points": 0.5, "calibration": "minmax"}, "cpu_classes": []},
        "bench": {"threads": 1, "rounds": 5, "seconds": 1.0},
        "reference": [],
    }


def _fit(epochs: int) -> dict[str, Any]:
    return {
        "epochs": epochs,
        "batch_size": 128,
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup": 0.0,
        "augment": {"flip": False, "shift": 0},
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes(path: Path) -> None:
    for recipe in load_recipes(path):
        assert resolved_recipe(json.loads(json.dumps(recipe.resolved()))) == recipe
    assert "deploy: {int8: {max_drop_points: 0.5}}" in path.read_text().splitlines()


def test_there_are_five_recipes_or_more() -> None:
    assert {path.stem for path in RECIPES} >= {"tcn1", "tcn2", "tcn4", "kd", "tcn4_joint"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tcn1", 94_650), ("tcn2", 95_322), ("tcn4", 91_242), ("kd", 94_650), ("tcn4_joint", 91_242)],
)
def test_parameter_counts_in_the_comments(name: str, parameters: int) -> None:
    """The paper's totals (Malik et al. 2021, Table 6): members and one head, 256 to 10."""
    path = next(path for path in RECIPES if path.stem == name)
    student = list(load_recipe(path).networks.values())[-1]
    assert sum(catalog.MODELS[model].parameters for model in student.models) + 2_570 == parameters
    assert f"{parameters:,}" in path.read_text() and "2,380,938" in path.read_text()


def test_joint_lessons() -> None:
    students = load_recipe(next(path for path in RECIPES if path.stem == "tcn4_joint")).networks["students"]
    assert [lesson.loss for lesson in students.learns] == ["mse", "kd"]
    assert students.learns[1] == KD(source="teacher", temperature=2, alpha=0.9)
    assert students.sources == ("teacher",)


def test_a_list_of_models_is_a_group() -> None:
    recipe = parse_recipe(
        HEAD
        + "  x: {model: [tcn-student-4, tcn-student-4x, tcn-student-4, mlp-64], learns: [{from: t, loss: mse}], "
        + "head: {from: t}}"
    )
    group = recipe.networks["x"]
    assert group.is_group and group.count is None and group.widths == (64,) * 4
    assert group.models == ("tcn-student-4", "tcn-student-4x", "tcn-student-4", "mlp-64")
    one = parse_recipe(HEAD + "  x: {model: tcn-student-1, count: 1, head: {from: t}}").networks["x"]
    assert one.is_group and one.models == ("tcn-student-1",)


def test_lr_without_a_dot_is_a_number() -> None:
    recipe = parse_recipe(TCN4.replace("{epochs: 12}", "{lr: 1e-4}"))
    assert recipe.networks["teacher"].fit.lr == 0.0001


def test_recipes_are_frozen() -> None:
    recipe = parse_recipe(TCN4)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_what_images_are_shown_as_is_written_out_when_it_is_given() -> None:
    text = "name: a\ndata: {name: mnist, as: rgb32}\nnetworks: {t: {model: lenet5}}\n"
    assert parse_recipe(text).resolved()["data"]["as"] == "rgb32"


def test_a_view_is_named_by_the_images_that_it_leaves() -> None:
    views = ("{fraction: 0.5, per_class: 3}", "{classes: [T-shirt/top, 3]}")
    networks = [f"x{n}: {{model: kd-student, view: {view}}}" for n, view in enumerate(views)]
    both, some = parse_recipe(
        f"name: a\ndata: {{name: fashion-mnist}}\nnetworks: {{{', '.join(networks)}}}"
    ).networks.values()
    assert both.view is not None and some.view is not None
    assert (both.view.name, some.view.name) == ("fraction0.5-per_class3", "classesT-shirt%2Ftop+3")
    assert both.view.model_dump() == {"fraction": 0.5, "per_class": 3}  # keys of stages from before there were classes
    low = parse_recipe(TCN4, overrides=["networks.students.view={resize: 14, centre: 20}"]).networks["students"].view
    assert low is not None and low.name == ""  # it learns from its teacher on the same images as everybody else
    assert low.model_dump() == {"fraction": None, "per_class": None, "resize": 14, "centre": 20}
    assert some.view.model_dump() == {"fraction": None, "per_class": None, "classes": ("T-shirt/top", 3)}


def test_momentum_is_written_out_for_sgd_only() -> None:
    recipe = parse_recipe(TCN4, overrides=["networks.teacher.fit.optimizer=sgd"])
    fits = [network["fit"] for network in recipe.resolved()["networks"].values()]
    assert [fit.get("momentum") for fit in fits] == [0.9, None]
    assert resolved_recipe(recipe.resolved()) == recipe


def test_quick_makes_it_small() -> None:
    recipe = parse_recipe(TCN4)
    small = quick(recipe)
    assert (small.data.limit, small.data.validation) == (1024, 1024)
    assert [network.fit.epochs for network in small.networks.values()] == [2, 2]
    assert small.networks["students"].head is not None
    assert small.networks["students"].head.fine_tune_epochs == 2
    assert small.bench.rounds == 2 and small.bench.seconds < 1
    assert small.deploy.int8.max_drop_points == 10
    assert recipe.networks["teacher"].fit.epochs == 12
    assert resolved_recipe(small.resolved()) == small
    assert quick(parse_recipe(TCN4, overrides=["data.limit=100"])).data.limit == 100
    assert quick(parse_recipe(TCN4, overrides=["data.validation=100"])).data.validation == 100


def test_reading_imports_neither_torch_nor_numpy() -> None:
    code = f"import sys, kdedge.variants as v; v.load_recipes({str(RECIPES[0])!r}); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "numpy", "onnx", "onnxruntime"} & set(modules)


# All problems at once, in these words


def test_all_problems_at_once() -> None:
    text = """\
name: TCN 4
sede: 1
data: {name: fashion-mnst, validation: 5}
networks:
  teacher:
    model: tcn-student-1
    fit:
      epochs: 0
      lr: -1e-3
      optimizer: adm
      epoch: 3
      batch_size: "128"
      augment: {flip: no, shift: 9}
  students:
    model: tcn-student-4
    count: 3
    learns:
      - {from: teachr, loss: msee}
      - {from: teacher, loss: mse, temperature: 3}
      - {from: teacher, loss: cross_entropy}
      - 5
    head: {from: techer, fine_tune_epochs: -1}
  labels: {model: [tcn-student-2, 5], learns: []}
bench: {threads: true, rounds: 1e3, seconds: .inf}
"""
    assert problems(text) == [
        "bad.yaml:1: name: expected a name of at most 64 a-z, 0-9, - and _ that starts with a-z or 0-9, got 'TCN 4'",
        "bad.yaml:2: sede: unknown key 'sede'; did you mean 'seed'? Keys: name, seed, seeds, variants, data, networks, deploy, bench, reference",
        "bad.yaml:3: data.name: unknown dataset 'fashion-mnst'; did you mean 'fashion-mnist'? "
        "Datasets: fashion-mnist, mnist, cifar10",
        "bad.yaml:3: data.validation: expected a whole number of at least 100, got 5",
        "bad.yaml:8: networks.teacher.fit.epochs: expected a whole number from 1 to 100,000, got 0",
        "bad.yaml:9: networks.teacher.fit.lr: expected a number above 0, got -0.001",
        "bad.yaml:10: networks.teacher.fit.optimizer: unknown optimizer 'adm'; did you mean 'adam'? "
        "Optimizers: adam, sgd",
        "bad.yaml:11: networks.teacher.fit.epoch: unknown key 'epoch'; did you mean 'epochs'? "
        "Keys: epochs, batch_size, optimizer, lr, momentum, weight_decay, schedule, warmup, augment, with",
        "bad.yaml:12: networks.teacher.fit.batch_size: expected a whole number from 1 to 65,536, got '128'",
        "bad.yaml:13: networks.teacher.fit.augment.flip: expected true or false, got 'no'",
        "bad.yaml:13: networks.teacher.fit.augment.shift: expected a whole number from 0 to 8, got 9",
        "bad.yaml:16: networks.students.count: 3 does not divide 256, the dense width of 'teacher'; "
        "use 1, 2, 4, 8, 16, 32, 64 members",
        f"bad.yaml:18: networks.students.learns[0].loss: unknown loss 'msee'; did you mean 'mse'? Losses: {LOSS_NAMES}",
        "bad.yaml:18: networks.students.learns[0].from: unknown network 'teachr'; did you mean 'teacher'? "
        "Networks: teacher, labels",
        "bad.yaml:19: networks.students.learns[1].temperature: unknown key 'temperature'. "
        "Keys: from, weight, drop, what, loss, minus",
        "bad.yaml:20: networks.students.learns[2].from: cross_entropy learns from labels, not from 'teacher'; "
        "losses that learn from a network: adversarial, attention, crd, dist, dkd, fitnet, kd, mse, pkt, rkd, sp, vid",
        "bad.yaml:21: networks.students.learns[3]: expected a lesson, such as {from: teacher, loss: kd}, got 5",
        "bad.yaml:22: networks.students.head.fine_tune_epochs: expected a whole number from 0 to 100,000, got -1",
        "bad.yaml:22: networks.students.head.from: unknown network 'techer'; did you mean 'teacher'? "
        "Networks: teacher, labels",
        "bad.yaml:23: networks.labels: 'labels' has a meaning in lessons; give the network another name",
        "bad.yaml:23: networks.labels.model[1]: expected text, got 5",
        "bad.yaml:23: networks.labels.learns: empty; write for example `learns: [{from: teacher, loss: mse}]`",
        "bad.yaml:24: bench.threads: expected a whole number from 1 to 1,024, got true",
        "bad.yaml:24: bench.rounds: expected a whole number from 1 to 1,000, got 1000.0",
        "bad.yaml:24: bench.seconds: expected a number above 0, got inf",
    ]


def test_problems_can_be_read_by_machines() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(TCN4.replace("mse", "msee"), "bad.yaml")
    assert caught.value.source == "bad.yaml"
    assert [(p.path, p.line) for p in caught.value.problems] == [("networks.students.learns[0].loss", 10)]


def test_missing_keys_are_told_at_the_parent() -> None:
    assert problems("\n\nseed: 1\ndata: {}\nnetworks:\n  a:\n    count: 2\n    learns: [{loss: kd}, {}]\n") == [
        "bad.yaml:3: name: missing; write for example `name: tcn4`",
        "bad.yaml:4: data.name: missing; write for example `name: fashion-mnist`",
        "bad.yaml:6: networks.a.model: missing; write for example `model: tcn-student-4`",
        "bad.yaml:8: networks.a.learns[0].from: missing; write the name of the network that is learned from",
        f"bad.yaml:8: networks.a.learns[1].loss: missing; write one of {LOSS_NAMES}",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{model: 5}", "model: expected a value such as tcn-student-4, got 5"),
        ("{model: []}", "model: empty; write for example `model: tcn-student-4`"),
        ("{model: kd-student, fit: {augment: true}}", "fit.augment: expected a mapping with keys such as flip, got true"),
        ("{model: kd-student, learns: [t]}", "learns[0]: expected a lesson, such as {from: teacher, loss: kd}, got 't'"),
        ("{model: kd-student, learns: [{from: t, loss: [kd]}]}",
         f"learns[0].loss: expected a loss, got a list; write one of {LOSS_NAMES}"),
        ("{model: kd-student, fit: }", "fit: expected a mapping with keys such as epochs, got nothing"),
        ("{model: kd-student, head: [t]}", "head: expected a mapping with keys such as from, got a list"),
        ("{model: kd-student, count: 65}", "count: expected a whole number from 1 to 64, got 65"),
        ("{model: [kd-student], count: 2}", "count: expected 1, because `model` lists 1, got 2"),
        ("{model: kd-student, learns: 5}", "learns: expected a value such as [{from: teacher, loss: mse}], got 5"),
        ("{model: kd-student, learns: [{source: t, from: t, loss: mse}]}",
         "learns[0].source: unknown key 'source'. Keys: from, weight, drop, what, loss, minus"),
        ("{model: kd-student, learns: [{from: t, loss: kd, what: dense}]}",
         "learns[0].what: expected 'logits', got 'dense'"),
        ("{model: kd-student, learns: [{from: t, loss: kd, form: mix}]}",
         "learns[0].form: unknown form 'mix'. Forms: sum, blend"),
        ("{model: kd-student, learns: [{from: t, loss: kd, temperature: 0}]}",
         "learns[0].temperature: expected a number above 0 and at most 1,000, got 0"),
        ("{model: kd-student, learns: [{loss: cross_entropy, label_smoothing: 1}]}",
         "learns[0].label_smoothing: expected a number of at least 0 and below 1, got 1"),
        ("{model: kd-student, learns: [{from: labels, loss: kd}]}",
         "learns[0].from: kd learns from a network; from labels learn with loss: cross_entropy"),
        ("{model: kd-student, fit: {momentum: 0.9}}",
         "fit.momentum: adam has no momentum; remove it, or write optimizer: sgd"),
        ("{model: kd-student, fit: {warmup: 1}}", "fit.warmup: expected a number from 0 to 0.9, got 1"),
        ("{model: kd-student, head: {from: x}}", "head.from: 'x' cannot learn from itself"),
        ("{model: kd-student, head: {from: labels}}", "head.from: unknown network 'labels'. Networks: t"),
    ],
)  # fmt: skip
def test_one_problem_in_a_network(line: str, message: str) -> None:
    assert network(line) == f"bad.yaml:5: networks.x.{message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reference: [3]", "reference[0]: expected an accuracy, such as {network: students, accuracy: 86.54, "
                           "printed: Table 3}, got 3"),
        ("reference: 3", "reference: expected a value such as [{network: students, accuracy: 86.54, printed: Table 3}], got 3"),
        ("deploy: {int8: 3}", "deploy.int8: expected a mapping with keys such as max_drop_points, got 3"),
        ("deploy: {cpu_classes: [x86-avx]}", "deploy.cpu_classes[0]: unknown CPU class 'x86-avx'; did you mean 'x86-avx2'? "
                                             "CPU classes: x86-vnni, x86-avx2, x86-sse, arm64-dotprod, arm64"),
        ("deploy: {int8: {calibration: entropy}}",
         "deploy.int8.calibration: unknown calibration 'entropy'. Calibrations: minmax, percentile, mse"),
        ("bench: []", "bench: expected a mapping with keys such as threads, got a list"),
        ("seeds: [a]", "seeds[0]: expected a whole number, got 'a'"),
    ],
)  # fmt: skip
def test_what_is_expected_beside_the_networks(text: str, message: str) -> None:
    assert problems(f"{HEAD}{text}\n") == [f"bad.yaml:5: {message}"]


def test_only_of_text_text_is_expected() -> None:
    """Every other key has an example, or a type that words describe."""
    for kind in {*_CLASSES.values(), *LOSSES.values()}:
        for key, field in keys(kind).items():
            assert expected(field) != "text" or field.annotation in (str, str | None) or key == "from", (kind, key)


def test_a_network_that_is_none() -> None:
    assert network("") == "bad.yaml:5: networks.x: expected a network, such as {model: lenet5}, got nothing"


# Files


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    recipe = tmp_path / "tcn4.yaml"
    recipe.write_text(TCN4)
    (tmp_path / "binary.yaml").write_bytes(b"name: a\n\xff\xfe\x00")
    (tmp_path / "large.yaml").write_text("#" * 1_000_001)
    for path, message in [
        (tmp_path / "tcn5.yaml", f": there is no such file; did you mean {recipe}?"),
        (tmp_path, ": cannot be read: Is a directory"),
        (tmp_path / "binary.yaml", ":2: not a text in UTF-8"),
        (tmp_path / "large.yaml", ": larger than 1,000,000 bytes; this is no recipe"),
        (Path("a\0b"), ": cannot be read: embedded null byte"),
    ]:
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value) == f"{path}{message}"


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TCN4.replace("\n", "\r\n").encode())
    assert load_recipe(str(path)) == parse_recipe(TCN4)


# JSON Schema


def test_json_schema_has_the_keys_of_yaml() -> None:
    schema = json_schema()
    json.dumps(schema)
    definitions = schema["$defs"]
    assert set(schema["properties"]) == {
        *("name", "seed", "seeds", "variants", "data", "networks", "deploy", "bench", "reference")
    }
    assert schema["properties"]["networks"]["additionalProperties"] is False
    assert "from" in definitions["Head"]["properties"] and "source" not in definitions["Head"]["properties"]
    assert all(definition["additionalProperties"] is False for definition in definitions.values())
    one, many = definitions["Network"]["properties"]["model"]["anyOf"][0]["oneOf"]
    assert set(one["examples"]) == set(catalog.MODELS) and (many["minItems"], many["maxItems"]) == (1, 64)


def test_every_class_of_the_recipe_names_its_keys() -> None:
    """A class that is added to the language has to be found by unknown keys and --set."""
    known = {kind.__name__ for kind in [*_CLASSES.values(), *LOSSES.values()]}
    assert set(json_schema()["$defs"]) | {"Recipe"} == known


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_json_schema_accepts_the_recipes(path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    assert list(validator.iter_errors(read(path.read_text()).value)) == []
    assert list(validator.iter_errors(load_recipes(path)[0].resolved())) == []
    assert list(validator.iter_errors({"name": "A"})) != []
