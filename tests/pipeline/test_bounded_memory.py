"""Models larger than memory: what is written leaves memory, nothing changes by that, and a limit is kept to or refused."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit import checkpoint
from quantkit.calibrate import collect as gathering
from quantkit.calibrate.collect import ExpertStatistics
from quantkit.calibrate.data import Calibration
from quantkit.errors import FormatError, QuantkitError
from quantkit.hf import made
from quantkit.nn import lean
from quantkit.nn.linear import QuantModule
from quantkit.nn.on_disk import OnDisk
from quantkit.pipeline import memory
from quantkit.pipeline.memory import Memory, Ways
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.settings import Run
from quantkit.qtensor import as_grid
from quantkit.system.scratch import Scratch
from tests.tiny import FAMILIES, tiny_llama

IDS = [torch.randint(3, 190, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(3)]
TEXT = Calibration(IDS)


def tensors(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))


def places(model: Any) -> list[object]:
    return [part.value for part in model.modules() if isinstance(part, QuantModule)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "source", max_shard_size="100KB")
    return tmp_path / "source"


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat everything as too large for memory."""
    monkeypatch.setattr(memory, "LARGE_BYTES", 0)
    monkeypatch.setattr(memory, "SPILL_BYTES", 0)
    monkeypatch.setattr(made, "LARGE_BYTES", 0)
    monkeypatch.setattr(Scratch, "LEAST_BYTES", 0)
    monkeypatch.setattr(Scratch, "STEP_BYTES", 0)
    monkeypatch.setattr(gathering, "SLICE_BYTES", 0)


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "rtn"), ("llama_tied", "gptq"), ("qwen3_moe", "gptq"), ("llama", "gptaq")],
)
def test_a_bounded_run_writes_the_same_bytes(tmp_path: Path, family: str, method: str, request: pytest.FixtureRequest) -> None:
    plain = quantize(FAMILIES[family](), out=tmp_path / "plain", method=method, calibration=TEXT)
    request.getfixturevalue("bounded")
    done = quantize(FAMILIES[family](), out=tmp_path / "bounded", method=method, calibration=TEXT)
    assert tensors(tmp_path / "bounded") == tensors(tmp_path / "plain")
    assert done.losses == plain.losses
    assert {**done.metadata["quality"]} == {**plain.metadata["quality"]}
    assert not [file for file in tmp_path.rglob("*") if ".quantkit-" in file.name]


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq-v2", "awq", "native"])
def test_the_layers_of_the_result_are_in_its_files_and_as_good_as_in_memory(tmp_path: Path, saved: Path, format: str) -> None:
    scheme = "w4a16-asym-g32"
    result = quantize(saved, scheme, out=tmp_path / "out", method="rtn", output=_format(format))
    kept = quantize(saved, scheme, method="rtn")
    model: Any = result.model
    for part in model.modules():
        if isinstance(part, QuantModule):
            part.release()
    assert all(isinstance(value, OnDisk) for value in places(model))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere")
    own, other = model.state_dict(), kept.model.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    with torch.no_grad():
        ids = IDS[0]
        assert torch.equal(model(ids).logits, kept.model(ids).logits)
    copied: Any = copy.deepcopy(result.model)
    assert not any(isinstance(value, OnDisk) for value in places(copied))
    assert as_grid(next(part for part in copied.modules() if isinstance(part, QuantModule)).qtensor)


def _format(name: str) -> Any:
    from quantkit.pipeline.settings import Output

    return Output(format=name)


