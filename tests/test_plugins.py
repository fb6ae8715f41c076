"""A scheme, a quantizer and a format, each added from outside the package in one file and used from end to end.

The files of ``tests/outside`` are put into a directory together with what an installer would write beside them, and a new
Python finds them there as it finds installed packages.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError, SpecError
from quantkit.quantizers.rtn import RTN
from quantkit.registry import Registry
from tests.tiny import tiny_llama

ROOT = Path(__file__).parent.parent
MEMBERS = {
    "scheme": ("w5a16-fine", "outside_scheme:fine"),
    "quantizer": ("dice", "outside_quantizer:Dice"),
    "format": ("one-file", "outside_format:FORMAT"),
}

USE = """
import sys
import torch
import quantkit
from quantkit.system.progress import Progress
from tests.tiny import tiny_llama

out, scheme, method, format = sys.argv[1:]
ids = torch.arange(3, 35)[None]

def run(out, stop=None):
    def progress(event):
        if stop is not None and event.detail == stop:
            raise KeyboardInterrupt
    model = tiny_llama(num_hidden_layers=2)
    settings = {"output": quantkit.Output(format=format), "run": quantkit.Run(progress=progress)}
    return quantkit.quantize(model, scheme, method=method, out=out, **settings).model

with torch.no_grad():
    model = run(out)
    loaded = quantkit.load(out, compute="exact")
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (model(input_ids=ids).logits - tiny_llama(num_hidden_layers=2)(input_ids=ids).logits).norm() > 0
found = quantkit.inspect(out)
print(found["format"], found["schemes"][0]["describe"], repr(quantkit.preset(scheme, [64])))
try:
    run(out + "-stopped", "model.layers.1")
except KeyboardInterrupt:
    run(out + "-stopped")
"""


def install(site: Path, kind: str, name: str, value: str) -> None:
    """Do what pip does with a package of one module."""
    if (file := ROOT / "tests" / "outside" / f"outside_{kind}.py").exists():
        shutil.copy(file, site)
    facts = site / f"outside_{kind}-1.5.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: outside-{kind}\nVersion: 1.5\n")
    (facts / "entry_points.txt").write_text(f"[quantkit.{kind}s]\n{name} = {value}\n")


def python(site: Path, *arguments: object, code: int = 0) -> tuple[str, str]:
    """Return what a new Python prints, to stdout and to stderr."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("kind", MEMBERS)
def test_one_file_from_outside_is_used_from_end_to_end(kind: str, tmp_path: Path) -> None:
    name, value = MEMBERS[kind]
    install(tmp_path, kind, name, value)
    chosen = {"scheme": "w4a16-asym", "quantizer": "rtn", "format": "native", kind: name}
    shown, _ = python(tmp_path, "-c", USE, tmp_path / "out", chosen["scheme"], chosen["quantizer"], chosen["format"])
    assert shown.split()[0] == chosen["format"]
    assert ("int5 g16 asym" in shown) == (kind == "scheme")
    whole, stopped = (sorted((tmp_path / out).iterdir()) for out in ("out", "out-stopped"))
    assert [file.name for file in stopped] == [file.name for file in whole]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, stopped, strict=True))
    assert ("weights.one" in [file.name for file in whole]) == (kind == "format")


def test_a_recipe_names_all_three_and_its_mistakes_are_explained(tmp_path: Path) -> None:
    for kind, (name, value) in MEMBERS.items():
        install(tmp_path, kind, name, value)
    tiny_llama().save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tmp_path / 'model'}\n"
        "scheme: w4a16\n"
        "rules: [{match: '*.down_proj', scheme: w5a16-fine}]\n"
        "method: {name: dice, options: {seed: 3}}\n"
        f"output: {{path: {tmp_path / 'out'}, format: one-file}}\n"
    )
    python(tmp_path, "-m", "quantkit", "run", recipe)
    commands = (
        ["list", "--json"],
        ["inspect", str(tmp_path / "out"), "--json"],
        ["plan", str(recipe), "--set", "method.options.sed=3"],
        ["plan", str(recipe), "--set", "scheme=w5a16-fin"],
    )
    one_after_the_other = (  # in one new Python: most of the time goes into starting it
        "import json, sys; from quantkit.cli import app; from typer.testing import CliRunner; "
        "done = [CliRunner().invoke(app, command) for command in json.loads(sys.argv[1])]; "
        "print(json.dumps([[one.exit_code, one.stdout, one.stderr] for one in done]))"
    )
    shown, _ = python(tmp_path, "-c", one_after_the_other, json.dumps(commands))
    (_, listed, _), (_, inspected, _), (first, _, about_option), (second, _, about_scheme) = json.loads(shown)
    assert all(name in json.loads(listed)[f"{kind}s"] for kind, (name, _) in MEMBERS.items())
    found = json.loads(inspected)
    assert found["format"] == "one-file"
    assert found["modules"]["model.layers.0.mlp.down_proj"] == "int5 g16 asym"
    assert found["metadata"]["quantizer"] == "Dice(seed=3)"
    assert (first, second) == (2, 2)
    assert "sed" in about_option
    assert "did you mean 'w5a16-fine'" in about_scheme


def test_a_broken_entry_point_is_named_and_takes_nobody_down(tmp_path: Path) -> None:
    install(tmp_path, "quantizer", "broken", "not_there:Quantizer")
    install(tmp_path, "format", "native", "outside_format:FORMAT")  # a name that is taken
    shown, message = python(tmp_path, "-m", "quantkit", "list", "--json")
    assert "rtn" in json.loads(shown)["quantizers"]
    assert "broken" not in json.loads(shown)["quantizers"]
    assert "quantizer 'broken' of outside-quantizer 1.5 (entry point not_there:Quantizer) cannot be used" in message
    assert "format 'native' of outside-format 1.5" in message
    assert "registered twice" in message
    ask = (
        "from quantkit.formats.base import FORMATS; from quantkit.quantizers.base import QUANTIZERS; "
        "print(FORMATS.get('native').dialect.quant_method, QUANTIZERS.get('gptq')); QUANTIZERS.get('broken')"
    )
    shown, message = python(tmp_path, "-c", ask, code=1)
    assert shown.startswith("quantkit <class")
    assert "SpecError: quantizer 'broken' of outside-quantizer 1.5" in message


def test_code_registers_members_without_entry_points() -> None:
    family: Registry[type] = Registry("nothing", error=SpecError, hint="; look elsewhere")
    family.register("mine")(RTN)
    assert family.get("mine") is RTN
    assert "mine" in family
    assert family.names() == ["mine"]
    with pytest.raises(QuantkitError, match="nothing 'mine' is registered twice"):
        family.register("mine")(str)
    with pytest.raises(SpecError, match=r"unknown nothing 'min'; did you mean 'mine'\? .*; look elsewhere"):
        family.get("min")
