"""Every shipped recipe is right, says what its gate is, and has the published sizes."""

import importlib.util
from pathlib import Path

import pytest
import yaml
from tiny_export import write_data

from kdedge.distillation import distill
from kdedge.plan import parameters, plan
from kdedge.recipe import Recipe
from kdedge.variants import load_recipes

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
EVERY_RUN = [recipe for path in RECIPES for recipe in load_recipes(path)]

# Teaching assistants over TCN, ensembles with their merge layer
VGG = {"teacher": 14_728_266, "one": 2_623_146, "two": 2_485_066, "four": 2_405_514, "eight": 1_942_026}
TOTALS = {  # as printed (Malik et al. 2021, Table 6, and others), or added up by hand from the layers
    "apprentice": {"teacher": 2_380_938, "student": 94_650, "apprentice": 94_650},
    "born_again": {"first": 94_650, "second": 94_650, "third": 94_650, "generations": 283_930},
    "codistill": {"teacher": 2_380_938, "students": 283_930, "one": 94_650},
    "conditional": {"teacher": 2_380_938, "student": 94_650},
    "dgkd": {"teacher": 2_380_938, "wide": 94_650, "narrow": 22_818, "student": 15_910},
    "ensemble": {**dict.fromkeys(("teacher", "second", "third", "tops", "shoes"), 2_380_938), "student": 94_650},
    "features": {"teacher": 2_380_938, "student": 22_818},
    "kd": {"teacher": 2_380_938, "student": 94_650},
    "kd_alpha": {"teacher": 28_334_410, "student": 62_006},
    "limited": {"teacher": 2_380_938, "student": 94_650},
    "logits": {"teacher": 2_380_938, "student": 94_650},
    "low_resolution": {"teacher": 2_380_938, "student": 94_650},
    "quantized_student": {"teacher": 2_380_938, "student": 94_650},
    "relations": {"teacher": 2_380_938, "student": 22_818},
    "residual": {
        "teacher": 2_380_938,
        "student": 94_650,
        "assistant": 94_650,
        "pair": 189_290,
        "single": 187_980,
    },
    "slides_mlp": {"teacher": 2_395_210, "student": 238_510},
    "ta_fashion": {"teacher": 2_380_938, "one": 94_650, "two": 95_322, "four": 91_242},
    "slides_resnet": {"teacher": 23_520_842, "student": 11_173_962},
    "takd": {"teacher": 2_380_938, "assistant": 94_650, "student": 39_760},
    **dict.fromkeys(("ta_hierarchical", "ta_direct", "ta_single"), VGG),
    "tcn1": {"teacher": 2_380_938, "students": 94_650},
    "tcn1_gan": {"teacher": 2_380_938, "students": 94_650},
    "tcn2": {"teacher": 2_380_938, "students": 95_322},
    "tcn2_gan": {"teacher": 2_380_938, "students": 95_322},
    "tcn4": {"teacher": 2_380_938, "students": 91_242},
    "tcn4_best": {"teacher": 289_546, "students": 82_186},
    "tcn4_edge": {"teacher": 289_546, "students": 72_650},
    "tcn4_gan": {"teacher": 2_380_938, "students": 91_242},
    "tcn4_improved": {"teacher": 2_380_938, "students": 281_970},
    "tcn4_joint": {"teacher": 2_380_938, "students": 91_242},
    "tcn4_qat": {"teacher": 2_380_938, "students": 91_242},
    "tcn8": {"teacher": 2_380_938, "students": 41_994},
    "tcn_table": {"teacher": 2_380_938, "students": 94_650},
    "weighted": {"teacher": 2_380_938, "student": 94_650},
    "zero_shot": {"teacher": 47_666, "student": 22_818},
}


def test_the_page_of_recipes_is_made_from_them() -> None:
    spec = importlib.util.spec_from_file_location("recipes", ROOT / "tools" / "recipes.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run python tools/recipes.py"


def test_there_are_recipes_and_nothing_else() -> None:
    assert {path.stem for path in RECIPES} == set(TOTALS)
    assert [path for path in (ROOT / "recipes").rglob("*") if path.is_file() and path.suffix != ".yaml"] == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 400)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all, so that a teacher that recipes share is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("recipe", EVERY_RUN, ids=lambda recipe: recipe.name)
def test_a_recipe_plans(recipe: Recipe) -> None:
    stages = plan(recipe, "data")
    assert {stage.network for stage in stages} == set(recipe.networks)
    assert len({stage.key for stage in stages}) == len(stages)
    done: set[str] = set()
    for stage in stages:
        assert done.issuperset(stage.parents)
        done.add(stage.name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(path: Path, data: Path, runs: Path) -> None:
    """On a few hundred images for a few steps, with one seed."""
    small = ["data.name=fashion-mnist", "data.validation=100", "data.calibration=20"]
    first = load_recipes(path)[0]
    if first.data.name == "cifar10":  # networks of millions of parameters, so fewer images
        small += ["data.as=rgb32", "data.limit=32"]
    small += [f"networks.{name}.fit.epochs=1" for name, network in first.networks.items() if network.members is None]
    small += [f"networks.{name}.head.fine_tune_epochs=1" for name, network in first.networks.items() if network.head]
    made = [name for name, network in load_recipes(path)[0].networks.items() if network.impressions]
    small += [f"networks.{name}.impressions.{few}" for name in made for few in ("count=20", "steps=2")]
    small += ["seeds=[0]"] if yaml.safe_load(path.read_text()).get("seeds") else []
    for recipe in load_recipes(path, small):
        run = distill(recipe, runs=runs, data_dir=data, device="cpu")
        for stage in run.stages:
            left = "images.npz" if stage.name.startswith("synthesize") else "weights.safetensors"
            assert (run.stage(stage.name) / left).is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_named_as_its_file(path: Path) -> None:
    assert {recipe.name.split("/")[0] for recipe in load_recipes(path)} == {path.stem}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_writes_its_gate_out(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    assert written["deploy"]["int8"]["max_drop_points"] == load_recipes(path)[0].deploy.int8.max_drop_points


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_published_sizes_and_tells_them(path: Path) -> None:
    recipe = load_recipes(path)[0]
    sizes = {name: parameters(recipe, name) for name in recipe.networks}
    assert sizes == TOTALS[path.stem]
    assert [size for size in sizes.values() if f"{size:,}" not in path.read_text()] == []
