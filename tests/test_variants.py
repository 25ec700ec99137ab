"""A recipe with variants and seeds: which runs it asks for, and what is said of a variant that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdedge.errors import RecipeError
from kdedge.recipe_reader import resolved_recipe
from kdedge.variants import load_recipe, load_recipes

STUDY = """\
name: alphas
data: {name: mnist}
networks:
  teacher: {model: mlp-1200}
  student:
    model: mlp-50
    learns: [{from: teacher, loss: kd, alpha: 0.5}]
variants:
  half: {}
  labels: {"networks.student.learns[0].alpha": 0}
  wide: {networks.student.model: mlp-300, networks.student.fit.epochs: 3}
reference:
  - {network: student, variant: wide, accuracy: 97.26, printed: slides}
  - {network: teacher, accuracy: 97.41, printed: slides}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return written(tmp_path, STUDY)


def written(folder: Path, text: str) -> Path:
    path = folder / "alphas.yaml"
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as raised:
        load_recipes(path, overrides)
    return str(raised.value)


def test_each_variant_differs_in_what_it_names_alone(study: Path) -> None:
    half, labels, wide = load_recipes(study)
    assert [recipe.name for recipe in (half, labels, wide)] == ["alphas/half", "alphas/labels", "alphas/wide"]
    assert [recipe.networks["student"].learns[0].alpha for recipe in (half, labels, wide)] == [0.5, 0, 0.5]  # type: ignore[union-attr]
    assert [recipe.networks["student"].model for recipe in (half, labels, wide)] == ["mlp-50", "mlp-50", "mlp-300"]
    assert [recipe.networks["student"].fit.epochs for recipe in (half, labels, wide)] == [10, 10, 3]
    assert half.networks["teacher"] == labels.networks["teacher"] == wide.networks["teacher"]


def test_each_variant_runs_with_each_seed(study: Path) -> None:
    recipes = load_recipes(study, ["seeds=[3, 5]"])
    names = ["half.seed3", "half.seed5", "labels.seed3", "labels.seed5", "wide.seed3", "wide.seed5"]
    assert [recipe.name for recipe in recipes] == [f"alphas/{name}" for name in names]
    assert [recipe.seed for recipe in recipes] == [3, 5] * 3


def test_seeds_alone(study: Path) -> None:
    first, second = load_recipes(study, ["variants={}", "reference=[]", "seeds=[0, 1]"])
    assert (first.name, second.name) == ("alphas/seed0", "alphas/seed1")
    assert first.networks == second.networks


def test_a_run_is_a_recipe_of_its_own(study: Path) -> None:
    """run.json holds it, and reading it again asks for the same run and no other."""
    wide = load_recipes(study, ["seeds=[3]"])[2]
    again = resolved_recipe(wide.resolved())
    assert again == wide
    assert (again.seed, again.seeds, again.variant) == (3, (), "wide")


def test_which_variant_a_run_is(study: Path) -> None:
    assert [recipe.variant for recipe in load_recipes(study)] == ["half", "labels", "wide"]
    assert [recipe.variant for recipe in load_recipes(study, ["seeds=[1]"])] == ["half", "labels", "wide"]
    assert [recipe.variant for recipe in load_recipes(study, ["variants={}", "reference=[]", "seeds=[1, 2]"])] == [
        None
    ] * 2
    odd = load_recipes(study, ["variants={seed1: {}}", "reference=[]", "seeds=[1]"])
    assert [(recipe.name, recipe.variant) for recipe in odd] == [("alphas/seed1.seed1", "seed1")]


def test_settings_from_the_command_line_hold_in_every_variant(tmp_path: Path) -> None:
    """Also in one that sets the same, and in one that has a network of its own."""
    own = "  own: {networks.student: {model: mlp-9, fit: {epochs: 5}}}\n"
    study = written(tmp_path, STUDY.replace("reference:", f"{own}reference:"))
    recipes = load_recipes(study, ["networks.student.fit.epochs=7"])
    assert [recipe.networks["student"].fit.epochs for recipe in recipes] == [7] * 4
    assert [recipe.networks["student"].model for recipe in recipes] == ["mlp-50", "mlp-50", "mlp-300", "mlp-9"]
    assert recipes[3].variants["own"]["networks.student"]["fit"] == {"epochs": 5}  # as the recipe has it


def test_a_setting_that_a_variant_has_no_place_for(tmp_path: Path) -> None:
    bare = written(tmp_path, STUDY.replace("half: {}", "half: {networks.student: {model: mlp-50}}"))
    assert problems(bare, "networks.student.learns[0].alpha=0.3").splitlines() == [
        f"{bare}: variants.half: --set networks.student.learns[0].alpha=0.3: "
        "networks.student.learns is not written in the recipe; set the whole list"
    ]


def test_a_recipe_without_variants_is_one_run(tmp_path: Path) -> None:
    path = written(tmp_path, STUDY.split("variants:")[0])
    assert load_recipes(path) == [load_recipe(path)]
    assert load_recipe(path).name == "alphas"


