"""Several processes carry out one run: the same bytes whatever their number, one message when one dies, and a way on."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.calibrate.collectors import COLLECTORS
from quantkit.calibrate.data import Calibration
from quantkit.calibrate.together import together
from quantkit.checkpoint.handed import Share
from quantkit.errors import QuantkitError, WorkerError
from quantkit.hf.structure import describe
from quantkit.nn.sites import Site, SiteStatistics
from quantkit.pipeline.memory import memory_of, run_size
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.settings import Run
from quantkit.pipeline.together import check_agreement, check_windows, refuse_together
from quantkit.presets import preset
from quantkit.quantizers.base import QUANTIZERS, quantize_site
from quantkit.quantizers.divide import portions
from quantkit.quantizers.gptq import GPTQ
from quantkit.system.progress import Progress
from quantkit.system.workers import ALONE, Workers, launched
from quantkit.transforms.base import STEPS
from tests.tiny import FAMILIES, tiny_llama

ROOT = Path(__file__).parents[2]
IDS = [torch.randint(3, 190, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(5)]
CASES = {"llama": "gptq", "qwen3_moe": "gptq", "llama_tied": "gptaq", "qwen2": "rtn"}
SCHEME = preset("w4a16-asym-g32", [64, 96])
DEADLY = "REHEARSE_DEATH"


def start(count: int, out: Path, **environment: str) -> list[subprocess.Popen[str]]:
    """Start processes as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = [base | environment | {"RANK": str(rank), "WORLD_SIZE": str(count)} for rank in range(count)]
    command = [sys.executable, __file__, str(out)]
    return [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for env in own]


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Return exit codes and what was said."""
    said = [one.communicate(timeout=1200)[1] for one in processes]
    return [(one.returncode, text) for one, text in zip(processes, said, strict=True)]


def weights(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))


def test_the_bytes_do_not_depend_on_the_number_of_workers_nor_on_a_death(tmp_path: Path) -> None:
    runs = {count: start(count, tmp_path / f"{count}") for count in (1, 2)}
    for count, processes in runs.items():
        assert [code for code, _ in finish(processes)] == [0] * count
    for family in CASES:
        assert weights(tmp_path / "1" / family) == weights(tmp_path / "2" / family), family
        apart = json.loads((tmp_path / "2" / f"{family}.json").read_text())["apart"]
        assert apart < 1e-4, "the other worker reads what was written"
    first, second = finish(start(2, tmp_path / "killed", **{DEADLY: "1"}))
    assert second[0] == -signal.SIGKILL
    assert first[0] == 3
    assert first[1].count("a worker of this run is gone") == 1
    assert "give the same command again to continue" in first[1]
    stage = tmp_path / "killed" / "llama" / "incomplete"
    assert sorted(json.loads((stage / "run" / "state.json").read_text())["blocks"]) == ["0"]
    assert sorted(file.name for file in (stage / "run").glob("chain*")) == [
        "chain-00000-1.safetensors",
        "chain-00000.safetensors",
    ]
    assert [code for code, _ in finish(start(1, tmp_path / "killed"))] == [0], "fewer workers go on"
    assert weights(tmp_path / "killed" / "llama") == weights(tmp_path / "1" / "llama")


def worker(out: Path) -> int:
    """Quantize a model of every case with the other workers."""
    torch.set_num_threads(1)
    with launched() as workers:
        for family, method in CASES.items():
            where = out / family

            def event(event: Progress) -> None:
                deadly = os.environ.get(DEADLY) == str(workers.rank)
                if deadly and event.stage == "quantize" and event.detail.startswith("model.layers.1."):
                    os.kill(os.getpid(), signal.SIGKILL)

            model = tiny_llama(num_hidden_layers=3) if family == "llama" else FAMILIES[family]()
            run = Run(workers=workers, progress=event)
            result = quantize(model, "w4a16-asym-g32", out=where, method=method, calibration=Calibration(IDS), run=run)
            logits = result.model(IDS[0]).logits
            mine = logits.detach().clone()
            workers.spread(logits.detach(), 0)
            if workers.rank == workers.size - 1:
                (out / f"{family}.json").write_text(json.dumps({"apart": float((mine - logits).abs().max())}))
            workers.wait()
    return 0


class Several(Workers):
    """A worker whose counterparts are there only in what they say."""

    shares = True

    def __init__(self, rank: int, size: int, others: Sequence[str] = ()) -> None:
        self.rank, self.size, self._others = rank, size, others

    def texts(self, text: str) -> list[str]:
        return [text, *self._others] if self._others else [text] * self.size


class Counting(Workers):
    """One of several workers, which have agreed on the step before; remembers what it would have sent."""

    shares = True

    def __init__(self, batches: int, largest: float) -> None:
        self._batches, self._largest = batches, largest
        self.sent: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor) -> None:
        if tensor.shape == (1,):
            tensor.fill_(self._batches)
        self.sent += [tensor.clone()] if tensor.is_floating_point() else []

    def maximum(self, tensor: torch.Tensor) -> None:
        tensor.fill_(self._largest)


def summed(parts: Sequence[Sequence[torch.Tensor]], kind: str) -> torch.Tensor:
    """Return the sum of what workers send that have these batches."""
    everything = [x for part in parts for x in part]
    largest = max(8 * float(torch.linalg.vector_norm(x, dim=0).amax().double() ** 2) for x in everything)
    site, sent = Site("s", "s", "weight", (4, everything[0].shape[1])), []
    for part in parts:
        one = Counting(len(everything), largest)
        together(site, [kind], range(1), lambda part=part: ((0, {kind: x}) for x in part), one)
        sent += one.sent
    return torch.stack(sent).sum(0)


@pytest.mark.parametrize("kind", ["hessian", "mean_square", "mean"])
def test_sums_are_exact_so_that_their_order_does_not_matter(kind: str) -> None:
    batches = [torch.randn(7, 16, generator=torch.Generator().manual_seed(i)) * 10.0 ** (i % 5 - 2) for i in range(12)]
    collector = COLLECTORS.get(kind)(16)
    for x in batches:
        collector.update(x)
    ways = [[batches], [batches[::-1]], [batches[::2], batches[1::2]], [batches[:1], batches[1:5], batches[5:]]]
    exact = [summed(parts, kind) for parts in ways]
    assert exact[0].dtype == torch.float64
    assert all(torch.equal(one, exact[0]) for one in exact)
    wanted = collector.state["sum"].double()
    torch.testing.assert_close(exact[0], wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("rows", [1, 64, 65, 200, 1000])
def test_portions_hold_every_row_once_in_whole_granules(size: int, rows: int) -> None:
    workers = Several(0, size)
    spec = SCHEME.weight
    found = portions(spec, (rows, 64), workers, divisible=True)
    assert len(found) == size
    assert [row for part in found for row in range(rows)[part]] == list(range(rows))
    assert all(part.start % 64 == 0 for part in found if part.stop > part.start)
    assert portions(spec, (rows, 64), workers, divisible=False)[0] == slice(0, rows)


def test_a_part_of_a_weight_is_what_it_is_in_the_whole() -> None:
    weight, x = torch.randn(200, 96), torch.randn(64, 96)
    hessian = COLLECTORS.get("hessian")(96)
    hessian.update(x)
    statistics = SiteStatistics({"hessian": hessian.result()}, (64,))
    spec = SCHEME.weight
    whole = quantize_site(GPTQ(), "s", weight, spec, statistics).qtensor
    for part in portions(spec, (200, 96), Several(0, 3), divisible=True):
        some = quantize_site(GPTQ(), "s", weight[part], spec, statistics).qtensor
        assert torch.equal(some.codes(), whole.codes()[part])


def test_hidden_states_are_numbered_among_those_of_all_workers() -> None:
    first, second = (Share(Several(rank, 2, others), 3 - rank) for rank, others in ((0, ["2"]), (1, ["2"])))
    assert first.numbers(3) == [0, 2, 4]
    assert first.numbers(6) == [0, 2, 4, 5, 7, 9]
    assert Share().numbers(4) == [0, 1, 2, 3]
    assert second.batches == 2


@pytest.mark.parametrize(
    ("method", "steps", "written", "said"),
    [
        ("autoround", [], True, "method autoround: its work cannot be divided"),
        ("gptq", ["awq"], True, "step awq: workers"),
        ("gptq", [], False, "none is asked for; give out="),
    ],
)
def test_what_workers_cannot_do_is_refused_by_name(method: str, steps: list[str], written: bool, said: str) -> None:
    made = [STEPS.get(one)() for one in steps]
    with pytest.raises(WorkerError, match=said):
        refuse_together(Several(0, 2), QUANTIZERS.get(method)(), made, written=written)
    refuse_together(ALONE, QUANTIZERS.get(method)(), made, written=written)


def test_guided_statistics_are_refused() -> None:
    with pytest.raises(WorkerError, match="cannot collect guided_hessian; leave guided=True out"):
        refuse_together(Several(0, 2), GPTQ(guided=True), [], written=True)


def test_more_workers_than_batches_are_refused() -> None:
    with pytest.raises(WorkerError, match="6 workers share 5 batches"):
        check_windows(Several(0, 6), IDS)
    check_windows(Several(0, 5), IDS)


def test_workers_that_are_about_to_do_other_things_are_named() -> None:
    model: Any = tiny_llama()
    with pytest.raises(WorkerError, match="worker 1 has other model, plan than worker 0"):
        check_agreement(Several(0, 2, ['{"plan": "b", "model": "c"}']), model, {"plan": "a"})


def test_half_an_environment_of_a_launcher_is_refused() -> None:
    with pytest.raises(WorkerError, match="RANK is not set; start it by torchrun"), launched({"WORLD_SIZE": "2"}):
        pass
    with launched({}) as workers:
        assert workers is ALONE


def test_a_recipe_says_nothing_about_workers() -> None:
    with pytest.raises(QuantkitError, match="launched"):
        Run(workers=2)


def test_memory_of_a_worker_holds_the_exact_sums() -> None:
    model = tiny_llama()
    structure = describe(model)
    plan = dict.fromkeys((site.name for site in structure.sites), SCHEME)
    size = run_size(model, structure, structure.sites, 64, 32)
    alone, shared = (memory_of(model, structure, plan, one, GPTQ()) for one in (size, replace(size, shared=True)))
    assert shared.calibrating - alone.calibrating == 8 * 96**2


if __name__ == "__main__":
    try:
        sys.exit(worker(Path(sys.argv[1])))
    except WorkerError as error:
        print(error, file=sys.stderr)
        sys.exit(3)
