"""YAML: which values are read, what is refused, and `--set`."""

from __future__ import annotations

import pytest
from bad_recipes import TCN4, problem, problems

from kdedge.losses import LOSSES
from kdedge.models import catalog
from kdedge.recipe_reader import parse_recipe
from kdedge.yaml_reader import read


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("+3", 3),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ('"true"', "true"),
        ("=", "="),
    ],
)
def test_scalars_are_yaml_1_2(written: str, value: object) -> None:
    document = read(f"key: {written}")
    assert document.problems == []
    found = document.value["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", ["bad.yaml: expected a recipe, got nothing; "
              "a recipe is a mapping of keys and values; write at least name, data and networks"]),
        ("# nothing\n- a\n", ["bad.yaml:2: expected a recipe, got a list; "
                              "a recipe is a mapping of keys and values; write at least name, data and networks"]),
        ("a:\n\tb: 1\n  \tc: 2\n", ["bad.yaml:2: a tab in the indentation; YAML is indented with spaces",
                                    "bad.yaml:3: a tab in the indentation; YAML is indented with spaces"]),
        ("a: 1\n---\nb: 2\n", ["bad.yaml:2: a second document starts here; a recipe is one document"]),
        ("a: b: c", ["bad.yaml:1: not valid YAML (mapping values are not allowed here): "
                     "a ':' too many or a wrong indentation; text with ': ' in it needs quotes"]),
        ("a: [1", ["bad.yaml:1: not valid YAML (while parsing a flow sequence, expected ',' or ']', "
                   "but got '<stream end>'): a bracket is never closed"]),
        ("{a[0].b: 1}", ["bad.yaml:1: not valid YAML (while parsing a flow mapping, expected ',' or '}', but got '['): "
                         'text with a [ inside of { } needs quotes, such as "learns[0]"; learns.0 is the same']),
        ("a:\tb", ["bad.yaml:1: not valid YAML (while scanning for the next token, found character '\\t' "
                   "that cannot start any token): a tab; YAML is separated by spaces"]),
        ("a: 1\nb: \x07", ["bad.yaml:2: the character 0x07 is not allowed in YAML"]),
        ("a:\n  " + "[" * 60, ["bad.yaml:2: nested deeper than 50 levels"]),
    ],
)  # fmt: skip
def test_text_that_is_no_recipe(text: str, messages: list[str]) -> None:
    assert problems(text) == messages


def test_refused_yaml_is_told_with_the_other_problems() -> None:
    text = """\
name: a
data: &data {name: mnist}
seed: !!python/object/apply:os.system [exit]
networks:
  t:
    model: mlp-8
    fit: *data
    <<: *data
    model: mlp-16
    5: x
    ? [a]
    : y
    head: !new {from: t}
  u: {model: mlp-0}
bench: {rounds: 99999999999999999999999999999999999999999}
"""
    assert problems(text) == [
        "bad.yaml:2: data: the anchor &data is not allowed in a recipe; remove it",
        "bad.yaml:3: seed: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed in a recipe; "
        "write the value alone",
        "bad.yaml:7: networks.t.fit: the alias *data is not allowed in a recipe; write the value out",
        "bad.yaml:8: networks.t: the merge key << is not allowed in a recipe; write the keys out",
        "bad.yaml:8: networks.t.'<<': the alias *data is not allowed in a recipe; write the value out",
        "bad.yaml:9: networks.t.model: the key is written twice, first in line 6",
        "bad.yaml:10: networks.t: the key '5' is not a name",
        "bad.yaml:11: networks.t: a list, mapping or alias stands where a key should; keys are names",
        "bad.yaml:13: networks.t.head: the tag '!new' is not allowed in a recipe; write the value alone",
        "bad.yaml:13: networks.t.head.from: 't' cannot learn from itself",
        "bad.yaml:14: networks.u.model: unknown model 'mlp-0'; did you mean 'mlp-H'? Models: "
        + ", ".join(catalog.names()),
        "bad.yaml:15: bench.rounds: a number of 41 digits; a recipe's numbers have at most 40",
    ]


