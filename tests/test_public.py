"""The public face: every exported name exists, and the version is the same wherever it is written."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantkit

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", quantkit.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(quantkit, name)
    assert name == "__version__" or value.__doc__


def test_public_names_are_listed_by_dir():
    assert set(quantkit.__all__) <= set(dir(quantkit))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="quantise"):
        quantkit.quantise  # noqa: B018


def test_the_promised_names_are_public():
    assert {"quantize", "load", "evaluate", "generate"} <= set(quantkit.__all__)


def test_the_version_is_the_changelogs_newest_and_the_packages():
    unreleased, newest, *_ = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert unreleased == "Unreleased"
    assert newest == quantkit.__version__ == importlib.metadata.version("quantkit")


def test_the_changelog_has_the_usual_sections_and_a_link_for_every_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert re.findall(r"^## \[([^]]+)\]", text, re.MULTILINE) == re.findall(r"^\[([^]]+)\]: https://", text, re.MULTILINE)


def test_python_m_quantkit_and_the_script_are_the_same_program():
    out = subprocess.run([sys.executable, "-m", "quantkit", "--version"], capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"quantkit {quantkit.__version__}"


def test_the_readme_gives_two_commands_and_ci_runs_the_second_word_for_word():
    quickstart = (ROOT / "README.md").read_text().split("## Quickstart")[1].split("\n## ")[0]
    commands = re.findall(r"```bash\n(.*?)\n```", quickstart, re.DOTALL)
    assert len(commands) == 2
    assert all("\n" not in command for command in commands)
    assert commands[0].endswith("/quantkit demo")
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
