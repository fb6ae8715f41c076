"""Modules that hold a weight once: what a kernel has repacked comes back bit for bit to whoever asks; int8 activations."""

import copy
import io
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from quantkit.errors import KernelError
from quantkit.kernels import KERNELS
from quantkit.kernels.cpu import ops
from quantkit.kernels.cpu.matmul import State
from quantkit.nn.install import set_compute
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.nn.packed import Packed
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec
from quantkit.system.compute import Compute, on_device

SPECS = [QuantSpec("int4", (1, 32)), QuantSpec("int3", (1, 16), False), QuantSpec("int8", scale_dtype="bfloat16")]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)


def quantized(spec: QuantSpec = SPECS[0], shape: tuple[int, ...] = (40, 64)) -> GridTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scale, zero = grid.choose_qparams(weight, spec)
    return GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec)


def packed(spec: QuantSpec = SPECS[0]) -> QuantLinear:
    module = QuantLinear(quantized(spec), torch.randn(40))
    module(torch.randn(1, 64))
    return module


def assert_bits(got: Mapping[str, torch.Tensor], want: GridTensor) -> None:
    assert got.keys() - {"bias"} == want.parts().keys()
    for name, part in want.parts().items():
        assert torch.equal(got[name], part), name


def holds_the_kernels_layout_alone(module: QuantLinear | QuantWeight) -> bool:
    """Whether no tensor of the QTensor is kept: neither as the value nor beside it."""
    value = module.value
    return isinstance(value, Packed) and value.whole is None and all(isinstance(state, State) for state in value.states)


@each_spec
def test_the_weight_is_repacked_at_the_first_product_and_comes_back(spec):
    x, given = torch.randn(3, 64), quantized(spec)
    module, tensors = QuantLinear(given, torch.randn(40)), [weakref.ref(part) for part in given.parts().values()]
    assert module.qtensor is given
    x.requires_grad_(True)
    module(x)
    assert module.qtensor is given  # a product under a gradient changes nothing
    del given
    x, want = x.detach(), quantized(spec)
    y = module(x)
    assert holds_the_kernels_layout_alone(module)
    assert [tensor() for tensor in tensors] == [None] * len(tensors)
    torch.testing.assert_close(y, nn.functional.linear(x, want.dequantize(), module.bias), rtol=1e-5, atol=1e-5)
    assert_bits(module.qtensor.parts(), want)
    assert_bits(module.state_dict(), want)
    assert torch.equal(module.dequantize(), want.dequantize())
    assert (module.nbytes, module.numel, module.device) == (want.nbytes, want.numel, want.device)
    assert holds_the_kernels_layout_alone(module)
    assert_bits(module.unpack().parts(), want)
    assert module.value is module.qtensor
    assert torch.equal(module(x), y)


@each_spec
def test_copies_saves_and_moves_have_the_codes(spec):
    x, want = torch.randn(2, 64), quantized(spec)
    module = packed(spec)
    y = module(x)
    copied = copy.deepcopy(module)
    assert isinstance(copied.value, GridTensor)
    assert_bits(copied.qtensor.parts(), want)
    assert torch.equal(copied(x), y)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_bits(loaded.state_dict(), want)
    assert torch.equal(loaded(x), y)
    other = packed(spec)
    loaded.load_state_dict(other.state_dict())  # its hooks work on itself
    assert torch.equal(loaded(x), other(x))
    assert torch.equal(module(x), y)
    assert holds_the_kernels_layout_alone(module)
    meta = copy.deepcopy(module).to("meta")
    assert meta.device.type == "meta"
    assert torch.equal(module.to(torch.bfloat16)(x.bfloat16()), module(x.bfloat16()))
    assert_bits(module.state_dict(), want)


def test_a_packed_module_can_be_loaded_into_and_assigned_to():
    x, other = torch.randn(2, 64), QuantLinear(quantized(), torch.randn(40))
    doubled = {"scale": other.qtensor.scale * 2}
    other.qtensor = other.qtensor.with_parts(doubled)
    module = packed()
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    module = packed()
    module.qtensor = module.qtensor.with_parts(doubled)
    torch.testing.assert_close(module(x) - module.bias, other(x) - other.bias)
    assert_bits(module.state_dict(), other.qtensor)


def test_what_a_state_dict_lacks_or_has_too_much_is_said_as_torch_says_it():
    state = packed(SPECS[1]).state_dict()
    del state["scale"]
    module = nn.Sequential(packed(SPECS[1]))
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.scale"'):
        module.load_state_dict({f"0.{name}": part for name, part in state.items()})
    state["scale"], state["extra"] = torch.ones(1), torch.ones(1)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.extra"(.|\n)*size mismatch for 0.scale'):
        module.load_state_dict({f"0.{name}": part for name, part in state.items()})
    lenient = packed(SPECS[1])
    found = lenient.load_state_dict({"packed": lenient.qtensor.packed, "bias": torch.zeros(40)}, strict=False)
    assert found.missing_keys == ["scale", "zero_point"]
    assert_bits(lenient.state_dict(), quantized(SPECS[1]))


def test_assigned_parts_are_the_given_tensors_and_copied_ones_are_not():
    state = packed().state_dict()
    module = packed()
    module.load_state_dict(state, assign=True)
    assert module.qtensor.packed.data_ptr() == state["packed"].data_ptr()
    state = packed().state_dict()
    module.load_state_dict(state)
    assert module.qtensor.packed.data_ptr() != state["packed"].data_ptr()


def test_every_dtype_runs_from_the_one_layout(monkeypatch):
    prepacked = []
    kernel = KERNELS.get("cpu")
    original = type(kernel).prepack
    monkeypatch.setattr(type(kernel), "prepack", lambda self, q: prepacked.append(q) or original(self, q))
    module = packed()
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
    for expert in (1, 0, 2):
        torch.testing.assert_close(stack.matmul(x, expert), x @ want.dequantize()[expert].T, rtol=1e-5, atol=1e-5)
        assert holds_the_kernels_layout_alone(stack)
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


def test_threads_see_the_weight_whatever_the_others_make_of_it():
    """Products, reads, moves and copies at once: every one finds the same weight."""
    module, want, x = QuantLinear(quantized(SPECS[1])), quantized(SPECS[1]), torch.randn(4, 64)
    product = x @ want.dequantize().T

    def work(number: int) -> None:
        for turn in range(30):
            if number == 0 and turn % 3 == 0:
                module.unpack()
            elif number == 1 and turn % 5 == 0:
                module.to("cpu")
            elif number == 2:
                assert_bits(copy.deepcopy(module).state_dict(), want)
            else:
                assert_bits(module.qtensor.parts(), want)
                torch.testing.assert_close(module(x), product, rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_weight_is_somewhere_else_for_a_while():
    module = QuantLinear(quantized())
    module(torch.randn(1, 64))
    value = module.value
    with on_device(nn.Sequential(module), Compute(torch.device("meta"), torch.float32)):
        assert module.device.type == "meta"
        assert module(torch.empty(2, 64, device="meta")).shape == (2, 40)
    assert module.value is value
    with on_device(nn.Sequential(module), Compute(torch.device("cpu"), torch.bfloat16)):
        assert module.value is value
