"""A run may be killed at any instant; running it again gives the same files, byte for byte."""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantkit.calibrate.data import Calibration
from quantkit.errors import FormatError
from quantkit.pipeline import resume
from quantkit.pipeline.quantize import collect, quantize
from quantkit.pipeline.settings import Output, Run
from quantkit.system import lock
from quantkit.system.compute import Compute
from quantkit.system.progress import Progress
from quantkit.transforms.distill import Distill
from tests.tiny import tiny_llama

KILLS = 25
STAGE = Path("incomplete")
LEARN = Distill(steps=2, windows=2, code_rate=0.1, dtype="float32")


def run(out: Path, scheme: str = "w4a16-asym", method: str = "gptq", **settings: Any) -> None:
    """Quantize a six-layer model; the same call always means the same files."""
    torch.set_num_threads(1)
    ids = [torch.randint(3, 190, (2, 48), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model = tiny_llama(num_hidden_layers=6)
    quantize(model, scheme, out=out, method=method, calibration=Calibration(ids), run=Run(**settings))


def run_everything(out: Path) -> None:
    """Quantize a small model through every kind of write: biases change, then scales of all blocks; an old model goes."""
    torch.set_num_threads(1)
    text = Calibration([torch.randint(3, 190, (2, 24), generator=torch.Generator().manual_seed(0))])
    quantize(
        tiny_llama(num_hidden_layers=2, intermediate_size=32),
        out=out,
        method="rtn",
        steps=[LEARN],
        calibration=text,
        output=Output(overwrite=True),
    )


def files(path: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint; a run that is killed right after publishing may leave its empty stage and its lock."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file() and p.name != lock.NAME}


def is_finished(out: Path) -> bool:
    return (out / "config.json").exists() and not (out / "INCOMPLETE.json").exists()


def start(out: Path, what: Callable[[Path], None], before: Callable[[], None] = lambda: None) -> int:
    """Run in a child process; a fork, since starting Python anew takes longer than the run."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            before()
            what(out)
            status = 0
        finally:
            os._exit(status)
    return child


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads that do not exist in it
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_kills_at_random_moments_change_nothing(tmp_path: Path, one_thread: None) -> None:
    begin = time.monotonic()
    run(tmp_path / "whole")
    duration = time.monotonic() - begin
    want, chance = files(tmp_path / "whole"), random.Random(20)
    kills = finished = 0
    while kills < KILLS:
        out = tmp_path / f"killed-{finished}"
        child = start(out, run)
        # Mostly short lives, so that one checkpoint takes several of them; some reach the writing of the files.
        time.sleep(chance.choice([0.25, 0.5, 1.1]) * duration * chance.random())
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        finished += is_finished(out)  # killed after the last rename: a finished checkpoint must be whole
    for number in range(finished + 1):
        out = tmp_path / f"killed-{number}"
        if not is_finished(out):
            run(out)
        assert files(out)["config.json"].decode() == want["config.json"].decode()
        assert files(out) == want


def kill_at(count: int, out: Path) -> Callable[[], None]:
    """Return a function that lets this process be killed at the ``count``-th operation on a file below ``out``."""
    seen = 0
    events = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir", "os.chmod")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in events and args and str(args[0]).startswith(str(out)):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_kill_between_any_two_operations_on_files_loses_nothing(tmp_path: Path, one_thread: None) -> None:
    """Each run is killed a little later than the one before; what it left is finished by a run that lives."""
    run_everything(tmp_path / "whole")
    want = files(tmp_path / "whole")
    for count in itertools.count(1, 9):
        out = tmp_path / "out"
        tiny_llama(seed=1).save_pretrained(out)  # the model that is to be replaced
        before = files(out)
        child = start(out, run_everything, kill_at(count, out))
        _, status = os.waitpid(child, 0)
        if is_finished(out):
            assert {name: data for name, data in files(out).items() if not name.startswith(".")} in (before, want)
        else:
            assert (out / "INCOMPLETE.json").exists()
        assert not is_finished(out / STAGE) or load_file(out / STAGE / "model.safetensors")
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        run_everything(out)
        assert files(out) == want
        shutil.rmtree(out)
    assert count > 100


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


def test_blocks_of_other_code_are_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(event: Progress) -> None:
        if event.detail == "model.layers.1":
            raise KeyboardInterrupt

    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(resume, "code_digest", lambda plugins: "of before the change")
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "q", progress=stop)
    seen: list[Progress] = []
    run(tmp_path / "q", progress=seen.append)
    assert "the source code of quantkit or a plug-in changed after its 2 finished blocks were written" in caplog.text
    assert "starting over" in caplog.text
    assert {e.detail.split(".")[2] for e in seen if e.loss is not None} == set("012345")
    assert files(tmp_path / "q") == files(tmp_path / "whole")


def test_the_digest_of_the_code_covers_what_decides_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(name: str, edited: str = "") -> Path:
        shutil.copytree(resume.PACKAGE, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        if edited:
            with (tmp_path / name / edited).open("a") as file:
                file.write("\n")
        return tmp_path / name

    own = resume.code_digest()
    assert resume.code_digest(package=copy("same")) == own
    assert resume.code_digest(package=copy("cli", "cli/run.py")) == own
    for number, edited in enumerate(
        ("quantizers/rtn.py", "kernels/csrc/quantize.cpp", "spec.py", "formats/containers/base.py")
    ):
        assert resume.code_digest(package=copy(str(number), edited)) != own

    def plug_in(text: str) -> str:
        (tmp_path / "plug_in.py").write_text(text)
        monkeypatch.setitem(sys.modules, "plug_in", ModuleType("plug_in"))
        sys.modules["plug_in"].__file__ = str(tmp_path / "plug_in.py")
        return resume.code_digest([type("Method", (), {"__module__": "plug_in"})()])

    assert len({own, plug_in("a = 1"), plug_in("a = 2")}) == 3


def test_a_block_that_the_disk_has_changed_is_refused(tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.detail == "model.layers.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "q", progress=stop)
    file = tmp_path / "q" / STAGE / "model.safetensors.part"
    data = bytearray(file.read_bytes())
    tensor = load_file(file)["model.layers.0.input_layernorm.weight"].numpy().tobytes()
    place = data.index(tensor)
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match="block 0 is not what was written"):
        run(tmp_path / "q")
    run(tmp_path / "q", resume=False)


def test_the_disk_holds_each_block_once(tmp_path: Path) -> None:
    sizes = []

    def look(event: Progress) -> None:
        if event.stage == "quantize" and event.loss is None:
            sizes.append(sum(f.stat().st_blocks * 512 for f in (tmp_path / "q").rglob("*") if f.is_file()))

    run(tmp_path / "q", progress=look)
    final = sum(len(data) for data in files(tmp_path / "q").values())
    activations = 2 * 3 * 2 * 48 * 64 * 4  # what the newest block handed on, and a moment long the one before it
    assert max(sizes) < final + activations + 100_000  # and small files: JSON, rounded up to the disk's blocks
