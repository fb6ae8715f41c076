"""Modules that hold a weight once: codes let go after prepacking come back bit for bit to whoever asks; int8 activations."""

import copy
import io

import pytest
import torch
from torch import nn

from quantkit.errors import KernelError
from quantkit.kernels import KERNELS
from quantkit.kernels.cpu import ops
from quantkit.nn.install import set_compute
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.numerics import grid
from quantkit.qtensor import QTensor
from quantkit.spec import QuantSpec

SPECS = [QuantSpec("int4", (1, 32)), QuantSpec("int3", (1, 16), False), QuantSpec("int8", scale_dtype="bfloat16")]
BUFFERS = ("packed", "scale", "zero_point")
each_spec = pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)


def quantized(spec: QuantSpec = SPECS[0], shape: tuple[int, ...] = (40, 64)) -> QTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scale, zero = grid.choose_qparams(weight, spec)
    return QTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec)


def released(spec: QuantSpec = SPECS[0], x: torch.Tensor | None = None) -> QuantLinear:
    module = QuantLinear(quantized(spec), torch.randn(40))
    module.keeps_codes = False
    module(torch.randn(1, 64) if x is None else x)
    return module


def assert_bits(got: dict[str, torch.Tensor], want: QTensor) -> None:
    for name in BUFFERS:
        value = getattr(want, name)
        assert got.get(name) is None if value is None else torch.equal(got[name], value), name


def held_bytes(module: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers() if not buffer.is_meta)


@each_spec
def test_codes_are_let_go_and_come_back(spec):
    x, want = torch.randn(3, 64), quantized(spec)
    module = released(spec)
    assert held_bytes(module) == 0
    y = module(x)
    assert held_bytes(module) == 0
    torch.testing.assert_close(y, nn.functional.linear(x, want.dequantize(), module.bias), rtol=1e-5, atol=1e-5)
    assert_bits({name: getattr(module, name) for name in BUFFERS}, want)
    assert_bits(module.state_dict(), want)
    assert_bits({name: getattr(module.qtensor, name) for name in BUFFERS}, want)
    assert held_bytes(module) == 0


@each_spec
def test_copies_saves_and_moves_have_the_codes(spec):
    x, want = torch.randn(2, 64), quantized(spec)
    module = released(spec)
    y = module(x)
    twin = copy.deepcopy(module)
    assert_bits(dict(twin.named_buffers()), want)
    assert torch.equal(twin(x), y)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    assert held_bytes(module) == 0
    meta = copy.deepcopy(module).to("meta")
    assert meta.packed.is_meta
    assert torch.equal(module.to(torch.bfloat16)(x.bfloat16()), module(x.bfloat16()))
    assert_bits(module.state_dict(), want)


def test_a_released_module_can_be_loaded_into_and_assigned_to():
    x, other = torch.randn(2, 64), QuantLinear(quantized(SPECS[0]).rows(0, 40), torch.randn(40))
    other.scale = other.scale * 2
    module = released()
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    module = released()
    module.scale = module.scale * 2
    torch.testing.assert_close(module(x) - module.bias, other(x) - other.bias)
    assert_bits(module.state_dict(), other.qtensor)


def test_every_dtype_runs_from_the_one_layout(monkeypatch):
    prepacked = []
    kernel = KERNELS.get("cpu")
    original = type(kernel).prepack
    monkeypatch.setattr(type(kernel), "prepack", lambda self, q: prepacked.append(q) or original(self, q))
    module = released()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for compute in ("float", "int8"):
            module.compute = compute
            module(torch.randn(2, 64).to(dtype))
    assert len(prepacked) == 1
    x = torch.randn(2, 64, dtype=torch.float64)  # the reference alone takes it, from the codes restored
    module.compute = "float"
    torch.testing.assert_close(module(x), nn.functional.linear(x, quantized().dequantize().double(), module.bias.double()))


def test_experts_are_let_go_together():
    want, x = quantized(SPECS[1], (3, 40, 64)), torch.randn(2, 64)
    stack = QuantWeight(want)
    stack.keeps_codes = False
    for expert in (1, 0, 2):
        torch.testing.assert_close(stack.matmul(x, expert), x @ want.dequantize()[expert].T, rtol=1e-5, atol=1e-5)
        assert held_bytes(stack) == 0
    assert_bits(stack.state_dict(), want)
    x.requires_grad_(True)
    stack.matmul(x, 1).sum().backward()
    torch.testing.assert_close(x.grad, want.dequantize()[1].sum(0).expand(2, 64))


def test_prepacked_is_what_a_forward_uses():
    module, x = QuantLinear(quantized()), torch.randn(2, 64)
    state = module.prepacked()
    assert torch.equal(KERNELS.get("cpu").matmul(x, state, None), module(x))
    assert module.prepacked() is state


def test_activations_are_rounded_only_when_asked_and_never_under_a_gradient():
    model, x = nn.Sequential(QuantLinear(quantized())), torch.randn(2, 64)
    exact = model(x)
    set_compute(model, "int8")
    assert "int8 activations" in repr(model)
    rounded = ops.round_activations(x, 32, 64) @ model[0].dequantize().T
    torch.testing.assert_close(model(x), rounded, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model(x), exact)
    torch.testing.assert_close(model(x.clone().requires_grad_(True)), exact, rtol=1e-5, atol=1e-5)
    set_compute(model, "float")
    assert torch.equal(model(x), exact)
    with pytest.raises(KernelError, match="compute='int4'"):
        set_compute(model, "int4")


def test_no_moment_shows_a_placeholder():
    """What another thread would see between two steps of letting go, and of taking back."""
    module, want = QuantLinear(quantized()), quantized()
    seen = []

    class Watched(dict):
        def update(self, *args):
            super().update(*args)
            seen.append(module.qtensor.packed)

    module._buffers = Watched(module._buffers)
    module.keeps_codes = False
    module(torch.randn(1, 64))
    assert module.__dict__["_buffers"]["packed"].is_meta
    module.to("cpu")
    assert len(seen) == 2
    assert all(torch.equal(packed, want.packed) for packed in seen)
