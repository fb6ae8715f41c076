"""Training by other loops: transformers' Trainer, accelerate, and two processes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import quantkit
from quantkit.nn.fake import FakeModule
from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[2]
IDS = torch.randint(3, 190, (8, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def test_transformers_trainer_trains_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_KERNEL", "reference")
    from transformers import Trainer, TrainingArguments

    def trained(steps: int, resume: bool = False) -> tuple[nn.Module, list[float]]:
        model = quantkit.prepare(tiny_llama(), "w3a16-asym-g32")
        arguments = TrainingArguments(
            tmp_path / "trainer", max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
            learning_rate=2e-3, lr_scheduler_type="constant", logging_steps=1, save_steps=5, report_to=[], disable_tqdm=True,
            seed=0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
        trainer.train(resume_from_checkpoint=resume)
        return model, [one["loss"] for one in trainer.state.log_history if "loss" in one]

    whole, losses = trained(10)
    assert losses[-1] < losses[0]
    for folder in sorted((tmp_path / "trainer").glob("checkpoint-10")):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    continued, _ = trained(10, resume=True)
    want = logits(whole)
    torch.testing.assert_close(logits(continued), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(quantkit.convert(whole)), want)
    quantkit.save(whole, tmp_path / "out")
    assert torch.equal(logits(quantkit.load(tmp_path / "out")), want)


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    """Let accelerate forget how the process was set up, before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerate_with_mixed_precision_and_accumulated_gradients() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
    model = quantkit.prepare(tiny_llama(), "w4a8-asym-g32")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    ready, optimizer = accelerator.prepare(model, optimizer)
    ready.train()
    losses = []
    for step in range(12):
        with accelerator.accumulate(ready):
            rows = IDS[step % 2 * 4 :][:4]
            loss = ready(input_ids=rows, labels=rows, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert sum(losses[-2:]) < sum(losses[:2])
    trained = accelerator.unwrap_model(ready)
    assert all(part.weight.dtype == torch.float32 for part in trained.modules() if isinstance(part, FakeModule))
    quantkit.convert(trained)


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_two_processes_are_one_with_the_same_batch(way: str, tmp_path: Path) -> None:
    """Gradients averaged by gloo; plain descent, which does not turn a rounded zero into a step of full size."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def begin(rank: int, world: int) -> subprocess.Popen:
        env = {**base, "RANK": str(rank), "WORLD_SIZE": str(world)}
        return subprocess.Popen([sys.executable, __file__, way, str(tmp_path / f"{world}-{rank}.json")], env=env)

    processes = [begin(0, 1), begin(0, 2), begin(1, 2)]
    assert [one.wait(timeout=300) for one in processes] == [0, 0, 0]
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    if way == "replicated":
        assert first["sums"] == second["sums"]
    assert first["losses"][0] != pytest.approx(second["losses"][0])
    for name, value in alone["sums"].items():
        assert first["sums"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert first["refused"] == (way == "sharded")
    together = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert together == pytest.approx(alone["losses"], rel=1e-3)


def run_rank(way: str, out: Path) -> None:
    """Train on this rank's rows, and write losses and sums of all trained parameters."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = quantkit.prepare(tiny_llama(), "w4a16-asym-g32")
    trained = model
    if world > 1:
        torch.distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model) if way == "replicated" else sharded(model)
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.05)
    rows, losses = IDS[rank::world], []
    for _ in range(4):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    state, refused = trained.state_dict(), False
    if world > 1 and way == "sharded":
        state = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True))
        try:
            quantkit.convert(trained)
        except quantkit.SpecError as error:
            refused = "spread over processes" in str(error)
    if state:  # gathered on the first
        whole = quantkit.prepare(tiny_llama(), "w4a16-asym-g32")
        whole.load_state_dict(state)
        state = dict(quantkit.convert(whole).named_parameters()) | state
    sums = {name: float(p.detach().double().sum()) for name, p in state.items() if p.is_floating_point()}
    out.write_text(json.dumps({"losses": losses, "sums": sums, "refused": refused}))
    if world > 1:
        torch.distributed.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


if __name__ == "__main__":
    run_rank(sys.argv[1], Path(sys.argv[2]))
