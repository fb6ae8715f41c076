"""Steps of a run: their order, what they are asked before any work, and statistics that do not fit."""

import dataclasses

import pytest
import torch

from quantkit.calibrate.data import Calibration
from quantkit.errors import CalibrationError, SpecError
from quantkit.nn.sites import SiteStatistics
from quantkit.pipeline.quantize import collect, quantize
from quantkit.pipeline.steps import make_steps
from quantkit.transforms.awq import AWQ
from quantkit.transforms.base import Transform
from quantkit.transforms.bias import BiasCorrection
from quantkit.transforms.distill import Distill
from quantkit.transforms.rotate import Rotate
from tests.tiny import FAMILIES, tiny_llama


def ids() -> list[torch.Tensor]:
    return [torch.randint(3, 190, (2, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def statistics(family: str = "llama", collectors: tuple[str, ...] = ("hessian",)) -> dict[str, SiteStatistics]:
    return collect(FAMILIES[family](), collectors, calibration=Calibration(data=ids()))[0]


def refused(method: str, known: dict[str, SiteStatistics], match: str, family: str = "llama", scheme: str = "w4a16") -> None:
    """Quantizing with statistics fails as expected, and the model is as before."""
    model = FAMILIES[family]()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(CalibrationError, match=match):
        quantize(model, scheme, method=method, calibration=Calibration(statistics=known))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_steps_are_sorted_by_stage_and_keep_their_order() -> None:
    steps = make_steps(["awq", "rotate", BiasCorrection()])
    assert (steps.before, steps.during, steps.after) == ((AWQ(), Rotate()), (BiasCorrection(),), ())
    assert steps.all == (AWQ(), Rotate(), BiasCorrection())
    assert make_steps(["smoothquant", "smoothquant"]).all[0] == make_steps(["smoothquant"]).all[0]


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        (["bias-correction", "rotate"], "rotate comes after bias-correction; first what rewrites the float model"),
        ([Distill(), "awq"], "awq comes after distill"),
        (["distill", "bias-correction"], "bias-correction comes after distill"),
        (["distill", Distill(steps=3)], "distill is given twice"),
        (["bias-correction", "bias-correction"], "bias-correction is given twice"),
        (["rotat"], "unknown step 'rotat'; did you mean 'rotate'"),
    ],
)
def test_steps_in_a_wrong_order_are_refused(steps: list[str], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        quantize(tiny_llama(), "w4a16", steps=steps, calibration=Calibration(data=ids()))


def test_a_transform_from_elsewhere_needs_no_other_file() -> None:
    seen: list[set[str]] = []

    @dataclasses.dataclass(frozen=True)
    class Watch(Transform):
        """Look at statistics, change nothing."""

        needs = ("mean_square",)

        def apply(self, model, structure, plan, statistics) -> None:  # type: ignore[no-untyped-def]
            seen.append({name for one in statistics.values() for name in one.results})

    result = quantize(tiny_llama(), "w8a16", method="rtn", steps=[Watch(), "rotate"], calibration=Calibration(data=ids()))
    assert seen == [{"mean_square"}]
    assert result.metadata["transforms"][0].endswith("Watch()")


def test_statistics_without_what_the_quantizer_needs_are_refused() -> None:
    known = statistics(collectors=("mean_square", "mean"))
    refused("gptq", known, r"layers\.0\.self_attn\.q_proj: statistics= hold mean_square, mean, not hessian, which gptq needs")
    refused("rtn-importance", statistics(), "not mean_square, which rtn-importance needs; collect them from this model")
    refused("gptq", statistics(), "not abs_max, which its static input scale needs", scheme="w8a8-static")


def test_statistics_of_another_model_are_refused() -> None:
    refused("gptq", statistics("opt"), r"q_proj: statistics= say nothing about this layer; they are of \d+ layers \(model\.dec")
    wide = {name: one for name, one in statistics().items() if not name.startswith("model.layers.1.")}
    refused("gptq", wide, r"model\.layers\.1\.self_attn\.q_proj: statistics= say nothing about this layer")
    narrow = collect(tiny_llama(intermediate_size=128), calibration=Calibration(data=ids()))[0]
    refused("gptq", narrow, r"down_proj: statistics= hold hessian of shape \(128, 128\), want \(\.\.\., 96\)")
    experts = statistics("mixtral")
    name = next(name for name in experts if "experts" in name)
    experts[name] = experts[name].expert(0)
    refused("gptq", experts, f"{name}: statistics= are of 1 experts, the layer has 4", "mixtral")


def test_gptaq_does_not_become_gptq_in_silence() -> None:
    refused("gptaq", statistics(), "gptaq needs drift, which compares quantized layers with the float model")
    with pytest.raises(CalibrationError, match=r"drift compares inputs behind quantized layers .* leave it out"):
        statistics(collectors=("hessian", "drift"))


def test_what_needs_no_statistics_ignores_them() -> None:
    plain, known = tiny_llama(), tiny_llama()
    quantize(plain, "w4a16", method="rtn")
    quantize(known, "w4a16", method="rtn", calibration=Calibration(statistics=statistics("opt")))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in known.state_dict().items())


def test_layers_that_read_one_tensor_share_what_is_derived_from_it() -> None:
    counted: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class Trace:
        scale: float

        def __call__(self, one: SiteStatistics) -> torch.Tensor:
            counted.append(1)
            return one.results["hessian"].trace() * self.scale

    found = statistics()
    first, second = (found[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj"))
    assert first.derived(Trace(2.0)) is second.derived(Trace(2.0))
    assert len(counted) == 1
    assert first.derived(Trace(3.0)) == pytest.approx(1.5 * first.derived(Trace(2.0)))
    assert len(counted) == 2
