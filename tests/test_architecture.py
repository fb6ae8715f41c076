"""The laws of the house, read from the source: floors, who may import what, sizes, and what an import may do."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    ORDER,
    floor,
    functions,
    imports,
    length,
    measure,
    module_name,
    nodes,
    parse,
    room,
)

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quantkit"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_RECIPE_LINES = 30
LOOSE = {"__main__", "dtypes", "errors", "presets", "qtensor", "registry", "spec", "version"}
"""The only modules directly in quantkit/; everything else lives in a room."""
FORBIDDEN = {"pickle", "cloudpickle", "dill", "torch.utils.cpp_extension"}

each_file = pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])


def test_the_house_has_the_rooms_it_says():
    house = measure(ROOT)
    print("\n".join(house.lines()))  # shown by pytest -rP, and when this fails
    assert set(house.loose) == LOOSE
    assert set(house.rooms) == {name for rooms in ORDER for name in rooms}
    assert not house.asks, "ask a plug-in for what it can do, not for its class"
    assert not house.ladders


def test_the_readmes_file_map_is_the_tree():
    block = (ROOT / "README.md").read_text().split("## File map")[1].split("```")[1].strip("\n")
    inside = [line.split("  ")[1] for line in block.splitlines() if line.startswith("  ")]
    rooms = [Path(name).stem for column in inside for name in column.split()]
    assert sorted(rooms) == sorted(name for names in ORDER for name in names), "every folder and loose file, once"
    assert [floor(name) for name in rooms] == sorted(floor(name) for name in rooms), "what is imported stands above"
    outside = [line.split()[0] for line in block.splitlines() if not line.startswith("  ")]
    assert all((ROOT / name).exists() for name in outside)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    folders = {name.split("/")[0] + "/" for name in tracked if "/" in name and not name.startswith(".")}
    assert folders <= set(outside), "every folder of the repository"


@each_file
def test_a_room_imports_only_rooms_below_it(path):
    here = room(module_name(path, ROOT), ROOT)
    if here is None:
        assert path == PACKAGE / "__init__.py"
        top_level = [n for n in parse(path).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [f"{getattr(node, 'module', '')}.{alias.name}" for node in top_level for alias in node.names]
        assert {room(name, ROOT) for name in names} <= {None, "version"}, "the package's root imports its rooms lazily"
        return
    for there in {room(name, ROOT) for name in imports(path, ROOT)} - {None, here}:
        assert floor(there) < floor(here), f"{here} (floor {floor(here) + 1}) imports {there} (floor {floor(there) + 1})"


@each_file
def test_only_hf_imports_transformers_and_nobody_what_is_forbidden(path):
    names = set(imports(path, ROOT))
    if room(module_name(path, ROOT), ROOT) != "hf":
        assert not {name for name in names if name.split(".")[0] in ("transformers", "accelerate", "huggingface_hub")}
    assert not names & FORBIDDEN


@each_file
def test_files_and_functions_are_short_and_explained(path):
    tree = parse(path)
    assert ast.get_docstring(tree), "a module says what it is for"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for function in functions(path):
        assert length(function) <= MAX_FUNCTION_LINES, f"{function.name}, line {function.lineno}"


@each_file
def test_the_library_never_prints_and_never_swallows(path):
    for node in nodes(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and room(module_name(path, ROOT), ROOT) != "cli":
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
    run("import quantkit.kernels, quantkit.recipe.schema, quantkit.nn.linear", tmp_path)
    assert not list(tmp_path.iterdir())


def test_help_does_not_wait_for_torch(tmp_path):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom quantkit.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\nassert result.exit_code == 0, result.output\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, 'pydantic' in sys.modules)"
    )
    assert run(code, tmp_path).split() == ["False", "False", "False"]
