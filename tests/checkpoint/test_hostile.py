"""Directories and disks that are not what they should be: nothing of the user's goes, nothing planted is used, all is said."""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import checkpoint
from quantkit.calibrate.data import Calibration
from quantkit.checkpoint import publish, state
from quantkit.checkpoint.record import RECORD
from quantkit.errors import FormatError, QuantkitError
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.settings import Output, Run
from quantkit.system.progress import Progress
from tests.tiny import tiny_llama, tiny_tokenizer

TEXT = Calibration([torch.randint(3, 190, (1, 16), generator=torch.Generator().manual_seed(0))])
RUN = Path("incomplete") / "run"


def small(**config: Any) -> Any:
    return tiny_llama(num_hidden_layers=2, intermediate_size=32, **config)


def run(out: Path, *, model: Any = None, method: str = "rtn", **output: Any) -> Any:
    """Write a tiny checkpoint; the same call always means the same files."""
    return quantize(
        model or small(), out=out, method=method, calibration=TEXT, output=Output(**output), tokenizer=tiny_tokenizer()
    )


def stopped(out: Path, method: str = "gptq", **output: Any) -> None:
    """Leave an unfinished checkpoint with one finished block."""

    def stop(event: Progress) -> None:
        if event.detail == "model.layers.0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(
            small(),
            out=out,
            method=method,
            calibration=TEXT,
            output=Output(**output),
            run=Run(progress=stop),
            tokenizer=tiny_tokenizer(),
        )


def save(model: Any, out: str) -> Path:
    quantize(model, method="rtn")
    return quantkit.save(model, out)


