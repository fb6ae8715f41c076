"""A sweep: one calibration, many rows, each on the disk as soon as it is done, whatever happens to the next."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open

import quantkit
from quantkit.errors import CalibrationError, FormatError, QuantkitError, SpecError
from quantkit.pipeline import resume
from quantkit.pipeline.plan import Resolution
from quantkit.quantizers.rtn import RTN
from quantkit.sweeps.result import SweepResult
from quantkit.sweeps.store import MANIFEST
from quantkit.system.progress import Progress
from tests import tiny

SCHEMES, QUANTIZERS = ("w4a16-asym-g32", "w8a16-g32"), ("rtn", "gptq")
NAMES = ["float", *(f"{scheme} {quantizer}" for scheme in SCHEMES for quantizer in QUANTIZERS)]
TEXT = [tiny.TEXT * 4]
CALIBRATION = quantkit.Calibration(TEXT, samples=4, length=32)
SAME = ("name", "status", "bits", "bytes", "kl", "kl_se", "perplexity", "perplexity_se", "top1", "statistics", "reason")
"""Columns that do not depend on the machine's mood."""


def sweep(
    model: Any, out: Path | None, *axes: Any, progress: Callable[[Progress], None] | None = None, **options: Any
) -> SweepResult:
    options = {"calibration": CALIBRATION, "evaluate": {"data": TEXT, "windows": 2, "length": 32}, **options}
    run = quantkit.Run(**({"progress": progress} if progress else {}))
    return quantkit.sweep(model, *(axes or (SCHEMES, QUANTIZERS)), out=out, **{"run": run, **options})


def table(result: SweepResult) -> list[tuple[Any, ...]]:
    return [tuple(getattr(row, name) for name in SAME) for row in result.rows]


def files(out: Path) -> dict[str, int]:
    """Return the finished rows' files and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "rows").glob("*.json")}


@pytest.fixture(scope="module")
def done(tiny_float, tmp_path_factory) -> SweepResult:
    return sweep(tiny_float, tmp_path_factory.mktemp("sweep"))


def test_every_row_is_measured_against_the_float_model(done, tiny_float):
    assert [row.name for row in done.rows] == NAMES
    assert {row.status for row in done.rows} == {"done"}
    assert [row.statistics for row in done.rows] == ["none", "none", "float inputs", "none", "float inputs"]
    base = done.float_row
    assert (base.kl, base.top1, base.seconds) == (0.0, 1.0, None)
    assert base.bytes > max(row.bytes for row in done.done)
    assert done["w8a16-g32 gptq"].kl < done["w4a16-asym-g32 gptq"].kl < done["w4a16-asym-g32 rtn"].kl
    assert all(row.seconds > 0 and row.peak_bytes > 0 and row.ms is None for row in done.done)
    assert {row.report.protocol.windows for row in done.rows} == {2}
    assert SweepResult.load(done.directory) == done
    with pytest.raises(QuantkitError, match="no row 'w4a16-asym-g32 gptk'; did you mean 'w4a16-asym-g32 gptq'"):
        done["w4a16-asym-g32 gptk"]


def test_a_row_is_what_quantize_makes_of_the_statistics_collected_once(done, tiny_float):
    model, tokenizer = quantkit.open_model(tiny_float)
    found, fingerprint = quantkit.collect(model, calibration=CALIBRATION, tokenizer=tokenizer)
    base = quantkit.BaseLogits(quantkit.open_model(tiny_float)[0])
    known = quantkit.Calibration(statistics=found)
    made = quantkit.quantize(model, "w4a16-asym-g32", method="gptq", calibration=known, tokenizer=tokenizer).model
    report = quantkit.evaluate(made, base, data=TEXT, windows=2, length=32, tokenizer=tokenizer, latency=False)
    assert report.quality == done["w4a16-asym-g32 gptq"].report.quality
    (facts,) = done.directory.glob("statistics-*/complete.json")
    assert json.loads(facts.read_text()) == {"collectors": ["hessian"], "fingerprint": fingerprint}


def test_the_same_sweep_again_measures_nothing_and_more_rows_cost_only_themselves(done, tiny_float, tmp_path):
    before = files(done.directory)
    assert table(sweep(tiny_float, done.directory)) == table(done)
    assert files(done.directory) == before
    model, tokenizer = quantkit.open_model(tiny_float)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    first = sweep(model, tmp_path, SCHEMES[:1], ["rtn"], tokenizer=tokenizer)
    before, events = files(tmp_path), list[Progress]()
    more = sweep(model, tmp_path, SCHEMES[:1], ["rtn", "gptaq", RTN(clip="mse")], tokenizer=tokenizer, progress=events.append)
    assert [row.name for row in more.rows[2:]] == ["w4a16-asym-g32 gptaq", "w4a16-asym-g32 rtn(clip='mse')"]
    assert table(more)[:2] == table(first)
    assert files(tmp_path).items() >= before.items()
    rows = [event.detail for event in events if event.stage == "sweep"]
    assert rows == ["row 3 of 4: w4a16-asym-g32 gptaq", "row 4 of 4: w4a16-asym-g32 rtn(clip='mse')", "done"]
    assert more.rows[2].statistics == "walk"
    assert not list(tmp_path.glob("statistics-*")), "nobody could use them"
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_each_row_can_be_calibrated_for_itself(done, tiny_float, tmp_path):
    found = sweep(tiny_float, tmp_path, SCHEMES[:1], ["gptq"], calibrate="each").done[0]
    assert found.statistics == "walk"
    assert found.kl != done["w4a16-asym-g32 gptq"].kl


def in_a_child(what: Callable[[], object]) -> int:
    """Run in a forked process and return how it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            what()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads that do not exist in it
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_sweep_that_is_killed_twice_goes_on_to_the_same_table(done, tiny_float, tmp_path, one_thread):
    def killed_at(stage: str, count: int) -> None:
        seen = 0

        def progress(event: Progress) -> None:
            nonlocal seen
            seen += event.stage == stage
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

        assert os.WIFSIGNALED(in_a_child(lambda: sweep(tiny_float, tmp_path, progress=progress)))

    killed_at("calibrate", 2)  # a block's statistics are written, the other's are not
    assert [row.status for row in SweepResult.load(tmp_path).rows] == ["pending"] * 5
    killed_at("quantize", 20)  # in the middle of the second row that is quantized
    half = SweepResult.load(tmp_path)
    assert [row.status for row in half.rows] == ["done", "done", "pending", "pending", "pending"]
    before = files(tmp_path)
    assert table(sweep(tiny_float, tmp_path)) == table(done)
    assert files(tmp_path).items() >= before.items(), "what was finished is not measured again"
    assert not [*tmp_path.rglob("*.begun"), *tmp_path.rglob("*.tmp"), *tmp_path.rglob("*.lock")]


