"""Blocks learned from their float output: the error falls or nothing changes, and kills change nothing."""

import logging
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantkit.calibrate.chain import collect_statistics
from quantkit.calibrate.data import Calibration
from quantkit.errors import CalibrationError, SpecError
from quantkit.hf.structure import describe
from quantkit.nn.learned import TunedWeight, substituted
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.nn.sites import Site
from quantkit.numerics import grid
from quantkit.pipeline.quantize import collect, quantize
from quantkit.pipeline.settings import Run
from quantkit.quantizers.autoround import AutoRound
from quantkit.quantizers.gptaq import GPTAQ
from quantkit.quantizers.rtn import nearest
from quantkit.spec import QuantSpec
from quantkit.system.compute import Compute
from quantkit.system.progress import Progress
from tests.tiny import FAMILIES, tiny_llama

EXACT = Compute(torch.device("cpu"), torch.float32)
SETTINGS = AutoRound(iters=40, scale_lr=0.004)


def ids() -> list[Tensor]:
    return [torch.randint(3, 190, (4, 48), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def errors(caplog: pytest.LogCaptureFixture) -> list[tuple[float, float]]:
    found = re.findall(r"output error (\S+) before learning, (\S+) after", caplog.text)
    return [(float(before), float(after)) for before, after in found]


@pytest.mark.parametrize("family", ["llama_tied", "qwen3_moe", "gpt_oss"])
def test_the_error_of_a_blocks_output_falls(family: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quantkit.pipeline.blocks")
    model, plain = FAMILIES[family](), FAMILIES[family]()
    quantize(plain, "w2a16-asym-g32", method=GPTAQ(), calibration=Calibration(data=ids()), run=Run(compute=EXACT))
    result = quantize(model, "w2a16-asym-g32", method=SETTINGS, calibration=Calibration(data=ids()), run=Run(compute=EXACT))
    assert all(after < 0.97 * start for start, after in errors(caplog))
    assert len(errors(caplog)) == len(describe(FAMILIES[family]()).blocks)
    assert result.metadata["output_error"]["max"] == pytest.approx(max(after for _, after in errors(caplog)), rel=1e-2)
    for name, value in model.named_parameters():
        assert torch.equal(value, plain.get_parameter(name))
        assert value.requires_grad == plain.get_parameter(name).requires_grad


def test_a_block_that_would_get_worse_keeps_what_it_started_with(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quantkit.pipeline.blocks")
    wild = AutoRound(iters=2, lr=0.99, scale_lr=0.9, batch_size=4)
    learned, start = tiny_llama(), tiny_llama()
    quantize(learned, "w3a16-asym-g32", method=wild, calibration=Calibration(data=ids()), run=Run(compute=EXACT))
    quantize(start, "w3a16-asym-g32", method=GPTAQ(), calibration=Calibration(data=ids()), run=Run(compute=EXACT))
    assert all(after > before for before, after in errors(caplog))
    for name, value in start.state_dict().items():
        assert torch.equal(learned.state_dict()[name], value)


def test_an_interrupted_run_gives_the_same_files(tmp_path: Path) -> None:
    def run(out: Path, stop: str | None = None) -> dict[str, bytes]:
        def progress(event: Progress) -> None:
            if event.detail == stop:
                raise KeyboardInterrupt

        quantize(
            tiny_llama(),
            "w3a16-asym",
            out=out,
            method=AutoRound(iters=6),
            calibration=Calibration(data=ids()),
            run=Run(progress=progress),
        )
        return {p.name: p.read_bytes() for p in sorted(out.iterdir())}

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "q", stop="model.layers.0")
    assert (tmp_path / "q" / "incomplete" / "run" / "chain-00000.safetensors").exists()
    assert run(tmp_path / "q") == whole


def test_what_cannot_work_is_refused_before_long_work() -> None:
    with pytest.raises(SpecError, match="autoround: iters=0"):
        AutoRound(iters=0)
    statistics, _ = collect(tiny_llama(), calibration=Calibration(data=ids()))
    with pytest.raises(CalibrationError, match="autoround learns from activations, which statistics= do not hold"):
        quantize(tiny_llama(), "w4a16", method="autoround", calibration=Calibration(statistics=statistics))


def test_drift_begins_at_half_of_what_rounding_took() -> None:
    spec = QuantSpec("int3", (1, 16), symmetric=False)
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    start = nearest(weight, grid.choose_qparams(weight, spec), spec)
    tuned = TunedWeight(start, torch.float32, code_rate=0.1, origin=weight)
    assert torch.equal(tuned.result().codes(), start.codes())
    back = (tuned.levels + 2 * tuned.drift.float()) * start.scale.float()[:, None, :, None]  # type: ignore[union-attr]
    torch.testing.assert_close(back.view(8, 32), weight, atol=0.02, rtol=0)


class Mixed(nn.Module):
    """A linear layer and a stack of experts beside other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.first, self.stack, self.last = (nn.Parameter(torch.randn(2, 8, 16)) for _ in range(3))


def test_substitutes_leave_no_trace() -> None:
    model, spec = Mixed(), QuantSpec("int4", (1, 16))
    before = dict(model.named_parameters())
    sites = [Site("linear", "linear", "weight", (8, 16)), Site("stack", "", "stack", (2, 8, 16))]

    def tuned(site: Site) -> TunedWeight:
        weight = model.get_parameter(f"{site.module}.{site.parameter}".lstrip("."))
        return TunedWeight(nearest(weight.detach(), grid.choose_qparams(weight.detach(), spec), spec), torch.float32)

    with substituted(model, {site: tuned(site) for site in sites}):
        assert isinstance(model.stack, TunedWeight)
        assert model.linear(torch.randn(3, 16)).shape == (3, 8)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is value for name, value in before.items())


def test_products_of_bfloat16_numbers_change_little_and_leave_the_quantizer_exact() -> None:
    rounding = Compute(torch.device("cpu"), torch.float32, torch.bfloat16)
    seen = []

    class Watching(GPTAQ):
        def quantize(self, weight: Tensor, spec: QuantSpec, statistics: object):  # type: ignore[no-untyped-def]
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().quantize(weight, spec, statistics)  # type: ignore[arg-type]

    models = [tiny_llama(), tiny_llama()]
    for model, compute in zip(models, (EXACT, rounding), strict=True):
        quantize(model, "w8a16", method=Watching(), calibration=Calibration(data=ids()), run=Run(compute=compute))
    assert not any(seen)
    outputs = [model(ids()[0]).logits for model in models]
    assert (outputs[0] - outputs[1]).norm() < 0.02 * outputs[0].norm()
    assert all(isinstance(m, QuantLinear | QuantWeight) for n, m in models[1].named_modules() if n.endswith("_proj"))
    exact, rounded = (
        collect_statistics(tiny_llama(), describe(tiny_llama()), ids(), ("hessian",), compute=compute, progress=lambda _: None)
        for compute in (EXACT, rounding)
    )
    for name, one in exact.items():
        other = rounded[name].results["hessian"]
        assert 0 < (one.results["hessian"] - other).norm() < 0.01 * other.norm()
