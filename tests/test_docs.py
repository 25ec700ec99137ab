"""The documents say what the program does: every command is told, every command line in them parses."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kdedge.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def command_lines() -> Iterator[str]:
    """Calls of kdedge in the README's code blocks. Where a block marks commands with `$`, other lines are output."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        marked = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        yield from (line for line in marked or lines if re.match(r"kdedge [a-z-]", line))


@pytest.mark.parametrize("command", main.commands)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"\bkdedge {command}\b", README)


def test_the_readme_shows_how_to_use_it() -> None:
    used = [shlex.split(line, comments=True)[1] for line in command_lines()]
    assert {"distill", "export", "bench"} <= set(used)


@pytest.mark.parametrize("line", dict.fromkeys(command_lines()))
def test_a_command_line_in_the_readme_parses(line: str) -> None:
    plain = re.sub(r"[\[\]]|\.\.\.|\|[\w|]+", "", line)  # of a synopsis: [RUN], [--set KEY=VALUE]..., auto|cpu|cuda
    name, *arguments = shlex.split(plain, comments=True)[1:]
    if name.startswith("-"):
        assert name in ("--help", "-h", "--version")
        return
    assert name in main.commands, f"there is no command {name!r}"
    if set(arguments) & {"--help", "-h"}:
        return
    with click.Context(main, info_name="kdedge") as parent:
        main.commands[name].make_context(name, arguments, parent)  # raises UsageError with the reason


def test_recipes_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"recipes/[\w./-]+\.yaml", README))
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_diff_that_shows_how_to_extend_is_in_the_tree() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    files = re.split(r"^\+\+\+ b/(\S+)\n", diff, flags=re.MULTILINE)[1:]
    assert len(files) == 6
    for path, added in zip(files[::2], files[1::2], strict=True):
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        assert [line for line in added.splitlines() if line.removeprefix("+") not in lines] == [], path


def test_relative_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")):
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
        assert [t for t in targets if "://" not in t and not (document.parent / t).exists()] == [], document.name


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    newest = re.search(r"^## \[?v?(\d[\w.]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert newest[1] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