@dataclasses.dataclass(frozen=True)
class Moody(RTN):
    """Fails for eight bits while it is in the mood."""

    fails: ClassVar[bool] = True

    def quantize(self, weight, spec, statistics):
        if self.fails and spec.bits == 8:
            raise ZeroDivisionError("out of sorts")
        return super().quantize(weight, spec, statistics)


@dataclasses.dataclass(frozen=True)
class Deadly(RTN):
    """Takes its whole process with it; here, where workers of a cluster can import it."""

    def quantize(self, weight, spec, statistics):
        os._exit(7)


def test_a_row_that_fails_says_why_and_loses_no_other_and_is_tried_again(tiny_float, tmp_path, monkeypatch):
    schemes = ["w8a16-g32", "w4a16-g32"]
    found = sweep(tiny_float, tmp_path, schemes, [Moody()])
    assert [row.status for row in found.rows] == ["done", "failed", "done"]
    assert found.rows[1].reason == "ZeroDivisionError: out of sorts"
    assert "1 failed" in repr(found)
    before = files(tmp_path)
    monkeypatch.setattr(Moody, "fails", False)
    again = sweep(tiny_float, tmp_path, schemes, [Moody()])
    assert [row.status for row in again.rows] == ["done"] * 3
    assert len(set(files(tmp_path).items()) - set(before.items())) == 1


def test_a_row_that_killed_the_process_twice_comes_last(tiny_float, tmp_path):
    first = sweep(tiny_float, tmp_path, SCHEMES, ["rtn"])
    (file,) = (tmp_path / "rows").glob("w4a16*.json")
    file.unlink()
    file.with_suffix(".begun").write_text('{"times": 2}')
    (tmp_path / "rows").joinpath(next(p.name for p in (tmp_path / "rows").glob("w8a16*.json"))).unlink()
    events = list[Progress]()
    assert table(sweep(tiny_float, tmp_path, SCHEMES, ["rtn"], progress=events.append)) == table(first)
    rows = [event.detail for event in events if event.stage == "sweep"]
    assert rows == ["row 3 of 3: w8a16-g32 rtn", "row 2 of 3: w4a16-asym-g32 rtn", "done"]


