"""The quantized tensor: its size, its parts, and what it refuses to be."""

import pytest
import torch

from quantkit.errors import SpecError
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor, concatenate
from quantkit.spec import QuantSpec

ASYM = QuantSpec("int3", (1, 16), symmetric=False)


def make(shape: tuple[int, ...] = (6, 48), spec: QuantSpec = ASYM, seed: int = 0) -> GridTensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    qparams = grid.choose_qparams(w, spec)
    return GridTensor.from_codes(grid.quantize(w, *qparams, spec), *qparams, spec)


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


def test_parts_are_its_tensors_by_name() -> None:
    a, b = make(), make(spec=QuantSpec("int4", (1, 16)))
    assert list(a.parts()) == ["packed", "scale", "zero_point"]
    assert list(b.parts()) == ["packed", "scale"]
    assert a.with_parts(make(seed=3).parts()).dequantize().equal(make(seed=3).dequantize())
    assert b.with_parts({"input_scale": torch.ones(1)}).with_parts({"input_scale": None}).input_scale is None
    assert a.device == torch.device("cpu")


def test_rows_experts_join_and_stack() -> None:
    a, b = make(seed=1), make(seed=2)
    joined = concatenate([a, b])
    assert torch.equal(joined.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
    assert torch.equal(joined.rows(slice(6, 12)).dequantize(), b.dequantize())
    stacked = GridTensor.stack([a, b])
    assert stacked.shape == (2, 6, 48)
    assert torch.equal(stacked[1].dequantize(), b.dequantize())
    index = torch.tensor([5, 0, 5])
    assert torch.equal(a.rows(index).dequantize(), a.dequantize()[index])
    assert a.rows(slice(None)).shape == a.shape
    assert torch.equal(stacked.rows(slice(2, 4))[0].dequantize(), a.dequantize()[2:4])


def test_what_does_not_fit_is_refused() -> None:
    a = make()
    with pytest.raises(SpecError, match="cannot join"):
        concatenate([a, make(spec=QuantSpec("int4", (1, 16)))])
    with pytest.raises(SpecError, match="only a 3-D"):
        a[0]
    with pytest.raises(SpecError, match="rows 1:3 do not fall on blocks of 2 rows"):
        make(spec=QuantSpec("int4", (2, 16))).rows(slice(1, 3))
    with pytest.raises(SpecError, match="2 rows share a scale"):
        make(spec=QuantSpec("int4", (2, 16))).rows(torch.tensor([1]))
    with pytest.raises(SpecError, match="packed codes"):
        GridTensor(a.packed[:, :2], a.scale, a.zero_point, a.spec, a.shape)
    with pytest.raises(SpecError, match="scale: shape"):
        GridTensor(a.packed, a.scale[:, :2], a.zero_point, a.spec, a.shape)
    with pytest.raises(SpecError, match="zero_point must be given"):
        GridTensor(a.packed, a.scale, None, a.spec, a.shape)
    with pytest.raises(SpecError, match="zero_point: shape"):
        GridTensor(a.packed, a.scale, a.zero_point[:2], a.spec, a.shape)  # type: ignore[index]
    with pytest.raises(SpecError, match="is not a multiple"):
        GridTensor(a.packed, a.scale, a.zero_point, QuantSpec("int3", (1, 10), symmetric=False), a.shape)


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-asym-g32", "nvfp4", "fp8"])
def test_a_large_stack_of_experts_is_dequantized_one_by_one_to_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.presets import preset
    from quantkit.quantizers.base import quantize_site
    from quantkit.quantizers.rtn import RTN

    stack = quantize_site(RTN(), "experts", torch.randn(5, 32, 64), preset(name, [64]).weight, None).qtensor
    whole = stack.dequantize()
    monkeypatch.setattr(grid, "AT_ONCE", 100)
    assert torch.equal(stack.dequantize(), whole)
    assert torch.equal(stack.dequantize(torch.bfloat16), whole.bfloat16())
