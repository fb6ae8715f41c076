"""Measure the package's structure from its source: rooms, arrows between them, and what is too large to read.

A *room* is a folder or a loose file directly in ``quantkit/``. An *arrow* runs from a room to one that it imports, at any
depth of the code. ``python tests/house.py [ROOT]`` prints the figures of a checkout.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ORDER: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("version",),
    ("dtypes",),
    ("registry",),
    ("spec",),
    ("presets",),
    ("system",),
    ("numerics",),
    ("qtensor",),
    ("kernels",),
    ("nn",),
    ("calibrate", "engine", "formats", "quantizers", "transforms"),
    ("hf",),
    ("checkpoint",),
    ("generation",),
    ("evaluation",),
    ("pipeline",),
    ("exports",),
    ("mixed",),
    ("recipe",),
    ("report",),
    ("sweeps",),
    ("serve",),
    ("cli",),
    ("__main__",),
)
"""Rooms from the ground up. A room imports only rooms of the lines above its own; rooms of one line do not know each other."""

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS, LADDER_STEPS = 400, 60, 8, 3


@functools.cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Return every node of a file's syntax tree; walking through it again and again takes most of the time."""
    return tuple(ast.walk(parse(path)))


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a file."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path, root: Path) -> tuple[str, ...]:
    """Return the dotted name of every module that a file imports, at any depth, relative ones resolved."""
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: list[str] = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            found += (source, *(f"{source}.{alias.name}" for alias in node.names))
    return tuple(found)


@functools.cache
def room(module: str, root: Path) -> str | None:
    """Return the room of ``quantkit.<room>...``; None outside the package and for its root."""
    parts = module.split(".")
    if parts[0] != "quantkit" or len(parts) < 2:
        return None
    package = root / "quantkit"
    return parts[1] if (package / parts[1]).is_dir() or (package / f"{parts[1]}.py").exists() else None


def floor(name: str) -> int:
    """Return the position of a room in :data:`ORDER`."""
    return next(i for i, rooms in enumerate(ORDER) if name in rooms)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function of a file, nested ones too."""
    yield from (node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function's code, without signature and docstring, which are not what tires a reader."""
    code = function.body[1:] if ast.get_docstring(function) else function.body
    return (code[-1].end_lineno or 0) - code[0].lineno + 1 if code else 0


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many arguments a caller may give."""
    spec = function.args
    return sum(one.arg not in ("self", "cls") for one in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs])


def ladders(path: Path) -> list[int]:
    """Return the lines where one value is asked for its class :data:`LADDER_STEPS` times or more in an if/elif chain."""
    found, inside = [], set()
    for node in nodes(path):
        if not isinstance(node, ast.If) or id(node) in inside:
            continue
        asked: list[str] = []
        step: ast.stmt | None = node
        while isinstance(step, ast.If):
            inside.add(id(step))
            asked += [
                ast.unparse(call.args[0])
                for call in ast.walk(step.test)
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "isinstance"
            ]
            step = step.orelse[0] if len(step.orelse) == 1 else None
        if asked and max(asked.count(one) for one in asked) >= LADDER_STEPS:
            found.append(node.lineno)
    return found


def members(files: list[Path]) -> dict[str, Path]:
    """Return class name to file of everything that registers itself in a plug-in family."""
    found = {}
    for path in files:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef) and any(
                isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr == "register"
                for one in node.decorator_list
            ):
                found[node.name] = path
    return found


def asked_for_members(path: Path, classes: dict[str, Path]) -> Iterator[int]:
    """Yield the lines where a file asks whether something is a plug-in that another file defines."""
    for node in nodes(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            names = {one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)}
            if any(name in classes and classes[name] != path for name in names):
                yield node.lineno


@dataclass(frozen=True)
class House:
    """What was measured; lists hold places as ``file:line``."""

    rooms: list[str]
    folders: list[str]
    loose: list[str]
    arrows: list[tuple[str, str]]
    upward: list[tuple[str, str]]
    long_files: list[str]
    long_functions: list[str]
    many_arguments: list[str]
    ladders: list[str]
    asks: list[str]

    def lines(self) -> list[str]:
        """Return one line per figure."""
        rows = [
            ("rooms (folders and loose files of quantkit/)", self.rooms),
            ("folders with modules, nested ones too", self.folders),
            ("loose files", self.loose),
            ("arrows between rooms", self.arrows),
            ("upward arrows", self.upward),
            (f"files over {MAX_FILE_LINES} lines", self.long_files),
            (f"functions over {MAX_FUNCTION_LINES} lines of code", self.long_functions),
            (f"functions over {MAX_ARGUMENTS} arguments", self.many_arguments),
            (f"isinstance ladders of {LADDER_STEPS} steps or more", self.ladders),
            ("isinstance of a plug-in outside its own file", self.asks),
        ]
        return [f"{len(found):5}  {what}" for what, found in rows]


def measure(root: Path) -> House:
    """Measure the package of a checkout; upward arrows are known only for rooms that :data:`ORDER` names."""
    package = root / "quantkit"
    files = sorted(package.rglob("*.py"))
    known = {name for rooms in ORDER for name in rooms}
    classes, arrows = members(files), set()
    for path in files:
        here = room(module_name(path, root), root)
        arrows |= {(here, there) for name in imports(path, root) if (there := room(name, root)) not in (None, here) and here}
    named = [(a, str(b)) for a, b in sorted(arrows, key=str)]
    loose = sorted(path.stem for path in package.glob("*.py") if path.stem != "__init__")
    folders = sorted({str(path.parent.relative_to(package)) for path in files} - {"."})
    return House(
        rooms=sorted({*loose, *(folder.split("/")[0] for folder in folders)}),
        folders=folders,
        loose=loose,
        arrows=named,
        upward=[(a, b) for a, b in named if {a, b} <= known and floor(b) >= floor(a)],
        long_files=[str(p) for p in files if len(p.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES],
        long_functions=[f"{p}:{f.lineno} {f.name}" for p in files for f in functions(p) if length(f) > MAX_FUNCTION_LINES],
        many_arguments=[f"{p}:{f.lineno} {f.name}" for p in files for f in functions(p) if arguments(f) > MAX_ARGUMENTS],
        ladders=[f"{p}:{line}" for p in files for line in ladders(p)],
        asks=[f"{p}:{line}" for p in files for line in asked_for_members(p, classes)],
    )


if __name__ == "__main__":
    house = measure(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
    print("\n".join(house.lines()))
    for place in (*house.long_files, *house.long_functions, *house.many_arguments, *house.ladders, *house.asks, *house.upward):
        print("      ", place)
