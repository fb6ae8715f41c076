"""Blocks of ggml: every byte means what the gguf package says, and scales of two levels are searched and fitted well."""

import gguf
import numpy as np
import pytest
import torch

from quantkit.errors import SpecError
from quantkit.kernels.functions import rounding
from quantkit.nn.sites import SiteStatistics
from quantkit.numerics import block_scales
from quantkit.numerics.ggml import BLOCK_TYPES, BlockType, values
from quantkit.qtensor import BlockTensor, concatenate, empty_qtensor
from quantkit.quantizers.base import quantize_site
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.rtn import RTN, ImportanceRTN
from quantkit.spec import BLOCK_GRIDS, QuantSpec, Scheme, block_spec, token_activations

KINDS = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)


def theirs(data: torch.Tensor, kind: BlockType) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind.name]).copy())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@KINDS
def test_any_bytes_mean_what_the_gguf_package_says(kind: BlockType) -> None:
    data = torch.randint(0, 256, (40, 3 * kind.nbytes), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert same(values(data, kind), theirs(data, kind))
    blocks = data.view(-1, kind.nbytes)
    blocks = blocks[values(blocks, kind).isfinite().all(-1)]  # NaN has many bits
    assert len(blocks) > 100
    assert torch.equal(kind.pack(kind.unpack(blocks)), blocks)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.size, kind.nbytes)
    assert gguf.GGMLQuantizationType[kind.name].value == kind.number


def odd_rows() -> torch.Tensor:
    """Rows that a search may stumble over: zeros, constants, one outlier, tiny and large numbers, one sign only."""
    random = torch.randn(10, 512, generator=torch.Generator().manual_seed(1))
    random[0], random[1], random[2] = 0.0, 0.5, -0.25
    random[3, 100] = 300.0
    random[4] *= 1e-9
    random[5] *= 3000.0
    random[6], random[7] = random[6].abs(), -random[7].abs()
    random[8, :256] = 0.0
    random[9] *= 1e-5
    return random


@KINDS
def test_odd_rows_are_searched_and_read_alike(kind: BlockType) -> None:
    weight = odd_rows()
    content = rounding.search_blocks(weight, kind)
    data = kind.pack(content).flatten(-2)
    mine = values(data, kind)
    assert same(mine, theirs(data, kind))
    assert torch.isfinite(mine).all()
    error = (mine - weight).square().sum(-1) / weight.square().sum(-1).clamp(min=1e-20)
    assert not mine[0].any()
    assert (error[[1, 2, 5, 6, 7, 8, 9]] < (0.3 if kind.name == "Q2_K" else 0.08)).all(), error


@KINDS
def test_what_float16_cannot_hold_is_refused(kind: BlockType) -> None:
    with pytest.raises(SpecError, match="not finite in float16"):
        rounding.search_blocks(torch.full((2, 256), 1e10) * torch.linspace(-1, 1, 256), kind)


@KINDS
def test_compensation_and_fitting_beat_rounding(kind: BlockType) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(800, 256, generator=generator) * torch.rand(256, generator=generator).mul(3).exp()
    x = x @ (torch.eye(256) + 0.02 * torch.randn(256, 256, generator=generator))
    hessian = x.T @ x / len(x)
    seen = SiteStatistics({"hessian": hessian, "mean_square": hessian.diagonal()}, (800,))
    weight, spec = torch.randn(24, 256, generator=generator) / 16, block_spec(kind.name)
    losses = [
        quantize_site(method, "x", weight, spec, seen).loss for method in (RTN(), ImportanceRTN(), GPTQ(rounds=0), GPTQ())
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.75 * losses[1]


def test_inputs_that_were_never_active_do_no_harm() -> None:
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(4))
    x[:, :64] = 0
    hessian, weight = x.T @ x / 300, torch.randn(8, 256)
    seen = SiteStatistics({"hessian": hessian}, (300,))
    for name in BLOCK_GRIDS:
        one = quantize_site(GPTQ(), "x", weight, block_spec(name), seen)
        dead = (one.qtensor.dequantize()[:, :64] - weight[:, :64]).square().mean()
        assert dead < 0.3
        assert one.loss < 0.2


@KINDS
def test_fitting_never_makes_it_worse_and_says_the_residual(kind: BlockType) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 512, generator=generator)
    x = torch.randn(600, 512, generator=generator)
    hessian = x.T @ x / 600
    before = block_scales.search(weight, kind)
    after, residual = block_scales.fit(weight, before, kind, hessian)

    def error(content: object) -> torch.Tensor:
        gone = weight - values(kind.pack(content).flatten(-2), kind)  # type: ignore[arg-type]
        return ((gone @ hessian) * gone).sum(-1)

    assert torch.equal(before.codes, after.codes)
    assert (error(after) <= error(before) * (1 + 1e-4)).all()
    assert torch.allclose(residual, (weight - values(kind.pack(after).flatten(-2), kind)) @ hessian, atol=2e-3)


@KINDS
def test_a_block_tensor_is_cut_and_joined(kind: BlockType) -> None:
    spec = block_spec(kind.name)
    whole = RTN().quantize(torch.randn(12, 512), spec, None)[0]
    assert isinstance(whole, BlockTensor)
    assert whole.shape == (12, 512)
    assert whole.nbytes == empty_qtensor(spec, (12, 512)).nbytes == 12 * 512 // kind.size * kind.nbytes
    joined = concatenate([whole.rows(slice(0, 5)), whole.rows(slice(5, 12))])
    assert torch.equal(joined.dequantize(), whole.dequantize())
    stack = BlockTensor.stack([whole, whole])
    assert stack.shape == (2, 12, 512)
    assert torch.equal(stack[1].dequantize(), stack.dequantize()[1])
    assert torch.equal(whole.rows(torch.tensor([3, 1])).dequantize(), whole.dequantize()[[3, 1]])


def test_a_block_spec_says_what_it_is() -> None:
    for name in BLOCK_GRIDS:
        spec = block_spec(name)
        assert spec.describe() == name
        assert QuantSpec.from_dict(spec.to_dict()) == spec
        assert Scheme.from_dict(Scheme(spec).to_dict()) == Scheme(spec)
    assert "blocks" not in QuantSpec("int4").to_dict()
    assert "use Q8_0, Q5_0" in str(block_spec("Q4_K").rejects((8, 96)))
    with pytest.raises(SpecError, match="Q4_K"):
        block_spec("Q4_L")
    with pytest.raises(SpecError, match="fix the other fields"):
        QuantSpec("int3", (1, 32), blocks="Q4_0")
    with pytest.raises(SpecError, match="float activations"):
        Scheme(block_spec("Q8_0"), token_activations("int8"))
