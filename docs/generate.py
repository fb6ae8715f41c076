"""What the site says about the code, taken from the code: a hook of mkdocs that fills in tables and lists.

A page writes ``<!-- generated: NAME -->`` where one of :data:`PARTS` belongs. Members of plug-in families are read from their
registries, options from their fields, the rest from docstrings, so that a new member is on the site without a word here.
"""

import ast
import dataclasses
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(folder) for folder in (ROOT, ROOT / "docs") if str(folder) not in sys.path]

from docstrings import plain  # noqa: E402

MARK = re.compile(r"<!-- generated: ([a-z-]+) -->")
CHECKED_SHAPE = (256, 256)  # a weight that every scheme's blocks divide

API = {
    "Quantize": ["quantize", "plan", "collect", "QuantizeResult", "Resolution"],
    "Mixed precision": ["search", "SearchResult", "Budget", "Scoring", "Decoding", "load_plan"],
    "Train": ["train", "Training", "prepare", "convert"],
    "What a run is told": ["Calibration", "Output", "Run", "Rule", "SchemeChoice", "Compute", "Progress"],
    "Quantizers": ["RTN", "ImportanceRTN", "HQQ", "GPTQ", "GPTAQ", "AutoRound"],
    "Steps": ["AWQ", "SmoothQuant", "Rotate", "BiasCorrection", "Distill"],
    "Checkpoints": ["load", "save", "inspect", "reformat", "open_model", "export", "package", "push_to_hub"],
    "Generate": ["generate", "Generation", "Engine", "Limits", "Sampling"],
    "Measure": ["evaluate", "EvalReport", "BaseLogits", "compare_latency", "comparison_table", "write_html"],
    "Compare": ["sweep", "SweepResult", "SweepRow", "SweepRecipe", "load_sweep", "run_sweep"],
    "Recipes": ["load_recipe", "plan_recipe", "run_recipe", "Recipe"],
    "Statistics": ["save_statistics", "load_statistics"],
    "Numbers": ["preset", "QuantSpec", "ActivationSpec", "Scheme", "KVScheme", "Plan", "QTensor", "GridTensor"],
    "Errors": [
        "QuantkitError",
        "SpecError",
        "CalibrationError",
        "FormatError",
        "KernelError",
        "RecipeError",
        "DiskError",
        "BusyError",
        "WorkerError",
    ],
}
"""Public names in the order of the reference; tests see to it that each stands here once."""


def summary(thing: object) -> str:
    """Return the first sentence of a docstring, as Markdown in one line; of a value without its own, its class's."""
    text = inspect.getdoc(thing if inspect.isclass(thing) or inspect.ismodule(thing) else type(thing)) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return plain(re.split(r"(?<=[.!?]) (?=[A-Z\"`])", first)[0])


def of_file(member: object) -> str:
    """Return the first sentence of the file that a member stands in."""
    return summary(inspect.getmodule(member if inspect.isclass(member) else type(member)))


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arguments(thing: object) -> dict[str, str]:
    """Return the ``Args:`` of a docstring, name to text."""
    found, name = {}, ""
    section = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", inspect.getdoc(thing) or "", re.MULTILINE)
    for line in section[1].splitlines() if section else ():
        if start := re.match(r"    (\w+): (.*)", line):
            name, found[start[1]] = start[1], start[2]
        elif name:
            found[name] += " " + line.strip()
    return {key: plain(value.strip()) for key, value in found.items()}


def fields(member: type) -> Iterator[tuple[str, object]]:
    """Yield the options of a member, name and default."""
    for one in dataclasses.fields(member) if dataclasses.is_dataclass(member) else ():
        made = one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
        yield one.name, made


def options(member: type) -> str:
    """Return the options of a member in one cell."""
    return ", ".join(f"`{name}={value!r}`" for name, value in fields(member))


def schemes() -> str:
    """Return the table of presets."""
    from quantkit.formats.base import FORMATS
    from quantkit.presets import MIXES, NAMED, PRESETS, preset

    rows = []
    for name in (*PRESETS, *NAMED, *MIXES):
        scheme = preset(name, [CHECKED_SHAPE[1]])
        stored = [f"`{key}`" for key, one in FORMATS if one.rejects(scheme, CHECKED_SHAPE, "float16") is None]
        inputs = scheme.describe().partition(", inputs ")[2] or "float"
        rows.append([f"`{name}`", scheme.weight.describe(), inputs, ", ".join(stored)])
    return table(["Scheme", "Weights, where 128 divides every layer", "Inputs", "Formats"], rows)


