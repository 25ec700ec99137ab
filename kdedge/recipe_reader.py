"""YAML text -> Recipe, or every problem at once: each names its line, what was given and what to write."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kdedge.errors import Problem, RecipeError
from kdedge.losses import LOSSES
from kdedge.recipe import Bench, Deploy, Fit, Head, Improve, Int8, Network, Quantize, Recipe, Reference
from kdedge.recipe_images import Augment, Data, Impressions, View
from kdedge.rules import recipe as rules
from kdedge.wording import KeyPath, explain, given, keys, unknown
from kdedge.yaml_reader import Document, assign, put, read

_CLASSES: dict[KeyPath, type[BaseModel]] = {  # which keys may stand where; "*" is a name, or a place in a list
    (): Recipe,
    ("data",): Data,
    ("networks", "*"): Network,
    ("networks", "*", "fit"): Fit,
    ("networks", "*", "fit", "augment"): Augment,
    ("networks", "*", "view"): View,
    ("networks", "*", "improve"): Improve,
    ("networks", "*", "head"): Head,
    ("networks", "*", "impressions"): Impressions,
    ("networks", "*", "quantize"): Quantize,
    ("deploy",): Deploy,
    ("deploy", "int8"): Int8,
    ("bench",): Bench,
    ("reference", "*"): Reference,
}

_ENTRIES: dict[KeyPath, str] = {  # what stands under the names, and in the lists, of a recipe
    ("networks", "*"): "a network, such as {model: lenet5}",
    ("networks", "*", "learns", "*"): "a lesson, such as {from: teacher, loss: kd}",
    ("variants", "*"): "what it changes, such as {networks.students.count: 4}",
    ("reference", "*"): "an accuracy, such as {network: students, accuracy: 86.54, printed: Table 3}",
}

_OF_ALL = ("name", "seed", "seeds", "variants", "reference")  # what no variant can have for itself


def parse_recipe(text: str, source: str = "<recipe>", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML text, changed by `networks.teacher.fit.epochs=2` and the like, and by none of its variants.

    `source` names it in problems. Raises RecipeError with every problem found.
    """
    return _build(_read(text, source, overrides), source)


def parse_variants(text: str, source: str = "<recipe>", overrides: Sequence[str] = ()) -> dict[str | None, Recipe]:
    """The recipe in a YAML text in each of its variants, by name; one without variants stands under None.

    Whatever `overrides` set holds in every variant. Raises RecipeError with the problems of the recipe and of all variants.
    """
    document = _read(text, source, overrides)
    documents: dict[str | None, Document] = {None: document}
    variants = document.value.get("variants") if isinstance(document.value, dict) else None
    for name, changes in variants.items() if isinstance(variants, dict) else ():
        documents[name] = _read(text, source, overrides)
        _vary(documents[name], name, changes if isinstance(changes, dict) else {}, overrides)
    recipes: dict[str | None, Recipe] = {}
    problems: list[Problem] = []
    for variant, varied in documents.items():
        _check_own_name(varied)
        try:
            recipes[variant] = _build(varied, source)
        except RecipeError as error:
            new = [problem for problem in error.problems if problem not in problems]  # not the recipe's own again
            problems += [problem if variant is None else _in(problem, f"variants.{variant}") for problem in new]
    if problems:
        raise RecipeError(source, _by_line(problems))
    return {name: recipe for name, recipe in recipes.items() if name is not None} or recipes


def resolved_recipe(resolved: dict[str, Any], source: str = "<recipe>") -> Recipe:
    """The recipe of plain values, as `Recipe.resolved` gives them. Raises RecipeError."""
    return _build(Document(resolved), source)


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, as `parse_recipe` reads it."""
    text: str = yaml.safe_dump(recipe.resolved(), sort_keys=False, default_flow_style=None, width=100)
    return text


def _read(text: str, source: str, overrides: Sequence[str]) -> Document:
    document = read(text)
    if not document.whole:
        raise RecipeError(source, document.problems)
    for setting in overrides if isinstance(document.value, dict) else ():
        assign(document, setting, _keys_at)
    return document


def _vary(document: Document, variant: str, changes: dict[str, Any], overrides: Sequence[str]) -> None:
    """Make the changes of a variant, and the user's once more over them; what cannot be done becomes a problem."""
    for path, value in changes.items():
        at: KeyPath = ("variants", variant, path)
        try:
            if re.split(r"[.\[]", path)[0] in _OF_ALL:
                raise ValueError("stands for all variants; write it outside of them")
            put(document, path, deepcopy(value), document.place(at) or 1, _keys_at)
        except ValueError as error:
            document.problems.append(document.problem(at, str(error)))
    for setting in overrides:
        assign(document, setting, _keys_at)


def _in(problem: Problem, variant: str) -> Problem:
    return problem if problem.path.startswith(variant) else replace(problem, path=f"{variant}: {problem.path}")


def _check_own_name(document: Document) -> None:
    name = document.value.get("name") if isinstance(document.value, dict) else None
    if isinstance(name, str) and "/" in name:
        message = f"expected a name without '/', which the runs of variants and seeds have, got {given(name)}"
        document.problems.append(document.problem(("name",), message))
        document.refused.add(("name",))


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
        raise RecipeError(source, _by_line(problems))
    return recipe


def _by_line(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: problem.line or sys.maxsize)


def _path(details: ErrorDetails) -> KeyPath:
    """Where an error stands in the recipe: pydantic's location without the names of unions' branches."""
    path = details["loc"]
    if path[0] in ("networks", "variants") and path[2:] == ("[key]",) and details["type"] != "extra_forbidden":
        return path[:2]
    if path[0] == "networks":
        if path[2:3] == ("learns",):
            path = path[:4] + path[5:]
            path = path[:5] + path[6:] if path[4:5] == ("from",) else path
        elif path[2:3] == ("model",):
            path = path[:3] + path[4:]
    return (*path, "loss") if details["type"].startswith("union_tag") else path


def _message(details: ErrorDetails, path: KeyPath) -> str:
    """One of pydantic's errors in plain words, with what to write."""
    value, key = details["input"], path[-1]
    if details["type"] == "union_tag_invalid" and isinstance(value["loss"], str):
        return unknown("loss", value["loss"], LOSSES)
    if details["type"].startswith("union_tag"):
        said = (
            "missing;" if details["type"] == "union_tag_not_found" else f"expected a loss, got {given(value['loss'])};"
        )
        return f"{said} write one of {', '.join(LOSSES)}"
    if _general(path) in _ENTRIES and details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected {_ENTRIES[_general(path)]}, got {given(value)}"
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
    return _CLASSES.get(_general(path), BaseModel)  # a class without keys for lists and for what nobody declared


def _general(path: KeyPath) -> KeyPath:
    """`path` with "*" for the name of a network or variant, and for a place in a list."""
    named = path[:1] in (("networks",), ("variants",))
    return tuple("*" if isinstance(key, int) or (named and n == 1) else key for n, key in enumerate(path))
