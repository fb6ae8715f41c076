"""What every quantizer in the registry promises."""

import pytest
import torch

from quantkit.calibrate.collectors import COLLECTORS, Hessian
from quantkit.errors import CalibrationError, SpecError
from quantkit.nn.sites import SiteStatistics
from quantkit.qtensor import GridTensor
from quantkit.quantizers.base import QUANTIZERS, quantize_site, relative_error
from quantkit.quantizers.gptaq import GPTAQ
from quantkit.quantizers.gptq import GPTQ, inverse_factor
from quantkit.quantizers.hqq import HQQ
from quantkit.quantizers.rtn import RTN
from quantkit.spec import QuantSpec

NAMES = QUANTIZERS.names()
SPECS = [
    QuantSpec("int4", (1, 32)),
    QuantSpec("int4", (1, 32), symmetric=False),
    QuantSpec("int3", (1, 64), symmetric=False),
    QuantSpec("int8"),
    QuantSpec("int2", (1, 32), symmetric=False, scale_dtype="bfloat16"),
    QuantSpec("int5", (8, 32), scale_dtype="float32"),
    QuantSpec("int6", (-1, -1)),
]


def problem(out: int = 24, features: int = 128, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, SiteStatistics]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) * torch.rand(features, generator=generator)
    x = torch.randn(tokens, features, generator=generator) @ mix
    weight = torch.randn(out, features, generator=generator)
    return weight, statistics_of(x)


def statistics_of(x: torch.Tensor) -> SiteStatistics:
    collector = Hessian(x.shape[1])
    collector.update(x)
    hessian = collector.result()
    return SiteStatistics({"hessian": hessian, "mean_square": hessian.diagonal().double()}, (x.shape[0],))


def forgiving_error(weight: torch.Tensor, qtensor: GridTensor) -> float:
    """Return what HQQ minimises: the sum of |error|^p over a quantized ``weight``."""
    return float((weight - qtensor.dequantize()).abs().pow(HQQ.p).sum(dtype=torch.float64))


OBJECTIVES = {"hqq": forgiving_error}
"""Quantizers that minimise something else than the error of the layer's output."""


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
@pytest.mark.parametrize("name", NAMES)
def test_not_worse_than_rounding_in_what_it_optimises(name: str, spec: QuantSpec) -> None:
    weight, statistics = problem()
    quantizer = QUANTIZERS.get(name)()
    known = {"hessian", "mean_square"} & set(quantizer.needs)
    seen = SiteStatistics({key: statistics.results[key] for key in known}, statistics.tokens) if known else None
    own = OBJECTIVES.get(name, lambda w, q: relative_error(w, q.dequantize(), seen))
    ours = own(weight, quantize_site(quantizer, "s", weight, spec, seen).qtensor)
    rounded = own(weight, quantize_site(RTN(), "s", weight, spec, None).qtensor)
    assert ours <= rounded * 1.0001


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_and_input_untouched(name: str) -> None:
    weight, statistics = problem()
    before = weight.clone()
    first, second = (quantize_site(QUANTIZERS.get(name)(), "s", weight, SPECS[1], statistics) for _ in range(2))
    assert torch.equal(first.qtensor.packed, second.qtensor.packed)
    assert torch.equal(first.qtensor.scale, second.qtensor.scale)
    assert first.loss == second.loss
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", NAMES)
def test_dead_columns_are_harmless(name: str) -> None:
    weight, _ = problem()
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(2))
    x[:, 32:70] = 0  # one whole group and parts of others
    result = quantize_site(QUANTIZERS.get(name)(), "s", weight, SPECS[0], statistics_of(x))
    assert torch.isfinite(result.qtensor.dequantize()).all()
    worst = (result.qtensor.dequantize() - weight)[:, 32:70].abs()
    step = result.qtensor.scale.float().abs().repeat_interleave(32, 1)[:, 32:70]
    assert (worst <= step * 8).all()


@pytest.mark.parametrize("name", NAMES)
def test_ragged_groups_and_bad_weights_are_refused(name: str) -> None:
    weight, statistics = problem(features=96)
    with pytest.raises(SpecError, match=r"s: in=96 is not a multiple of group_size 64; use 32 or channel"):
        quantize_site(QUANTIZERS.get(name)(), "s", weight, QuantSpec("int4", (1, 64)), statistics)
    weight[3, 5] = torch.nan
    with pytest.raises(CalibrationError, match="s: the weight holds NaN"):
        quantize_site(QUANTIZERS.get(name)(), "s", weight, QuantSpec("int4", (1, 32)), statistics)


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_of_experts_equals_a_loop(name: str) -> None:
    problems = [problem(seed=seed) for seed in range(3)]
    weight = torch.stack([w for w, _ in problems])
    stacked = SiteStatistics(
        {key: torch.stack([s.results[key] for _, s in problems]) for key in ("hessian", "mean_square")}, (400, 400, 400)
    )
    whole = quantize_site(QUANTIZERS.get(name)(), "s", weight, SPECS[1], stacked)
    for i, (matrix, statistics) in enumerate(problems):
        alone = quantize_site(QUANTIZERS.get(name)(), "s", matrix, SPECS[1], statistics)
        assert torch.equal(whole.qtensor[i].dequantize(), alone.qtensor.dequantize())


