"""A run may be killed at any instant; running it again gives the same files, byte for byte."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.calibrate.data import Calibration
from quantkit.errors import FormatError
from quantkit.pipeline.quantize import collect, quantize
from quantkit.pipeline.settings import Run
from quantkit.system.compute import Compute
from quantkit.system.progress import Progress
from tests.tiny import tiny_llama

KILLS = 20


def run(out: Path, scheme: str = "w4a16-asym", method: str = "gptq", **settings: Any) -> None:
    """Quantize a six-layer model; the same call always means the same files."""
    torch.set_num_threads(1)
    ids = [torch.randint(3, 190, (2, 48), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model = tiny_llama(num_hidden_layers=6)
    quantize(model, scheme, out=out, method=method, calibration=Calibration(ids), run=Run(**settings))


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def start(out: Path) -> int:
    """Run in a child process; a fork, since starting Python anew takes longer than the run."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(out)
            status = 0
        finally:
            os._exit(status)
    return child


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads that do not exist in it
    try:
        begin = time.monotonic()
        run(tmp_path / "whole")
        duration = time.monotonic() - begin
        chance = random.Random(20)
        kills = finished = 0
        while kills < KILLS:
            out = tmp_path / f"killed-{finished}"
            child = start(out)
            # Mostly short lives, so that one checkpoint takes several of them; some reach the writing of the files.
            time.sleep(chance.choice([0.25, 0.5, 1.1]) * duration * chance.random())
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
            if (out / "config.json").exists() and not (out / "INCOMPLETE.json").exists():
                finished += 1  # killed after the last rename: a finished checkpoint must be whole
        want = files(tmp_path / "whole")
        for number in range(finished + 1):
            out = tmp_path / f"killed-{number}"
            if not (out / "config.json").exists() or (out / "INCOMPLETE.json").exists():
                run(out)
            found = files(out)
            assert found["config.json"].decode() == want["config.json"].decode()
            assert found == want
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("quantizer", ["gptq", "gptaq"])
def test_an_interrupted_run_continues_where_it_stopped(tmp_path: Path, quantizer: str) -> None:
    def stop_in_block_three(event: Progress) -> None:
        if event.detail.startswith("model.layers.3") and event.loss is not None:
            raise KeyboardInterrupt

    run(tmp_path / "whole", method=quantizer)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "q", method=quantizer, progress=stop_in_block_three)
    assert not (tmp_path / "q" / "config.json").exists()
    seen: list[Progress] = []
    run(tmp_path / "q", method=quantizer, progress=seen.append)
    assert {e.detail.split(".")[2] for e in seen if e.loss is not None} == {"3", "4", "5"}
    assert files(tmp_path / "q") == files(tmp_path / "whole")


def test_state_of_another_run_is_not_continued(tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.detail.startswith("model.layers.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "q", progress=stop)
    with pytest.raises(FormatError, match=r"unfinished state of another run .* resume=False"):
        run(tmp_path / "q", "w4a16-asym-g32", "rtn-importance")
    run(tmp_path / "q", "w4a16-asym-g32", "rtn-importance", resume=False)


def test_other_batches_and_other_statistics_are_another_run(tmp_path: Path) -> None:
    """What block i handed on has the sizes of its batches; statistics decide codes as calibration text does."""

    def stop(event: Progress) -> None:
        if event.detail.startswith("model.layers.1"):
            raise KeyboardInterrupt

    ids = torch.randint(3, 190, (4, 32), generator=torch.Generator().manual_seed(0))
    known, others = (collect(tiny_llama(), calibration=Calibration(data=[part]))[0] for part in (ids, ids + 1))
    text, narrow = Calibration([ids]), Compute(torch.device("cpu"), torch.bfloat16)
    runs = [
        (text, Calibration(list(ids.split(1))), None),
        (Calibration(statistics=known), Calibration(statistics=others), None),
        (text, text, narrow),
    ]
    for number, (first, second, compute) in enumerate(runs):
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_llama(), "w4a16", out=tmp_path / f"{number}", calibration=first, run=Run(progress=stop))
        with pytest.raises(FormatError, match="unfinished state of another run"):
            quantize(tiny_llama(), "w4a16", out=tmp_path / f"{number}", calibration=second, run=Run(compute=compute))
        quantize(tiny_llama(), "w4a16", out=tmp_path / f"{number}", calibration=first)
