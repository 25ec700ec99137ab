"""Commands on a run and its export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from kdedge.cli.options import DATA_DIR, JSON, RUN, RUNS
from kdedge.cli.printing import print_json, print_runs, print_table
from kdedge.errors import GateError, KdedgeError, PackageError, RunError


@click.command()
@RUN
@click.option("--int8", is_flag=True, help="Write int8 files as well, and fail if they lost too much accuracy.")
@click.option("--repair", is_flag=True, help="With --int8: keep the fewest layers in float that let int8 pass.")
@RUNS
@DATA_DIR
@JSON
def export(run: Path | None, int8: bool, repair: bool, runs: Path, data_dir: Path | None, as_json: bool) -> None:
    """Write ONNX files of a run, check them, and measure what was written.

    Exits with 3 when an int8 file lost more accuracy than the recipe allows.
    """
    if repair and not int8:
        raise click.UsageError("--repair is of int8 files: kdedge export --int8 --repair")
    from kdedge.manifest import read_manifest
    from kdedge.progress import progress
    from kdedge.store import find_run, runs_of

    folder = find_run(run, runs)
    from kdedge.deployment import export, rows_to_print
    from kdedge.repair import sentences
    from kdedge.validate import Known

    failed, documents, known = list[KdedgeError](), [], Known()
    for one in (found := runs_of(folder)):
        try:
            with progress() as shown:
                manifest = export(one, int8=int8, repair=repair, data_dir=data_dir, progress=shown, known=known)
        except KdedgeError as error:  # the other runs are exported all the same
            failed.append(error)
            if isinstance(error, GateError):
                documents.append(read_manifest(one / "export").model_dump(mode="json"))
            continue
        documents.append(manifest.model_dump(mode="json"))
        if not as_json:
            if len(found) > 1:
                click.echo(click.style(manifest.recipe, bold=True))
            print_table(*rows_to_print(manifest))
            click.echo("".join(f"- {sentence}\n" for sentence in sentences(manifest)), nl=False)
    if as_json and documents:
        print_runs(documents)
    if failed:
        kind = GateError if any(isinstance(error, GateError) for error in failed) else RunError
        raise kind("\n".join(dict.fromkeys(map(str, failed))))
    if not as_json:
        where = folder / "export" if found == [folder] else folder
        click.echo(f"Exported: {where}. Next: kdedge bench {folder} --device cpu")


@click.command()
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
    from kdedge.store import find_run
    from kdedge.validate import Known

    folder = find_run(run, runs)
    documents, known = [], Known()
    for one in _named_runs(folder, quiet=as_json):
        with progress() as shown:
            report = bench(one, device=device, threads=threads, data_dir=data_dir, progress=shown.note, known=known)
        documents.append(report.model_dump(mode="json"))
        if not as_json:
            print_table(*rows_for_print(report))
            for verdict in report.verdicts:
                click.echo(f"- {verdict}")
            click.echo(f"Written: {one / 'validation.json'}, {one / 'bench.json'}")
    if as_json:
        print_runs(documents)


@click.command()
@RUN
@click.option(
    "--cpu-class",
    "cpu_classes",
    multiple=True,
    default=["all"],
    show_default=True,
    metavar="all|NAME",
    help="Measure on this class, as `kdedge devices` lists them; may be given several times.",
)
@click.option(
    "--images", type=click.IntRange(min=1), metavar="N", help="Take the first N test images instead of 2,000."
)
@click.option("--full", is_flag=True, help="Take all test images.")
@RUNS
@DATA_DIR
@JSON
def validate(
    run: Path | None,
    cpu_classes: tuple[str, ...],
    images: int | None,
    full: bool,
    runs: Path,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure the int8 files on other CPU classes, emulated, and compare with fp32 and with this machine.

    A class that cannot be emulated here is "not validated", never passed.
    """
    if images and full:
        raise click.UsageError("--images takes some of the test images and --full all of them: name one of the two.")
    from kdedge.portability import IMAGES, rows_to_print, sentences, validate
    from kdedge.progress import progress
    from kdedge.store import find_run
    from kdedge.validate import Known

    n = None if full else images or IMAGES
    folder = find_run(run, runs)
    documents, known = [], Known()
    for one in _named_runs(folder, quiet=as_json):
        with progress() as shown:
            report = validate(one, cpu_classes=cpu_classes, images=n, data_dir=data_dir, progress=shown, known=known)
        documents.append(report.model_dump(mode="json"))
        if not as_json:
            print_table(*rows_to_print(report))
            click.echo("\n".join(f"- {sentence}" for sentence in sentences(report)))
            click.echo(f"Written: {one / 'cpu_classes.json'}")
    if as_json:
        print_runs(documents)


@click.command()
@click.argument("run", required=False, metavar="[RUN]")
@click.argument("network", required=False, metavar="NETWORK")
@RUNS
@DATA_DIR
@JSON
def diagnose(run: str | None, network: str | None, runs: Path, data_dir: Path | None, as_json: bool) -> None:
    """Say which layers of a network lose accuracy in int8: each alone in int8, and each alone in float.

    Takes 500 validation images, and no test image.
    """
    if run is None:
        raise click.UsageError("Missing argument 'NETWORK', such as students.")
    from kdedge.store import find_run

    folder = find_run(Path(run) if network else None, runs)
    from kdedge.diagnosis import diagnose, rows_to_print, sentences
    from kdedge.progress import progress

    documents = []
    for one in _named_runs(folder, quiet=as_json):
        with progress() as shown:
            diagnosis = diagnose(one, network or run, data_dir=data_dir, progress=shown)
        documents.append(diagnosis.model_dump(mode="json"))
        if not as_json:
            print_table(*rows_to_print(diagnosis))
            click.echo("\n".join(f"- {sentence}" for sentence in sentences(diagnosis)))
            click.echo(f"Written: {one / 'diagnosis' / diagnosis.network}.json")
    if as_json:
        print_runs(documents)


@click.command()
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
        print_json(found.model_dump(mode="json"))
        return
    print_table(*rows_to_print(found))
    tables = [classes_to_print(found)] if per_class else []
    tables += confusions_to_print(found) if confusion else []
    for table in tables:
        click.echo()
        print_table(*table)
    if tables:
        click.echo()
    said = [f"- {sentence}" for sentence in sentences(found)]
    click.echo("\n".join([*said, f"Written: {folder / 'results.json'}"]))


@click.command()
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
            print_table(*rows_to_print(verified))
            click.echo("\n".join(f"- {note}" for note in verified.notes))
    if as_json:
        print_runs(documents)
    if problems:
        raise PackageError(problems)


def _named_runs(folder: Path, *, quiet: bool) -> Iterator[Path]:
    """The runs of a folder, and where there are several, the name of each ahead of what is printed of it."""
    from kdedge.store import runs_of

    for one in (found := runs_of(folder)):
        if len(found) > 1 and not quiet:
            click.echo(click.style(one.relative_to(folder).as_posix(), bold=True))
        yield one