def test_a_product_that_cannot_be_is_skipped_with_its_reason(tiny_float):
    found = sweep(tiny_float, None, ["mxfp4", "w8a16-g48"], ["gptq", "rtn"])
    assert found.directory is None
    assert [row.status for row in found.rows] == ["done", "skipped", "done", "skipped", "skipped"]
    assert "GPTQ chooses integers, not fp4_e2m1; use quantizer rtn" in found.rows[1].reason
    assert "in=64 is not a multiple of group_size 48" in found.rows[3].reason


def test_what_decides_a_row_is_in_its_key(done, tiny_float, tmp_path, monkeypatch, caplog):
    out, before = done.directory, files(done.directory)
    with pytest.raises(FormatError, match="holds another sweep: all of it is of another evaluation; choose another directory"):
        sweep(tiny_float, out, evaluate={"data": TEXT, "windows": 1, "length": 32})
    with pytest.raises(FormatError, match="row 'w4a16-asym-g32 gptq' is of another calibration"):
        sweep(tiny_float, out, calibration=quantkit.Calibration(TEXT, samples=3, length=32))
    with pytest.raises(FormatError, match="row 'w4a16-asym-g32 gptq' is of another statistics"):
        sweep(tiny_float, out, calibrate="each")
    with pytest.raises(FormatError, match="row 'w4a16-asym-g32 rtn' is of another plan"):
        sweep(tiny_float, out, rules=[quantkit.Rule("down_proj", skip=True)])
    other = tiny.tiny_llama(seed=1, max_position_embeddings=512)
    with pytest.raises(FormatError, match="another sweep: all of it is of another config, model; "):
        sweep(other, out, tokenizer=tiny.tiny_tokenizer())
    assert files(out) == before
    first = sweep(tiny_float, tmp_path, SCHEMES[:1], ["rtn"])
    before = files(tmp_path)
    monkeypatch.setattr(resume, "_package_digest", lambda package: "0" * 64)
    again = sweep(tiny_float, tmp_path, SCHEMES[:1], ["rtn"])
    assert len(set(files(tmp_path).items()) - set(before.items())) == 2
    assert "measured again: the source code of quantkit" in caplog.text
    assert table(again) == table(first)


def test_another_sweep_is_replaced_where_that_is_asked_for(tiny_float, tmp_path):
    axes = (SCHEMES[:1], ["rtn"])
    (tmp_path / "rows").mkdir()  # a sweep that was killed before it had begun
    sweep(tiny_float, tmp_path, *axes)
    new = {"data": TEXT, "windows": 1, "length": 32}
    found = sweep(tiny_float, tmp_path, *axes, evaluate=new, output=quantkit.Output(overwrite=True))
    assert {row.report.protocol.windows for row in found.rows} == {1}
    before = files(tmp_path)
    sweep(tiny_float, tmp_path, *axes, evaluate=new, run=quantkit.Run(resume=False))
    assert not set(before.items()) & set(files(tmp_path).items())


@pytest.mark.parametrize(
    ("axes", "options", "wanted"),
    [
        ((["w4a61", "w8"], ["gptk", "rtn"]), {}, "(?s)unknown scheme 'w4a61'.*unknown scheme 'w8'.*unknown quantizer 'gptk'"),
        ((["w4a16"], ["rtn"]), {"steps": [["awk"], []]}, "steps: unknown step 'awk'; did you mean 'awq'"),
        (([], ["rtn"]), {}, "schemes and budgets are empty; give at least one"),
        ((["w4a16"], []), {}, "quantizers is empty"),
        (("w4a16", ["rtn"]), {}, r"schemes: 'w4a16' is a str; want a list, such as \['w4a16'\]"),
        ((["w4a16"], ["rtn"]), {"steps": ["awq"]}, r"'awq' is one step; want variants, each a list of steps: \[\[\], \['awq'"),
        ((["w4a16", "w8a16", "w4a16"], ["rtn"]), {}, "schemes: 'w4a16' is given twice"),
        ((["w4a16"], ["rtn", RTN()]), {}, "quantizers: 'rtn' is given twice"),
        ((["w4a16-g32", "w4a16"], ["rtn"]), {}, "rows 'w4a16-g32 rtn' and 'w4a16 rtn' are the same on this model"),
        ((["mxfp4"], ["gptq"]), {}, "(?s)no row of the sweep can be made:\nmxfp4 gptq: .*GPTQ chooses integers"),
        ((["w4a16"], ["rtn"]), {"budgets": ["4 bpw"], "choices": ["w4a61", "float"]}, "choices: unknown scheme 'w4a61'"),
        ((["w4a16"], ["rtn"]), {"budgets": ["4 bpw", "4 bpw"]}, "budgets: '4 bpw' is given twice"),
        ((["w4a16"], ["rtn"]), {"budgets": ["4 bits"]}, "budgets: budget '4 bits': unknown unit 'bits'; did you mean 'bpw'"),
        ((["w4a16"], ["rtn"]), {"keep": "all"}, "keep='all' without a directory"),
        ((["w4a16"], ["rtn"]), {"keep": "some"}, "keep='some': want none, frontier or all"),
        ((["w4a16"], ["rtn"]), {"calibrate": "twice"}, "calibrate='twice': want once or each"),
        ((["w4a16"], ["rtn"]), {"ray": True}, "ray without a directory"),
    ],
)  # fmt: skip
def test_bad_axes_are_one_error_before_anything_is_calibrated(tiny_float, axes, options, wanted):
    with pytest.raises(SpecError, match=wanted):
        sweep(tiny_float, None, *axes, progress=lambda event: pytest.fail(event.stage), **options)


