"""The compiled CPU kernel beyond the contract: instruction sets, threads, forks, sanitizers, and the torch operator."""

import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from quantkit.errors import KernelError
from quantkit.kernels import KERNELS, build
from quantkit.kernels.cpu import layout, ops
from quantkit.kernels.cpu.matmul import BLOCK, State
from quantkit.numerics import grid
from quantkit.numerics.fake import fake_quantize
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec, token_activations
from tests.qtensors import random_qtensor

CPU, INT8 = KERNELS.get("cpu"), KERNELS.get("cpu-int8")
BOTH = pytest.mark.parametrize("kernel", [CPU, INT8], ids=["float", "int8"])
SAYS = {
    "avx512-amx": "avx512 vnni bf16 amx",
    "avx512-bf16": "avx512 vnni bf16",
    "avx512-vnni": "avx512 vnni",
    "avx512": "avx512 maddubs",
    "avx2-vnni": "avx2 vnni",
    "avx2": "avx2 maddubs",
}
SANITIZE = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def quantized(bits: int = 4, shape: tuple[int, int] = (200, 128), symmetric: bool = False, group: int = 32) -> GridTensor:
    generator = torch.Generator().manual_seed(bits)
    spec = QuantSpec(f"int{bits}", (1, group), symmetric)
    weight = torch.randn(shape, generator=generator)
    scale, zero = grid.choose_qparams(weight, spec)
    return GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec)


def extremes(bits: int, shape: tuple[int, int], group: int) -> GridTensor:
    """Largest and smallest codes and zero points: what saturates where sums are too narrow."""
    generator = torch.Generator().manual_seed(bits)
    top, blocks = 2**bits - 1, (shape[0], shape[1] // group)
    codes = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) * top
    codes[0], codes[1] = top, 0
    zero = torch.randint(0, 2, blocks, generator=generator, dtype=torch.uint8) * top
    return GridTensor.from_codes(codes, torch.ones(blocks).half(), zero, QuantSpec(f"int{bits}", (1, group), False))


@pytest.mark.usefixtures("isa")
@BOTH
def test_every_instruction_set_gives_the_same_product(kernel):
    for bits, group in ((2, 32), (4, 32), (4, 12), (5, 96), (8, 96), (8, 37)):
        shape = (77, 96 if 96 % group == 0 else group * 2)
        for qtensor in (quantized(bits, shape, group=group), extremes(bits, shape, group)):
            state = kernel.prepack(qtensor)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for m in (1, 2, 3, 7, 13, 33, 100):
                    x = torch.randn(m, shape[1])
                    x[0] = x[0].sign()  # int8's largest values
                    x = x.to(dtype)
                    seen = ops.round_activations(x, group, BLOCK) if kernel is INT8 else x
                    exact = seen.double() @ qtensor.dequantize().double().T
                    size = (seen.double().abs() @ qtensor.dequantize().double().abs().T).max().item()
                    tolerance = {"atol": 1e-5 * size, "rtol": torch.finfo(dtype).eps}
                    torch.testing.assert_close(kernel.matmul(x, state, None).double(), exact, **tolerance)


@pytest.mark.usefixtures("isa")
def test_every_instruction_set_reads_tables_small_floats_and_narrow_scales():
    for spec in (
        QuantSpec("nf4", (1, 12)),
        QuantSpec("fp8_e4m3", (1, -1)),
        QuantSpec("fp4_e2m1", (1, 16), True, "float8_e4m3fn"),
        QuantSpec("fp4_e2m1", (1, 32), True, "float8_e8m0fnu"),
        QuantSpec("int4", (1, 32), False, "bfloat16", offset=True),
    ):
        qtensor = random_qtensor(spec, (37, 96))
        for kernel in (CPU,) if spec.dtype == "fp8_e4m3" else (CPU, INT8):
            state = kernel.prepack(qtensor)
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(33, 96).to(dtype)
                block = BLOCK if kernel is INT8 else 0
                got = kernel.matmul(x, state, None)
                want = ops.wq_matmul_plain(x.float(), *state.weight, block, None)
                nf4 = spec.dtype == "nf4" and dtype == torch.bfloat16  # whose numbers bfloat16 rounds
                limit = (2.0**-8 if dtype == torch.bfloat16 else 1e-5) * (3 if nf4 else 1)
                torch.testing.assert_close(got.float(), want, rtol=limit, atol=limit * want.abs().max().item())
                for m in (1, 3, 9):
                    assert torch.equal(kernel.matmul(x[:m], state, None), got[:m])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("grid_of_inputs", ["int8", "fp8_e4m3"])
def test_every_instruction_set_rounds_inputs_as_schemes_do(grid_of_inputs):
    activation = token_activations(grid_of_inputs)
    for spec in (QuantSpec("int8", (1, -1)), QuantSpec("int4", (1, 32), False), QuantSpec("fp8_e4m3", (1, -1))):
        qtensor, x = random_qtensor(spec, (37, 96)), torch.randn(20, 96)
        x[0] = -x[0].sign()  # the largest magnitude is negative: code -128
        want = fake_quantize(x, activation.grid).double() @ qtensor.dequantize().double().T
        got = CPU.matmul_rounded(x, CPU.prepack(qtensor), None, activation)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_a_library_says_what_it_was_built_for(isa):
    assert build.library().qk_isa().decode() == SAYS.get(isa, "portable")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", [4, 8])
