"""Commands on the machines that files are measured on."""

from __future__ import annotations

import click

from kdedge.cli.options import JSON
from kdedge.cli.printing import print_json, print_rows


@click.group(invoke_without_command=True)
@JSON
@click.pass_context
def devices(context: click.Context, as_json: bool) -> None:
    """List the CPU classes, and how each can be run here; `setup` makes what is missing.

    int8 files give other logits on another class. `kdedge validate` measures them on each.
    """
    if context.invoked_subcommand:
        return
    from kdedge.devices import cpu_classes

    found = cpu_classes()
    if as_json:
        print_json({"cpu_classes": [one._asdict() for one in found]})
        return
    print_rows([[one.name, one.status, one.how] for one in found], str.ljust)


@devices.command()
@click.argument("what", type=click.Choice(["arm64"]))
def setup(what: str) -> None:
    """Make what the Arm classes need: an Arm Python with onnxruntime in the user's cache, about 60 MB of downloads."""
    from kdedge.devices import arm64
    from kdedge.progress import progress

    with progress() as shown:
        click.echo(f"Made: {arm64.setup(shown.note)}")
