"""A kind of quantized weight that the package does not know runs wherever a QTensor is all that is asked for."""

import copy

import pytest
import torch
from torch import nn

from quantkit.errors import KernelError, SpecError
from quantkit.evaluation.footprint import footprint
from quantkit.hf.structure import describe
from quantkit.kernels import KERNELS, Problem, select
from quantkit.nn.embedding import QuantEmbedding
from quantkit.nn.install import install
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.qtensor import QTensor, as_grid
from quantkit.spec import TOKEN_INT8, ActivationSpec, QuantSpec
from tests.codebook import CodebookTensor, random_codebook
from tests.tiny import VOCAB, tiny_llama


def test_the_reference_kernel_takes_it_and_the_others_say_why_not() -> None:
    problem = Problem(random_codebook((8, 16)).spec, (8, 16), "cpu", torch.float32)
    assert select(problem) is KERNELS.get("reference")
    assert KERNELS.get("cpu").rejects(problem) == "codes are codebook of 16, want a grid"
    with pytest.raises(KernelError, match=r"codebook of 16(.|\n)*cpu \(float activations\): codes are codebook of 16"):
        select(problem, "int8")
    with pytest.raises(SpecError, match="codebook of 16 has no codes and scales on a grid"):
        as_grid(random_codebook((8, 16)))


def test_a_layer_multiplies_saves_loads_copies_moves_and_differentiates() -> None:
    weight, bias, x = random_codebook((24, 40)), torch.randn(24), torch.randn(3, 40)
    layer, want = QuantLinear(weight, bias), nn.functional.linear(x, weight.dequantize(), bias)
    assert torch.equal(layer(x), want)
    assert layer.qtensor is weight
    assert (layer.nbytes, layer.numel) == (24 * 40 + 32, 24 * 40)
    assert set(layer.state_dict()) == {"index", "table", "bias"}
    assert torch.equal(copy.deepcopy(layer)(x), want)
    other = QuantLinear(random_codebook((24, 40), seed=1), bias)
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), want)
    narrow = layer.to("meta").to_empty(device="cpu").to(torch.bfloat16)
    assert [part.dtype for part in narrow.qtensor.parts().values()] == [torch.uint8, torch.float16]
    x.requires_grad_()
    other(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 40))


def test_inputs_are_rounded_for_it_too() -> None:
    weight, x = random_codebook((24, 40)), torch.randn(3, 40)
    layer = QuantLinear(weight, activation=TOKEN_INT8)
    assert 0 < (layer(x) - x @ weight.dequantize().T).norm() < 0.02 * layer(x).norm()
    static = ActivationSpec(QuantSpec("int8", (-1, -1)), dynamic=False)
    layer = QuantLinear(weight.with_parts({"input_scale": torch.tensor([0.5])}), activation=static)
    assert torch.equal(layer(x), (x * 2).round() / 2 @ weight.dequantize().T)
    assert "input_scale" in layer.state_dict()


def test_stacks_and_tables() -> None:
    stack, x = QuantWeight(random_codebook((3, 24, 40))), torch.randn(2, 40)
    for expert in range(3):
        torch.testing.assert_close(stack.matmul(x, expert), x @ stack.dequantize()[expert].T)
    moved = stack.to(torch.bfloat16).qtensor
    assert torch.equal(moved.dequantize(), random_codebook((3, 24, 40)).dequantize())
    table, ids = QuantEmbedding(random_codebook((24, 40)), torch.bfloat16), torch.tensor([[3, 3], [0, 23]])
    assert torch.equal(table(ids), table.weight[ids])


def test_a_model_of_them_runs_and_weighs_what_they_weigh() -> None:
    model, reference = tiny_llama().eval(), tiny_llama().eval()
    sites = describe(model).sites
    for number, site in enumerate(sites):
        weight = random_codebook(site.shape, seed=number)
        weight = weight.with_parts({"table": weight.table / 8})
        reference.get_submodule(site.module).weight.data = weight.dequantize()
        install(model, site, weight)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits)
    assert footprint(model).quantized_share > 0.5
    assert footprint(model).bits_per_weight == pytest.approx(8, rel=0.02)


def test_the_member_satisfies_the_protocol() -> None:
    member: QTensor = random_codebook((8, 16))
    assert isinstance(member.rows(slice(2, 4)), CodebookTensor)
    assert torch.equal(member.rows(torch.tensor([5, 1])).dequantize(), member.dequantize()[[5, 1]])
