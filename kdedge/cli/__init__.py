"""The command line: parse, call one function, print. The only package that knows Click."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from kdedge.cli.devices import devices
from kdedge.cli.recipes import check, distill, plan, schema
from kdedge.cli.runs import bench, diagnose, export, results, validate, verify
from kdedge.errors import KdedgeError, RecipeError


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


COMMANDS = [check, plan, schema, distill, export, bench, validate, diagnose, results, verify, devices]


@click.group(cls=_Commands, commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kdedge")
def main() -> None:
    """Distil a big network into small ones, export them as int8 ONNX, and prove the files on the device.

    \b
    kdedge distill recipes/tcn4.yaml    train teacher and students   -> runs/tcn4/
    kdedge export --int8                ONNX files, gated            -> runs/tcn4/export/
    kdedge bench --device cpu           accuracy and latency         -> runs/tcn4/bench.json

    RUN is the folder of a run, or its name in --runs; a command without RUN takes the newest one.
    """