def test_an_expert_without_tokens_falls_back_and_says_so() -> None:
    (weight, statistics), (other, _) = problem(seed=0), problem(seed=1)
    empty = torch.zeros_like(statistics.results["hessian"])
    stacked = SiteStatistics({"hessian": torch.stack([statistics.results["hessian"], empty])}, (400, 0))
    result = quantize_site(GPTQ(), "s", torch.stack([weight, other]), SPECS[0], stacked)
    assert result.fell_back
    assert result.notes == ("expert 1: no calibration input: rounded to nearest",)
    rounded = quantize_site(RTN(), "s", other, SPECS[0], None)
    assert torch.equal(result.qtensor[1].packed, rounded.qtensor.packed)


def test_hqq_gives_most_weights_a_better_grid_where_a_few_are_outliers() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(5))
    weight[:, ::64] *= 4  # one outlier in every group of 64
    for spec in (SPECS[2], QuantSpec("int3", (1, 64))):
        errors = {
            name: (weight - quantize_site(one, "s", weight, spec, None).qtensor.dequantize()).abs().median()
            for name, one in {"hqq": HQQ(), "rtn": RTN()}.items()
        }
        assert errors["hqq"] < 0.9 * errors["rtn"]
        objectives = [
            forgiving_error(weight, quantize_site(HQQ(rounds=n), "s", weight, spec, None).qtensor) for n in (0, 5, 20)
        ]
        assert objectives[2] <= objectives[1] < objectives[0]
    with pytest.raises(SpecError, match="p=2"):
        HQQ(p=2)


def test_gptq_compensates_and_activation_order_helps() -> None:
    weight, statistics = problem(out=64, features=256, seed=4)
    spec = QuantSpec("int3", (1, 64), symmetric=False)
    losses = {}
    for label, quantizer in {
        "rtn": RTN(),
        "plain": GPTQ(act_order=False, clip="absmax"),
        "ordered": GPTQ(clip="absmax"),
    }.items():
        losses[label] = relative_error(
            weight, quantize_site(quantizer, "s", weight, spec, statistics).qtensor.dequantize(), statistics
        )
    assert losses["plain"] < 0.8 * losses["rtn"]
    assert losses["ordered"] < 0.8 * losses["rtn"]


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[2], SPECS[4], SPECS[5]], ids=QuantSpec.describe)
def test_rounds_of_descent_lower_the_error_every_time(spec: QuantSpec) -> None:
    weight, statistics = problem(out=64, features=256, seed=4)
    losses = [quantize_site(GPTQ(rounds=rounds), "s", weight, spec, statistics).loss for rounds in range(4)]
    assert losses[3] <= losses[2] <= losses[1] <= losses[0]
    assert losses[1] < 0.99 * losses[0]


def test_gptaq_comes_closer_to_the_float_models_outputs_than_gptq() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, _ = problem(out=32, features=128)
    float_x = torch.randn(2000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    x = float_x * 1.05 + 0.3 * float_x.roll(1, 1) + torch.randn(2000, 128, generator=generator)
    statistics = statistics_of(x)
    drift = COLLECTORS.get("drift")(128)
    drift.update(torch.cat([x, float_x], 1))
    statistics.results["drift"] = drift.result()
    errors = {}
    for name, quantizer in {"gptq": GPTQ(), "half": GPTAQ(), "full": GPTAQ(correction=1.0)}.items():
        quantized = quantize_site(quantizer, "s", weight, SPECS[1], statistics).qtensor.dequantize()
        errors[name] = (float_x @ weight.T - x @ quantized.T).square().mean().item()
    assert errors["full"] < errors["half"] < errors["gptq"]
    float_best = torch.linalg.lstsq(x, float_x @ weight.T).solution.T
    unavoidable = (float_x @ weight.T - x @ float_best.T).square().mean().item()
    assert errors["full"] - unavoidable < 0.5 * (errors["gptq"] - unavoidable)


def test_gptq_matches_the_unblocked_algorithm() -> None:
    """Algorithm 1 written as plainly as possible, in float64, gives the same codes."""
    weight, statistics = problem(out=12, features=96, seed=7)
    spec = QuantSpec("int4", (1, 32), symmetric=False)
    result = quantize_site(GPTQ(rounds=0), "s", weight, spec, statistics).qtensor
    hessian = statistics.results["hessian"].double()
    order = statistics.results["hessian"].diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order][:, order] + 0.01 * hessian.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scale = result.scale.double().repeat_interleave(32, 1)[:, order]
    zero = result.zero_point.double().repeat_interleave(32, 1)[:, order]  # type: ignore[union-attr]
    left = weight.double()[:, order].clone()
    codes = torch.empty(12, 96)
    for k in range(96):
        code = (left[:, k] / scale[:, k]).round().add(zero[:, k]).clamp(0, 15)
        error = (left[:, k] - (code - zero[:, k]) * scale[:, k]) / upper[k, k]
        left[:, k:] -= error[:, None] * upper[k, k:]
        codes[:, order[k]] = code.float()
    differing = (codes != result.codes().float()).float().mean()
    assert differing < 0.01  # ties and float32 rounding may flip single codes


def test_failing_cholesky_gets_more_damping_and_says_so() -> None:
    indefinite = torch.eye(4)
    indefinite[0, 1] = indefinite[1, 0] = 1.005
    factor, damping = inverse_factor(indefinite, 0.001)
    assert damping == pytest.approx(0.01)
    assert torch.isfinite(factor).all()
    statistics = SiteStatistics({"hessian": indefinite}, (10,))
    result = quantize_site(GPTQ(damping=0.001), "s", torch.randn(2, 4), QuantSpec("int8"), statistics)
    assert "needed damping" in result.notes[0]
    with pytest.raises(CalibrationError, match="cannot be factorised"):
        inverse_factor(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 0.01)


def test_unknown_quantizer_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'gptq'"):
        QUANTIZERS.get("gptqq")
