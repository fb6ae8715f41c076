"""Hopper's product for many tokens in the emulator: its layouts, scales, tails and gates against plain torch."""

import pytest
import torch
from torch.nn import functional as F

from quantkit.kernels.cuda import calls, layout, norms, ops, prefill
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec
from tests.cuda import emulated


def quantized(spec: QuantSpec, n: int, k: int) -> GridTensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    scale, zero = grid.choose_qparams(weight, spec)
    return GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


CASES = [  # bits, group, symmetric, tokens, rows, columns
    (4, 32, False, 130, 70, 96),
    (4, 64, True, 5, 128, 448),  # more steps than stages
    (4, 128, False, 128, 130, 384),
    (4, -1, False, 33, 65, 100),  # columns that are no multiple of anything
    (8, 32, True, 140, 64, 160),
    (8, -1, True, 9, 200, 72),
    (8, 64, False, 20, 60, 64),
]


@pytest.mark.parametrize(("bits", "group", "symmetric", "tokens", "rows", "columns"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_equals_a_dense_product_of_the_expanded_weight(bits, group, symmetric, tokens, rows, columns, dtype, monkeypatch):
    qtensor = quantized(QuantSpec(f"int{bits}", (1, group), symmetric), rows, columns)
    weight = layout.prepack(qtensor)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    want = x.double() @ qtensor.dequantize().to(dtype).double().T
    with emulated.machine(monkeypatch):
        assert error(prefill.matmul(x, weight), want) < 4e-3
        assert error(prefill.matmul(x, weight, bias), want + bias.double()) < 4e-3


@pytest.mark.parametrize("processors", [8, 132])
def test_split_sums_are_the_same_bits_every_time(processors, monkeypatch):
    weight = layout.prepack(quantized(QuantSpec("int4", (1, 64), False), 200, 1100 // 64 * 64))
    x, bias = torch.randn(140, weight.columns).half(), torch.randn(200).half()
    splits = prefill.choose_splits(4, weight.columns // 64, processors)
    assert splits == {8: 2, 132: 2}[processors]
    assert prefill.choose_splits(64, 64, 132) == 2
    assert prefill.choose_splits(448, 64, 132) == 1
    with emulated.machine(monkeypatch, processors):
        got = prefill.matmul(x, weight, bias)
        assert torch.equal(prefill.matmul(x, weight, bias), got)
        monkeypatch.setattr(prefill, "choose_splits", lambda *rest: 1)
        assert error(got, prefill.matmul(x, weight, bias)) < 1e-3


@pytest.mark.parametrize("tokens", [3, 130])
@pytest.mark.parametrize("rows", [64, 150])
def test_a_head_says_where_its_largest_results_are(tokens, rows, monkeypatch):
    weight = layout.prepack(quantized(QuantSpec("int4", (1, 64), False), rows, 576))
    x = torch.randn(tokens, 576).half()
    x[1] = 60000  # beyond half's numbers
    with emulated.machine(monkeypatch, 64, capability=(9, 0)):  # several splits
        monkeypatch.setattr(prefill, "_agrees", lambda *key: True)
        logits, bests = ops.multiply_head(x, *weight, None, "codes")
    assert torch.equal(logits.isfinite().all(-1), torch.arange(tokens) != 1)
    tiles = F.pad(torch.where(logits < torch.inf, logits.float(), torch.inf), (0, -rows % 64), value=-torch.inf)
    want = tiles.unflatten(-1, (weight.tiles, 64)).max(-1)
    assert torch.equal(bests[..., 0].view(torch.float32), want.values)
    assert torch.equal(bests[..., 1], want.indices.int() + 64 * torch.arange(weight.tiles, dtype=torch.int32))
    plain = ops._IMPLEMENTATIONS["head_matmul"][0](x[:1], *weight, None, "codes")
    assert error(plain[0], logits[:1]) < 2e-3
    assert plain[1].shape == bests[:1].shape
    assert (plain[1][..., 1] == bests[:1, :, 1]).float().mean() > 0.5  # near equals may change places


def test_tokens_are_arranged_as_the_products_read_them(monkeypatch):
    """Every element once, where the fragment tables put its column, under the swizzle of 128 bytes."""
    tokens, columns = 131, 80
    x = torch.arange(tokens * columns, dtype=torch.int16).view(torch.bfloat16).view(tokens, columns)
    with emulated.machine(monkeypatch):
        got = prefill.arrange(x).view(torch.int16)
    want = torch.zeros(256, 128, dtype=torch.int16)
    want[:tokens, :columns] = x.view(torch.int16)
    assert got.shape == (2, 2, 128, 64)
    place = torch.empty(64, dtype=torch.int64)  # column of a step -> where it stands in its row
    for column in range(64):
        half, t, s, pair = column // 32, column % 32 // 8, column % 8 // 4, column % 4 // 2
        place[column] = 32 * half + 16 * s + 8 * pair + 2 * t + column % 2
    for token in range(256):
        for step in range(2):
            row = got[token // 128, step, token % 128]
            pieces = row.view(8, 8)[torch.arange(8) ^ (token % 8)].flatten()
            assert torch.equal(pieces[place], want[token, 64 * step : 64 * step + 64])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gate_meets_its_value(activation, monkeypatch):
    qtensor = quantized(QuantSpec("int4", (1, 64), False), 140, 128)
    weight = layout.prepack(qtensor, True)
    x, bias = torch.randn(131, 128).half(), torch.randn(140).half()
    with emulated.machine(monkeypatch):
        both = prefill.matmul(x, weight, bias)
        want = norms.activate_plain(both, activation, interleaved=True)
        assert torch.equal(prefill.matmul(x, weight, bias, activation), want)


def test_a_device_that_computes_something_else_is_noticed(monkeypatch, caplog):
    cpu = torch.device("cpu")
    with emulated.machine(monkeypatch, capability=(9, 0)):
        monkeypatch.setattr(calls, "capturing", lambda: True)
        assert not prefill.works(cpu, torch.bfloat16, 4)  # not now
        monkeypatch.setattr(calls, "capturing", lambda: False)
        for bits in (4, 8):
            for dtype in (torch.bfloat16, torch.float16):
                assert prefill.works(cpu, dtype, bits)
        assert not caplog.records
        monkeypatch.setattr(prefill, "_known", {})
        right = prefill.arrange
        monkeypatch.setattr(prefill, "arrange", lambda x: right(x).roll(1, -1))
        assert not prefill.works(cpu, torch.bfloat16, 4)
        assert not prefill.works(cpu, torch.bfloat16, 4)
    assert len(caplog.records) == 1
    assert "relative error of 1" in caplog.records[0].getMessage()
    with emulated.machine(monkeypatch):
        assert not prefill.works(cpu, torch.float16, 8)


@pytest.mark.parametrize("form", ["codes", "int8"])
def test_which_kernel_a_product_uses(form, monkeypatch):
    weight = layout.prepack(quantized(QuantSpec("int8"), 64, 64))
    used = []
    monkeypatch.setattr(calls, "matmul", lambda x, *rest, **options: used.append("codes") or x)
    monkeypatch.setattr(calls, "dense_matmul", lambda x, *rest, **options: used.append("dense") or x)
    monkeypatch.setattr(prefill, "matmul", lambda x, *rest, **options: used.append("prompt") or x)
    monkeypatch.setattr(prefill, "_agrees", lambda *key: True)
    for capability in ((8, 0), (9, 0)):
        with emulated.machine(monkeypatch, capability=capability):
            for tokens in (1, 64, 65, 159, 160, 700):
                ops.multiply(torch.zeros(tokens, 64).half(), *weight, None, form, None)
    many = "prompt" if form == "codes" else "codes"
    assert used == [
        *["codes"] * 4,
        *["dense"] * 2,
        "codes",
        "codes",
        many,
        many,
        *["prompt" if many == "prompt" else "dense"] * 2,
    ]