@BOTH
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(kernel, bits):
    for group, columns in ((32, 96), (576, 576), (20, 60)):
        state = kernel.prepack(quantized(bits, (50, columns), group=group))
        x = torch.randn(67, columns)
        whole = kernel.matmul(x, state, None)
        for rows in (1, 2, 3, 4, 5, 8, 9, 13, 24, 40):
            assert torch.equal(kernel.matmul(x[:rows], state, None), whole[:rows])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("columns", [96, 576, 1000])  # 1000: not whole tiles
def test_a_row_of_bfloat16_gives_the_same_bits_alone_and_in_a_batch(columns):
    weight = torch.randn(50, columns).bfloat16()
    plain = State(packed := layout.prepack_float(weight), packed.struct())
    group = 32 if columns % 32 == 0 else 40
    cases = [(plain, weight)]
    for qtensor in (quantized(4, (50, columns), group=group), quantized(8, (50, columns), group=columns)):
        cases.append((CPU.prepack(qtensor), qtensor.dequantize()))
    x = torch.randn(67, columns).bfloat16()
    x[5, 3] = float("inf")  # stays in its row, although tiles overlap
    for state, numbers in cases:
        whole = CPU.matmul(x, state, None)
        fine = [row for row in range(67) if row != 5]
        want = x[fine].double() @ numbers.double().T
        torch.testing.assert_close(whole[fine].double(), want, rtol=2.0**-8, atol=1e-5 * want.abs().max().item())
        assert not whole[5].isfinite().any()
        for rows in (1, 2, 3, 8, 15, 16, 17, 33, 49):
            assert torch.equal(CPU.matmul(x[-rows:], state, None), whole[-rows:])


@BOTH
def test_threads_and_batches_do_not_change_a_bit(kernel, threads):
    state = kernel.prepack(quantized(shape=(1000, 128)))
    x = torch.randn(3000, 128)  # more than is made ready at a time
    threads(1)
    whole = kernel.matmul(x, state, None)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(kernel.matmul(x, state, None), whole)
        for rows in (1, 2, 3, 5, 12, 700):
            assert torch.equal(kernel.matmul(x[:rows], state, None), whole[:rows])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float_weights_run_in_the_same_layout(dtype):
    for rows, columns in ((1, 1), (33, 37), (50, 600)):
        weight = torch.randn(rows, columns).to(dtype)
        state = layout.prepack_float(weight)
        assert torch.equal(layout.dequantize(*state), weight.float())
        bias = torch.randn(rows)
        for block in (0, 64):  # float weights leave activations alone, whatever is asked for
            for m in (1, 3, 8, 30):
                x = torch.randn(m, columns)
                exact = x.double() @ weight.double().T + bias.double()
                got = ops.compute(x, state, state.struct(), block, bias)
                torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6 * columns)


@pytest.mark.usefixtures("isa")
def test_bfloat16_weights_meet_bfloat16_activations_in_any_batch():
    for rows, columns in ((1, 1), (33, 37), (50, 600), (77, 1030)):
        weight, x, bias = (torch.randn(shape).bfloat16() for shape in ((rows, columns), (67, columns), (rows,)))
        state = layout.prepack_float(weight)
        exact = x.double() @ weight.double().T + bias.double()
        size = (x.double().abs() @ weight.double().abs().T + bias.double().abs()).max().item()
        whole = ops.compute(x, state, state.struct(), 0, bias)
        torch.testing.assert_close(whole.double(), exact, rtol=2.0**-8, atol=1e-6 * size)
        for m in (1, 2, 3, 4, 5, 8, 9, 13, 24, 40):
            assert torch.equal(ops.compute(x[:m], state, state.struct(), 0, bias), whole[:m])


def test_weights_that_have_no_layout_are_refused():
    for weight in (torch.randn(2, 3).half(), torch.randn(2, 3, 4)):
        with pytest.raises(KernelError, match=r"want float32 or bfloat16 \(N, K\)"):
            layout.prepack_float(weight)


def test_int8_activations_are_what_they_are_said_to_be():
    x = torch.tensor([[1.0, -127.0, 63.4, 0.4] + [0.0] * 60, [1e-38] * 64, [0.0] * 63 + [float("inf")]])
    rounded = ops.round_activations(x, 64, 64)
    assert rounded[0, :4].tolist() == [1.0, -127.0, 63.0, 0.0]
    assert torch.equal(rounded[1], torch.zeros(64))
    assert rounded[2].isnan().all()
    qtensor = quantized(4, (20, 64), group=64)
    y = INT8.matmul(x, INT8.prepack(qtensor), None)
    torch.testing.assert_close(y[0], rounded[0] @ qtensor.dequantize().T)
    assert torch.equal(y[1], torch.zeros(20))
    assert y[2].isnan().all()


