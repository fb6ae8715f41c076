"""The laws of the house, read from the source: floors, who may import what, sizes, and what an import may do."""

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quantkit"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_RECIPE_LINES = 400, 60, 30

FLOORS = (
    {"errors", "files", "memory", "numerics", "progress", "qtensor", "registry", "spec"},
    {"kernels", "nn"},
    {"calibrate", "engine", "formats", "quantizers", "transforms"},
    {"hf"},
    {
        "blockwise",
        "checkpoint",
        "compute",
        "distill",
        "evaluation",
        "generation",
        "models",
        "pipeline",
        "plan",
        "proof",
        "reconstruct",
        "rescale",
        "resume",
        "rotation",
    },
    {
        "__main__",
        "cli",
        "demo",
        "doctor",
        "forecast",
        "located_yaml",
        "recipe",
        "recipe_choices",
        "report",
        "run",
        "serve",
        "templates",
    },
)
BLIND = {"calibrate", "engine", "formats", "quantizers", "transforms"}
"""Rooms of one floor that know nothing of each other."""
FORBIDDEN = {"pickle", "cloudpickle", "dill", "torch.utils.cpp_extension"}

each_file = pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of every module that a file imports, at any depth, relative ones resolved."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """Return the room of ``quantkit.<room>...``; None outside the package and for its root."""
    parts = module.split(".")
    if parts[0] != "quantkit" or len(parts) < 2:
        return None
    return parts[1] if (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists() else None


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert rooms <= set().union(*FLOORS)


@each_file
def test_a_floor_imports_only_floors_below_it(path):
    here = room(module_name(path))
    if here is None:
        assert path == PACKAGE / "__init__.py"
        top_level = [n for n in parse(path).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [alias.name for node in top_level for alias in node.names]
        assert all(room(name) is None for name in names), "the package's root must import its rooms lazily"
        return
    for there in {room(name) for name in imports(path)} - {None, here}:
        assert floor(there) <= floor(here), f"{here} (floor {floor(here) + 1}) imports {there} (floor {floor(there) + 1})"
        assert not {here, there} <= BLIND, f"{here} and {there} stand on one floor and must not know each other"


@each_file
def test_only_hf_imports_transformers_and_nobody_what_is_forbidden(path):
    names = set(imports(path))
    if room(module_name(path)) != "hf":
        assert not {name for name in names if name.split(".")[0] in ("transformers", "accelerate", "huggingface_hub")}
    assert not names & FORBIDDEN


@each_file
def test_files_and_functions_are_short_and_explained(path):
    tree = parse(path)
    assert ast.get_docstring(tree), "a module says what it is for"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            code = (
                node.body[1:] if ast.get_docstring(node) else node.body
            )  # signature and docstring are not what tires a reader
            lines = code[-1].end_lineno - code[0].lineno + 1 if code else 0
            assert lines <= MAX_FUNCTION_LINES, f"{node.name}, line {node.lineno}"


@each_file
def test_the_library_never_prints_and_never_swallows(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and room(module_name(path)) != "cli":
            assert node.func.id != "print", f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            assert not all(isinstance(stmt, ast.Pass) for stmt in node.body), f"line {node.lineno}: except ... pass"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_are_short(path):
    assert len(path.read_text().splitlines()) <= MAX_RECIPE_LINES


def run(code: str, tmp_path: Path) -> str:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bare_import_is_light_and_compiles_nothing(tmp_path):
    heavy = {"torch", "transformers", "matplotlib", "datasets", "pandas", "rich", "pydantic"}
    found = run("import quantkit, sys; print(*{name.split('.')[0] for name in sys.modules})", tmp_path)
    assert not heavy & set(found.split())
    run("import quantkit.kernels, quantkit.recipe, quantkit.nn.linear", tmp_path)
    assert not list(tmp_path.iterdir())


def test_help_does_not_wait_for_torch(tmp_path):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom quantkit.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\nassert result.exit_code == 0, result.output\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, 'pydantic' in sys.modules)"
    )
    assert run(code, tmp_path).split() == ["False", "False", "False"]
