"""QuantLinear and QuantWeight as torch modules: saving, moving, copying, casting, differentiating."""

import copy
import io

import pytest
import torch
from torch import nn

from quantkit.errors import KernelError, SpecError
from quantkit.kernels import KERNELS
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

SPECS = [QuantSpec("int4", (1, 32)), QuantSpec("int3", (1, 32), False), QuantSpec("int8", scale_dtype="float32")]


def quantized(spec: QuantSpec = SPECS[0], shape: tuple[int, ...] = (48, 64), seed: int = 0) -> GridTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scale, zero = grid.choose_qparams(weight, spec)
    return GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec)


def linear(spec: QuantSpec = SPECS[0], seed: int = 0) -> QuantLinear:
    return QuantLinear(quantized(spec, seed=seed), torch.randn(48))


def expected(module: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    bias = None if module.bias is None else module.bias.float()
    return nn.functional.linear(x.float(), module.dequantize(), bias)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_forward(spec):
    module, x = linear(spec), torch.randn(2, 5, 64)
    assert (module.in_features, module.out_features, module.shape) == (64, 48, (48, 64))
    torch.testing.assert_close(module(x), expected(module, x), rtol=1e-5, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        y = module(x.to(dtype))
        assert y.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.float(), expected(module, x.to(dtype)), rtol=2 * eps, atol=4 * eps)
    assert "48x64" in repr(module)
    assert spec.describe() in repr(module)


def test_state_dict_round_trips():
    module, other, x = linear(SPECS[1]), linear(SPECS[1], seed=1), torch.randn(3, 64)
    assert set(module.state_dict()) == {"packed", "scale", "zero_point", "bias"}
    other(x)  # its prepacked state must not survive the load
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    empty = QuantLinear(GridTensor.empty(SPECS[1], (48, 64)), torch.empty(48, device="meta"))
    assert empty.device.type == "meta"
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), module(x))


def test_a_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        linear().load_state_dict(QuantLinear(quantized(shape=(48, 96)), torch.zeros(48)).state_dict())


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to", "type"])
def test_casting_a_model_leaves_codes_and_scales_alone(cast):
    module = nn.Sequential(linear(SPECS[1]))
    before = {name: value.clone() for name, value in module[0].qtensor.parts().items()}
    module(torch.randn(1, 64))
    dtype = {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    getattr(module, cast)(*((dtype,) if cast in ("to", "type") else ()))
    for name, value in module[0].qtensor.parts().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert module[0].bias.dtype == dtype
    x = torch.randn(2, 64).to(dtype)
    torch.testing.assert_close(module(x).float(), expected(module[0], x), rtol=2e-2, atol=2e-2)


def test_moving_devices():
    module = linear(SPECS[1])
    meta = copy.deepcopy(module).to("meta")
    assert all(tensor.is_meta for tensor in (*meta.qtensor.parts().values(), meta.bias))
    assert meta(torch.empty(2, 64, device="meta")).shape == (2, 48)
    back = meta.to_empty(device="cpu").to(torch.bfloat16)
    assert [part.dtype for part in back.qtensor.parts().values()] == [torch.int32, torch.float16, torch.uint8]
    back.load_state_dict(module.state_dict())
    assert torch.equal(back.dequantize(), module.dequantize())


def test_copies_are_independent():
    module, x = linear(), torch.randn(3, 64)
    before = module(x)
    other = copy.deepcopy(module)
    assert torch.equal(other(x), before)
    other.qtensor = other.qtensor.with_parts({"packed": torch.zeros_like(other.qtensor.packed)})
    assert not torch.equal(other(x), before)
    assert torch.equal(module(x), before)


def test_a_module_can_be_saved_whole_without_its_prepacked_state():
    module, x = linear(SPECS[1]), torch.randn(3, 64)
    file = io.BytesIO()
    torch.save(module, file)
    size = file.tell()
    module(x)
    again = io.BytesIO()
    torch.save(module, again)
    assert abs(again.tell() - size) < 1000
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), module(x))


@pytest.mark.parametrize("name", ["packed", "scale", "zero_point"])
def test_a_replaced_part_is_noticed(name):
    module, other, x = linear(SPECS[1]), linear(SPECS[1], seed=1), torch.randn(3, 64)
    before, revision = module(x), module.revision
    module.qtensor = module.qtensor.with_parts({name: other.qtensor.parts()[name]})
    assert module.revision == revision + 1
    assert not torch.equal(module(x), before)
    torch.testing.assert_close(module(x), expected(module, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(SpecError, match=r"int3 g32 asym .* in place of one int4 g32"):
        linear().qtensor = module.qtensor


def test_the_weight_is_packed_once_for_all_dtypes(monkeypatch):
    kernel, calls = KERNELS.get("cpu"), []
    monkeypatch.setattr(kernel, "prepack", lambda q, prepack=kernel.prepack: calls.append(1) or prepack(q), raising=False)
    module, x = linear(), torch.randn(2, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
        module(x.to(dtype))
    assert len(calls) == 1


def test_gradients_flow_to_x_and_bias():
    module, x = linear(), torch.randn(3, 64, requires_grad=True)
    module.bias.requires_grad_(True)
    out = torch.randn(3, 48)
    module(x).backward(out)
    torch.testing.assert_close(x.grad, out @ module.dequantize())
    torch.testing.assert_close(module.bias.grad, out.sum(0))
    with torch.no_grad():
        assert not module(x).requires_grad


def test_inference_mode():
    with torch.inference_mode():
        module, x = linear(), torch.randn(3, 64)
        first = module(x)
    torch.testing.assert_close(module(x), first)


def test_a_forced_kernel_is_obeyed(monkeypatch):
    monkeypatch.setenv("QUANTKIT_KERNEL", "cpu")
    with pytest.raises(KernelError, match="float64"):
        linear()(torch.randn(1, 64, dtype=torch.float64))


def test_what_does_not_fit_is_refused():
    stack = quantized(shape=(3, 48, 64))
    with pytest.raises(SpecError, match="QuantWeight"):
        QuantLinear(stack)
    with pytest.raises(SpecError, match="bias \\(47,\\)"):
        QuantLinear(quantized(), torch.zeros(47))
    with pytest.raises(SpecError, match="QuantLinear"):
        QuantWeight(quantized())
    with pytest.raises(SpecError, match="multiple of group_size 32"):
        QuantLinear(GridTensor.empty(SPECS[0], (8, 40)))
    with pytest.raises(SpecError, match="expert 3 of 3"):
        QuantWeight(stack).matmul(torch.randn(1, 64), 3)
    with pytest.raises((KernelError, RuntimeError), match="64"):
        linear()(torch.randn(1, 63))


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_expert_stacks(spec):
    stack, x = QuantWeight(quantized(spec, (3, 48, 64))), torch.randn(5, 64)
    assert stack.shape == (3, 48, 64)
    for expert in (0, 2, 1, 0):
        torch.testing.assert_close(stack.matmul(x, expert), x @ stack.dequantize()[expert].T, rtol=1e-5, atol=1e-5)
    empty = QuantWeight(GridTensor.empty(spec, (3, 48, 64)))
    assert empty.device.type == "meta"
    empty.load_state_dict(stack.state_dict(), assign=True)
    assert torch.equal(empty.matmul(x, 2), stack.matmul(x, 2))
    x.requires_grad_(True)
    stack.matmul(x, 1).sum().backward()
    torch.testing.assert_close(x.grad, stack.dequantize()[1].sum(0).expand(5, 64))