def files(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfinished checkpoint, to be copied."""
    out = tmp_path_factory.mktemp("hostile") / "begun"
    stopped(out)
    return out


@pytest.fixture
def out(tmp_path: Path, begun: Path) -> Path:
    """An unfinished checkpoint of the test's own."""
    return Path(shutil.copytree(begun, tmp_path / "out"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hostile") / "whole"
    run(out, method="gptq")
    return out


# What is the user's stays.


def test_a_users_files_stay_wherever_they_lie(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny_llama(seed=1).save_pretrained(out)
    mine = ["notes.txt", ".draft.tmp", ".probe", "README.md", "adapter.safetensors", "adapter/config.json", "old.bin"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    run(out, overwrite=True)
    assert all((out / name).read_text() == "mine" for name in mine)
    assert set(files(out)) - set(mine) == set(checkpoint.read_record(out).files)  # type: ignore[union-attr]
    stopped(out, overwrite=True)
    (out / "incomplete" / "mine.txt").write_text("mine")
    run(out, method="gptq", overwrite=True)
    assert (out / "incomplete" / "mine.txt").read_text() == "mine"
    assert all((out / name).read_text() == "mine" for name in mine)


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_something_of_the_users_where_unfinished_files_go_is_an_error(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    stage = out / "incomplete"
    (tmp_path / "elsewhere").mkdir()
    out.mkdir()
    if kind == "directory":
        (stage / "run").mkdir(parents=True)
        (stage / "run" / "data.csv").write_text("mine")
    elif kind == "file":
        stage.write_text("mine")
    else:
        stage.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "data.csv").write_text("mine")
    before = files(tmp_path)
    for resume in (True, False):
        with pytest.raises(FormatError, match=r"is not quantkit's.*move it away"):
            quantize(small(), out=out, method="rtn", run=Run(resume=resume))
    model = small()
    quantize(model, method="rtn")
    with pytest.raises(FormatError, match=r"is not quantkit's.*move it away"):
        quantkit.save(model, out)
    assert files(tmp_path) == before


def test_a_stage_of_another_user_is_not_continued(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "owner_of_new_files", lambda path: os.getuid() + 1)
    with pytest.raises(FormatError, match="incomplete belongs to another user"):
        run(out, method="gptq")


@pytest.mark.parametrize("path", ["", "  ", "a\0b", "x" * 300, "a/" + "y" * 300])
def test_a_path_that_cannot_be_written_to_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = small()
    attempts: list[Callable[[], object]] = [
        lambda: quantize(model, out=path),
        lambda: quantize(model, output=Output(path)),
        lambda: save(model, path),
    ]
    for attempt in attempts:
        with pytest.raises(QuantkitError, match=r"path to write to is empty|NUL|choose a shorter name"):
            attempt()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["a\0b", "x" * 300])
def test_a_path_that_cannot_be_read_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    for attempt in (quantkit.load, quantkit.inspect, quantkit.open_model, quantkit.quantize, quantkit.plan):
        with pytest.raises(QuantkitError):
            attempt(path)


# State that is damaged, stale or another run's.


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda run: (run / "state.json").write_text("{"), id="truncated state"),
        pytest.param(lambda run: (run / "state.json").write_text("[]"), id="a list"),
        pytest.param(lambda run: (run / "state.json").write_text("[" * 100_000), id="deep"),
        pytest.param(lambda run: edit(run, blocks={"0": {"digest": 7}}), id="no digest"),
        pytest.param(lambda run: edit(run, blocks=[]), id="blocks are a list"),
        pytest.param(lambda run: edit(run, phase="published?"), id="unknown phase"),
        pytest.param(lambda run: edit(run, phase="publishing", files=["../../evil"]), id="leads outside"),
        pytest.param(lambda run: edit(run, key=None), id="no key"),
        pytest.param(lambda run: next(run.glob("chain*")).write_bytes(b"nonsense"), id="chain is nonsense"),
        pytest.param(lambda run: next(run.glob("chain*")).unlink(), id="no chain"),
        pytest.param(lambda run: flip(next(run.glob("chain*"))), id="a bit of the chain"),
        pytest.param(lambda run: flip(next(run.parent.glob("*.part"))), id="a bit of a tensor"),
        pytest.param(lambda run: os.truncate(next(run.parent.glob("*.part")), 5000), id="truncated tensors"),
        pytest.param(lambda run: next(run.parent.glob("*.part")).unlink(), id="no tensors"),
    ],
)
def test_damaged_state_is_an_error(out: Path, harm: Callable[[Path], object]) -> None:
    harm(out / RUN)
    with pytest.raises(FormatError, match="resume=False"):
        run(out, method="gptq")


def test_the_way_out_of_damaged_state_works(out: Path, whole: Path) -> None:
    (out / RUN / "state.json").write_text("{")
    flip(next((out / "incomplete").glob("*.part")))
    quantize(small(), out=out, method="gptq", calibration=TEXT, run=Run(resume=False), tokenizer=tiny_tokenizer())
    assert files(out) == files(whole)


def edit(folder: Path, **values: Any) -> None:
    file = folder / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    places = [i for i in range(start, len(data)) if data[i]]
    data[places[len(places) // 4]] ^= 1
    file.write_bytes(data)


def test_state_of_another_layout_is_started_over(out: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(out / RUN, layout=1)
    run(out, method="gptq")
    assert "another version of quantkit" in caplog.text
    assert files(out) == files(whole)


def test_a_stage_without_its_state_is_nobodys(tmp_path: Path, out: Path) -> None:
    """Whatever a kill left while a finished run's state was removed, other weights do not meet its blocks."""
    other = small(seed=5)
    (out / RUN / "state.json").unlink()
    run(out, model=small(seed=5), method="gptq")
    run(tmp_path / "want", model=other, method="gptq")
    assert files(out) == files(tmp_path / "want")


CHANGES: dict[str, Callable[[Any], object]] = {
    "config: eps": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    "config: rope": lambda model: model.config.rope_parameters.update(rope_theta=5e5),
    "model: one weight": lambda model: model.model.layers[1].mlp.up_proj.weight.data[17].index_fill_(0, torch.tensor([3]), 0.5),
    "model: a bit of a norm": lambda model: model.model.norm.weight.data[7].add_(1e-6),
    "model: a buffer": lambda model: model.model.rotary_emb.inv_freq[1].mul_(1.5),
    "generation": lambda model: setattr(model.generation_config, "temperature", 0.3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_smallest_change_of_the_input_is_another_run(out: Path, change: str) -> None:
    model = small()
    CHANGES[change](model)
    with pytest.raises(FormatError, match=rf"unfinished state of another run \(other .*{change.split(':')[0]}"):
        run(out, model=model, method="gptq")


def test_another_tokenizer_is_another_run(out: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(FormatError, match="other tokenizer"):
        quantize(small(), out=out, method="gptq", calibration=TEXT, tokenizer=tokenizer)


# Kills while files move, and the same command again.


def kill_at(count: int, out: Path) -> None:
    """Let this process be killed at the ``count``-th operation on a file below ``out``."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and args and str(args[0]).startswith(str(out)):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_while_publishing(count: int, out: Path, what: Callable[[], object]) -> bool:
    """Carry ``what`` out in a child that is killed ``count`` operations into publishing; return whether it came that far."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            begin = publish.begin

            def begin_counting(*arguments: Any) -> None:
                kill_at(count, out)
                begin(*arguments)

            publish.begin = begin_counting
            what()
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return bool(code)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads that do not exist in it
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_checkpoint_that_replaces_its_input_loses_neither_at_any_kill(tmp_path: Path, one_thread: None) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    small().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)

    def in_place(path: Path) -> Any:
        return quantize(str(path), out=path, method="rtn", output=Output(overwrite=True))

    shutil.copytree(source, tmp_path / "whole")
    in_place(tmp_path / "whole")
    want, before = files(tmp_path / "whole"), files(source)
    count = 1
    while True:
        shutil.copytree(source, out)
        if not killed_while_publishing(count, out, lambda: in_place(out)):
            break
        found = files(out)
        both = set(found.values())
        finished = {name: found[name] for name in want if name in found} == want
        assert finished or set(before.values()) <= both, "the old checkpoint is whole until the new one is in place"
        assert in_place(out).path == out
        assert files(out) == want
        assert in_place(out).already_done
        shutil.rmtree(out)
        count += 13
    assert count > 40
    with pytest.raises(FormatError, match=r"another run: plan; .* and the float model, which this directory held before"):
        quantize(str(out), "w8a16", out=out, method="rtn", output=Output(overwrite=True))
    assert files(out) == want


def test_the_same_run_again_is_done_and_another_says_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(out)
    before = files(out)
    model = small()
    second = run(out, model=model)
    ids = torch.arange(3, 20)[None]
    assert second.already_done
    assert not first.already_done
    assert second.model is model
    assert torch.allclose(model(ids).logits, first.model(ids).logits, atol=1e-5)
    assert (second.plan, second.losses, second.coverage) == (first.plan, first.losses, first.coverage)
    with pytest.raises(FormatError, match=r"of another run: settings \(there .*RTN.*, here .*HQQ.*overwrite=True"):
        run(out, method="hqq")
    with pytest.raises(FormatError, match="of another run: plan; "):  # and no digest of it
        quantize(small(), "w8a16", out=out, method="rtn")
    with pytest.raises(FormatError, match="already holds a model"):
        quantize(small(), out=out, method="rtn", run=Run(resume=False))
    assert files(out) == before
    assert run(out, overwrite=True).already_done
    flip(out / "model.safetensors")
    with pytest.raises(FormatError, match="is what this run wrote, but cannot be read back"):
        run(out)
    assert not run(out, overwrite=True).already_done
    assert files(out) == before


# A full disk.


def test_a_full_disk_at_any_moment_loses_nothing(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every n-th synchronisation finds the disk full; the same call goes on when there is space again."""
    fsync, seen, limit = os.fsync, 0, 0

    def full(handle: int) -> None:
        nonlocal seen
        seen += 1
        if seen == limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    for limit in itertools.count(1, 11):
        seen, out = 0, tmp_path / f"{limit}"
        with contextlib.suppress(NoSpace):
            attempt(out)
            break
        attempt(out)
        assert files(out) == files(whole)
    assert limit > 30


class NoSpace(Exception):
    """A full disk was reported, and how to go on."""


def attempt(out: Path) -> None:
    try:
        run(out, method="gptq")
    except FormatError as error:
        if re.search(r"No space left.*free some space", str(error)):
            raise NoSpace from error
        raise


# Checksums, and scales that are no numbers.


def test_checksums_find_a_flipped_bit_and_are_asked_for(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    assert quantkit.inspect(out, verify=True)["format"] == "compressed-tensors"
    flip(out / "model.safetensors")
    quantkit.load(out)
    for look in (quantkit.load, quantkit.inspect):
        with pytest.raises(FormatError, match=rf"does not have the checksum in {RECORD}"):
            look(out, verify=True)
    (out / RECORD).unlink()
    with pytest.raises(FormatError, match="cannot be verified"):
        quantkit.load(out, verify=True)
    (out / RECORD).write_text('{"version": "1", "tensors": {"a": "b"}}')
    with pytest.raises(FormatError, match="is damaged"):
        quantkit.load(out, verify=True)
    quantkit.load(out)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_no_number_is_refused_always(tmp_path: Path, whole: Path, value: float) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight_scale"))
    tensors[name][3, 0] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for load in (quantkit.load, lambda path: quantkit.load(path, cache=False), quantkit.open_model):
        with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj: scale holds NaN or infinity"):
            load(out)


def test_the_state_knows_no_names_outside() -> None:
    assert not state._is_inside("../a")
    assert not state._is_inside("/a")
    assert not state._is_inside("")
    assert state._is_inside("a/b.json")
