"""What every kernel in the registry promises: the float64 product of the dequantized weight, for every spec it accepts.

Tolerance: float32 sums of K products, the rounding of the result to x's dtype, and what the kernel says it rounds weights to
(the reference: x's dtype; others: nothing, but NF4's numbers to bfloat16 beside bfloat16 activations, and to whole numbers
beside int8 ones). A kernel that rounds activations is held to the product of the rounded ones.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import KernelError
from quantkit.kernels import KERNELS, Kernel, Problem, report, select
from quantkit.kernels.cpu import layout, ops
from quantkit.kernels.cpu.matmul import BLOCK
from quantkit.numerics import ggml, grid
from quantkit.qtensor import BlockTensor, QTensor
from quantkit.spec import BLOCK_GRIDS, QuantSpec, block_spec
from tests.qtensors import assert_same, random_qtensor

NAMES = [name for name in KERNELS.names() if name not in ("cuda", "blocks")]  # held to it in tests/{cuda,gpu,formats}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = {  # block -> K it is tried with
    (1, 32): (64,),
    (1, 64): (192, 576),
    (1, 128): (256,),
    (1, 12): (36,),
    (1, -1): (37, 576),
    (-1, -1): (40,),
}


OTHERS = {  # what are not integers with a zero point, and a shape of odd sizes
    "fp8": (QuantSpec("fp8_e4m3"), (37, 77)),
    "fp8-tensor": (QuantSpec("fp8_e4m3", (-1, -1), True, "bfloat16"), (18, 40)),
    "fp8-block": (QuantSpec("fp8_e4m3", (16, 24), True, "float32"), (48, 72)),
    "nf4": (QuantSpec("nf4", (1, 64)), (35, 192)),
    "nf4-odd": (QuantSpec("nf4", (1, 12)), (7, 36)),
    "fp4": (QuantSpec("fp4_e2m1"), (33, 37)),
    "mxfp4": (QuantSpec("fp4_e2m1", (1, 32), True, "float8_e8m0fnu"), (17, 96)),
    "nvfp4": (QuantSpec("fp4_e2m1", (1, 16), True, "float8_e4m3fn"), (21, 80)),
    "offset": (QuantSpec("int4", (1, 32), False, "bfloat16", offset=True), (19, 96)),
    "offset-odd": (QuantSpec("int8", (1, 12), False, "float32", offset=True), (5, 36)),
    **{name: (block_spec(name), (9, 512)) for name in BLOCK_GRIDS},
}


def kernel_for(name: str, qtensor: QTensor, dtype: torch.dtype) -> Kernel:
    kernel = KERNELS.get(name)
    reason = kernel.rejects(Problem(qtensor.spec, (qtensor.shape[0], qtensor.shape[1]), "cpu", dtype))
    assert reason is None
    return kernel


def assert_product(name: str, y: torch.Tensor, x: torch.Tensor, qtensor: QTensor, bias: torch.Tensor | None) -> None:
    weight = qtensor.dequantize().double()
    dtype = x.dtype
    if KERNELS.get(name).compute == "int8":
        x = ops.round_activations(x, grid.block_size(qtensor.spec, qtensor.shape)[1], BLOCK)
        weight = layout.dequantize(*layout.prepack(qtensor), whole=True).double()
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.abs().T
    eps = torch.finfo(dtype).eps
    rounded = eps if name == "reference" or (qtensor.spec.dtype, dtype) == ("nf4", torch.bfloat16) else 0.0
    tolerance = (2 * torch.finfo(torch.float32).eps * x.shape[-1] ** 0.5 + rounded) * size + eps * exact.abs() + 1e-7
    assert y.dtype == dtype
    assert y.shape == exact.shape
    error = (y.double() - exact).abs()
    assert (error <= tolerance).all(), (qtensor.spec.describe(), tuple(x.shape), (error / tolerance).max().item())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_dequantized_product(name, bits, symmetric):
    for block, columns in BLOCKS.items():
        spec = QuantSpec(f"int{bits}", block, symmetric)
        for k in columns:
            for n in (1, 7, 64, 193):
                qtensor = random_qtensor(spec, (n, k))
                kernel = kernel_for(name, qtensor, torch.float32)
                state = kernel.prepack(qtensor)
                assert_same(kernel.unpack(state, spec), qtensor)
                for m in (1, 2, 3, 5, 17, 33):
                    x = torch.randn(m, k)
                    assert_product(name, kernel.matmul(x, state, None), x, qtensor, None)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_activation_dtype(name, dtype, biased):
    for spec in (QuantSpec("int4", (1, 64), False), QuantSpec("int8"), QuantSpec("int3", (1, 32), scale_dtype="bfloat16")):
        qtensor = random_qtensor(spec, (193, 192))
        kernel = kernel_for(name, qtensor, dtype)
        state = kernel.prepack(qtensor)
        bias = torch.randn(193).to(dtype) if biased else None
        for m in (1, 2, 3, 5, 9, 17, 33, 101):
            x = torch.randn(m, 192).to(dtype)
            assert_product(name, kernel.matmul(x, state, bias), x, qtensor, bias)


def other_weight(spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
    """Every code possible but NaN."""
    if spec.blocks is None:
        return random_qtensor(spec, shape)
    kind, generator = ggml.BLOCK_TYPES[spec.blocks], torch.Generator().manual_seed(0)
    blocks = (shape[0], shape[1] // kind.size)
    content = kind.unpack(torch.randint(0, 256, (*blocks, kind.nbytes), dtype=torch.uint8, generator=generator))
    d, low = ((torch.rand(blocks, generator=generator) / 64).half() for _ in range(2))
    return BlockTensor.from_content(content._replace(d=d, low=None if content.low is None else low), spec)


@pytest.mark.parametrize("which", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_tables_small_floats_offsets_and_blocks(name, which):
    spec, shape = OTHERS[which]
    qtensor = other_weight(spec, shape)
    if reason := KERNELS.get(name).rejects(Problem(spec, shape, "cpu", torch.float32)):
        assert name == "cpu-int8"
        assert "no multiples of a step" in reason
        return
    for dtype in DTYPES:
        kernel = kernel_for(name, qtensor, dtype)
        state = kernel.prepack(qtensor)
        assert_same(kernel.unpack(state, spec), qtensor)
        whole = torch.randn(33, shape[1]).to(dtype)
        for m in (1, 2, 5, 9, 33):
            y = kernel.matmul(whole[:m], state, None)
            assert_product(name, y, whole[:m], qtensor, None)
            if m == 9 and name != "reference":  # which leaves the order of sums to torch
                assert torch.equal(y[:1], kernel.matmul(whole[:1], state, None))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("block", [(1, 16), (4, 32), (-1, 16), (-1, -1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_scales_of_every_dtype_and_block(name, block, scale_dtype):
    for symmetric in (True, False):
        qtensor = random_qtensor(QuantSpec("int4", block, symmetric, scale_dtype), (36, 64))
        kernel = kernel_for(name, qtensor, torch.float32)
        state, x = kernel.prepack(qtensor), torch.randn(3, 64)
        assert_same(kernel.unpack(state, qtensor.spec), qtensor)
        assert_product(name, kernel.matmul(x, state, None), x, qtensor, None)


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.integers(1, 40),
    groups=st.integers(1, 4),
    n=st.integers(1, 40),
    m=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_problem(bits, symmetric, group, groups, n, m, dtype, biased, seed):
    torch.manual_seed(seed)
    qtensor = random_qtensor(QuantSpec(f"int{bits}", (1, group), symmetric), (n, group * groups), seed)
    bias = torch.randn(n).to(dtype) if biased else None
    x = torch.randn(m, group * groups).to(dtype)
    for name in NAMES:
        kernel = kernel_for(name, qtensor, dtype)
        assert_product(name, kernel.matmul(x, kernel.prepack(qtensor), bias), x, qtensor, bias)


@pytest.mark.parametrize("name", NAMES)
def test_any_layout_of_x(name):
    qtensor = random_qtensor(QuantSpec("int4", (1, 32)), (33, 64))
    kernel = kernel_for(name, qtensor, torch.float32)
    state = kernel.prepack(qtensor)
    wide = torch.randn(2, 40, 200)
    layouts = (wide[:, :3, 5:69], wide[..., 1:129:2], torch.randn(64, 7).T, torch.randn(64, 50).T, wide[0, 0, 9:73])
    for x in (*layouts, torch.randn(2, 3, 4, 64), torch.empty(0, 64), torch.empty(2, 0, 64)):
        before = x.clone()
        assert_product(name, kernel.matmul(x, state, None), x, qtensor, None)
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", NAMES)
def test_large_and_non_finite_values_pass_through(name):
    qtensor = random_qtensor(QuantSpec("int4", (1, 32), False), (17, 64))
    kernel = kernel_for(name, qtensor, torch.float32)
    state = kernel.prepack(qtensor)
    x = torch.randn(1, 64) * 1e30
    assert_product(name, kernel.matmul(x, state, None) / 1e30, x / 1e30, qtensor, None)
    x[0, 3] = float("nan")
    assert kernel.matmul(x, state, None).isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_prepacking_leaves_the_weight_alone_and_is_deterministic(name):
    qtensor = random_qtensor(QuantSpec("int5", (1, 32), False), (20, 64))
    kernel = kernel_for(name, qtensor, torch.float32)
    before, x = qtensor.dequantize(), torch.randn(3, 64)
    state = kernel.prepack(qtensor)
    first = kernel.matmul(x, state, None)
    assert torch.equal(kernel.matmul(x, kernel.prepack(qtensor), None), first)
    assert torch.equal(kernel.matmul(x, state, None), first)
    assert torch.equal(qtensor.dequantize(), before)


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(QuantSpec("int4", (1, 64)), (64, 64), device, dtype)


def test_the_cuda_kernel_leaves_the_cpu_alone():
    assert KERNELS.get("cuda").rejects(problem()) == "runs on cuda, not on cpu"
    assert "no CUDA device" in str(KERNELS.get("cuda").rejects(problem("cuda", torch.float16))) or torch.cuda.is_available()


def test_the_fastest_that_accepts_is_selected(monkeypatch):
    monkeypatch.delenv("QUANTKIT_KERNEL", raising=False)
    assert select(problem()) is KERNELS.get("cpu")
    assert select(problem(dtype=torch.float64)) is KERNELS.get("reference")
    assert select(problem(device="meta")) is KERNELS.get("reference")


def test_activations_are_rounded_only_where_that_was_asked_for(monkeypatch):
    monkeypatch.delenv("QUANTKIT_KERNEL", raising=False)
    assert select(problem(), "int8") is KERNELS.get("cpu-int8")
    with pytest.raises(KernelError, match="with int8 activations") as caught:
        select(problem(device="meta"), "int8")
    assert "reference (float activations): can run it" in str(caught.value)
    with pytest.raises(KernelError, match="compute='int4'; want one of float, int8"):
        select(problem(), "int4")
    monkeypatch.setenv("QUANTKIT_KERNEL", "cpu-int8")
    assert select(problem()) is KERNELS.get("cpu-int8")


def test_a_kernel_can_be_forced(monkeypatch):
    monkeypatch.setenv("QUANTKIT_KERNEL", "reference")
    assert select(problem()) is KERNELS.get("reference")
    monkeypatch.setenv("QUANTKIT_KERNEL", "")
    assert select(problem()) is KERNELS.get("cpu")


def test_a_forced_kernel_that_rejects_is_an_error_with_every_reason(monkeypatch):
    monkeypatch.setenv("QUANTKIT_KERNEL", "cpu")
    with pytest.raises(KernelError, match="QUANTKIT_KERNEL=cpu") as caught:
        select(problem(dtype=torch.float64))
    assert "cpu (float activations): activations are torch.float64" in str(caught.value)
    assert "reference (float activations): can run it" in str(caught.value)
    monkeypatch.setenv("QUANTKIT_KERNEL", "cpp")
    with pytest.raises(KernelError, match="did you mean 'cpu'"):
        select(problem())


def test_nobody_accepts(monkeypatch):
    monkeypatch.delenv("QUANTKIT_KERNEL", raising=False)
    with pytest.raises(KernelError, match="no kernel can run int4 g64, out=64 in=64, int32 on cpu") as caught:
        select(problem(dtype=torch.int32))
    assert all(name in str(caught.value) for name in NAMES)


def test_report_lists_every_kernel_best_first():
    rows = report()
    assert sorted(row["kernel"] for row in rows) == KERNELS.names()
    assert [row["priority"] for row in rows] == sorted((row["priority"] for row in rows), reverse=True)
    assert all((row["reason"] is None) == row["available"] for row in rows)
    assert {"compiler", "isa", "cache", "threads"} <= rows[0]["details"].keys()
