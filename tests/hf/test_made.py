"""Parameters that are made as a model is loaded, such as joined experts, and where they lie."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantkit.calibrate.data import Calibration
from quantkit.errors import DiskError
from quantkit.hf import made
from quantkit.hf.load import load_float
from quantkit.pipeline.memory import held_bytes
from quantkit.pipeline.quantize import quantize
from quantkit.system.memory import mapped_pages
from quantkit.system.scratch import Scratch
from tests.tiny import FAMILIES, tiny_llama

TEXT = Calibration([torch.randint(3, 190, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(2)])


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat what is made as too much for memory, however little it is."""
    monkeypatch.setattr(made, "LARGE_BYTES", 1)
    monkeypatch.setattr(Scratch, "LEAST_BYTES", 0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama_tied", "gemma3"])
@pytest.mark.usefixtures("large")
def test_a_model_whose_parameters_lie_on_the_disk_is_the_same_model(tmp_path: Path, family: str) -> None:
    FAMILIES[family]().save_pretrained(tmp_path / "source")
    plain, other = load_float(tmp_path / "source")[0], load_float(tmp_path / "source", scratch=tmp_path)[0]
    own, there = plain.state_dict(), other.state_dict()
    assert list(own) == list(there)
    for name, tensor in own.items():
        assert torch.equal(tensor, there[name]), name
        assert tensor.dtype == there[name].dtype, name
    assert [one.requires_grad for one in plain.parameters()] == [one.requires_grad for one in other.parameters()]
    assert len(list(plain.parameters())) == len(list(other.parameters()))  # what is tied stays tied
    assert not [file for file in tmp_path.rglob("*") if ".quantkit-" in file.name]


@pytest.mark.usefixtures("large")
def test_joined_experts_are_views_of_a_file_and_can_leave_memory(tmp_path: Path) -> None:
    FAMILIES["qwen3_moe"]().save_pretrained(tmp_path / "source")
    for scratch, here in ((tmp_path, True), (None, False)):
        model, _ = load_float(tmp_path / "source", scratch=scratch)
        experts = {name: one for name, one in model.named_parameters() if one.ndim == 3}
        assert experts
        large = {name: one for name, one in experts.items() if one.nbytes >= 2 * os.sysconf("SC_PAGE_SIZE")}
        assert large
        assert all(bool(mapped_pages([one])) == here for one in large.values())


@pytest.mark.usefixtures("large")
def test_weights_in_another_dtype_than_the_files_lie_there_too(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "source")
    model, _ = load_float(tmp_path / "source", torch.bfloat16, scratch=tmp_path)
    plain, _ = load_float(tmp_path / "source", torch.bfloat16)
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_checkpoint_is_the_same(tmp_path: Path, method: str, request: pytest.FixtureRequest) -> None:
    FAMILIES["qwen3_moe"]().save_pretrained(tmp_path / "source")
    for name in ("memory", "disk"):
        quantize(tmp_path / "source", out=tmp_path / name, method=method, calibration=TEXT)
        if name == "memory":
            request.getfixturevalue("large")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "disk"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_little_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES["qwen3_moe"]().save_pretrained(tmp_path / "source")
    monkeypatch.setattr(Scratch, "keep", lambda *_: pytest.fail("written to the disk"))
    load_float(tmp_path / "source", scratch=tmp_path)


def test_a_plan_knows_where_experts_will_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES["qwen3_moe"]().save_pretrained(tmp_path / "source")
    experts = sum(one.nbytes for one in FAMILIES["qwen3_moe"]().parameters() if one.ndim == 3)
    empty: Any = _plan_of(tmp_path / "source")
    assert held_bytes(empty) == experts
    monkeypatch.setattr(made, "LARGE_BYTES", 1)
    assert held_bytes(empty) == 0


def _plan_of(source: Path) -> Any:
    from quantkit.hf.account import account
    from quantkit.hf.ledger import keep_ledger
    from quantkit.hf.load import empty_model
    from quantkit.hf.source import load_config

    model = empty_model(load_config(source))
    keep_ledger(model, account(source, model))
    return model


@pytest.mark.usefixtures("large")
def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES["qwen3_moe"]().save_pretrained(tmp_path / "source")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskError, match="No space left"):
        quantize(tmp_path / "source", out=tmp_path / "out", method="rtn")
    monkeypatch.undo()
    quantize(tmp_path / "source", out=tmp_path / "out", method="rtn")  # and nothing is left of it
