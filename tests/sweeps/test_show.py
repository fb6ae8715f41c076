"""What a sweep shows: the frontier, a table, a picture, a page, a data frame, and the command with its YAML file."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import QuantkitError, RecipeError
from quantkit.evaluation import Divergence, EvalReport, Footprint, Quality
from quantkit.evaluation.latency import Latency, Spread
from quantkit.evaluation.record import Environment, Protocol
from quantkit.report.trade_off import figure_of
from quantkit.sweeps.result import SweepResult
from quantkit.sweeps.rows import FLOAT, SweepRow
from quantkit.sweeps.schema import load_sweep
from quantkit.sweeps.show import cells, headline, trade_off

PROTOCOL = Protocol("a text", "0" * 64, 32, 32, False, 2, 9, 64, 2, 64)
ENVIRONMENT = Environment("1", "2", "3", "4", "an OS", "a CPU", None, 1, "float32", "cpu")


def made(name: str, nbytes: int, kl: float, ms: float | None = None) -> SweepRow:
    """Return a measured row."""
    divergence = Divergence(64, 2, kl, kl / 10, kl, kl, kl, ((0.5, kl),), 0.9, 1, 1, 2.0, 7.4, kl, 0.1)
    quality = Quality(64, 2, 2.0, 0.1, 7.4 + kl, 0.5, 0.5, divergence)
    spread = Spread(*[ms or 1.0] * len(dataclasses.fields(Spread)))
    latency = Latency(32, 4, 2, 1, "cpu", spread, spread, nbytes) if ms else None
    footprint = Footprint(1000, nbytes, nbytes, nbytes / 125, nbytes / 125, 1.0)
    report = EvalReport(name, quality, PROTOCOL, footprint, ENVIRONMENT, latency, "the float model")
    scheme, _, quantizer = name.partition(" ")
    return SweepRow(name, scheme, quantizer, status="done", bytes=nbytes, seconds=1.0, peak_bytes=10**8, report=report)


ROWS = (
    made(FLOAT, 2000, 0.0),
    made("w3 rtn", 400, 0.9),
    made("w3 gptq", 400, 0.3),
    made("w4 rtn", 500, 0.4),  # w3 gptq is smaller and better
    made("w4 gptq", 500, 0.1),
    made("w8 rtn", 1000, 0.1),  # w4 gptq is smaller and as good
    made("w8 <b> gptq", 1000, 0.05),
    SweepRow("nf4 gptq", "nf4", "gptq", status="skipped", reason="it chooses <integers>"),
    SweepRow("w2 rtn", "w2", "rtn", status="failed", reason="ValueError: no"),
)
RESULT = SweepResult(ROWS)


def test_the_frontier_is_what_no_row_beats_in_both():
    assert [row.name for row in RESULT.frontier()] == ["w3 gptq", "w4 gptq", "w8 <b> gptq"]
    assert [row.name for row in RESULT.frontier("bits", "perplexity")] == ["w3 gptq", "w4 gptq", "w8 <b> gptq"]
    assert RESULT.frontier("ms") == []
    twin = dataclasses.replace(ROWS[4], name="twin")
    assert [row.name for row in SweepResult((*ROWS, twin)).frontier()] == ["w3 gptq", "w4 gptq", "twin", "w8 <b> gptq"]
    assert RESULT.best("bytes", 600).name == "w4 gptq"
    assert RESULT.best("bytes", 300) is None
    with pytest.raises(QuantkitError, match="'byte' is no cost of a row; did you mean 'bytes'"):
        RESULT.frontier("byte")
    with pytest.raises(QuantkitError, match="'kll' is no loss of a row; did you mean 'kl'"):
        RESULT.frontier("bytes", "kll")


def test_the_repr_is_short_and_says_what_matters():
    lines = repr(RESULT).splitlines()
    assert lines[0].startswith("SweepResult: 6 done, 1 failed, 1 skipped; float: perplexity 7.40")
    assert lines[1] == "frontier:"
    assert len(lines) == 5
    many = SweepResult(tuple(made(f"w{i} rtn", 100 * i, 1 / i) for i in range(1, 30)))
    assert len(repr(many).splitlines()) == 10
    assert repr(SweepResult(())) == "SweepResult: no rows"


def test_cells_mark_the_frontier_and_show_times_only_where_there_are_some():
    heads, rows = cells(RESULT)
    assert "ms" not in heads
    assert [row[0] for marked, row in rows if marked] == ["w3 gptq *", "w4 gptq *", "w8 <b> gptq *"]
    assert "ms" in cells(SweepResult((made("w3 rtn", 400, 0.9, ms=2.5),)))[0]
    assert headline(RESULT).startswith("3 of 6 rows are worth their bytes")
    assert headline(SweepResult(())) == "No row is measured yet."


def test_the_picture_has_every_row_the_frontier_and_the_float_model():
    figure = RESULT.plot("bits")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["frontier"].get_xdata()) == [400 / 125, 500 / 125, 1000 / 125]
    assert set(lines["float model"].get_xdata()) == {2000 / 125}
    assert {text.get_text() for text in axes.texts} == {"w3 gptq", "w4 gptq", "w8 <b> gptq"}
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    assert legend == {"frontier", "float model", "rtn", "gptq", "<b> gptq"}
    across = RESULT.plot("bytes", "perplexity").axes[0]
    assert any(set(line.get_ydata()) == {7.4} for line in across.lines)
    with pytest.raises(QuantkitError, match="fewer than two rows have ms and kl; sweep with latency"):
        RESULT.plot("ms")
    timed = SweepResult((made("w3 rtn", 400, 0.9, ms=2.5), made("w4 rtn", 500, 0.4, ms=3.5)))
    assert len(figure_of(trade_off(timed, "ms", "kl")).axes[0].texts) == 2


def test_the_page_loads_nothing_and_escapes_names(tmp_path):
    RESULT.save_html(tmp_path / "sweep.html", title="Mine & yours")
    page = (tmp_path / "sweep.html").read_text()
    assert page.count('<svg viewBox="') == 2
    assert page.count('class="marked"') == 3
    assert "Mine &amp; yours" in page
    assert "w8 &lt;b&gt; gptq" in page
    assert "skipped: it chooses &lt;integers&gt;" in page
    assert not re.search(r"(src|href)=.?https?:|<script|<b>", page)
    assert RESULT._repr_html_().count("<tr>") == 1 + 7
    assert "w8 &lt;b&gt; gptq" in RESULT._repr_html_()


def test_a_data_frame_on_request(monkeypatch):
    pytest.importorskip("pandas")
    frame = RESULT.to_pandas()
    assert list(frame["name"]) == [row.name for row in ROWS]
    assert frame.set_index("name")["kl"]["w4 gptq"] == 0.1
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(QuantkitError, match="pip install pandas"):
        RESULT.to_pandas()


def test_rows_are_stored_exactly():
    assert [SweepRow.from_dict(row.to_dict()) for row in ROWS] == list(ROWS)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


MINIMAL = "model: demo\nschemes: [w4a16]\noutput: {path: out}\n"


def test_a_sweep_in_yaml_has_the_sections_of_a_recipe(tmp_path):
    text = MINIMAL + "quantizers: [rtn, {name: gptq, options: {damping: 0.02}}]\n"
    text += "steps: [[], [awq]]\nevaluate: {windows: 4}\n"
    found = load_sweep(write(tmp_path, text), {"calibration.samples": 3})
    assert [one.build() for one in found.quantizers] == [quantkit.RTN(), quantkit.GPTQ(damping=0.02)]
    assert [[step.build() for step in variant] for variant in found.steps] == [[], [quantkit.AWQ()]]
    assert found.calibration == quantkit.Calibration(samples=3)
    assert (found.evaluate.windows, found.evaluate.latency, found.evaluate.against) == (4, False, "base")
    assert [one.build() for one in load_sweep(write(tmp_path, MINIMAL)).quantizers] == [quantkit.GPTQ()]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("scheme: w4a16\n", "sweep.yaml:4:1: scheme: unknown key; write schemes: [...]"),
        ("quantisers: [rtn]\n", "sweep.yaml:4:1: quantisers: unknown key; did you mean 'quantizers'?"),
        ("evaluate: {window: 4}\n", "sweep.yaml:4:12: evaluate.window: unknown key; did you mean 'windows'?"),
        ("evaluate: {against: none}\n", "evaluate.against: Input should be 'base'"),
        ("quantizers: [rtn, gptk]\n", "unknown quantizer 'gptk'; did you mean 'gptq'?"),
        ("steps: [awq]\n", "sweep.yaml:4:9: steps.0: Input should be a valid list"),
        ("budgets: [4 bpw]\nchoices: [float, w4a61]\n", "sweep.yaml:5:18: choices.1: unknown scheme 'w4a61'; did you mean"),
        ("keep: some\n", "keep: Input should be 'none', 'frontier' or 'all'"),
        ("calibrate: twice\n", "calibrate: Input should be 'once' or 'each'"),
        ("calibration: {sampels: 3}\n", "calibration.sampels: unknown key; did you mean 'samples'?"),
    ],
)
def test_mistakes_in_yaml_are_placed(tmp_path, text, wanted):
    with pytest.raises(RecipeError) as caught:
        load_sweep(write(tmp_path, MINIMAL + text))
    assert wanted in str(caught.value)


def test_the_command_shows_rows_and_table_and_writes_a_page(tiny_float, tiny_text, tmp_path):
    path = write(
        tmp_path,
        f"model: {tiny_float}\nschemes: [w4a16-g32, mxfp4]\nquantizers: [gptq]\noutput: {{path: {tmp_path / 'out'}}}\n"
        f"calibration: {{data: {tiny_text}, samples: 4, length: 32}}\n"
        f"evaluate: {{data: {tiny_text}, windows: 2, length: 32}}\n",
    )
    line = ["sweep", str(path), "--html", str(tmp_path / "page.html"), "--set", "evaluate.windows=3"]
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(app, line)
    assert shown.exit_code == 0, shown.output
    assert "row 1 of 2: float" in shown.output
    assert "row 2 of 2: w4a16-g32 gptq" in shown.output
    assert re.search(r"w4a16-g32 gptq \* +4\.\d+ ", shown.output)
    assert "skipped: mxfp4 gptq: " in shown.output
    assert (tmp_path / "page.html").exists()
    again = CliRunner().invoke(app, line)
    assert again.exit_code == 0
    assert "row 1" not in again.output
    assert CliRunner().invoke(app, [*line, "evaluate.windows=1"]).exit_code == 2


SHOWN = sorted((Path(__file__).parents[2] / "recipes" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_sweeps_that_are_shown_are_valid_and_short(path):
    assert load_sweep(path).schemes
    assert len(path.read_text().splitlines()) <= 30
