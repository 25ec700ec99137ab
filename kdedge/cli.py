"""The command line: parse, call one function, print. The only file that knows Click."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from kdedge.errors import GateError, KdedgeError, RecipeError

if TYPE_CHECKING:
    from kdedge.recipe import Recipe

_Command = TypeVar("_Command", bound=Callable[..., Any])

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
    help="Change the recipe, e.g. networks.teacher.fit.epochs=2.",
)
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
RUN = click.argument("run", type=click.Path(path_type=Path), required=False)


class _Commands(click.Group):
    """Shows the user's mistakes as messages, with the exit code of their kind; bugs keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KdedgeError as error:
            _fail(error)


def _fail(error: KdedgeError) -> NoReturn:
    prefix = "" if isinstance(error, RecipeError) else "Error: "
    click.echo(click.style(f"{prefix}{error}", fg="red"), err=True)
    sys.exit(error.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kdedge")
def main() -> None:
    """Distil a big network into small ones, export them as int8 ONNX, and prove the files on the device.

    \b
    kdedge distill recipes/tcn4.yaml    train teacher and students   -> runs/tcn4/
    kdedge export --int8                ONNX files, gated            -> runs/tcn4/export/
    kdedge bench --device cpu           accuracy and latency         -> runs/tcn4/bench.json

    A command without RUN takes the newest run.
    """


@main.command()
@RECIPE
@SET
@JSON
def check(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say everything that is wrong with a recipe, or that nothing is."""
    from kdedge.plan import parameters
    from kdedge.recipe import load_recipe

    try:
        loaded = load_recipe(recipe, overrides)
    except RecipeError as error:
        if as_json:
            problems = [{"path": p.path, "line": p.line, "message": p.message} for p in error.problems]
            _print_json({"recipe": str(recipe), "ok": False, "problems": problems})
        raise
    sizes = {name: parameters(loaded, name) for name in loaded.networks}
    if as_json:
        _print_json({"recipe": str(recipe), "ok": True, "problems": [], "parameters": sizes})
    else:
        click.echo(f"{recipe}: nothing wrong")
        for name, size in sizes.items():
            click.echo(f"  {name}: {size:,} parameters")


@main.command()
@RECIPE
@click.option("--full", is_flag=True, help="Show the recipe with every default written out.")
@SET
@RUNS
@DATA_DIR
@JSON
def plan(
    recipe: Path, full: bool, overrides: tuple[str, ...], runs: Path, data_dir: Path | None, as_json: bool
) -> None:
    """Show what `distill` would do, stage by stage, and what is done already."""
    from kdedge.plan import describe
    from kdedge.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    document = describe(loaded, runs, data_dir)
    if as_json:
        _print_json(document)
        return
    if full:
        click.echo(_yaml(loaded))
    if document["note"]:
        click.echo(document["note"], err=True)
    width = max(len(stage["name"]) for stage in document["stages"])
    for stage in document["stages"]:
        after = f"after {', '.join(stage['parents'])}" if stage["parents"] else ""
        state = "finished" if stage["finished"] else "to do"
        click.echo(f"{stage['name']:{width}}  {(stage['key'] or '-')[:12]:12}  {state:8}  {after}".rstrip())


@main.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete them."""
    from kdedge.recipe import json_schema

    _print_json(json_schema())


@main.command()
@RECIPE
@RUNS
@SET
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to train."
)
@DATA_DIR
@click.option(
    "--quick", is_flag=True, help="A small subset and few steps, to try the chain; the accuracies mean nothing."
)
@click.option(
    "--checkpoint-every",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How much work a kill may cost.",
)
@JSON
def distill(
    recipe: Path,
    runs: Path,
    overrides: tuple[str, ...],
    device: str,
    data_dir: Path | None,
    quick: bool,
    checkpoint_every: float,
    as_json: bool,
) -> None:
    """Train the teacher, the students and the merge head of a recipe.

    Finished stages are kept: run the same command again after a stop, and it goes on where it was.
    """
    from kdedge.progress import progress
    from kdedge.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from kdedge.distillation import distill, summary  # imports torch, so only once the recipe is right

    with progress() as shown:
        run = distill(
            loaded,
            runs=runs,
            device=device,
            data_dir=data_dir,
            quick=quick,
            checkpoint_every_s=checkpoint_every,
            progress=shown,
        )
    document = summary(run)
    if as_json:
        _print_json(document)
        return
    for network in document["networks"]:
        click.echo(
            f"{network['name']}: {network['validation_accuracy']:.2f}% on validation, {network['parameters']:,} parameters"
        )
    click.echo(f"Finished: {run.path}. Next: kdedge export {run.path} --int8")


@main.command()
@RUN
@click.option("--int8", is_flag=True, help="Write int8 files as well, and refuse them if they lost accuracy.")
@RUNS
@DATA_DIR
@JSON
def export(run: Path | None, int8: bool, runs: Path, data_dir: Path | None, as_json: bool) -> None:
    """Write ONNX files of a run, check them, and measure what was written.

    Exits with 3 when an int8 file lost more accuracy than the recipe allows.
    """
    from kdedge.progress import progress
    from kdedge.store import newest_run, read_manifest

    folder = run or newest_run(runs)
    from kdedge.deployment import export, rows_to_print

    try:
        with progress() as shown:
            manifest = export(folder, int8=int8, data_dir=data_dir, progress=shown)
    except GateError:
        if as_json:
            _print_json(read_manifest(folder / "export").model_dump(mode="json"))
        raise
    if as_json:
        _print_json(manifest.model_dump(mode="json"))
        return
    _print_table(*rows_to_print(manifest))
    click.echo(f"Exported: {folder / 'export'}. Next: kdedge bench {folder} --device cpu")


@main.command()
@RUN
@click.option("--device", default="cpu", show_default=True, help="Where to measure.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of onnxruntime; the recipe's by default.")
@RUNS
@DATA_DIR
@JSON
def bench(run: Path | None, device: str, threads: int | None, runs: Path, data_dir: Path | None, as_json: bool) -> None:
    """Measure accuracy, latency, start-up and memory of the exported files, on the device."""
    from kdedge.benchmark import bench, rows_for_print
    from kdedge.progress import progress
    from kdedge.store import newest_run

    folder = run or newest_run(runs)
    with progress() as shown:
        report = bench(folder, device=device, threads=threads, data_dir=data_dir, progress=shown.note)
    if as_json:
        _print_json(report.model_dump(mode="json"))
        return
    _print_table(*rows_for_print(report))
    for verdict in report.verdicts:
        click.echo(f"- {verdict}")
    click.echo(f"Written: {folder / 'validation.json'}, {folder / 'bench.json'}")


def _print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they need to be; the first to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    for line in [header, *rows]:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        click.echo("  ".join(cells).rstrip())


def _yaml(recipe: Recipe) -> str:
    import yaml

    text: str = yaml.safe_dump(recipe.resolved(), sort_keys=False, default_flow_style=None, width=100)
    return text
