"""Weights in two planes of four bits: the same product to the last bit, and a draft that reads half of it."""

import pytest
import torch

from quantkit.kernels.cpu import layout, ops
from quantkit.qtensor import GridTensor
from tests.kernels.test_cpu import extremes, quantized

SHAPES = ((2, 8, 8), (7, 74, 37), (77, 96, 32), (50, 576, 576), (33, 640, 64), (200, 24, 12))  # rows, columns, group


def weights(symmetric: bool) -> list[tuple[GridTensor, layout.Prepacked]]:
    found = [quantized(8, (n, k), symmetric, g) for n, k, g in SHAPES]
    found += [] if symmetric else [extremes(8, (n, k), g) for n, k, g in SHAPES]
    return [(qtensor, layout.prepack(qtensor)) for qtensor in found]


@pytest.mark.parametrize("symmetric", [True, False])
def test_planes_hold_the_same_codes_in_as_many_bytes(symmetric):
    for qtensor, whole in weights(symmetric):
        planes = layout.split(whole)
        assert planes.nbytes == whole.nbytes
        assert planes.columns == whole.columns
        assert torch.equal(layout.join(planes).codes, whole.codes)
        back = layout.restore(planes, qtensor.spec)
        assert torch.equal(back.packed, qtensor.packed)
        assert torch.equal(back.scale, qtensor.scale)
        codes, zero = qtensor.codes().long(), 128 if qtensor.zero_point is None else qtensor.zero_point.long()
        coarse = (codes >> 4 << 4).unflatten(1, (-1, whole.group)) + 8
        draft = (coarse - (zero if isinstance(zero, int) else zero[..., None])) * qtensor.scale.float()[..., None]
        assert torch.equal(layout.dequantize(*planes._replace(kind=layout.HIGH_PLANE)), draft.flatten(1))


def test_only_codes_of_eight_bits_are_split():
    for state in (layout.prepack(quantized(4)), layout.prepack_float(torch.randn(5, 9))):
        assert layout.split(state) is state
        assert layout.join(state) is state


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("block", [0, 64], ids=["float", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_are_those_of_whole_codes_and_the_draft_is_what_it_says(block, symmetric):
    for _, whole in weights(symmetric):
        planes = layout.split(whole)
        high = planes._replace(kind=layout.HIGH_PLANE)
        draft = layout.dequantize(*high).double()
        for m in (1, 2, 3, 5, 9, 30):
            x = torch.randn(m, whole.columns)
            y = ops.compute(x, planes, planes.struct(), block, None)
            assert torch.equal(y, ops.compute(x, whole, whole.struct(), block, None))
            seen = (ops.round_activations(x, whole.group, block) if block else x).double()
            tolerance = 1e-5 * (seen.abs() @ draft.abs().T).max().item()
            rough = ops.compute(x, high, high.struct(), block, None).double()
            torch.testing.assert_close(rough, seen @ draft.T, rtol=0, atol=tolerance)
            for row in range(m):  # whatever the batch
                assert torch.equal(ops.compute(x[row], high, high.struct(), block, None).double(), rough[row])


def test_the_operator_knows_planes():
    planes = layout.split(layout.prepack(quantized(8)))
    for kind in (layout.PLANES, layout.HIGH_PLANE):
        state, x = planes._replace(kind=kind), torch.randn(3, 128)
        torch.testing.assert_close(
            ops.wq_matmul_plain(x, *state, 0, None), ops.wq_matmul()(x, *state, 0, None), rtol=1e-4, atol=1e-4
        )
