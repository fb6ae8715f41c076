"""Bars where somebody looks, silence where nobody does."""

import io
import sys

import pytest

import quantkit
from quantkit.errors import QuantkitError
from quantkit.system.progress import Bars, Progress, callback, ignore
from tests.tiny import tiny_llama


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """Return a terminal in place of standard error, for the rest of a test (capturing begins after fixtures)."""
    shown = Terminal()
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def events(bars):
    for stage in ("calibrate", "quantize"):
        for done in (0, 1, 2):
            bars(Progress(stage, done, 2, "layers.1", 0.25))


def test_a_terminal_has_a_bar_for_each_stage(monkeypatch):
    shown = terminal(monkeypatch)
    events(Bars())
    said = shown.getvalue()
    assert said.count("calibrate: 100%") == said.count("quantize: 100%") == 1
    assert "layers.1, loss 2.5e-01" in said


def test_there_is_no_bar_in_a_pipe_or_where_it_is_turned_off(monkeypatch):
    shown = terminal(monkeypatch)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    events(Bars())
    assert shown.getvalue() == ""
    monkeypatch.delenv("TQDM_DISABLE")
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    events(Bars())
    assert pipe.getvalue() == ""


def test_quantize_shows_bars_unless_it_is_told_not_to(monkeypatch):
    shown = terminal(monkeypatch)
    quantkit.quantize(tiny_llama(), "w4a16", method="rtn")
    assert "quantize: 100%" in shown.getvalue()
    shown.truncate(0)
    quantkit.quantize(tiny_llama(), "w4a16", method="rtn", run=quantkit.Run(progress=None))
    seen = []
    quantkit.quantize(tiny_llama(), "w4a16", method="rtn", run=quantkit.Run(progress=seen.append))
    assert seen[-1].done == seen[-1].total
    assert "quantize" not in shown.getvalue()


def test_what_is_no_choice_is_refused():
    assert callback(None) is ignore
    with pytest.raises(QuantkitError, match="'auto' for bars"):
        quantkit.Run(progress="loud")
    with pytest.raises(QuantkitError, match="'auto' for bars"):
        callback(3)