def test_bad_settings_are_one_error(tiny_float, tmp_path):
    with pytest.raises(CalibrationError, match="evaluate: window: did you mean 'windows'"):
        sweep(tiny_float, None, evaluate={"window": 3})
    with pytest.raises(CalibrationError, match="a sweep, which collects its own"):
        sweep(tiny_float, None, calibration=quantkit.Calibration(statistics={}))
    with pytest.raises(SpecError, match="ray with a loaded model"):
        sweep(tiny.tiny_llama(), tmp_path, ray=True)
    with pytest.raises(TypeError, match="did you mean 'calibrate'"):
        sweep(tiny_float, None, calibrat="once")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"holds something that is no sweep \(notes.txt\)"):
        sweep(tiny_float, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damaged_rows_are_named(done, tiny_float, tmp_path):
    with pytest.raises(FormatError, match=MANIFEST):
        SweepResult.load(tmp_path)
    sweep(tiny_float, tmp_path, SCHEMES[:1], ["rtn"])
    file = next((tmp_path / "rows").glob("w4*.json"))
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "row": {**data["row"], "bytes": "many"}}))
    with pytest.raises(FormatError, match=r"w4a16.*bytes: .*delete it, and the row is measured again"):
        SweepResult.load(tmp_path)
    file.write_text("{")
    with pytest.raises(FormatError, match="cannot be read as JSON"):
        sweep(tiny_float, tmp_path, SCHEMES[:1], ["rtn"])


def test_checkpoints_of_the_frontier_stay(tiny_float, tmp_path):
    found = sweep(tiny_float, tmp_path, SCHEMES[:1], QUANTIZERS, keep="frontier")
    (best,) = found.frontier()
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert best.quantizer == "gptq", "as many bytes as rounding, and a smaller KL"
    assert path == best.checkpoint
    assert path.name.startswith("w4a16-asym-g32-gptq-")
    assert found.rows[1].checkpoint is None
    with safe_open(next(path.glob("*.safetensors")), "pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == best.bytes  # noqa: SIM118 - no mapping


def test_a_budget_is_searched_once_and_its_plan_is_a_row(tiny_float, tmp_path):
    asked = []

    def search(model, budget, *, choices, method, calibration, **options):
        asked.append((budget, [choice.name for choice in choices], method, sum(batch.tokens for batch in calibration.data)))
        assert set(options) == {"rules", "output", "run", "tokenizer"}
        low, high = (quantkit.plan(model, choice).plan for choice in choices)
        return Resolution({name: high[name] if "down" in name else low[name] for name in low}, notes=("found",))

    def go():
        axes = {"budgets": ["5 bpw"], "choices": ["w4a16-g32", "w8a16-g32"], "search": search}
        return sweep(tiny_float, tmp_path, ["w4a16-g32"], ["rtn"], **axes)

    found = go()
    assert [row.name for row in found.rows[1:]] == ["w4a16-g32 rtn", "budget 5 bpw rtn"]
    assert found.rows[1].bits < found.rows[2].bits < 8
    assert found.rows[2].budget == "5 bpw"
    assert asked == [("5 bpw", ["w4a16-g32", "w8a16-g32"], RTN(), 128)]
    next((tmp_path / "rows").glob("budget*rtn*.json")).unlink()
    assert table(go()) == table(found)
    assert len(asked) == 1


def test_one_process_sweeps_in_a_directory(tiny_float, tmp_path):
    from quantkit import checkpoint

    def busy() -> None:
        with checkpoint.claim(tmp_path, "sweeping"):
            found.append(in_a_child(lambda: refused(lambda: sweep(tiny_float, tmp_path))))

    def refused(what: Callable[[], object]) -> None:
        with pytest.raises(quantkit.BusyError, match="sweeping"):
            what()

    found: list[int] = []
    busy()
    assert found == [0]