def quantizers() -> str:
    """Return the table of quantizers."""
    from quantkit.quantizers.base import QUANTIZERS

    rows = [[f"`{name}`", summary(one), ", ".join(one().needs) or "no text", options(one)] for name, one in QUANTIZERS]
    return table(["Name", "What it does", "Reads", "Options"], rows)


def steps() -> str:
    """Return the table of steps."""
    from quantkit.transforms.base import STEPS

    rows = [[f"`{name}`", summary(one), options(one)] for name, one in STEPS]
    return table(["Name", "What it does", "Options"], rows)


def formats() -> str:
    """Return the table of formats."""
    from quantkit.formats.base import FORMATS

    return table(["Name", "What it is"], [[f"`{name}`", of_file(one.dialect)] for name, one in FORMATS])


def kernels() -> str:
    """Return the table of kernels."""
    from quantkit.kernels import KERNELS

    best = sorted(KERNELS, key=lambda member: -member[1].priority)
    return table(["Name", "Priority", "What it does"], [[f"`{name}`", one.priority, of_file(one)] for name, one in best])


def products() -> str:
    """Return the table of what the CPU multiplies, by scheme."""
    from quantkit.kernels.cpu.tables import is_table, rejects_inputs
    from quantkit.presets import NAMED, PRESETS, preset
    from quantkit.spec import BLOCK_GRIDS, Scheme, block_spec

    def whole(scheme: Scheme) -> bool:
        return scheme.weight.is_integer or scheme.weight.dtype in ("fp4_e2m1", "iq4_nl")

    def product(scheme: Scheme) -> str:
        inputs = scheme.activation
        if inputs is None:
            return "float32 or bfloat16"
        if rejects_inputs(inputs, 256):
            return "through modules"
        return "int8" if inputs.grid.is_integer and whole(scheme) else "bfloat16" if not inputs.grid.is_integer else "float32"

    def faster(scheme: Scheme) -> str:
        if scheme.activation is not None or not (scheme.weight.is_integer or is_table(scheme.weight.dtype)):
            return "-"
        return "int8" if whole(scheme) else "int8, numbers rounded to 1/127"

    known = {name: preset(name, [256]) for name in (*PRESETS, *NAMED)}
    known |= {name: Scheme(block_spec(name)) for name in BLOCK_GRIDS}
    rows: dict[tuple[str, str], list[str]] = {}
    for name, scheme in known.items():
        rows.setdefault((product(scheme), faster(scheme)), []).append(f"`{name}`")
    return table(["Schemes", "Product", 'With `compute="int8"`'], [[", ".join(names), *how] for how, names in rows.items()])


def drafters() -> str:
    """Return the table of drafters."""
    from quantkit.engine.drafters.base import DRAFTERS

    return table(["Name", "How it guesses"], [[f"`{name}`", of_file(one)] for name, one in DRAFTERS])


def collectors() -> str:
    """Return the table of collectors."""
    from quantkit.calibrate.collectors import COLLECTORS

    return table(["Name", "What it keeps of a layer's input"], [[f"`{name}`", summary(one)] for name, one in COLLECTORS])


def caches() -> str:
    """Return the table of key/value presets."""
    from quantkit.spec import KV_PRESETS

    return table(["Name", "Keys and values"], [[f"`{name}`", one.describe()] for name, one in KV_PRESETS.items()])


