"""The quantized tensor: its size, its parts, and what it refuses to be."""

import pytest
import torch

from quantkit.errors import SpecError
from quantkit.numerics import grid
from quantkit.qtensor import QTensor, concatenate, stack
from quantkit.spec import QuantSpec

ASYM = QuantSpec("int3", (1, 16), symmetric=False)


def make(shape: tuple[int, ...] = (6, 48), spec: QuantSpec = ASYM, seed: int = 0) -> QTensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    qparams = grid.choose_qparams(w, spec)
    return QTensor.from_codes(grid.quantize(w, *qparams, spec), *qparams, spec)


def test_bytes_are_what_a_disk_shows() -> None:
    q = make()
    # 48 codes of 3 bits are 4.5 words, padded to 5; 3 scales of 2 bytes a row; 18 zero points of 3 bits in 7 bytes
    assert q.nbytes == 6 * 5 * 4 + 6 * 3 * 2 + 7
    assert q.bits_per_weight == q.nbytes * 8 / (6 * 48)
    assert make((8, 128), QuantSpec("int4", (1, 64))).bits_per_weight == 4 + 16 / 64


def test_dequantize_is_the_grid() -> None:
    q = make()
    assert torch.equal(q.dequantize(), grid.dequantize(q.codes(), q.scale, q.zero_point, q.spec))
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(q.to("cpu").dequantize(), q.dequantize())


def test_rows_experts_join_and_stack() -> None:
    a, b = make(seed=1), make(seed=2)
    joined = concatenate([a, b])
    assert torch.equal(joined.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
    assert torch.equal(joined.rows(6, 12).dequantize(), b.dequantize())
    stacked = stack([a, b])
    assert stacked.shape == (2, 6, 48)
    assert torch.equal(stacked[1].dequantize(), b.dequantize())
    assert torch.equal(stacked.rows(2, 4)[0].dequantize(), a.dequantize()[2:4])


def test_what_does_not_fit_is_refused() -> None:
    a = make()
    with pytest.raises(SpecError, match="cannot join"):
        concatenate([a, make(spec=QuantSpec("int4", (1, 16)))])
    with pytest.raises(SpecError, match="only a 3-D"):
        a[0]
    with pytest.raises(SpecError, match="rows 1:3 do not fall on blocks of 2 rows"):
        make(spec=QuantSpec("int4", (2, 16))).rows(1, 3)
    with pytest.raises(SpecError, match="packed codes"):
        QTensor(a.packed[:, :2], a.scale, a.zero_point, a.spec, a.shape)
    with pytest.raises(SpecError, match="scale: shape"):
        QTensor(a.packed, a.scale[:, :2], a.zero_point, a.spec, a.shape)
    with pytest.raises(SpecError, match="zero_point must be given"):
        QTensor(a.packed, a.scale, None, a.spec, a.shape)
    with pytest.raises(SpecError, match="zero_point: shape"):
        QTensor(a.packed, a.scale, a.zero_point[:2], a.spec, a.shape)  # type: ignore[index]
    with pytest.raises(SpecError, match="is not a multiple"):
        QTensor(a.packed, a.scale, a.zero_point, QuantSpec("int3", (1, 10), symmetric=False), a.shape)
