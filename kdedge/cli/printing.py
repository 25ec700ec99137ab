"""Documents and tables on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click


def print_json(document: dict[str, Any]) -> None:
    """One document, and nothing else, readable by people as well."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_runs(documents: list[dict[str, Any]]) -> None:
    """The document of a run; of a recipe with variants or seeds, those of all its runs."""
    print_json(documents[0] if len(documents) == 1 else {"runs": documents})


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A header and its rows, figures to the right."""
    print_rows([header, *rows], str.rjust)


def print_rows(rows: list[list[str]], align: Callable[[str, int], str]) -> None:
    """Columns as wide as they need to be, the first one to the left."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, *cells in rows:
        aligned = (align(cell, width) for cell, width in zip(cells, others, strict=True))
        click.echo("  ".join([name.ljust(first), *aligned]).rstrip())
