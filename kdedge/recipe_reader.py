"""YAML text -> Recipe, or every problem at once: each names its line, what was given and what to write."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kdedge.errors import RecipeError
from kdedge.losses import LOSSES
from kdedge.recipe import Bench, Deploy, Fit, Head, Improve, Int8, Network, Recipe, Reference
from kdedge.recipe_images import Augment, Data, Impressions, View
from kdedge.rules import recipe as rules
from kdedge.wording import KeyPath, explain, given, keys, unknown
from kdedge.yaml_reader import Document, assign, put, read

_CLASSES: dict[KeyPath, type[BaseModel]] = {  # which keys may stand where; "*" is a network's name
    (): Recipe,
    ("data",): Data,
    ("networks", "*"): Network,
    ("networks", "*", "fit"): Fit,
    ("networks", "*", "fit", "augment"): Augment,
    ("networks", "*", "view"): View,
    ("networks", "*", "improve"): Improve,
    ("networks", "*", "head"): Head,
    ("networks", "*", "impressions"): Impressions,
    ("deploy",): Deploy,
    ("deploy", "int8"): Int8,
    ("bench",): Bench,
    ("reference", "*"): Reference,
}


def parse_recipe(
    text: str, source: str = "<recipe>", overrides: Sequence[str] = (), variant: str | None = None
) -> Recipe:
    """The recipe in a YAML text, changed by `networks.teacher.fit.epochs=2` and the like, and by one of its variants.

    `source` names it in problems. Raises RecipeError with every problem found.
    """
    document = read(text)
    if not document.whole:
        raise RecipeError(source, document.problems)
    for setting in overrides if isinstance(document.value, dict) else ():
        assign(document, setting, _keys_at)
    for path, value in document.value["variants"][variant].items() if variant is not None else ():
        at: KeyPath = ("variants", variant or "", path)
        try:
            put(document, path, value, document.place(at) or 1, _keys_at)
        except ValueError as error:
            document.problems.append(document.problem(at, str(error)))
    return _build(document, source)


def resolved_recipe(resolved: dict[str, Any], source: str = "<recipe>") -> Recipe:
    """The recipe of plain values, as `Recipe.resolved` gives them. Raises RecipeError."""
    return _build(Document(resolved), source)


def _build(document: Document, source: str) -> Recipe:
    """Recipe from plain values, or RecipeError with the reader's, the schema's and the rules' problems together."""
    tree, problems = document.value, list(document.problems)
    if not isinstance(tree, dict):
        hint = "a recipe is a mapping of keys and values; write at least name, data and networks"
        problems.append(document.problem((), f"expected a recipe, got {given(tree)}; {hint}"))
        raise RecipeError(source, problems)
    recipe: Recipe | None = None
    found: list[tuple[KeyPath, str]] = []
    try:
        recipe = Recipe.model_validate(tree, strict=True, by_alias=True, by_name=False)  # `from`, never `source`
    except ValidationError as error:
        for details in error.errors(include_url=False):
            path = _path(details)
            incomplete = details["type"] == "missing" and path[:-1] in document.refused
            miscounted = details["type"] == "too_short" and details["input"]  # refused entries are not counted
            if path not in document.refused and not incomplete and not miscounted:
                found.append((path, _message(details, path)))
    refused = {*document.refused, *(path for path, _ in found)}
    findings = dict.fromkeys([*found, *rules.check(tree, refused)])
    problems += [document.problem(path, message) for path, message in findings]
    if problems or recipe is None:
        raise RecipeError(source, sorted(problems, key=lambda problem: problem.line or sys.maxsize))
    return recipe


def _path(details: ErrorDetails) -> KeyPath:
    """Where an error stands in the recipe: pydantic's location without the names of unions' branches."""
    path = details["loc"]
    if path[0] == "networks":
        if path[2:] == ("[key]",) and details["type"] != "extra_forbidden":
            path = path[:2]
        elif path[2:3] == ("learns",):
            path = path[:4] + path[5:]
            path = path[:5] + path[6:] if path[4:5] == ("from",) else path
        elif path[2:3] == ("model",):
            path = path[:3] + path[4:]
    return (*path, "loss") if details["type"].startswith("union_tag") else path


def _message(details: ErrorDetails, path: KeyPath) -> str:
    """One of pydantic's errors in plain words, with what to write."""
    value, key = details["input"], path[-1]
    if details["type"] == "union_tag_invalid":
        return unknown("loss", str(value["loss"]), LOSSES)
    if details["type"] == "union_tag_not_found":
        return f"missing; write one of {', '.join(LOSSES)}"
    if details["type"] in ("model_type", "model_attributes_type") and len(path) in (2, 4):
        example = "network, such as {model: lenet5}" if len(path) == 2 else "lesson, such as {from: teacher, loss: kd}"
        return f"expected a {example}, got {given(value)}"
    if len(path) == 5 and path[2] == "learns":
        loss = str(details["loc"][4])
        if key == "from" and loss == "cross_entropy":
            others = ", ".join(name for name in LOSSES if name != loss)
            return (
                f"cross_entropy learns from labels, not from {given(value)}; losses that learn from a network: {others}"
            )
        if key == "from" and details["type"] == "missing":
            return "missing; write the name of the network that is learned from"
        return explain(details, key, LOSSES[loss])
    return explain(details, key, _class_at(path[:-1]))


def _keys_at(path: KeyPath) -> list[str]:
    return list(keys(_class_at(path)))


def _class_at(path: KeyPath) -> type[BaseModel]:
    if path[:1] in (("networks",), ("reference",)) and len(path) > 1:
        path = (path[0], "*", *path[2:])
    return _CLASSES.get(path, BaseModel)  # a class without keys for lists and for what nobody declared
