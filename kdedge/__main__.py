"""`python -m kdedge` is the command `kdedge`."""

from kdedge.cli import main

main(prog_name="kdedge")
