"""The options and arguments that commands share."""

from __future__ import annotations

from pathlib import Path

import click

RUNS = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Folder of all runs.",
)
DATA_DIR = click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder that holds <dataset>/ (or set KDEDGE_DATA)."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else there.")
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe, in all of its variants, e.g. networks.teacher.fit.epochs=2.",
)
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
RUN = click.argument("run", type=click.Path(path_type=Path), required=False)
