"""Every scheme runs natively: which kernel takes it, and that a step of the native engine computes what the modules do."""

import dataclasses
import functools

import pytest
import torch

import quantkit
from quantkit.hf.lowering.lower import lower
from quantkit.hf.structure import describe
from quantkit.kernels import KERNELS, Problem
from quantkit.kernels.cpu import decoder
from quantkit.kernels.cpu.decoder import NativeDecoder
from quantkit.kernels.program import reference
from quantkit.nn.install import float_activations, install
from quantkit.nn.sites import read_weight
from quantkit.numerics.inputs import InputQuantizer, static_scale
from quantkit.presets import NAMED, PRESETS, preset
from quantkit.spec import BLOCK_GRIDS, ActivationSpec, QuantSpec, Scheme, block_spec
from tests.kernels.test_decoder import assert_close, read, some_ids
from tests.tiny import FAMILIES

READ = {  # what other writers' files hold, beside the presets
    "mlx": Scheme(QuantSpec("int4", (1, 64), False, "bfloat16", offset=True)),
    "awq": Scheme(QuantSpec("int4", (1, 128), False)),
    "gptq-3": Scheme(QuantSpec("int3", (1, 128), False)),
    "w8a8-g64": preset("w8a8-g64", [256]),
    "w4a8-channel": preset("w4a8-channel", [256]),
    "inputs of 4 bits": Scheme(QuantSpec("int4", (1, 64)), ActivationSpec(QuantSpec("int4", (1, -1), True, "float32"))),
    "nf4, inputs int8": Scheme(QuantSpec("nf4", (1, 64)), ActivationSpec(QuantSpec("int8", (1, -1), True, "float32"))),
    **{name: Scheme(block_spec(name)) for name in BLOCK_GRIDS},
}
SCHEMES = {**{name: preset(name, [256]) for name in (*PRESETS, *NAMED)}, **READ}


def weight_of(weight: torch.Tensor, scheme: Scheme):
    """Return a weight on a scheme's grid, with an input scale where that is static."""
    spec, inputs = scheme.weight, InputQuantizer(scheme.activation)
    if spec.offset:
        plain = quantkit.RTN().quantize(weight, dataclasses.replace(spec, offset=False), None)[0]
        offset = (-plain.zero_point.float() * plain.scale.float()).to(plain.scale.dtype)
        return dataclasses.replace(plain, spec=spec, zero_point=offset)
    qtensor = quantkit.RTN().quantize(inputs.prepare_weight(weight), spec, None)[0]
    if not scheme.static:
        return qtensor
    return qtensor.with_parts({"input_scale": static_scale(scheme.activation, torch.full((weight.shape[1],), 4.0))})


@functools.cache
def model_of(name: str):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_key_value_heads": 4, "head_dim": 64}
    model = FAMILIES["llama"](**sizes)
    for site in describe(model).sites:
        install(model, site, weight_of(read_weight(model, site).float(), SCHEMES[name]), SCHEMES[name].activation)
    return model


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_has_a_compiled_kernel(name):
    problem = Problem(SCHEMES[name].weight, (256, 512), "cpu", torch.bfloat16)
    assert KERNELS.get("cpu").rejects(problem) is None
    reason = KERNELS.get("cpu-int8").rejects(problem)
    assert (reason is None) != name.startswith("fp8"), reason


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_runs_natively(name):
    model, scheme, ids = model_of(name), SCHEMES[name], some_ids(21)
    program = lower(model)
    assert decoder.rejects(program) is None
    want = reference.logits(program, torch.tensor(ids))
    native = NativeDecoder(program)
    if scheme.activation is None:
        assert_close(read(native, ids), want, 5e-6)
        allowed = 0.03 * want.abs().mean()
    else:  # a difference of the last bit is now and then rounded the other way
        with float_activations(model):
            far = (reference.logits(program, torch.tensor(ids)) - want).abs().mean()
        allowed = 0.02 * want.abs().mean() if scheme.rotated else 0.2 * far
    for options in ({}, {"exact": False}, {"bfloat16": True}):
        whole = read(native, ids, **options)
        assert (whole - want).abs().mean() < allowed, options
        assert torch.equal(read(native, ids, [1, 2, 5], **options), whole)
