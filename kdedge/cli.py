"""The command line: parse, call one function, print. The only file that knows Click."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from kdedge.errors import GateError, KdedgeError, PackageError, RecipeError

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
    help="Change the recipe, in all of its variants, e.g. networks.teacher.fit.epochs=2.",
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

    RUN is the folder of a run, or its name in --runs; a command without RUN takes the newest one.
    """


@main.command()
@RECIPE
@SET
@JSON
def check(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say everything that is wrong with a recipe, or that nothing is."""
    from kdedge.plan import parameters, sizes_to_print
    from kdedge.variants import load_recipes

    try:
        loaded = load_recipes(recipe, overrides)
    except RecipeError as error:
        if as_json:
            problems = [{"path": p.path, "line": p.line, "message": p.message} for p in error.problems]
            _print_json({"recipe": str(recipe), "ok": False, "problems": problems})
        raise
    sizes = {one.name: {name: parameters(one, name) for name in one.networks} for one in loaded}
    if as_json:
        runs = {"runs": sizes} if len(loaded) > 1 else {}
        _print_json({"recipe": str(recipe), "ok": True, "problems": [], "parameters": sizes[loaded[0].name], **runs})
        return
    click.echo(f"{recipe}: nothing wrong" + (f" in {len(loaded)} runs" if len(loaded) > 1 else ""))
    click.echo("\n".join(sizes_to_print(loaded)))


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
    from kdedge.plan import describe, rows_to_print
    from kdedge.recipe_reader import to_yaml
    from kdedge.variants import load_recipes

    loaded = load_recipes(recipe, overrides)
    documents = describe(loaded, runs, data_dir)
    if as_json:
        _print_runs(documents)
        return
    if documents[0]["note"]:
        click.echo(documents[0]["note"], err=True)
    for one, document in zip(loaded, documents, strict=True):
        if len(loaded) > 1:
            click.echo(click.style(one.name, bold=True))
        if full:
            click.echo(to_yaml(one))
        _print_rows(rows_to_print(document), str.ljust)


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
    """Train the teacher, the students and the merge head of a recipe, in each of its variants with each of its seeds.

    Finished stages are kept: run the same command again after a stop, and it goes on where it was.
    """
    from kdedge.progress import progress
    from kdedge.variants import load_recipes

    loaded = load_recipes(recipe, overrides)
    from kdedge.distillation import distill, lines_to_print, summary  # imports torch, so only once the recipe is right

    documents = []
    for number, one in enumerate(loaded):
        if len(loaded) > 1 and not as_json:
            click.echo(click.style(f"{one.name} ({number + 1} of {len(loaded)})", bold=True))
        with progress() as shown:
            run = distill(
                one,
                runs=runs,
                device=device,
                data_dir=data_dir,
                quick=quick,
                checkpoint_every_s=checkpoint_every,
                progress=shown,
            )
        documents.append(summary(run))
        if not as_json:
            click.echo("\n".join(lines_to_print(documents[-1])))
    if as_json:
        _print_runs(documents)
        return
    folder = runs / loaded[0].name.split("/")[0]
    click.echo(f"Finished: {folder}. Next: kdedge export {folder} --int8")


@main.command()
@RUN
@click.option("--int8", is_flag=True, help="Write int8 files as well, and fail if they lost too much accuracy.")
@RUNS
@DATA_DIR
@JSON
def export(run: Path | None, int8: bool, runs: Path, data_dir: Path | None, as_json: bool) -> None:
    """Write ONNX files of a run, check them, and measure what was written.

    Exits with 3 when an int8 file lost more accuracy than the recipe allows.
    """
    from kdedge.manifest import read_manifest
    from kdedge.progress import progress
    from kdedge.store import find_run, runs_of

    folder = find_run(run, runs)
    from kdedge.deployment import export, rows_to_print
    from kdedge.validate import Known

    refused, documents, known = [], [], Known()
    for one in (found := runs_of(folder)):
        try:
            with progress() as shown:
                manifest = export(one, int8=int8, data_dir=data_dir, progress=shown, known=known)
        except GateError as error:  # the other runs are exported all the same
            refused.append(str(error))
            documents.append(read_manifest(one / "export").model_dump(mode="json"))
            continue
        documents.append(manifest.model_dump(mode="json"))
        if not as_json:
            if len(found) > 1:
                click.echo(click.style(manifest.recipe, bold=True))
            _print_table(*rows_to_print(manifest))
    if as_json:
        _print_runs(documents)
    if refused:
        raise GateError("\n".join(refused))
    if not as_json:
        where = folder / "export" if found == [folder] else folder
        click.echo(f"Exported: {where}. Next: kdedge bench {folder} --device cpu")


@main.command()
@RUN
@click.option("--device", default="cpu", show_default=True, help="Where to measure.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of onnxruntime; the recipe's by default.")
@RUNS
@DATA_DIR
@JSON
def bench(run: Path | None, device: str, threads: int | None, runs: Path, data_dir: Path | None, as_json: bool) -> None:
    """Measure accuracy, latency, start-up and memory of the exported files, on the device."""
    from kdedge.benchmark import Known, bench, rows_for_print
    from kdedge.progress import progress
    from kdedge.store import find_run, runs_of

    folder = find_run(run, runs)
    documents, known = [], Known()
    for one in (found := runs_of(folder)):
        if len(found) > 1 and not as_json:
            click.echo(click.style(one.relative_to(folder).as_posix(), bold=True))
        with progress() as shown:
            report = bench(one, device=device, threads=threads, data_dir=data_dir, progress=shown.note, known=known)
        documents.append(report.model_dump(mode="json"))
        if not as_json:
            _print_table(*rows_for_print(report))
            for verdict in report.verdicts:
                click.echo(f"- {verdict}")
            click.echo(f"Written: {one / 'validation.json'}, {one / 'bench.json'}")
    if as_json:
        _print_runs(documents)


@main.command()
@RUN
@click.option("--against", multiple=True, metavar="VARIANT", help="Compare with this variant, else with the first.")
@click.option("--per-class", is_flag=True, help="Print the accuracy on each class as well.")
@click.option("--confusion", is_flag=True, help="Print which classes are taken for which as well.")
@RUNS
@JSON
def results(
    run: Path | None, against: tuple[str, ...], per_class: bool, confusion: bool, runs: Path, as_json: bool
) -> None:
    """Print one table over the variants and seeds of a recipe, and which differences are more than noise."""
    from kdedge.comparison import classes_to_print, confusions_to_print, results, rows_to_print, sentences
    from kdedge.store import find_run

    folder = find_run(run, runs)
    found = results(folder, *against)
    if as_json:
        _print_json(found.model_dump(mode="json"))
        return
    _print_table(*rows_to_print(found))
    tables = [classes_to_print(found)] if per_class else []
    tables += confusions_to_print(found) if confusion else []
    for table in tables:
        click.echo()
        _print_table(*table)
    if tables:
        click.echo()
    said = [f"- {sentence}" for sentence in sentences(found)]
    click.echo("\n".join([*said, f"Written: {folder / 'results.json'}"]))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False, metavar="[RUN|FOLDER]")
@RUNS
@DATA_DIR
@JSON
def verify(folder: Path | None, runs: Path, data_dir: Path | None, as_json: bool) -> None:
    """Check that an export folder, a copy of one, or that of a run, is what its manifest says.

    The folder is enough. Its accuracy is measured as well where the images are at hand: nothing is downloaded.
    """
    from kdedge.progress import progress
    from kdedge.store import exports_of
    from kdedge.verification import rows_to_print, verify

    problems, documents = [], []
    for one in exports_of(folder, runs):
        try:
            with progress() as shown:
                verified = verify(one, data_dir=data_dir, progress=shown.note)
        except PackageError as error:  # the others are checked all the same
            problems += error.problems
            documents.append({"folder": str(one), "ok": False, "problems": error.problems})
            continue
        documents.append({"folder": str(one), "ok": True, "problems": []} | verified.model_dump(mode="json"))
        if not as_json:
            _print_table(*rows_to_print(verified))
            click.echo("\n".join(f"- {note}" for note in verified.notes))
    if as_json:
        _print_runs(documents)
    if problems:
        raise PackageError(problems)


def _print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _print_runs(documents: list[dict[str, Any]]) -> None:
    """The document of a run; of a recipe with variants or seeds, those of all its runs."""
    _print_json(documents[0] if len(documents) == 1 else {"runs": documents})


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    _print_rows([header, *rows], str.rjust)


def _print_rows(rows: list[list[str]], align: Callable[[str, int], str]) -> None:
    """Columns as wide as they need to be, the first one to the left."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, *cells in rows:
        aligned = (align(cell, width) for cell, width in zip(cells, others, strict=True))
        click.echo("  ".join([name.ljust(first), *aligned]).rstrip())
