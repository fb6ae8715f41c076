"""What a command says while it works, where there is no terminal for a bar."""

import pytest
from typer.testing import CliRunner

from quantkit.cli import LOADING, app
from quantkit.cli.console import progress_bars
from quantkit.system.progress import Progress


@pytest.mark.parametrize(("quiet_s", "between"), [(1e9, []), (-1.0, ["1 of 3 steps", "2 of 3 steps"])])
def test_a_long_stage_says_how_far_it_is(capsys, monkeypatch, quiet_s, between):
    monkeypatch.setattr("quantkit.cli.console.QUIET_S", quiet_s)
    with progress_bars() as progress:
        for stage in ("quantize", "evaluate"):
            for done in (1, 2, 3):
                progress(Progress(stage, done, 3))
    said = [line.rsplit(" in ", 1)[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [f"{stage}: {steps}" for stage in ("quantize", "evaluate") for steps in (*between, "3 steps")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "./nothing/here", "a"], True),
        (["eval", "./nothing/here"], True),
        (["generate", "--help"], False),
        (["generate"], False),
        (["inspect", "./nothing/here"], False),
    ],
)
def test_a_command_that_loads_a_model_says_so_before_it_does(arguments, said):
    result = CliRunner().invoke(app, arguments)
    assert result.stderr.startswith("loading ...\n") is said
    assert "loading" not in result.stdout


def test_the_commands_that_load_a_model_exist():
    assert set(LOADING) <= {one.name or one.callback.__name__ for one in app.registered_commands}
