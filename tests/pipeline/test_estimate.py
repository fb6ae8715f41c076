"""Predictions made without weights, compared with what is then really written."""

import pytest
import torch
from safetensors import safe_open

from quantkit import checkpoint
from quantkit.calibrate.data import Calibration
from quantkit.checkpoint.contents import contents_of
from quantkit.nn.install import install
from quantkit.nn.sites import read_weight
from quantkit.numerics import grid
from quantkit.pipeline.estimate import estimate
from quantkit.pipeline.plan import make_plan
from quantkit.pipeline.rules import Rule
from quantkit.qtensor import GridTensor
from quantkit.quantizers.autoround import AutoRound
from quantkit.quantizers.gptaq import GPTAQ
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.rtn import RTN, nearest
from quantkit.spec import QuantSpec, Scheme
from quantkit.transforms.bias import BiasCorrection
from quantkit.transforms.distill import Distill
from quantkit.transforms.rotate import Rotate
from quantkit.transforms.smoothquant import SmoothQuant
from tests import tiny


@pytest.mark.parametrize(
    "spec", [QuantSpec("int3", (1, 32)), QuantSpec("int4", (1, -1), False), QuantSpec("int5", (8, 16), False)]
)
@pytest.mark.parametrize("shape", [(24, 96), (3, 16, 32)])
def test_an_empty_qtensor_has_the_size_of_a_full_one(spec, shape):
    weight = torch.randn(shape)
    qparams = grid.choose_qparams(weight, spec)
    full = GridTensor.from_codes(grid.quantize(weight, *qparams, spec), *qparams, spec)
    assert (GridTensor.empty(spec, shape).nbytes, GridTensor.empty(spec, shape).shape) == (full.nbytes, full.shape)


@pytest.mark.parametrize(
    ("family", "format"),
    [
        *(
            (family, format)
            for family in ("llama", "llama_tied", "qwen3_moe", "phi3")
            for format in ("compressed-tensors", "native")
        ),
        ("gpt2", "native"),
    ],
)
def test_predicted_bytes_are_the_written_bytes(family, format, tmp_path):
    model = tiny.FAMILIES[family]()
    contents = contents_of(model.config)
    plan = make_plan(contents.structure, Scheme(QuantSpec("int4", (1, 32), False))).plan
    predicted = estimate(contents, plan, RTN(), format=format)
    numel = nbytes = 0
    for site in contents.sites.values():
        if site.name in plan:
            weight, spec = read_weight(model, site), plan[site.name].weight
            parts = [nearest(w, grid.choose_qparams(w, spec), spec) for w in (weight if weight.dim() == 3 else [weight])]
            numel, nbytes = numel + weight.numel(), nbytes + sum(part.nbytes for part in parts)
            whole = grid.choose_qparams(weight, spec)
            install(model, site, GridTensor.from_codes(grid.quantize(weight, *whole, spec), *whole, spec))
    checkpoint.save(model, tmp_path / "out", plan=plan, format=format)
    written = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            written += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert predicted.total_bytes == written
    assert predicted.weights == numel
    assert predicted.bits_per_weight == nbytes * 8 / numel
    assert predicted.total_bytes < predicted.float_bytes


def test_what_stays_in_float_is_counted_once_with_its_reason():
    model = tiny.FAMILIES["llama_tied"]()
    contents = contents_of(model.config)
    plan = make_plan(contents.structure, "w4a16", [Rule("q_proj", skip=True)]).plan
    found = estimate(contents, plan, RTN(), reasons={name: "my reason" for name in contents.sites})
    assert found.kept["my reason"] == (2, 2 * 64 * 64)
    assert found.kept["tied to model.embed_tokens.weight"] == (1, 0)
    kept = sum(numel for _, numel in found.kept.values())
    assert kept + found.weights == sum(p.numel() for p in model.parameters())


def test_calibration_costs_memory_and_a_pass():
    contents = contents_of(tiny.FAMILIES["llama"]().config)
    plan = make_plan(contents.structure, "w4a16").plan
    text = [Calibration(samples=n, length=1000) for n in (1000, 2000)]
    without, small, large = estimate(contents, plan, RTN()), *(estimate(contents, plan, GPTQ(), calibration=t) for t in text)
    assert without.peak_bytes < small.peak_bytes < large.peak_bytes
    assert (len(without.passes), len(small.passes)) == (1, 2)
    assert "1,000,000 tokens" in small.passes[0]


def test_a_quantizer_says_what_else_a_block_goes_through():
    contents = contents_of(tiny.FAMILIES["llama"]().config)
    plan = make_plan(contents.structure, "w4a16").plan
    text = Calibration(samples=1000, length=1000)
    plain, paired, learned = (estimate(contents, plan, one, calibration=text) for one in (GPTQ(), GPTAQ(), AutoRound(iters=7)))
    assert plain.peak_bytes < paired.peak_bytes < learned.peak_bytes
    assert paired.passes[0] == f"{plain.passes[0]}, and one of the float block"
    assert learned.passes[0] == f"{paired.passes[0]}, then 7 forwards and backwards of 2 windows and a last forward"


@pytest.mark.parametrize(("steps", "reads"), [([Rotate()], False), ([SmoothQuant()], True), ([BiasCorrection()], True)])
def test_steps_that_look_at_inputs_cost_a_calibration(steps, reads):
    contents = contents_of(tiny.FAMILIES["llama"]().config)
    plan = make_plan(contents.structure, "w4a16").plan
    assert len(estimate(contents, plan, RTN(), steps).passes) == 1 + reads


def test_distillation_costs_memory_and_two_passes():
    contents = contents_of(tiny.FAMILIES["llama"]().config)
    plan = make_plan(contents.structure, "w4a16").plan
    without, small, large = (
        estimate(contents, plan, RTN(), steps)
        for steps in ((), [Distill(steps=3, windows=64)], [Distill(steps=3, windows=640)])
    )
    assert without.peak_bytes < small.peak_bytes < large.peak_bytes
    assert "float model: one forward of up to 98,304 tokens" in small.passes[0]
    assert "3 forwards and backwards of 64 windows" in small.passes[1]


def test_a_quantized_embedding_is_not_counted_among_what_is_kept():
    model = tiny.FAMILIES["llama"]()
    contents = contents_of(model.config)
    table = {"model.embed_tokens": Scheme(QuantSpec("int8"))}
    plan = {**make_plan(contents.structure, "w8a16-channel").plan, **table}
    found = estimate(contents, plan, RTN(), format="native")
    assert "embedding" not in found.kept
    assert found.weights + sum(size for _, size in found.kept.values()) == model.num_parameters()
