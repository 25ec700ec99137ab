"""Commands on a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from kdedge.cli.options import DATA_DIR, JSON, RECIPE, RUNS, SET
from kdedge.cli.printing import print_json, print_rows, print_runs
from kdedge.errors import RecipeError


@click.command()
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
            print_json({"recipe": str(recipe), "ok": False, "problems": problems})
        raise
    sizes = {one.name: {name: parameters(one, name) for name in one.networks} for one in loaded}
    if as_json:
        runs = {"runs": sizes} if len(loaded) > 1 else {}
        print_json({"recipe": str(recipe), "ok": True, "problems": [], "parameters": sizes[loaded[0].name], **runs})
        return
    click.echo(f"{recipe}: nothing wrong" + (f" in {len(loaded)} runs" if len(loaded) > 1 else ""))
    click.echo("\n".join(sizes_to_print(loaded)))


@click.command()
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
        print_runs(documents)
        return
    if documents[0]["note"]:
        click.echo(documents[0]["note"], err=True)
    for one, document in zip(loaded, documents, strict=True):
        if len(loaded) > 1:
            click.echo(click.style(one.name, bold=True))
        if full:
            click.echo(to_yaml(one))
        print_rows(rows_to_print(document), str.ljust)


@click.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete them."""
    from kdedge.recipe import json_schema

    print_json(json_schema())


@click.command()
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
        print_runs(documents)
        return
    folder = runs / loaded[0].name.split("/")[0]
    click.echo(f"Finished: {folder}. Next: kdedge export {folder} --int8")
