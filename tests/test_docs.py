"""The site: every Python block and every command of a page runs, and what pages say of the code is taken from the code."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.calibrate.collectors import COLLECTORS
from quantkit.cli import app
from quantkit.engine.drafters import DRAFTERS
from quantkit.formats.base import FORMATS
from quantkit.kernels import KERNELS
from quantkit.presets import MIXES, NAMED, PRESETS
from quantkit.quantizers.base import QUANTIZERS
from quantkit.transforms.base import STEPS
from tests import tiny

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FAMILIES = {
    "quantizers": QUANTIZERS,
    "steps": STEPS,
    "formats": FORMATS,
    "kernels": KERNELS,
    "drafters": DRAFTERS,
    "collectors": COLLECTORS,
}


class Block(NamedTuple):
    """A fenced block of a page: its language, the file it says it is, and its first line's number."""

    language: str
    title: str | None
    line: int
    text: str


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL):
        yield Block(found[1], found[2], text.count("\n", 0, found.start()) + 2, found[3])


def runs(block: Block) -> bool:
    return block.language == "python" or (block.language == "bash" and "\nquantkit " in f"\n{block.text}")


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    pytest.importorskip("griffe", reason="the extra docs is not installed")
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What pages call "demo", in small."""
    path = tmp_path_factory.mktemp("demo")
    tiny.tiny_llama(tie_word_embeddings=True, intermediate_size=128, max_position_embeddings=512).save_pretrained(path)
    tiny.tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def plug_ins(monkeypatch):
    """Registries that forget what a page adds to them."""
    for family in FAMILIES.values():
        family.names()
        monkeypatch.setattr(family, "_members", dict(family._members))


@pytest.mark.usefixtures("plug_ins")
@pytest.mark.parametrize("path", [p for p in PAGES if any(map(runs, blocks(p)))], ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_shows_runs(path, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before, names = set(sys.modules), {"__name__": path.stem}
    for block in blocks(path):
        text = block.text.replace('"demo"', repr(demo)).replace("model: demo", f"model: {demo}")
        text = re.sub(r"(?m)^quantkit .*$", lambda line: re.sub(r"(?<= )demo(?= |$)", demo, line[0]), text)
        if block.title:
            Path(block.title).write_text(text)
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + text, str(path), "exec")  # so that a traceback names the page's line
            exec(code, names)
        elif runs(block):
            for line in text.splitlines():
                if line.startswith("quantkit "):
                    done = CliRunner().invoke(app, shlex.split(line)[1:])
                    assert done.exit_code == 0, f"{line}\n{done.output}"
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_site_shows_every_page(generate):
    nav = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    pages = {str(p.relative_to(ROOT / "docs")) for p in PAGES if p.is_relative_to(ROOT / "docs")}
    assert set(re.findall(r"[\w/-]+\.md", nav)) == {*pages, "contributing.md", "changelog.md"}
    marks = {name for page in PAGES for name in generate.MARK.findall(page.read_text())}
    assert marks == set(generate.PARTS)


def test_every_public_name_is_in_the_reference_once(generate):
    assert sorted(name for names in generate.API.values() for name in names) == sorted({*quantkit.__all__} - {"__version__"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_member_is_in_its_table_and_says_what_it_is(generate, family):
    rows = [line.split(" | ") for line in generate.PARTS[family]().splitlines()[2:]]
    assert sorted(row[0].strip("| `") for row in rows) == FAMILIES[family].names()
    assert all(all(cell.strip("| ") for cell in row[:2]) for row in rows)


def test_schemes_and_recipe_keys_are_all_there(generate):
    schemes = generate.schemes()
    assert all(f"| `{name}` |" in schemes for name in (*PRESETS, *NAMED, *MIXES))
    recipe = generate.recipe()
    assert all(f"| `{name}` |" in recipe for name in (*quantkit.Recipe.model_fields, "samples", "format", "strict", "match"))


def test_the_reference_of_the_command_line_has_every_command(generate):
    from typer.main import get_command

    from quantkit.cli import app

    text = generate.command()
    for name, command in get_command(app).commands.items():
        assert f"# `quantkit {name}`" in text
        assert all(option in text for param in command.params for option in param.opts if option.startswith("--"))


def test_docstrings_become_markdown(generate):
    assert generate.plain("a :class:`~quantkit.spec.Scheme` or ``None``") == "a `Scheme` or `None`"
    assert generate.fill("<!-- generated: caches -->").startswith("| Name | Keys and values |")