def test_an_alias_bomb_does_not_grow() -> None:
    """Ten levels of nine aliases would be 3.5 billion strings."""
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 11))
    document = read(bomb)
    assert document.value["a10"] == [None] * 9
    assert len(document.problems) == 11 + 90


def test_a_long_value_stays_on_one_short_line() -> None:
    line = problem(TCN4.replace("tcn4", "x\\n" * 10_000).replace("name: x", 'name: "x', 1).replace("\ndata", '"\ndata'))
    assert len(line) < 300


# --set


def test_overrides() -> None:
    recipe = parse_recipe(
        TCN4,
        overrides=[
            "seed=1",
            "networks.teacher.fit.epochs=2",
            "networks.students.learns.0.weight=2",
            "networks.students.learns[0].weight=3e-1",
            "bench.rounds=7",
            "networks.teacher.fit.augment.flip=true",
            "networks.students.fit={epochs: 3, lr: 1e-4}",
            "networks.ta={model: kd-student}",
        ],
    )
    assert recipe.seed == 1 and recipe.bench.rounds == 7 and recipe.networks["teacher"].fit.augment.flip
    assert recipe.networks["teacher"].fit.epochs == 2
    students = recipe.networks["students"]
    assert (students.fit.epochs, students.fit.lr, students.learns[0].weight) == (3, 1e-4, 0.3)
    assert list(recipe.networks) == ["teacher", "students", "ta"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed", "expected KEY=VALUE, for example --set networks.teacher.fit.epochs=2"),
        ("=5", "expected KEY=VALUE, for example --set networks.teacher.fit.epochs=2"),
        ("bech.rounds=1", "unknown key 'bech'; did you mean 'bench'? Keys: name, seed, seeds, variants, data, networks, deploy, bench, reference"),
        ("networks.techer.fit.epochs=1", "unknown key 'techer'; did you mean 'teacher'? Keys: teacher, students"),
        ("networks.teacher.fitt.epochs=1",
         "unknown key 'fitt'; did you mean 'fit'? Keys: model, count, split, learns, fit, view, improve, head, impressions, quantize, members, merge"),
        ("networks.students.learns[1].weight=1",
         "networks.students.learns is a list of 1, counted from networks.students.learns[0]"),
        ("networks.teacher.learns[0].weight=1",
         "networks.teacher.learns is not written in the recipe; set the whole list"),
        ("name.x=1", "name is 'tcn4', a single value without keys"),
        ("seed=*a", "the alias *a is not allowed in a recipe; write the value out"),
        ("seed=no", "expected a whole number from 0 to 4,294,967,295, got 'no'"),
        ("networks.students.count=3",
         "3 does not divide 256, the dense width of 'teacher'; use 1, 2, 4, 8, 16, 32, 64 members"),
        ("deploy.int8.max_drop_points=", "expected a number of at least 0, got nothing"),
    ],
)  # fmt: skip
def test_overrides_that_cannot_be(setting: str, message: str) -> None:
    assert problem(TCN4, setting) == f"bad.yaml: --set {setting}: {message}"


def test_a_problem_inside_of_an_override_names_its_place() -> None:
    assert problem(TCN4, "networks.teacher.fit={epochs: 0}") == (
        "bad.yaml: --set networks.teacher.fit={epochs: 0}: networks.teacher.fit.epochs: "
        "expected a whole number from 1 to 100,000, got 0"
    )


def test_overrides_and_the_file_are_told_together() -> None:
    assert problems(TCN4.replace("mse", "msee"), "seed=-1", "x") == [
        "bad.yaml:10: networks.students.learns[0].loss: unknown loss 'msee'; did you mean 'mse'? "
        f"Losses: {', '.join(LOSSES)}",
        "bad.yaml: --set x: expected KEY=VALUE, for example --set networks.teacher.fit.epochs=2",
        "bad.yaml: --set seed=-1: expected a whole number from 0 to 4,294,967,295, got -1",
    ]
