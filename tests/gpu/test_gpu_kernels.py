"""Every CUDA kernel on a device, against float64 or its plain torch other, at odd sizes; skipped without one."""

import dataclasses
import itertools

import pytest
import torch

from quantkit.engine.sampling import Sampling
from quantkit.kernels import KERNELS, Problem, select
from quantkit.kernels.cuda import attention, calls, layout, norms, prefill
from quantkit.kernels.cuda import ops as cuda_ops
from quantkit.kernels.cuda.attention import LayerPages, Rope, Where
from quantkit.kernels.cuda.sampling import sample
from quantkit.kernels.functions.sampling import Draw, draw_plain
from quantkit.kernels.program.reference import ACTIVATIONS
from quantkit.nn.linear import QuantLinear
from quantkit.numerics import grid
from quantkit.numerics.fake import fake_quantize
from quantkit.qtensor import GridTensor
from quantkit.spec import TOKEN_INT8, QuantSpec, token_activations
from tests.qtensors import assert_same, random_qtensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float16, torch.bfloat16]
TOKENS = (1, 3, 5, 8, 9, 17, 32, 33, 63, 65, 159, 161, 255)
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9))


def on_gpu(spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
    return random_qtensor(spec, shape).to("cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_matmul(group, bits, symmetric, dtype):
    kernel = KERNELS.get("cuda")
    for n, k in ((1, 128), (70, 384), (193, 1152), (576, 2048), (4096, 1024)):
        qtensor = on_gpu(QuantSpec(f"int{bits}", (1, group), symmetric), (n, k))
        assert select(Problem(qtensor.spec, (n, k), "cuda", dtype)) is kernel
        state = kernel.prepack(qtensor)
        assert_same(kernel.unpack(state, qtensor.spec), qtensor)
        weight, bias = qtensor.dequantize().double(), torch.randn(n, device="cuda").to(dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, k, device="cuda").to(dtype)
            got = kernel.matmul(x, state, bias)
            assert error(got, x.double() @ weight.T + bias.double()) < TOLERANCE[dtype], (n, k, tokens)


def test_columns_that_nothing_divides():
    kernel = KERNELS.get("cuda")
    for k in (8, 37, 72, 100, 4095):
        qtensor = on_gpu(QuantSpec("int4"), (129, k))
        state = kernel.prepack(qtensor)
        for tokens in (1, 40, 200):
            x = torch.randn(tokens, k, device="cuda").half()
            assert error(kernel.matmul(x, state, None), x.double() @ qtensor.dequantize().double().T) < 1e-3


def test_the_same_bits_every_time_and_in_every_batch():
    for n, k in ((4096, 4096), (1024, 14336), (70, 1152)):
        weight = layout.prepack(on_gpu(QuantSpec("int4", (1, 128)), (n, k)))
        x = torch.randn(128, k, device="cuda").bfloat16()
        whole = calls.matmul(x, weight)
        for _ in range(20):
            assert torch.equal(calls.matmul(x, weight), whole)
        for tokens in (1, 2, 8, 9, 16, 31, 64):
            assert torch.equal(calls.matmul(x[:tokens].contiguous(), weight), whole[:tokens])


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != prefill.CAPABILITY, reason="needs compute 9.0"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_many_tokens_on_hopper(bits, dtype):
    assert prefill.works(torch.device("cuda", 0), dtype, bits)
    for n, k, group in ((64, 64, 32), (70, 384, 64), (193, 1152, -1), (4096, 4096, 128), (1024, 14336, 128), (129, 100, -1)):
        qtensor = on_gpu(QuantSpec(f"int{bits}", (1, group), False), (n, k))
        weight, bias = layout.prepack(qtensor), torch.randn(n, device="cuda").to(dtype)
        exact = qtensor.dequantize().to(dtype).double()
        for tokens in (1, 65, 127, 128, 129, 300, 1024):
            x = torch.randn(tokens, k, device="cuda").to(dtype)
            got = prefill.matmul(x, weight, bias)
            assert error(got, x.double() @ exact.T + bias.double()) < TOLERANCE[dtype], (n, k, tokens)
            for _ in range(20):
                assert torch.equal(prefill.matmul(x, weight, bias), got)


@pytest.mark.parametrize("tokens", [1, 7, 64, 100])
def test_a_head_and_the_tokens_chosen_from_it(tokens):
    weight = layout.prepack(on_gpu(QuantSpec("int8", (1, -1)), (5003, 1024)))
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()
    logits, bests = cuda_ops.ops().head_matmul(x, *weight, None, "codes")
    assert torch.equal(logits, cuda_ops.ops().fragment_matmul(x, *weight, None, "codes"))
    draw, positions = Draw.greedy(tokens, "cuda"), torch.arange(tokens, dtype=torch.int32, device="cuda")
    draw.set([Sampling() if i % 2 else Sampling(0.9, top_k=40, top_p=0.95, seed=i) for i in range(tokens)])
    newest = torch.full((tokens,), -5, dtype=torch.int32, device="cuda")
    slots = positions.flip(0).contiguous()
    chosen = sample(logits, draw, positions, slots, newest, bests)
    assert torch.equal(chosen, sample(logits, draw, positions))
    assert torch.equal(newest.flip(0), chosen)


def test_a_replayed_graph_says_what_eager_calls_say():
    weight = layout.prepack(on_gpu(QuantSpec("int4", (1, 128)), (1024, 4096)))
    x = torch.randn(4, 4096, device="cuda").half()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls.matmul(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = calls.matmul(x, weight)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, calls.matmul(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_8_bits(dtype):
    int8 = on_gpu(QuantSpec("int8"), (193, 1152))
    spec = QuantSpec("fp8_e4m3")
    weight = torch.randn(193, 1152, device="cuda")
    scale, _ = grid.choose_qparams(weight, spec)
    fp8 = GridTensor.from_codes(grid.quantize(weight, scale, None, spec), scale, None, spec)
    for qtensor, activation in ((int8, TOKEN_INT8), (fp8, token_activations("fp8_e4m3"))):
        if qtensor is fp8 and torch.cuda.get_device_capability() < (8, 9):
            continue
        layer = QuantLinear(qtensor, torch.randn(193, device="cuda").to(dtype), activation=activation)
        for tokens in TOKENS:
            x = torch.randn(tokens, 1152, device="cuda").to(dtype)
            rounded = fake_quantize(x.float(), activation.grid).double()
            want = rounded @ qtensor.dequantize().double().T + layer.bias.double()
            assert error(layer(x), want) < TOLERANCE[dtype] + (4e-3 if tokens >= calls.DENSE_TOKENS else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_in_the_product_changes_no_bit(dtype):
    ops = cuda_ops.ops()
    for spec, form in (
        (QuantSpec("int4", (1, 128)), "codes"),
        (QuantSpec("int4", (1, 32), False), "codes"),
        (QuantSpec("int8"), "codes"),
        (QuantSpec("int8"), "int8"),
    ):
        for (n, k), activation in itertools.product(((35, 384), (7168, 2048)), ACTIVATIONS):
            qtensor, bias = on_gpu(spec, (2 * n, k)), torch.randn(2 * n, device="cuda").to(dtype)
            apart, interleaved = layout.prepack(qtensor), layout.prepack(qtensor, interleave=True)
            for tokens in (1, 5, 16, 33, 200):
                x = torch.randn(tokens, k, device="cuda").to(dtype)
                want = norms.activate(ops.fragment_matmul(x, *apart, bias, form), activation)
                got = ops.fragment_matmul(x, *interleaved, layout.interleave_halves(bias), form, activation)
                if tokens < calls.DENSE_TOKENS:
                    assert torch.equal(got, want), (spec, n, activation, tokens)
                else:
                    assert error(got, want) < 2 * TOLERANCE[dtype]


def test_experts():
    qtensor = on_gpu(QuantSpec("int4", (1, 32), False), (16, 200, 384))
    chosen = torch.randint(0, 16, (300,), device="cuda").sort().values
    offsets = torch.searchsorted(chosen, torch.arange(17, device="cuda")).int()
    x = torch.randn(300, 384, device="cuda").half()
    got = cuda_ops.ops().fragment_experts(x, offsets, *layout.prepack(qtensor))
    want = torch.einsum("tk,tnk->tn", x.double(), qtensor.dequantize().double()[chosen])
    assert error(got, want) < 1e-3
    gated = cuda_ops.ops().fragment_experts(x, offsets, *layout.prepack(qtensor, interleave=True), "silu")
    assert torch.equal(gated, norms.activate(got, "silu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glue(dtype):
    for rows, n in ((1, 4096), (3, 77), (130, 576), (2, 14336)):
        x, residual = (torch.randn(rows, n, device="cuda").to(dtype) for _ in range(2))
        gain, shift = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
        for kind, rounding in itertools.product(range(3), norms.ROUNDINGS):
            if rounding == "fp8_e4m3" and torch.cuda.get_device_capability() < (8, 9):
                continue
            options = {"kind": kind, "eps": 1e-5, "factor": 0.5, "rounding": rounding}
            total, y, scales = norms.norm(x, residual, gain, shift, **options)
            total2, y2, scales2 = norms.norm_plain(x, residual, gain, shift, **options)
            assert error(total, total2) < 1e-3
            assert error(y.float(), y2.float()) < 5e-3
            torch.testing.assert_close(scales, scales2, rtol=8e-3, atol=0)
        for activation, gated in itertools.product(ACTIVATIONS, (True, False)):
            pair = torch.randn(rows, 2 * n, device="cuda").to(dtype)
            got, want = (f(pair, activation, gated) for f in (norms.activate, norms.activate_plain))
            assert error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_chosen_as_in_plain_torch(dtype):
    samplings = [Sampling(), Sampling(1.0), Sampling(0.7, top_k=50), Sampling(1.2, top_p=0.9), Sampling(1.5, 200, 0.8, 0.02)]
    rows = 128
    for size in (128256, 151_669, 999, 4):
        logits = (3 * torch.randn(rows, size, device="cuda")).to(dtype)
        draw, positions = Draw.greedy(rows, "cuda"), torch.arange(rows, dtype=torch.int32, device="cuda")
        draw.set([dataclasses.replace(samplings[row % len(samplings)], seed=row) for row in range(rows)])
        got = sample(logits, draw, positions)
        want = draw_plain(logits.cpu(), Draw(*(part.cpu() for part in draw)), positions.cpu())
        assert (got.cpu() != want).sum() <= 1, size  # two that race within a rounding
        for _ in range(20):
            assert torch.equal(sample(logits, draw, positions), got)
        assert torch.equal(sample(logits[7:9].contiguous(), Draw(*(part[7:9] for part in draw)), positions[7:9]), got[7:9])


@pytest.mark.parametrize("kind", attention.KINDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (9, 3), (20, 1), (8, 8)])
@pytest.mark.parametrize("head", [64, 128])
def test_attention(head, heads, kv_heads, kind):
    for dtype, (window, softcap) in zip(DTYPES, ((None, None), (300, 30.0)), strict=True):
        rows, lengths = 5, torch.tensor([1, 17, 500, 1023, 333], device="cuda")
        pages = LayerPages.empty(rows * 32, kv_heads, head, kind, dtype, "cuda")
        other = LayerPages(*(None if t is None else t.clone() for t in pages[:4]), kind)
        table = torch.randperm(rows * 32, device="cuda").view(rows, 32).int()
        slots = torch.repeat_interleave(torch.arange(rows, device="cuda"), lengths).int()
        positions = torch.cat([torch.arange(int(n), device="cuda") for n in lengths]).int()
        where, rope = Where(positions, slots, table), Rope(torch.randn(1024, 32).cuda(), torch.randn(1024, 32).cuda(), 64)
        qkv = torch.randn(len(positions), (heads + 2 * kv_heads) * head, device="cuda").to(dtype)
        q = attention.append(qkv, heads, rope, where, pages)
        q2 = attention.append_plain(qkv, heads, rope, where, other)
        assert error(q, q2) < TOLERANCE[dtype]
        for got, want in zip(pages.read(dtype), other.read(dtype), strict=True):
            assert error(got, want) < 8e-3
        last = lengths.cumsum(0) - 1
        here, options = Where(positions[last], slots[last], table), {"scale": head**-0.5, "window": window, "softcap": softcap}
        want = attention.attend_plain(q[last], here, pages, **options)
        for splits in (1, 3, 16, None):
            got = attention.attend(q[last].contiguous(), here, pages, splits=splits, **options)
            assert error(got, want) < 2 * TOLERANCE[dtype], splits
            for _ in range(20):
                assert torch.equal(attention.attend(q[last].contiguous(), here, pages, splits=splits, **options), got)
        size, starts = attention.tile_tokens(heads, kv_heads), (last + 1 - lengths).tolist()
        tiles = [tile for start, n in zip(starts, lengths.tolist(), strict=True) for tile in attention.cut(start, n, size)]
        laid = torch.tensor(tiles, dtype=torch.int32, device="cuda")
        together = attention.attend_prompt(q, where, pages, laid, **options)
        assert error(together, attention.attend(q, where, pages, splits=1, **options)) < 2 * TOLERANCE[dtype]
        for _ in range(20):
            assert torch.equal(attention.attend_prompt(q, where, pages, laid, **options), together)


@pytest.mark.parametrize("kind", attention.KINDS)
def test_rows_that_fill_up_write_nothing_and_read_zeros(kind):
    pages = LayerPages.empty(4, 2, 64, kind, torch.float16, "cuda")
    table, rope = torch.tensor([[2, 1], [3, 0]], dtype=torch.int32, device="cuda"), Rope(None, None)
    positions, slots = (torch.tensor(part, dtype=torch.int32, device="cuda") for part in ([-1, 40, -1], [0, 1, 0]))
    where = Where(positions, slots, table)
    q = attention.append(torch.randn(3, 8 * 64, device="cuda").half(), 4, rope, where, pages)
    for stored in (part for part in pages[:4] if part is not None):
        assert stored.view(torch.uint8).flatten(1).any(-1).tolist() == [True, False, False, False]
    for splits in (1, 3):
        got = attention.attend(q, where, pages, scale=0.1, splits=splits)
        assert got.flatten(1).any(-1).tolist() == [False, True, False]


def test_operators_trace_and_modules_compile_to_the_same():
    layer = QuantLinear(on_gpu(QuantSpec("int4", (1, 64)), (192, 256)))
    x = torch.randn(3, 256, device="cuda").half()
    weight = layout.prepack(layer.qtensor)
    for activation in (None, "silu"):
        torch.library.opcheck(cuda_ops.ops().fragment_matmul.default, (x, *weight, None, "codes", activation))
    assert torch.equal(layer(x), cuda_ops.ops().fragment_matmul(x, *weight, None, "codes"))