def test_bits_that_the_disk_loses_while_a_run_goes_on_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = checkpoint.CheckpointWriter.finish

    def damaged(self: checkpoint.CheckpointWriter, *arguments: Any, **options: Any) -> Path:
        part = next((tmp_path / "out" / "incomplete").glob("*.part"))
        with part.open("r+b") as file:
            file.seek(-70, os.SEEK_END)
            byte = file.read(1)
            file.seek(-70, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        return finish(self, *arguments, **options)

    monkeypatch.setattr(checkpoint.CheckpointWriter, "finish", damaged)
    with pytest.raises(FormatError, match="is not what was written; the disk lost bits"):
        quantize(tiny_llama(), out=tmp_path / "out", method="rtn")


def test_statistics_of_experts_come_in_slices_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.nn.sites import Site

    site = Site("x", "x", "w", (5, 4, 8))
    ids = torch.tensor([0, 0, 2, 2, 2, 4])
    inputs = [gathering.Inputs(torch.randn(6, 8), ids), gathering.Inputs(torch.randn(6, 8), ids.flip(0))]
    whole = gathering.collect(site, ["hessian", "abs_max"], inputs)
    monkeypatch.setattr(gathering, "SLICE_BYTES", 2 * (4 * 8 * 8 + 8 + 32))
    sliced = gathering.collect(site, ["hessian", "abs_max"], inputs)
    assert isinstance(sliced, ExpertStatistics)
    assert not isinstance(whole, ExpertStatistics)
    assert sliced.tokens == whole.tokens == (4, 0, 6, 0, 2)
    for name in ("hessian", "abs_max"):
        assert torch.equal(sliced.results[name], whole.results[name])
        for expert in (4, 0, 2):
            assert torch.equal(sliced.expert(expert).results[name], whole.expert(expert).results[name])
    assert len(sliced._slice) <= 2
    for expert, rows in ((0, [*range(2)]), (2, [*range(2, 5)])):
        x = torch.cat([inputs[0].x[rows], inputs[1].x[[5 - row for row in reversed(rows)]]])
        assert torch.allclose(whole.expert(expert).results["hessian"], x.T @ x / len(x), atol=1e-6)


def test_forwards_side_by_side_are_those_alone_and_let_go_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama(num_hidden_layers=3)
    blocks = [f"model.layers.{i}" for i in range(3)]
    gone: list[Any] = []
    monkeypatch.setattr(lean, "let_go", gone.append)
    with torch.no_grad():
        alone = [model(ids).logits for ids in IDS]
        found = lean.side_by_side(model, blocks, [lambda ids=ids: model(ids).logits for ids in IDS])
        assert all(torch.equal(one, other) for one, other in zip(alone, found, strict=True))
        assert gone == [*model.model.layers, model]
        with pytest.raises(RuntimeError, match="boom"):
            lean.side_by_side(model, blocks, [lambda: model(IDS[0]).logits, lambda: _fail()])
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def _fail() -> torch.Tensor:
    raise RuntimeError("boom")


def test_a_scratch_tensor_is_used_like_any_other_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scratch, "LEAST_BYTES", 1)
    scratch, original = Scratch(tmp_path), torch.randn(3, 5).bfloat16()
    kept = scratch.keep(original)
    assert kept is not original
    assert torch.equal(kept, original)
    assert list(tmp_path.iterdir()) == []
    moved = torch.arange(7.0)
    before = moved.data_ptr()
    scratch.move(moved)
    assert moved.data_ptr() != before
    assert moved.tolist() == [*range(7)]
    monkeypatch.setattr(Scratch, "STEP_BYTES", -(1 << 60))
    scratch.check()
    assert moved.add_(1).tolist() == [*range(1, 8)]
    assert Scratch().keep(original) is original

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(QuantkitError, match=r"cannot write 30 bytes to .*free some space"):
        scratch.keep(original)


def test_a_limit_is_kept_to_or_refused_before_work(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(QuantkitError, match=r"max_memory=50 MiB: the run needs \d+ MiB: Python and torch 400 MiB"):
        quantize(saved, out=tmp_path / "out", method="rtn", run=Run(max_memory="50MiB"))  # type: ignore[arg-type]
    assert not list((tmp_path / "out").glob("*")), "nothing was begun"
    for wrong in ("4 potatoes", 0, -5, "much"):
        with pytest.raises(QuantkitError, match="max_memory"):
            Run(max_memory=wrong)  # type: ignore[arg-type]
    assert Run(max_memory="1GiB").max_memory == 1 << 30  # type: ignore[arg-type]


def test_only_what_is_needed_is_done_to_keep_to_a_limit() -> None:
    sizes = {"looking": 500, "looking_lean": 50, "rounding": 20, "calibrating": 100, "activations": 500, "spilled": 50}
    one = Memory(runtime=100, held=0, **sizes)
    assert [one.peak(Ways(lean, spills)) for lean in (False, True) for spills in (False, True)] == [700, 600, 700, 250]
    assert one.choose(None) == one.choose(800) == Ways()
    assert one.choose(650) == Ways(spills=True)
    assert one.choose(300) == Ways(lean=True, spills=True)
    with pytest.raises(QuantkitError, match="calibrating a block"):
        one.choose(255)


SCRIPT = """
import sys
import quantkit
import quantkit.pipeline.memory
from quantkit import quantize
from quantkit.system.memory import resident_bytes
quantkit.pipeline.memory.LARGE_BYTES = 0
quantize(sys.argv[1], out=sys.argv[2] + "-first", method="rtn")  # what is imported and compiled on the way
before = resident_bytes()
quantize(sys.argv[3], out=sys.argv[2], method="rtn")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # rusage knows the parent's, too
print(int(peak.split()[1]) * 1024 - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what is mapped")
def test_the_peak_is_a_few_blocks_and_not_the_model(tmp_path: Path) -> None:
    config = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=1).config
    model: Any = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=1)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    config.num_hidden_layers, config.dtype = 48, torch.bfloat16
    layer = {name.removeprefix("model.layers.0."): one for name, one in state.items() if name.startswith("model.layers.0.")}
    every = {name: one for name, one in state.items() if not name.startswith("model.layers.")}
    every |= {f"model.layers.{i}.{name}": one.clone() for i in range(48) for name, one in layer.items()}
    (tmp_path / "source").mkdir()
    config.save_pretrained(tmp_path / "source")
    save_file(every, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    total = sum(one.nbytes for one in every.values())
    assert total > 280 << 20
    model.save_pretrained(tmp_path / "small")
    places = (tmp_path / name for name in ("small", "out", "source"))
    done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, places)], capture_output=True, text=True, check=True)
    grown = int(done.stdout)
    assert grown < total // 2, f"{grown:,} of {total:,}"
