"""Makes docs/recipes.md from the recipes.

python tools/recipes.py
"""

from __future__ import annotations

from pathlib import Path

from kdedge.losses import Lesson
from kdedge.losses.dense import MSE
from kdedge.plan import parameters
from kdedge.recipe import Network, Recipe
from kdedge.variants import load_recipes

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "recipes.md"


def page() -> str:
    """All recipes: what each is, its networks, and its variants."""
    parts = [
        "# Recipes",
        "Written by `python tools/recipes.py` from `recipes/`. Run one with `kdedge distill recipes/NAME.yaml`; `kdedge plan` shows its\n"
        "stages. In the column `learns`, `dense x4 of teacher` means that four members each learn a quarter of that vector.",
    ]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        parts += _section(path)
    return "\n\n".join(parts) + "\n"


def _section(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    comment = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    recipes = load_recipes(path)
    first = recipes[0]
    facts = [f"Data: {first.data.name}" + (f" as {first.data.as_}" if first.data.as_ else "")]
    if seeds := list(dict.fromkeys(recipe.seed for recipe in recipes if len(recipes) > 1)):
        facts += [f"seeds {', '.join(map(str, seeds))}"] if len(seeds) > 1 else []
    rows = ["| network | model | parameters | learns | epochs |", "|---|---|---|---|---|"]
    rows += [_row(first, name, network) for name, network in first.networks.items()]
    found = [f"## {path.stem}", "\n".join(comment), "; ".join(facts) + ".", "\n".join(rows)]
    if first.variants:
        changes = [f"- `{name}`: {_changes(settings)}" for name, settings in first.variants.items()]
        found.append("\n".join(["Variants:", "", *changes]))
    return found


def _row(recipe: Recipe, name: str, network: Network) -> str:
    if network.members is not None:
        made = ", ".join(network.members)
        made = f"{network.merge} of {made}" if len(network.members) > 1 else made
        return f"| {name} | {made} | {parameters(recipe, name):,} | | |"
    models = " + ".join(dict.fromkeys(network.models))
    model = f"{len(network.models)} x {models}" if len(network.models) > 1 else models
    if network.split == "none":
        model += ", an ensemble"
    if (improve := network.improve) is not None:
        model += f", then the worst {improve.worst} {improve.model}"
    if network.quantize is not None:
        start = f", starting as {network.quantize.source}" if network.quantize.source else ""
        model += f", trained with {network.quantize.weights}-bit weights{start}"
    if network.view is not None:
        model += f", sees {_plain({key: value for key, value in network.view if value is not None})}"
    chunks = len(network.models) if network.split == "chunks" else 1
    lessons = ", ".join(_lesson(lesson, chunks) for lesson in network.learns)
    if (images := network.impressions) is not None:
        lessons += f", on {images.count:,} images made from {images.source}"
    head = network.head
    if head is not None:
        tuned = f", tuned for {head.fine_tune_epochs} epochs" if head.fine_tune_epochs else ""
        lessons += f"; head of {head.source}{tuned}"
    return f"| {name} | {model} | {parameters(recipe, name):,} | {lessons} | {network.fit.epochs} |"


def _lesson(lesson: Lesson, chunks: int) -> str:
    what = f"{lesson.what} x{chunks}" if lesson.what == "dense" and chunks > 1 else lesson.what
    rest = f" less {lesson.minus}" if isinstance(lesson, MSE) and lesson.minus is not None else ""
    return f"{lesson.loss} ({what} of {', '.join(lesson.sources)}{rest})"


def _changes(settings: dict[str, object]) -> str:
    return ", ".join(f"`{path}: {_plain(value)}`" for path, value in settings.items()) or "as above"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
