"""Recipes that are made from a recipe: each of its variants with each of its seeds, and the quick one to try the chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from kdedge.errors import Problem, RecipeError
from kdedge.recipe import Int8, Recipe
from kdedge.recipe_reader import parse_variants
from kdedge.yaml_reader import read_text


def load_recipes(path: str | Path, overrides: Sequence[str] = ()) -> list[Recipe]:
    """Every run that a recipe file asks for: each variant with each seed, or the one that it describes.

    `overrides` are settings like `networks.teacher.fit.epochs=2`; they hold in every variant. Raises RecipeError.
    """
    recipes = parse_variants(read_text(Path(path)), str(path), overrides)
    return [_run_of(recipe, variant, seed) for variant, recipe in recipes.items() for seed in recipe.seeds or [None]]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file that describes one run. Raises RecipeError, also when it has several variants or seeds."""
    recipes = load_recipes(path, overrides)
    if len(recipes) > 1:
        raise RecipeError(str(path), [Problem("", f"describes {len(recipes)} runs; load_recipes gives each of them")])
    return recipes[0]


def _run_of(recipe: Recipe, variant: str | None, seed: int | None) -> Recipe:
    """One run: one seed, and, of several, a name of its own in the recipe's folder, which says which variant it is."""
    if variant is None and seed is None:
        return recipe
    parts = [] if variant is None else [variant]
    parts += [] if seed is None else [f"seed{seed}"]
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}/{'.'.join(parts)}",
            "seed": recipe.seed if seed is None else seed,
            "seeds": (),
        }
    )


QUICK_IMAGES, QUICK_EPOCHS, QUICK_STEPS, QUICK_DROP_POINTS = 1024, 2, 10, 10.0


def quick(recipe: Recipe) -> Recipe:
    """The same recipe made small, to try the whole chain in less than a minute; its accuracies mean nothing.

    So its gate is wide: a network that has hardly learned has logits so close that int8 changes their order.
    """
    networks = {}
    for name, network in recipe.networks.items():
        head = network.head
        if head is not None:
            head = head.model_copy(update={"fine_tune_epochs": min(head.fine_tune_epochs, QUICK_EPOCHS)})
        made = network.impressions
        if made is not None:
            fewer = {"count": min(made.count, QUICK_IMAGES // 4), "steps": min(made.steps, QUICK_STEPS)}
            made = made.model_copy(update=fewer)
        fit = network.fit.model_copy(update={"epochs": min(network.fit.epochs, QUICK_EPOCHS)})
        networks[name] = network.model_copy(update={"fit": fit, "head": head, "impressions": made})
    data = {
        "limit": min(recipe.data.limit or math.inf, QUICK_IMAGES),
        "validation": min(recipe.data.validation, QUICK_IMAGES),
    }
    bench = {"rounds": min(recipe.bench.rounds, 2), "seconds": min(recipe.bench.seconds, 0.1)}
    gate = Int8(max_drop_points=max(recipe.deploy.int8.max_drop_points, QUICK_DROP_POINTS))
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "networks": networks,
            "deploy": recipe.deploy.model_copy(update={"int8": gate}),
            "bench": recipe.bench.model_copy(update=bench),
        }
    )
