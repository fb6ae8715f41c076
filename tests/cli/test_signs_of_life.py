"""What a command says while it works, where there is no terminal for a bar."""

import time

import pytest
from typer.testing import CliRunner

from quantkit.cli import QUICK, app, bars
from quantkit.cli.bars import PULSE, Pulse, progress_bars
from quantkit.system.progress import Progress


@pytest.mark.parametrize(("quiet_s", "between"), [(1e9, []), (-1.0, ["1 of 3 steps", "2 of 3 steps"])])
def test_a_long_stage_says_how_far_it_is(capsys, monkeypatch, quiet_s, between):
    monkeypatch.setattr("quantkit.cli.bars.QUIET_S", quiet_s)
    with progress_bars() as progress:
        for stage in ("quantize", "evaluate"):
            for done in (1, 2, 3):
                progress(Progress(stage, done, 3))
    PULSE.end()
    said = [line.rsplit(" in ", 1)[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [f"{stage}: {steps}" for stage in ("quantize", "evaluate") for steps in (*between, "3 steps")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "./nothing/here", "a"], True),
        (["eval", "./nothing/here"], True),
        (["generate", "--help"], False),
        (["generate"], False),
        (["inspect", "./nothing/here"], True),
        (["inspect", "./nothing/here", "--quiet"], False),
        (["init"], False),
    ],
)
def test_a_command_that_loads_a_model_says_so_before_it_does(arguments, said):
    result = CliRunner().invoke(app, arguments)
    assert result.stderr.startswith("loading ...\n") is said
    assert "loading" not in result.stdout


def test_the_commands_that_answer_at_once_exist():
    assert set(QUICK) <= {one.name or one.callback.__name__ for one in app.registered_commands}


def test_what_is_left_is_said_at_the_pace_since_the_last_line(capsys, monkeypatch):
    """After an interruption, blocks that were finished before pass in no time."""
    now_s = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(PULSE, "begin", lambda doing: None)
    lines = bars._Lines()
    for done, now_s[0] in ((0, 1.0), (50, 2.0), (51, 22.0), (53, 62.0)):
        lines.show(Progress("quantize", done, 60, "model.layers.5", 0.001), begins=done == 0)
    said = " ".join(capsys.readouterr().err.split())  # wherever lines end
    first = said.index("quantize: 51 of 60 steps in 22.0 s, about 4 s left")
    assert first < said.index("quantize: 53 of 60 steps in 62.0 s, about 2 min left; model.layers.5: loss 1.00e-03")


def test_a_pulse_is_heard_where_nothing_else_is(capsys, monkeypatch):
    monkeypatch.setattr(bars, "LOOK_S", 0.01)
    monkeypatch.setattr(bars, "QUIET_S", 0.0)
    pulse = Pulse()
    pulse.begin("loading")
    until = time.monotonic() + 20
    heard = ""
    while heard.count("loading: still at work after 0 s") < 2 and time.monotonic() < until:
        time.sleep(0.01)
        heard += capsys.readouterr().err
    pulse.end()
    assert heard.count("loading: still at work after") >= 2
    time.sleep(0.05)
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
