"""The layout of the CUDA kernels in plain torch: nothing is lost, and it stands for the weight, at every shape."""

import pytest
import torch

from quantkit.kernels.cuda import layout
from quantkit.kernels.cuda.matmul import unfit
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec
from tests.qtensors import assert_same, random_qtensor


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_comes_back(bits, symmetric):
    for block, columns in (((1, 32), 96), ((1, 64), 192), ((1, -1), 37), ((4, 32), 96), ((-1, -1), 40)):
        spec = QuantSpec(f"int{bits}", block, symmetric, "bfloat16" if bits == 5 else "float16")
        for shape in ((36, columns), (132, columns), (3, 68, columns)):
            qtensor = random_qtensor(spec, shape)
            laid = layout.prepack(qtensor)
            assert_same(layout.restore(laid, spec), qtensor)
            assert torch.equal(layout.dequantize(laid).view(shape), qtensor.dequantize())
    assert_same(layout.restore(laid, spec, 1), qtensor[1])


def test_rows_of_gate_and_up_alternate():
    for block in ((1, 32), (4, 32), (-1, -1)):
        qtensor = random_qtensor(QuantSpec("int4", block, False), (2, 72, 64))
        interleaved_bias = layout.dequantize(layout.prepack(qtensor, interleave=True))
        gate, up = qtensor.dequantize().chunk(2, 1)
        assert torch.equal(interleaved_bias[:, 0::2], gate)
        assert torch.equal(interleaved_bias[:, 1::2], up)
    assert layout.interleave_halves(torch.arange(6)).tolist() == [0, 3, 1, 4, 2, 5]


def test_fp8_comes_back():
    spec = QuantSpec("fp8_e4m3", (1, -1))
    weight = torch.randn(70, 96)
    scale, _ = grid.choose_qparams(weight, spec)
    qtensor = GridTensor.from_codes(grid.quantize(weight, scale, None, spec), scale, None, spec)
    laid = layout.prepack(qtensor)
    assert_same(layout.restore(laid, spec), qtensor)
    assert torch.equal(layout.dequantize(laid, fp8=True)[0], qtensor.dequantize())


def test_a_lane_finds_its_columns_where_the_drawing_says():
    """Word by word, from the picture in unpack.cuh: 4 bits, then 8."""
    codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
    spec = QuantSpec("int4", (1, 64))
    words = layout.prepack(GridTensor.from_codes(codes, torch.ones(64, 2).half(), None, spec)).codes.view(torch.int32)
    for step, part, lane, h, s in ((0, 0, 0, 0, 0), (1, 2, 13, 1, 0), (1, 3, 31, 0, 1)):
        word = int(words[0, ((step * 4 + part) * 32 + lane) * 4 + 2 * h + s]) & 0xFFFFFFFF
        rows = (16 * part + lane // 4, 16 * part + lane // 4 + 8)
        first = 64 * step + 32 * h + 8 * (lane % 4) + 4 * s
        places = [
            (rows[0], 0),
            (rows[1], 0),
            (rows[0], 2),
            (rows[1], 2),
            (rows[0], 1),
            (rows[1], 1),
            (rows[0], 3),
            (rows[1], 3),
        ]
        assert [word >> (4 * i) & 15 for i in range(8)] == [int(codes[row, first + k]) for row, k in places]
    spec = QuantSpec("int8", (1, 64))
    codes = torch.randint(0, 256, (64, 128), dtype=torch.uint8)
    held = layout.prepack(GridTensor.from_codes(codes, torch.ones(64, 2).half(), None, spec)).codes[0]
    for step, part, lane, h in ((0, 0, 0, 0), (1, 2, 13, 1), (1, 3, 31, 0)):
        own = held[(((step * 4 + part) * 2 + h) * 32 + lane) * 16 :][:16]
        column = 64 * step + 32 * h + 8 * (lane % 4)
        top, below = (codes[16 * part + lane // 4 + 8 * r, column : column + 8] for r in range(2))
        assert torch.equal(own, torch.cat([top[:4], below[:4], top[4:], below[4:]]))


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        (QuantSpec("int4", (1, 16)), (64, 64), "groups of 16"),
        (QuantSpec("int4", (1, 96)), (64, 192), "groups of 96"),
        (QuantSpec("int4", (1, 64), scale_dtype="float32"), (64, 64), "scales are float32"),
        (QuantSpec("nf4", (1, 64)), (64, 64), "codes are nf4"),
        (QuantSpec("int4"), (0, 64), "empty"),
    ],
)
def test_what_does_not_fit_is_named(spec, shape, reason):
    assert reason in str(unfit(spec, shape))
    assert unfit(QuantSpec("int4", (1, 96)), (64, 96)) is None  # one group is one scale per row
