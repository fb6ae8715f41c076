"""Blocks at work on another device or in another dtype: what comes back afterwards."""

import torch

from quantkit.system.compute import Compute, on_device
from tests.tiny import tiny_llama


def test_parameters_come_back_bit_by_bit_and_buffers_keep_their_dtype() -> None:
    model = tiny_llama()
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    with on_device(model, Compute(torch.device("cpu"), torch.bfloat16)):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    for name, p in model.named_parameters():
        same, address, value = before[name]
        assert p is same
        assert p.data_ptr() == address
        assert torch.equal(p, value)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


def test_a_parameter_that_was_written_keeps_its_new_value_in_its_own_dtype() -> None:
    linear = torch.nn.Linear(8, 4)
    bias = linear.bias.detach().clone()
    with on_device(linear, Compute(torch.device("cpu"), torch.bfloat16)):
        linear.weight.data = torch.full((4, 8), 1.5, dtype=torch.bfloat16)
    assert linear.weight.dtype == torch.float32
    assert torch.equal(linear.weight, torch.full((4, 8), 1.5))
    assert torch.equal(linear.bias, bias)
