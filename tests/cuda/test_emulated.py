"""Every CUDA kernel, run on the CPU thread by thread (see ``host.h``), against what it should compute.

Slow machinery, so the problems are few and odd: sizes that are no multiple of anything, every kind of weight, several splits.
The same checks on a real device, and many more, are in ``tests/gpu``.
"""

import ctypes

import pytest
import torch

from quantkit.errors import KernelError
from quantkit.kernels.cuda import attention, calls, layout, norms, ops
from quantkit.kernels.cuda.attention import LayerPages, Rope, Where
from quantkit.numerics import grid
from quantkit.numerics.fake import fake_quantize
from quantkit.qtensor import GridTensor
from quantkit.spec import TOKEN_INT8, QuantSpec
from tests.cuda import emulated
from tests.qtensors import random_qtensor

DTYPES = [torch.float16, torch.bfloat16]
EPS = {torch.float16: 4e-4, torch.bfloat16: 3e-3}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    torch.manual_seed(0)
    with emulated.machine(monkeypatch):
        yield


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9))


def product(x: torch.Tensor, qtensor: GridTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.double() @ qtensor.dequantize().double().T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "n", "k", "tokens"),
    [
        (4, True, 128, 70, 384, 1),
        (4, False, 32, 130, 96, 9),
        (4, False, 64, 64, 1152, 3),  # several splits
        (4, True, -1, 33, 72, 17),
        (3, True, -1, 5, 37, 2),  # columns that 8 does not divide
        (8, False, 128, 65, 256, 5),
        (8, True, 32, 64, 160, 33),  # two blocks of tokens
        (6, True, -1, 40, 576, 8),
    ],
)
def test_matmul_and_expand(bits, symmetric, group, n, k, tokens, dtype):
    qtensor = random_qtensor(QuantSpec(f"int{bits}", (1, group), symmetric, "bfloat16" if bits == 8 else "float16"), (n, k))
    weight = layout.prepack(qtensor)
    x, bias = torch.randn(tokens, k).to(dtype), torch.randn(n).to(dtype)
    got = calls.matmul(x, weight, bias)
    assert got.dtype == dtype
    assert error(got, product(x, qtensor, bias)) < EPS[dtype]
    whole = torch.cat([calls.expand(weight, dtype, range(tile, tile + 1)) for tile in range(weight.tiles)])
    assert torch.equal(whole, qtensor.dequantize(dtype))
    many = calls.dense_matmul(x, weight, bias)
    assert error(many, product(x, qtensor, bias)) < 2 * EPS[dtype]


def test_a_token_gets_the_same_bits_in_every_batch():
    weight = layout.prepack(random_qtensor(QuantSpec("int4", (1, 64), False), (64, 1152)))
    x = torch.randn(40, 1152).half()
    assert calls.choose_splits(1, 18, 8) > 1
    whole = calls.matmul(x, weight)
    for tokens in (1, 7, 12, 20):
        assert torch.equal(calls.matmul(x[:tokens], weight), whole[:tokens])


