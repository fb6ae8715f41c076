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
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import load_float
from quantkit.pipeline.memory import held_bytes
from quantkit.pipeline.quantize import quantize
from quantkit.system import joined
from quantkit.system.memory import PAGE_BYTES, drop_pages, mapped_pages
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
@pytest.mark.parametrize("shard", ["1GB", "60KB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_experts_are_views_of_the_source_and_take_no_disk(
    tmp_path: Path, shard: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _whole_pages().to(dtype).save_pretrained(tmp_path / "source", max_shard_size=shard)
    plain, _ = load_float(tmp_path / "source")
    empty = _plan_of(tmp_path / "source")
    ledger = ledger_of(empty)
    assert ledger is not None
    written, experts = made.written_bytes(empty, ledger), sum(one.nbytes for one in plain.parameters() if one.ndim == 3)
    assert made.made_bytes(empty, ledger) == experts
    assert written == 0 if shard == "1GB" else written < experts / 2
    monkeypatch.setattr(Scratch, "keep", lambda _, tensor: tensor if tensor.ndim < 3 else pytest.fail("written to the disk"))
    model, _ = load_float(tmp_path / "source", scratch=tmp_path)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.dtype == other.dtype == dtype
        if one.ndim == 3:
            pages = mapped_pages([one])
            assert sum(end - start for start, end in pages) >= one.nbytes - 2 * PAGE_BYTES
            drop_pages(pages)
            assert torch.equal(one, other), name
    if shard == "1GB":
        assert not [file for file in tmp_path.rglob("*") if file.parent != tmp_path / "source" and file.is_file()]


@pytest.mark.usefixtures("large")
def test_writing_to_joined_experts_leaves_the_source_alone(tmp_path: Path) -> None:
    _whole_pages().save_pretrained(tmp_path / "source")
    before = (tmp_path / "source" / "model.safetensors").read_bytes()
    model, _ = load_float(tmp_path / "source", scratch=tmp_path)
    experts = [one for one in model.parameters() if one.ndim == 3]
    for one in experts:
        one.data.add_(1)
    kept = [one.clone() for one in experts]
    drop_pages(mapped_pages(experts))
    assert all(torch.equal(one, own) for one, own in zip(experts, kept, strict=True))
    assert (tmp_path / "source" / "model.safetensors").read_bytes() == before


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("fault", ["no room", "all alike", "other bytes"])
def test_experts_that_cannot_be_views_of_the_source_are_written(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _whole_pages()
    if fault == "all alike":
        for one in model.parameters():
            one.data.fill_(0.25)
    model.save_pretrained(tmp_path / "source")
    if fault == "no room":
        monkeypatch.setattr(joined, "_SHARE_OF_MAPPINGS", 0.0)
    if fault == "other bytes":  # as if transformers had changed something behind the beginnings
        monkeypatch.setattr(made, "join", lambda pieces, dtype, shape, _: torch.zeros(*shape, dtype=dtype))
    written: list[int] = []
    keep = Scratch.keep
    monkeypatch.setattr(Scratch, "keep", lambda self, tensor: written.append(tensor.ndim) or keep(self, tensor))
    found, _ = load_float(tmp_path / "source", scratch=tmp_path)
    assert 3 in written
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), model.parameters(), strict=True))


def test_pieces_of_any_place_and_order_are_joined(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for index, places in enumerate([(8, 8, 8), (0, 0), (4088, 8, 4088), (96, 200, 300, 96, 96)]):
        pieces, wanted = [], []
        for number, place in enumerate(places):
            data = torch.randint(0, 256, (PAGE_BYTES * (1 + number % 2),), dtype=torch.uint8, generator=generator)
            path = tmp_path / f"{index}-{number}"
            path.write_bytes(bytes(place + PAGE_BYTES) + bytes(data.tolist()))
            pieces.append(joined.Piece(path, place + PAGE_BYTES, len(data)))
            wanted.append(data)
        found = joined.join(pieces, torch.uint8, (sum(map(len, wanted)),), tmp_path)
        assert found is not None
        for piece in pieces:
            piece.path.unlink()
        assert torch.equal(found, torch.cat(wanted))
    assert not list(tmp_path.iterdir())


def test_pieces_that_would_have_to_be_copied_need_a_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * PAGE_BYTES))
    pieces = [joined.Piece(tmp_path / "file", begin, PAGE_BYTES) for begin in (0, 8)]
    assert joined.copied_bytes(pieces) == PAGE_BYTES
    assert joined.join(pieces, torch.uint8, (2 * PAGE_BYTES,), None) is None
    assert joined.join([pieces[0], pieces[0]], torch.uint8, (2 * PAGE_BYTES,), None) is not None


def test_a_file_that_is_gone_or_short_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="gone"):
        joined.join([joined.Piece(tmp_path / "gone", 0, PAGE_BYTES)], torch.uint8, (PAGE_BYTES,), tmp_path)
    (tmp_path / "short").write_bytes(bytes(PAGE_BYTES))
    for begins in ((0, 8), (0, PAGE_BYTES)):  # one that is copied, and one that is mapped
        pieces = [joined.Piece(tmp_path / "short", begin, PAGE_BYTES) for begin in begins]
        with pytest.raises(DiskError, match="ends before"):
            joined.join(pieces, torch.uint8, (2 * PAGE_BYTES,), tmp_path)


def _whole_pages() -> Any:
    """Return a tiny mixture whose experts' matrices are whole pages long, in float32 and in bfloat16."""
    return FAMILIES["qwen3_moe"](hidden_size=64, moe_intermediate_size=128, num_experts=4)


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