def test_one_run_is_asked_for_and_there_are_several(study: Path) -> None:
    with pytest.raises(RecipeError, match="describes 3 runs; load_recipes gives each of them"):
        load_recipe(study)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "networks.student.fit.epochs: 3",
            "networks.pupil.fit.epochs: 3",
            "yaml:11: variants.wide.'networks.pupil.fit.epochs': unknown key 'pupil'. Keys: teacher, student",
        ),
        (
            "networks.student.fit.epochs: 3",
            "networks.student.fit.epoch: 3",
            "yaml:11: variants.wide: networks.student.fit.epoch: unknown key 'epoch'; did you mean 'epochs'?",
        ),
        (
            "learns[0].alpha",
            "learns[1].alpha",
            "yaml:10: variants.labels.'networks.student.learns[1].alpha': networks.student.learns is a list of 1, "
            "counted from networks.student.learns[0]",
        ),
        (
            'alpha": 0',
            'alpha": 2',
            "yaml:10: variants.labels: networks.student.learns[0].alpha: expected a number from 0 to 1, got 2",
        ),
        ("mlp-300", "lenet5", "yaml:11: variants.wide: networks.student.model: lenet5 sees 3 x 32 x 32 images"),
        ("student, variant: wide", "student, variant: wild", "unknown variant 'wild'; did you mean 'wide'?"),
        ("{network: teacher", "{network: tutor", "yaml:14: reference[1].network: unknown network 'tutor'"),
        (
            "half: {}",
            "half: 3",
            "yaml:9: variants.half: expected what it changes, such as {networks.students.count: 4}, got 3",
        ),
        (
            "half: {}",
            "Half: {}",
            "yaml:9: variants.Half: expected a name of at most 64 a-z, 0-9, - and _ that starts with a-z or 0-9",
        ),
        (
            "data:",
            "seed: 1\nseeds: [1, 2]\ndata:",
            "yaml:2: seed: remove it, or remove `seeds`, which says the same for several runs",
        ),
        ("data:", "seeds: [3, 1, 3]\ndata:", "yaml:2: seeds[2]: 3 is in the list twice"),
        ("data:", "seeds: 3\ndata:", "yaml:2: seeds: expected a value such as [0, 1, 2], got 3"),
        (
            "name: alphas",
            "name: a/b",
            "yaml:1: name: expected a name without '/', which the runs of variants and seeds",
        ),
    ],
)
def test_what_is_wrong_with_a_variant(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert STUDY.count(old) == 1
    assert message in problems(written(tmp_path, STUDY.replace(old, new)))


@pytest.mark.parametrize(
    "path", ["name", "seed", "seeds", "seeds[0]", "variants", "variants.half", "reference", "reference[0].accuracy"]
)
def test_what_no_variant_can_change(tmp_path: Path, path: str) -> None:
    said = problems(written(tmp_path, STUDY.replace("half: {}", f'half: {{"{path}": 3}}')))
    assert said.endswith(": stands for all variants; write it outside of them")
    assert "yaml:9: variants.half." in said and path in said


@pytest.mark.parametrize("name", ["''", ".", "..", ".hidden", "/", "a/..", "../a", "a b"])
def test_names_that_are_no_folder_of_runs(tmp_path: Path, name: str) -> None:
    (said,) = problems(written(tmp_path, STUDY.replace("name: alphas", f"name: {name}"))).splitlines()
    assert "yaml:1: name: expected a name" in said


def test_variants_that_are_no_mapping(tmp_path: Path) -> None:
    text = STUDY.split("variants:")[0] + "variants: [half, wide]\n"
    (said,) = problems(written(tmp_path, text)).splitlines()
    assert said.endswith("yaml:8: variants: expected a value such as {wide: {networks.students.count: 4}}, got a list")


def test_variants_are_checked_while_the_recipe_has_problems(tmp_path: Path) -> None:
    """Each problem is told once: not that of the recipe again in every variant."""
    text = STUDY.replace("alpha: 0.5", "alpha: 5").replace("epochs: 3", "epoch: 3").replace("wide, accu", "broad, accu")
    text = text.replace("accuracy: 97.26", "accuracy: 972.6")
    said = problems(written(tmp_path, text)).splitlines()
    assert [line.partition(".yaml:")[2].partition(": expected")[0].partition(": unknown")[0] for line in said] == [
        "7: networks.student.learns[0].alpha",
        "11: variants.wide: networks.student.fit.epoch",
        "13: reference[0].accuracy",
        "13: reference[0].variant",
    ]


def test_all_variants_are_checked_at_once(tmp_path: Path) -> None:
    text = STUDY.replace('alpha": 0', 'alpha": 2').replace("mlp-300", "lenet5")
    said = problems(written(tmp_path, text))
    assert "variants.labels: " in said
    assert "variants.wide: " in said