@pytest.mark.parametrize(("k", "splits"), [(192, 1), (1152, 2)])
def test_chunks_of_tokens_share_every_tile_and_change_no_bit(k, splits):
    qtensor = random_qtensor(QuantSpec("int4", (1, 64), False), (150, k))
    weight, bias = layout.prepack(qtensor), torch.randn(150).half()
    x = torch.randn(70, k).half()  # three chunks, three tiles
    assert calls.choose_splits(weight.tiles, k // layout.STEP, 8) == splits
    whole = calls.matmul(x, weight, bias)
    assert error(whole, product(x, qtensor, bias)) < EPS[x.dtype]
    for first in range(0, 70, 32):
        assert torch.equal(calls.matmul(x[first : first + 32].contiguous(), weight, bias), whole[first : first + 32])


def test_a_machine_of_little_shared_memory_takes_fewer_warps():
    qtensor = random_qtensor(QuantSpec("int8", (1, 32), False), (70, 384))
    weight, x = layout.prepack(qtensor), torch.randn(9, 384).half()

    def knob(size: int) -> None:
        emulated.library().qk_host_shared_limit(ctypes.c_long(size))

    try:
        knob(99 * 1024)
        assert error(calls.matmul(x, weight), product(x, qtensor)) < EPS[torch.float16]
        for spec in (QuantSpec("int4", (1, 32), False), QuantSpec("int8", (1, 64))):  # as many for few tokens as for many
            weight, x = layout.prepack(random_qtensor(spec, (70, 384))), torch.randn(33, 384).half()
            whole = calls.matmul(x, weight)
            for tokens in (1, 8, 9, 16, 17):
                assert torch.equal(calls.matmul(x[:tokens].contiguous(), weight), whole[:tokens])
    finally:
        knob(226 * 1024)


def test_infinities_and_padding_stay_where_they_are():
    weight = layout.prepack(random_qtensor(QuantSpec("int4", (1, 32)), (20, 96)))
    x = torch.randn(3, 96).half()
    x[1, 5] = float("nan")
    got = calls.matmul(x, weight)
    assert got[1].isnan().all()
    assert got[0].isfinite().all()
    assert got[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_by_int8(dtype):
    qtensor = random_qtensor(QuantSpec("int8"), (70, 208))
    x, bias = torch.randn(11, 208).to(dtype), torch.randn(70).to(dtype)
    got = ops.multiply(x, *layout.prepack(qtensor), bias, "int8")
    rounded = fake_quantize(x.float(), TOKEN_INT8.grid)
    assert error(got, product(rounded, qtensor, bias)) < EPS[dtype]


def test_fp8_by_fp8():
    spec = QuantSpec("fp8_e4m3")
    weight = torch.randn(70, 160)
    scale, _ = grid.choose_qparams(weight, spec)
    qtensor = GridTensor.from_codes(grid.quantize(weight, scale, None, spec), scale, None, spec)
    x = torch.randn(3, 160).bfloat16()
    got = ops.multiply(x, *layout.prepack(qtensor), None, "fp8")
    rounded = fake_quantize(x.float(), QuantSpec("fp8_e4m3", (1, -1), True, "float32"))
    assert error(got, product(rounded, qtensor)) < EPS[torch.bfloat16]
    assert torch.equal(calls.expand(layout.prepack(qtensor), torch.bfloat16, range(2), fp8=True), qtensor.dequantize(x.dtype))


def gated_pair(spec: QuantSpec, n: int, k: int) -> tuple[layout.Fragments, layout.Fragments]:
    """One [gate | up] of n outputs laid out side by side, and with its rows in turn."""
    if spec.dtype == "fp8_e4m3":
        weight = torch.randn(2 * n, k)
        scale, _ = grid.choose_qparams(weight, spec)
        qtensor = GridTensor.from_codes(grid.quantize(weight, scale, None, spec), scale, None, spec)
    else:
        qtensor = random_qtensor(spec, (2 * n, k))
    return layout.prepack(qtensor), layout.prepack(qtensor, interleave=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("spec", "form", "n", "k", "tokens", "activation"),
    [
        (QuantSpec("int4", (1, 64), False), "codes", 35, 1152, 3, "silu"),  # several splits, a tile that is not full
        (QuantSpec("int4", (1, 32)), "codes", 33, 96, 9, "gelu_tanh"),
        (QuantSpec("int8", (1, 128), False), "codes", 64, 256, 33, "gelu"),  # two blocks of tokens
        (QuantSpec("int6", (4, -1)), "codes", 34, 72, 1, "relu"),  # a scale that gate and up share
        (QuantSpec("int8"), "int8", 35, 1088, 11, "relu2"),
        (QuantSpec("fp8_e4m3"), "fp8", 35, 160, 2, "silu"),
    ],
)
def test_a_gate_in_the_product_changes_no_bit(spec, form, n, k, tokens, activation, dtype):
    apart, interleaved = gated_pair(spec, n, k)
    x, bias = (torch.randn(tokens, k) / 1000).to(dtype), torch.randn(2 * n).to(dtype)
    for b in (None, bias):
        want = norms.activate(ops.multiply(x, *apart, b, form), activation)
        swapped = None if b is None else layout.interleave_halves(b)
        got = ops.multiply(x, *interleaved, swapped, form, activation)
        assert got.shape == (tokens, n)
        assert torch.equal(got, want)
        assert error(got, ops.multiply_plain(x, *interleaved, swapped, form, activation)) < 4 * EPS[dtype]
    if tokens > 1:
        assert torch.equal(ops.multiply(x[:1], *interleaved, swapped, form, activation), want[:1])


def test_many_tokens_pass_their_gate_after_the_product(monkeypatch):
    monkeypatch.setattr(calls, "DENSE_TOKENS", 4)
    for spec, form in (
        (QuantSpec("int4", (1, 32)), "codes"),
        (QuantSpec("int8"), "int8"),
        (QuantSpec("fp8_e4m3"), "fp8 codes"),
    ):
        apart, interleaved = gated_pair(spec, 35, 96)
        x, bias = (torch.randn(5, 96) / 1000).half(), torch.randn(70).half()
        want = norms.activate(ops.multiply(x, *apart, bias, form), "silu")
        assert error(ops.multiply(x, *interleaved, layout.interleave_halves(bias), form, "silu"), want) < EPS[x.dtype]


def test_an_odd_number_of_rows_has_no_gates():
    weight = layout.prepack(random_qtensor(QuantSpec("int4", (1, 32)), (7, 32)))
    with pytest.raises(KernelError, match="qk_matmul_codes4"):
        calls.matmul(torch.zeros(1, 32).half(), weight, activation="silu")


def test_experts_multiply_their_own_tokens():
    qtensor = random_qtensor(QuantSpec("int4", (1, 32), False), (4, 70, 96))
    x, offsets = torch.randn(21, 96).half(), torch.tensor([0, 3, 3, 20, 21], dtype=torch.int32)
    got = calls.matmul(x, layout.prepack(qtensor), offsets=offsets)
    for expert in range(4):
        own = slice(int(offsets[expert]), int(offsets[expert + 1]))
        if own.stop > own.start:
            assert error(got[own], product(x[own], qtensor[expert])) < EPS[torch.float16]
    gated = calls.matmul(x, layout.prepack(qtensor, interleave=True), offsets=offsets, activation="silu")
    assert torch.equal(gated, norms.activate(got, "silu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kilobytes", [226, 2], ids=["kept", "read again"])  # of shared memory
@pytest.mark.parametrize("n", [64, 77, 1100])
def test_norms(n, dtype, kilobytes, request):
    set_limit = emulated.library().qk_host_shared_limit
    request.addfinalizer(lambda: set_limit(ctypes.c_long(226 * 1024)))
    set_limit(ctypes.c_long(kilobytes * 1024))
    x, residual = torch.randn(3, n).to(dtype), torch.randn(3, n).to(dtype)
    gain, shift = torch.randn(n), torch.randn(n)
    for kind in (norms.NONE, norms.RMS, norms.LAYER):
        for rounding in norms.ROUNDINGS:
            wanted = {"kind": kind, "eps": 1e-5, "factor": 0.5, "rounding": rounding}
            arguments = (x, residual, gain, shift if kind == norms.LAYER else None)
            (total, y, scales), (total2, y2, scales2) = (f(*arguments, **wanted) for f in (norms.norm, norms.norm_plain))
            assert torch.equal(total, total2)
            assert error(y.float(), y2.float()) < 4e-3
            assert scales.shape == scales2.shape
            torch.testing.assert_close(scales, scales2, rtol=4e-3, atol=0)
    assert torch.equal(norms.norm(torch.zeros(2, n, dtype=dtype), None, None, None, kind=0, rounding="int8")[2], torch.ones(2))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_gates(activation):
    x = torch.randn(3, 300).half()
    for gated in (True, False):
        got, want = (f(x, activation, gated) for f in (norms.activate, norms.activate_plain))
        assert error(got, want) < EPS[x.dtype]
    swapped = layout.interleave_halves(x, 1)
    assert torch.equal(norms.activate(swapped, activation, interleaved=True), norms.activate(x, activation))
    assert torch.equal(norms.activate_plain(swapped, activation, interleaved=True), norms.activate_plain(x, activation))


@pytest.mark.parametrize("kind", attention.KINDS)
@pytest.mark.parametrize(
    ("head", "heads", "kv_heads", "window", "softcap", "interleaved", "dtype"),
    [(64, 4, 2, None, None, False, torch.float16), (128, 20, 1, 40, 5.0, True, torch.bfloat16)],
)
def test_pages(kind, head, heads, kv_heads, window, softcap, interleaved, dtype):
    ours = LayerPages.empty(24, kv_heads, head, kind, dtype, "cpu")
    other = LayerPages(*(None if t is None else t.clone() for t in ours[:4]), kind)
    table = torch.randperm(24).view(3, 8).int()
    gains = (torch.rand(head) + 0.5, torch.rand(head) + 0.5) if interleaved else (None, None)
    rope = Rope(torch.randn(256, 16), torch.randn(256, 16), 32, interleaved, *gains)
    lengths = (5, 130, 49)
    where = Where(
        torch.cat([torch.arange(n) for n in lengths]).int(), torch.tensor([0] * 5 + [1] * 130 + [2] * 49).int(), table
    )
    qkv = torch.randn(sum(lengths), (heads + 2 * kv_heads) * head).to(dtype)
    attention.append_plain(qkv, heads, rope, where, ours)
    attention.append_plain(qkv, heads, rope, where, other)
    last = torch.tensor([4, 134, 183])
    where, new = Where(where.positions[last], where.slots[last], table), torch.randn(3, qkv.shape[1]).to(dtype)
    q, q2 = attention.append(new, heads, rope, where, ours), attention.append_plain(new, heads, rope, where, other)
    assert error(q, q2) < EPS[dtype]
    for got, want in zip(ours.read(dtype), other.read(dtype), strict=True):
        assert error(got, want) < 5e-3  # a code may fall on the other side of a half
    options = {"scale": 0.1, "window": window, "softcap": softcap}
    want = attention.attend_plain(q, where, ours, **options)
    for splits in (1, 3):
        assert error(attention.attend(q, where, ours, splits=splits, **options), want) < EPS[dtype]


@pytest.mark.parametrize("kind", attention.KINDS)
@pytest.mark.parametrize(
    ("head", "heads", "kv_heads", "window", "softcap", "dtype"),
    [
        (64, 6, 2, None, None, torch.float16),  # 5 tokens of 3 heads in 16 rows, one of them idle
        (128, 4, 2, 20, 5.0, torch.bfloat16),
        (64, 20, 1, None, None, torch.float16),  # more heads than rows
        (64, 1, 1, 7, None, torch.bfloat16),
    ],
)
def test_prompts(kind, head, heads, kv_heads, window, softcap, dtype):
    pages = LayerPages.empty(24, kv_heads, head, kind, dtype, "cpu")
    table, size = torch.randperm(24).view(3, 8).int(), attention.tile_tokens(heads, kv_heads)
    runs = [(0, 0, 11), (1, 37, 50), (2, 100, 1), (0, -1, 1)]  # slot, first position, tokens; the last one fills up
    positions = torch.cat([torch.arange(start, start + count) for _, start, count in runs]).int()
    slots = torch.cat([torch.full((count,), slot) for slot, _, count in runs]).int()
    past = Where(torch.arange(128).repeat(3).int(), torch.arange(3).repeat_interleave(128).int(), table)
    rope = Rope(None, None)
    attention.append_plain(torch.randn(384, (heads + 2 * kv_heads) * head).to(dtype), heads, rope, past, pages)
    where, q = Where(positions, slots, table), torch.randn(len(positions), heads, head).to(dtype)
    tiles = [*attention.cut(0, 11, size), *attention.cut(11, 50, size), (61, 1)]
    options = {"scale": 0.1, "window": window, "softcap": softcap}
    want = attention.attend_plain(q, where, pages, **options)
    laid = torch.tensor(tiles, dtype=torch.int32)
    got = attention.attend_prompt(q, where, pages, laid, **options)
    assert error(got, want) < EPS[dtype]
    assert not got[-1].any()
    assert torch.equal(attention.attend_prompt_plain(q, where, pages, laid, **options), want)


@pytest.mark.parametrize("kind", attention.KINDS)
def test_rows_that_fill_up_write_nothing_and_read_zeros(kind):
    pages, table = LayerPages.empty(4, 2, 64, kind, torch.float16, "cpu"), torch.tensor([[2, 1], [3, 0]], dtype=torch.int32)
    qkv, rope = torch.randn(3, 8 * 64).half(), Rope(torch.randn(64, 32), torch.randn(64, 32), 64)
    where = Where(torch.tensor([-1, 40, -1], dtype=torch.int32), torch.tensor([0, 1, 0], dtype=torch.int32), table)
    other = LayerPages(*(None if t is None else t.clone() for t in pages[:4]), kind)
    q = attention.append(qkv, 4, rope, where, pages)
    attention.append_plain(qkv, 4, rope, where, other)
    for stored, want in zip(pages[:4], other[:4], strict=True):
        if stored is not None:
            touched = stored.view(torch.uint8).flatten(2).any(-1).any(-1)
            assert touched.tolist() == want.view(torch.uint8).flatten(2).any(-1).any(-1).tolist() == [True, False, False, False]
    for splits in (1, 3):
        got = attention.attend(q, where, pages, scale=0.1, splits=splits)
        assert not got[0].any()
        assert not got[2].any()
        assert got[1].any()
