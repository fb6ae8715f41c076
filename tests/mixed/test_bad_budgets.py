"""Mistakes in a budget or its choices are one error before any text is read: in Python, on the command line, and in a file."""

import pytest
import yaml
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import QuantkitError

FEW = ["w3a16-asym-g32", "w4a16-asym-g32"]
NO_TEXT = "no-such-folder/no-such-file.txt"


@pytest.mark.parametrize(
    ("budget", "choices", "include", "says"),
    [
        ("4.25bits", FEW, [], "unknown unit 'bits'; did you mean 'bpw'"),
        ("0 bpw", FEW, [], "want a positive number"),
        ("-1 MB", FEW, [], "want a number and a unit"),
        ("nan bpw", FEW, [], "want a number and a unit"),
        ("1 bpw", FEW, [], "out of reach; the choices reach from 3."),
        ("20 kB", FEW, [], "include embedding and head (--include embedding --include head, --format native), or add"),
        ("4 bpw", FEW[:1], [], "at least two"),
        ("4 bpw", [FEW[0], FEW[0]], [], "'w3a16-asym-g32' is given twice"),
        ("4 bpw", [*FEW, "w4a61"], [], "w4a61"),
        ("4 bpw", [*FEW, "w4a16-g40"], [], "no layer can have 'w4a16-g40'"),
        ("4 bpw", [*FEW, "nf4"], [], "no layer can have 'nf4'"),
        ("4 bpw", FEW, ["middle"], "want 'embedding' or 'head'"),
        ("4 bpw", FEW, ["embedding"], "use native"),
    ],
)
def test_a_mistake_is_one_error_on_every_way_in(budget, choices, include, says, tiny_float, tmp_path):
    with pytest.raises(QuantkitError) as error:
        quantkit.search(tiny_float, budget, choices, include=include, calibration=quantkit.Calibration(NO_TEXT))
    assert says in str(error.value)
    listed = [f"--choice={one}" for one in choices] + [f"--include={one}" for one in include]
    out = tmp_path / "out"
    for command in (["quantize", "--out", str(out)], ["search"]):
        done = CliRunner().invoke(app, [*command, str(tiny_float), "--budget", budget, *listed, "--data", NO_TEXT])
        assert done.exit_code == 2, done.output
        assert says in done.output
    scheme = {"budget": budget, "choices": choices, "include": include}
    recipe = {"model": str(tiny_float), "scheme": scheme, "calibration": {"data": NO_TEXT}, "output": {"path": str(out)}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(QuantkitError) as error:
        quantkit.run_recipe(quantkit.load_recipe(tmp_path / "recipe.yaml"))
    assert says in str(error.value)


def test_options_of_a_search_want_a_budget(tiny_float, tmp_path):
    for option in ("--choice=w4a16", "--include=head"):
        done = CliRunner().invoke(app, ["quantize", str(tiny_float), "--out", str(tmp_path / "out"), option])
        assert done.exit_code == 2
        assert "go with --budget" in done.output
