"""Every shipped recipe is right, says what its gate is, and has the published sizes."""

from pathlib import Path

import pytest
import yaml

from kdedge.plan import parameters, plan
from kdedge.variants import load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

TOTALS = {  # Malik et al. 2021, Table 6
    "kd": {"teacher": 2_380_938, "student": 94_650},
    "tcn1": {"teacher": 2_380_938, "students": 94_650},
    "tcn2": {"teacher": 2_380_938, "students": 95_322},
    "tcn4": {"teacher": 2_380_938, "students": 91_242},
    "tcn4_joint": {"teacher": 2_380_938, "students": 91_242},
}


def test_there_are_recipes_and_nothing_else() -> None:
    assert len(RECIPES) >= 5
    assert {path.stem for path in RECIPES} >= set(TOTALS)
    assert [path for path in (ROOT / "recipes").rglob("*") if path.is_file() and path.suffix != ".yaml"] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_plans(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    stages = plan(recipe, "data")
    assert {stage.network for stage in stages} == set(recipe.networks)
    assert len({stage.key for stage in stages}) == len(stages)
    done: set[str] = set()
    for stage in stages:
        assert done.issuperset(stage.parents)
        done.add(stage.name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_writes_its_gate_out(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    assert written["deploy"]["int8"]["max_drop_points"] == load_recipe(path).deploy.int8.max_drop_points


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_published_sizes_and_tells_them(path: Path) -> None:
    recipe = load_recipe(path)
    sizes = {name: parameters(recipe, name) for name in recipe.networks}
    assert sizes == TOTALS.get(path.stem, sizes)
    assert [size for size in sizes.values() if f"{size:,}" not in path.read_text()] == []