def recipe() -> str:
    """Return the keys of a recipe, section by section."""
    import quantkit
    from quantkit.recipe import schema

    known = {
        one.__name__: one for one in (quantkit.Calibration, quantkit.Output, quantkit.Run, quantkit.Rule, quantkit.Training)
    }
    of_quantize = arguments(quantkit.quantize) | {
        "model": "hub id, directory, `.gguf` file, or `demo`",
        "dtype": "dtype in which the model is read",
        "output": "where to and how; `path` is required",
        "train": "train afterwards, behind the rounding; left out, nothing is trained",
        "evaluate": "measure afterwards; left out, nothing is measured",
    }
    top = [
        [f"`{name}`", "required" if field.is_required() else "", of_quantize.get(name, "")]
        for name, field in schema.Recipe.model_fields.items()
    ]
    parts = [table(["Key", "", "Meaning"], top)]
    sections = {
        "rules": known["Rule"],
        "calibration": known["Calibration"],
        "output": known["Output"],
        "run": known["Run"],
        "train": known["Training"],
    }
    for key, section in sections.items():
        said = arguments(section)
        parts.append(f"### `{key}`\n\n{summary(section)}\n")
        parts.append(
            table(["Key", "Default", "Meaning"], [[f"`{n}`", default(v), said.get(n, "")] for n, v in fields(section)])
        )
    parts.append(f"### `evaluate`\n\n{summary(schema.Evaluation)}\n")
    rows = [[f"`{name}`", default(field.default)] for name, field in schema.Evaluation.model_fields.items()]
    parts.append(table(["Key", "Default"], rows))
    return "\n\n".join(parts)


def sweep() -> str:
    """Return the keys of a sweep."""
    import quantkit
    from quantkit.sweeps.schema import Scoring

    said = arguments(quantkit.SweepRecipe)
    fields = quantkit.SweepRecipe.model_fields.items()
    top = [[f"`{name}`", "required" if field.is_required() else "", said[name]] for name, field in fields]
    rows = [[f"`{name}`", default(field.default)] for name, field in Scoring.model_fields.items()]
    scoring = f"### `evaluate` of a sweep\n\n{summary(Scoring)}"
    return "\n\n".join([table(["Key", "", "Meaning"], top), scoring, table(["Key", "Default"], rows)])


def default(value: object) -> str:
    """Return a default value for a table."""
    if value is dataclasses.MISSING:
        return "required"
    return "" if callable(value) else f"`{value!r}`"


def command() -> str:
    """Return the reference of the command line, from its help."""
    import typer
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from quantkit.cli import app

    group = get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group), name="quantkit")
    return text.partition("\n")[2].replace("```console", "```text").replace("\n#", "\n")


def api() -> str:
    """Return the public names, for mkdocstrings to fill in."""
    return "\n\n".join(f"## {head}\n\n" + "\n\n".join(f"::: quantkit.{name}" for name in names) for head, names in API.items())


def file_map() -> str:
    """Return the rooms of the package with their files, each with the first sentence of its docstring."""
    from tests.house import ORDER

    parts = []
    for name in (name for names in reversed(ORDER) for name in names):
        place = ROOT / "quantkit" / name
        if not place.is_dir():
            parts.append(f"**`{name}.py`**: {docstring(place.with_suffix('.py'))}")
            continue
        files = [path for path in sorted(place.rglob("*.py")) if path.name != "__init__.py"]
        rows = [[f"`{path.relative_to(place)}`", docstring(path)] for path in files]
        inside = "\n".join(f"    {line}" for line in table(["File", ""], rows).splitlines())
        parts.append(f'??? note "{name}/"\n\n    {docstring(place / "__init__.py")}\n\n{inside}')
    return "\n\n".join(parts)


def docstring(path: Path) -> str:
    """Return the first sentence of a file's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return plain(re.split(r"(?<=[.!?]) (?=[A-Z\"`])", text)[0])


PARTS: dict[str, Callable[[], str]] = {
    "schemes": schemes,
    "quantizers": quantizers,
    "steps": steps,
    "formats": formats,
    "kernels": kernels,
    "products": products,
    "drafters": drafters,
    "collectors": collectors,
    "caches": caches,
    "recipe": recipe,
    "sweep": sweep,
    "command": command,
    "api": api,
    "file-map": file_map,
}


def fill(markdown: str) -> str:
    """Replace every mark in a page by what it names."""
    return MARK.sub(lambda found: PARTS[found[1]](), markdown)


def on_config(config: Any) -> Any:
    """Take the project's addresses from pyproject.toml, the only place that says them."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    config.site_url, config.repo_url, config.repo_name = urls["Documentation"], urls["Homepage"], "quantkit"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand at the root of the repository."""
    from mkdocs.structure.files import File

    for source in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / source).read_text(encoding="utf-8")
        text = text.replace("](docs/", "](").replace("](README.md#file-map)", "](architecture.md#file-map)")
        files.append(File.generated(config, source.lower(), content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in a page."""
    return fill(markdown)
