"""The rules of the house: imports only point down, commands load only what they need, files and functions are short."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_export import write_data, write_export

ROOT = Path(__file__).parent.parent

# From bottom to top. A module imports what stands in its own row or below; a folder is named for all that is in it.
LEVELS = [
    {"errors"},
    {"data", "models", "losses", "quantize", "devices", "statistics", "yaml_reader", "wording"},
    {
        "recipe",
        "recipe_images",
        "recipe_values",
        "rules",
        "recipe_reader",
        "variants",
    },
    {"plan"},
    {"fit", "targets", "networks", "store", "manifest", "progress", "machine", "impressions"},
    {
        "distillation",
        "stages",
        "learners",
        "work",
        "deployment",
        "pieces",
        "repair",
        "gates",
        "validate",
        "audit",
        "verification",
        "benchmark",
        "bench_report",
        "recommendation",
        "comparison",
        "measurements",
        "portability",
        "diagnosis",
    },
    {"cli", "__init__", "__main__"},
]
TOP = len(LEVELS) - 1
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
BESIDE_PYTHON = {
    "exporters": {"exporters", "torch", "onnx", "onnx_ir", "onnxruntime", "numpy"},
    "kdedge/devices/runner.py": {"numpy", "onnxruntime"},  # it is copied to devices that have nothing else
}
ALLOWED = {
    ("exporters", "kdedge/deployment.py"),
    ("exporters", "kdedge/pieces.py"),
    ("exporters", "kdedge/diagnosis.py"),
    ("exporters", "kdedge/repair.py"),
    ("click", "kdedge/cli/"),
}  # one place each

MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60
WHOLE = {"kdedge/devices/runner.py": 400}  # it is copied to devices as one file, so it cannot be cut
STORIES = {"kdedge/fit.py:fit", "kdedge/distillation.py:distill"}  # they are read from top to bottom


def sources() -> Iterator[tuple[str, str]]:
    for path in [*ROOT.glob("kdedge/**/*.py"), *ROOT.glob("exporters/**/*.py")]:
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def imports(text: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported, at the top or in a function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def module(file: str) -> str:
    """The name by which a file of kdedge stands in LEVELS."""
    return file.removesuffix(".py").split("/")[1]


def complaint(file: str, name: str) -> str | None:
    """What is wrong with importing `name` in `file`."""
    package = name.split(".")[0]
    if not package:
        return "is relative"
    for place, allowed in BESIDE_PYTHON.items():
        if file.startswith(place) and package not in allowed | sys.stdlib_module_names:
            return f"{place} must not need it"
    places = [place for name, place in ALLOWED if name == package]
    if places and file.startswith("kdedge") and not file.startswith(tuple(places)):
        return f"only {' and '.join(places)} may"
    if package == "kdedge":
        own, other = module(file), f"{name}.__init__".split(".")[1]
        return "points up" if LEVEL.get(other, TOP) > LEVEL.get(own, TOP) else None
    return None


def test_the_page_on_architecture_draws_the_same_levels() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = page.split("## Imports only point down")[1].split("```")[1].strip().splitlines()
    rows = [set(re.findall(r"\w+", line)) for line in reversed(drawn)]
    assert rows == [names - {"__init__", "__main__"} for names in LEVELS]
    modules = {path.stem for path in ROOT.glob("kdedge/*.py")} - {"__init__", "__main__"}
    assert [name for name in modules if f"`{name}.py`" not in page] == []


def test_imports_only_point_down() -> None:
    wrong = [
        f"{file}:{line}: imports {name}, which {why}"
        for file, text in sources()
        for line, name in imports(text)
        if (why := complaint(file, name))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_place() -> None:
    found = {module(file) for file, _ in sources() if file.startswith("kdedge/")}
    assert found == set(LEVEL)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("kdedge/plan.py", "kdedge.fit.fit"),
        ("kdedge/models/tcn.py", "kdedge.store"),
        ("kdedge/errors.py", "kdedge"),
        ("kdedge/validate.py", "exporters.parity.check"),
        ("kdedge/plan.py", "click"),
        ("exporters/int8.py", "kdedge.errors.RunError"),
        ("exporters/int8.py", "pydantic"),
        ("kdedge/devices/runner.py", "kdedge.errors"),
        ("kdedge/fit.py", ".losses.MSE"),
    ],
)
def test_the_rule_sees_what_is_wrong(file: str, name: str) -> None:
    assert complaint(file, name)


def test_files_and_functions_stay_short() -> None:
    wrong = []
    for file, text in sources():
        if (lines := len(text.splitlines())) > (most := WHOLE.get(file, MAX_FILE_LINES)):
            wrong.append(f"{file}:{most + 1}: the file has {lines} lines, at most {most} are allowed")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or f"{file}:{node.name}" in STORIES:
                continue
            if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES:
                wrong.append(f"{file}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}")
    assert not wrong, "\n".join(wrong)


TORCH = ("torch", "torchvision", "onnx", "onnxscript", "onnx_ir")
COMMAND = "from kdedge.cli import main; main({}, standalone_mode=False)"


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import kdedge; dir(kdedge)", (*TORCH, "numpy", "onnxruntime", "pydantic", "yaml", "click", "rich")),
        (COMMAND.format(["--help"]), (*TORCH, "numpy", "onnxruntime", "pydantic", "yaml", "rich")),
        (COMMAND.format(["schema"]), (*TORCH, "numpy", "onnxruntime")),
        (COMMAND.format(["check", "recipes/tcn4.yaml"]), (*TORCH, "numpy", "onnxruntime")),
        (COMMAND.format(["plan", "recipes/tcn4.yaml", "--data-dir", "{data}"]), (*TORCH, "onnxruntime")),
        ("import kdedge.benchmark, kdedge.validate", (*TORCH, "onnxruntime")),  # the runner imports onnxruntime
        ("import kdedge.verification", (*TORCH, "onnxruntime")),
        ("import kdedge.portability, kdedge.devices.arm64", (*TORCH, "onnxruntime")),
        (COMMAND.format(["verify", "{export}"]), ("torch", "torchvision", "onnxscript", "onnx_ir", "onnxruntime")),
    ],
    ids=["import", "help", "schema", "check", "plan", "bench", "verification", "portability", "verify"],
)
def test_what_is_not_loaded(code: str, unwanted: tuple[str, ...], tmp_path: Path) -> None:
    code = code.replace("{data}", str(write_data(tmp_path, 6000))) if "{data}" in code else code
    if "{export}" in code:
        write_export(tmp_path)
        code = code.replace("{export}", str(tmp_path / "export"))
    probe = f"import sys\n{code}\nprint('loaded:', *(name for name in {unwanted!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