def test_a_block_that_cannot_be_is_refused():
    state = CPU.prepack(quantized())
    for block in (-8, 12, 264):
        with pytest.raises(KernelError, match=f"block={block}; want a multiple of 8 up to 256"):
            ops.compute(torch.randn(1, 128), *state, block, None)


def test_python_threads_may_call_at_once(threads):
    threads(2)
    states = [CPU.prepack(quantized(bits, shape=(600, 128))) for bits in (2, 4, 8)]
    inputs = [torch.randn(m, 128) for m in (1, 4, 40)]
    wanted = [[CPU.matmul(x, state, None) for x in inputs] for state in states]
    wrong: list[str] = []

    def call(seed: int) -> None:
        for i in range(60):
            s, j = (i + seed) % 3, (i // 3 + seed) % 3
            if not torch.allclose(CPU.matmul(inputs[j], states[s], None), wanted[s][j], rtol=1e-5, atol=1e-5):
                wrong.append(f"thread {seed}, call {i}")

    pool = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in pool)
    assert wrong == []


def _child(queue, state, x) -> None:
    queue.put(CPU.matmul(x, state, None).tolist())


def test_a_forked_child_computes_after_its_parent_has(threads):
    threads(2)
    state, x = CPU.prepack(quantized(shape=(600, 128))), torch.randn(1, 128)
    wanted = CPU.matmul(x, state, None)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, state, x))
    child.start()
    assert queue.get(timeout=60) == wanted.tolist()
    child.join(timeout=60)
    assert child.exitcode == 0


def test_the_process_ends_cleanly_after_threads_have_run():
    code = (
        "import torch; torch.set_num_threads(2); from quantkit.kernels import KERNELS, build; "
        "from quantkit.qtensor import GridTensor; from quantkit.spec import QuantSpec; "
        "q = GridTensor.from_codes(torch.ones(512, 64, dtype=torch.uint8), torch.ones(512, 1), None, QuantSpec('int4')); "
        "k = KERNELS.get('cpu'); print(k.matmul(torch.ones(1, 64), k.prepack(q), None).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(-7.0 * 64 * 512), "")


def run_driver(compiler: list[str], driver: Path, emulator: tuple[str, ...] = (), optimize: str = "-O0") -> str:
    """Compile the sources and the contract in C++, run it, and return the instruction set that it says it ran on.

    Without optimization by default: sanitizers see every access, and compiling takes a third of the time.
    """
    command = [*compiler, "-std=c++17", optimize, "-Wno-psabi", "-pthread", f"-I{build.sources()[0].parent}"]
    command += [str(path) for path in build.sources() if path.suffix == ".cpp"]
    command += [str(Path(__file__).with_name(name)) for name in ("driver.cpp", "decoder_problems.cpp", "draw_problems.cpp")]
    done = subprocess.run([*command, "-o", str(driver)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run(
        [*emulator, str(driver), *(["few"] if emulator else [])], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert " problems, all right, on " in done.stdout
    return done.stdout.strip().rpartition(" on ")[2]


@pytest.mark.parametrize("isa", ["portable", "native"])
def test_no_byte_out_of_place(isa, tmp_path):
    """Compile the sources with the address and undefined-behaviour sanitizers and run them on arrays of exact size."""
    run_driver([*build.compiler(), *build.ISA_FLAGS[isa], *SANITIZE], tmp_path / "driver")


@pytest.mark.parametrize("block", [0, 64], ids=["float", "int8"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_the_operator_keeps_torchs_rules(biased, block):
    operator = ops.wq_matmul()
    for symmetric in (True, False):
        state = CPU.prepack(quantized(symmetric=symmetric))
        for rows in (1, 40):
            bias = torch.randn(200) if biased else None
            arguments = (torch.randn(2, rows, 128), *state.weight, block, bias)
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
            torch.testing.assert_close(ops.wq_matmul_plain(*arguments), operator(*arguments), rtol=1e-4, atol=1e-4)


def test_the_operator_can_be_traced():
    state = CPU.prepack(quantized())
    operator = ops.wq_matmul()
    compiled = torch.compile(lambda x: F.relu(operator(x, *state.weight, 0, None)), backend="eager", fullgraph=True)
    x = torch.randn(3, 128)
    torch.testing.assert_close(compiled(x), F.relu(CPU.matmul(x, state, None)))


@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.randn(1, 127), None),
        (torch.randn(1, 128, dtype=torch.float64), None),
        (torch.randn(1, 128), torch.randn(200).half()),
    ],
    ids=["columns", "dtype", "bias"],
)
def test_arguments_that_do_not_fit_are_refused(x, bias):
    with pytest.raises(KernelError, match=r"want float32, float16 or bfloat16 \(\.\.\., 128\)"):
        CPU.matmul(x, CPU.prepack(quantized()), bias)
