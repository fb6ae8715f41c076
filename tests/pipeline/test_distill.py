"""Scales learned end to end: the gradient is right, the KL falls, everything else stays, and kills change nothing."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.calibrate.data import Calibration
from quantkit.errors import CalibrationError
from quantkit.nn.learned import TunedLinear, TunedWeight
from quantkit.numerics import grid
from quantkit.numerics.divergence import divergence_gradient
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.rules import Rule
from quantkit.pipeline.settings import Run
from quantkit.qtensor import GridTensor
from quantkit.quantizers.rtn import nearest
from quantkit.spec import QuantSpec
from quantkit.system.progress import Progress
from quantkit.transforms.distill import Distill
from tests.tiny import FAMILIES, tiny_llama

SETTINGS = Distill(steps=12, windows=2, rate=0.01, dtype="float32")


def ids() -> list[torch.Tensor]:
    return [torch.randint(3, 190, (2, 48), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def rounded(shape: tuple[int, ...], spec: QuantSpec) -> GridTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return nearest(weight, grid.choose_qparams(weight, spec), spec)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4", (1, 32), symmetric=False, scale_dtype="float32"),
        QuantSpec("int8", symmetric=False, scale_dtype="float32"),
        QuantSpec("int3", (4, 16), scale_dtype="float32"),
        QuantSpec("int2", (-1, -1), symmetric=False, scale_dtype="float32"),
    ],
    ids=QuantSpec.describe,
)
def test_products_and_their_gradients_are_those_of_the_formula(spec: QuantSpec) -> None:
    qtensor = rounded((12, 64), spec)
    tuned = TunedWeight(qtensor, torch.float32)
    assert torch.equal(tuned.weight, qtensor.dequantize())
    tuned.change.data.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
    tuned.refresh()
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    slope = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(3))
    TunedLinear(tuned, torch.ones(12))(x).backward(slope)

    change = tuned.change.detach().clone().requires_grad_()
    other = x.detach().clone().requires_grad_()
    steps = grid.expand(qtensor.scale * (1 + change), spec, (12, 64))
    zero = grid.zero_code(spec) if qtensor.zero_point is None else grid.expand(qtensor.zero_point, spec, (12, 64)).float()
    (other @ ((qtensor.codes().float() - zero) * steps).T).backward(slope)
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(tuned.change.grad, change.grad)


def test_divergence_and_its_gradient_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, wanted = (5 * torch.randn(7, 50, generator=generator) for _ in range(2))
    logits.requires_grad_()
    want = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")
    want.backward()
    total, gradient = divergence_gradient(logits.detach(), wanted)
    assert total == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(gradient, logits.grad)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_teacher_keeps_its_head_where_the_students_is_quantized(family: str) -> None:
    settings, curves = Distill(steps=1, windows=8, dtype="float32"), []
    for head in (None, "w2a16-asym-g32"):
        model = FAMILIES[family]()
        rules = [] if head is None else [Rule("head", head)]
        result = quantize(model, "w8a16", steps=[settings], rules=rules, calibration=Calibration(data=ids()))
        curves.append(result.metadata["distill"]["kl"][0])
        assert head is None or not isinstance(model.lm_head, torch.nn.Linear)
    assert curves[1] > 100 * curves[0]  # what a head of 2 bits loses is seen


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_quantized_embedding_may_have_another_dtype_than_the_products(family: str) -> None:
    model = FAMILIES[family]()
    settings = Distill(steps=2, windows=2, dtype="bfloat16")
    rules = [Rule("embedding", "w8a16")]
    result = quantize(model, "w3a16-g32", steps=[settings], rules=rules, calibration=Calibration(data=ids()))
    assert all(math.isfinite(loss) for loss in result.metadata["distill"]["kl"])


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "qwen3_moe", "gpt_oss", "gemma2"])
def test_the_kl_falls_and_only_scales_change(family: str) -> None:
    plain, tuned = (FAMILIES[family]() for _ in range(2))
    before = {name: p.clone() for name, p in plain.named_parameters()}
    first = quantize(plain, "w2a16-asym-g32", calibration=Calibration(data=ids()))
    curve: list[float] = []

    def watch(event: Progress) -> None:
        if event.stage == "distill":
            assert event.loss is not None
            curve.append(event.loss)

    second = quantize(tuned, "w2a16-asym-g32", steps=[SETTINGS], calibration=Calibration(data=ids()), run=Run(progress=watch))
    assert len(curve) == 12
    assert sum(curve[-4:]) < 0.95 * sum(curve[:4])  # the same four windows, two rounds later
    assert second.metadata["distill"]["kl"] == tuple(curve)
    for name, value in tuned.named_parameters():
        assert torch.equal(value, before[name])
        assert value.requires_grad == plain.get_parameter(name).requires_grad
    old, new = plain.state_dict(), tuned.state_dict()
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.endswith(".scale")}
    assert first.metadata["bits_per_weight"] == second.metadata["bits_per_weight"]
    logits = tuned(ids()[0]).logits
    assert torch.isfinite(logits).all()


def test_learned_codes_lower_the_kl_further_and_stay_on_the_grid() -> None:
    settings = Distill(steps=40, windows=2, rate=0.01, dtype="float32")
    last = []
    for code_rate in (0.0, 0.05):
        model = tiny_llama()
        result = quantize(
            model, "w2a16-asym", steps=[replace(settings, code_rate=code_rate)], calibration=Calibration(data=ids())
        )
        last.append(sum(result.metadata["distill"]["kl"][-2:]))
    assert last[1] < 0.9 * last[0]
    site = model.get_submodule("model.layers.1.mlp.down_proj").qtensor
    assert int(site.codes().max()) <= 3


def test_an_interrupted_distillation_gives_the_same_files(tmp_path: Path) -> None:
    def run(out: Path, stop: int | None = None) -> dict[str, bytes]:
        def progress(event: Progress) -> None:
            if event.stage == "distill" and event.done == stop:
                raise KeyboardInterrupt

        quantize(
            tiny_llama(),
            "w3a16-asym",
            out=out,
            steps=[SETTINGS],
            calibration=Calibration(data=ids()),
            run=Run(progress=progress),
        )
        return {p.name: p.read_bytes() for p in sorted(out.iterdir())}

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "q", stop=5)
    assert run(tmp_path / "q") == whole


def test_it_works_after_a_quantizer_without_calibration() -> None:
    curve = quantize(tiny_llama(), "w2a16-asym", method="rtn", steps=[SETTINGS], calibration=Calibration(data=ids())).metadata[
        "distill"
    ]["kl"]
    assert sum(curve[-4:]) < 0.95 * sum(curve[:4])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(CalibrationError, match="steps=0"):
        Distill(steps=0)
