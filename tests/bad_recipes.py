"""Recipes for the tests, and what is said of bad ones."""

from __future__ import annotations

import pytest

from kdedge.errors import RecipeError
from kdedge.recipe_reader import parse_recipe

TCN4 = """\
name: tcn4
data: {name: fashion-mnist}
networks:
  teacher:
    model: tcn-teacher
    fit: {epochs: 12}
  students:
    model: tcn-student-4
    count: 4
    learns: [{from: teacher, what: dense, loss: mse}]
    fit: {epochs: 10}
    head: {from: teacher, fine_tune_epochs: 10}
"""

HEAD = "name: a\ndata: {name: fashion-mnist}\nnetworks:\n  t: {model: tcn-teacher}\n"


def problems(text: str, *overrides: str) -> list[str]:
    """The lines of the error that `text` causes, called bad.yaml."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "bad.yaml", overrides)
    return str(caught.value).split("\n")


def problem(text: str, *overrides: str) -> str:
    (only,) = problems(text, *overrides)
    return only


def network(line: str) -> str:
    """The one problem of a network `x` that stands in line 5 beside the teacher `t`."""
    return problem(f"{HEAD}  x: {line}\n")
