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
from quantkit.kernels import KERNELS, build, ops
from quantkit.numerics import grid
from quantkit.qtensor import QTensor
from quantkit.spec import QuantSpec

CPU = KERNELS.get("cpu")
NEEDED = {"avx512": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"), "avx2": ("avx2", "fma3", "f16c"), "portable": ()}


def quantized(bits: int = 4, shape: tuple[int, int] = (200, 128), symmetric: bool = False, group: int = 32) -> QTensor:
    generator = torch.Generator().manual_seed(bits)
    spec = QuantSpec(f"int{bits}", (1, group), symmetric)
    weight = torch.randn(shape, generator=generator)
    scale, zero = grid.choose_qparams(weight, spec)
    return QTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec)


@pytest.fixture
def threads():
    """Restore torch's number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set_gives_the_same_product(isa, monkeypatch):
    capabilities = torch.cpu.get_capabilities()
    if not all(capabilities.get(feature, False) for feature in NEEDED[isa]):
        pytest.skip(f"this CPU has no {isa}")
    native = build.library()
    library = native if native.qk_isa().decode() == isa else build.load(isa)
    assert library.qk_isa().decode() == isa
    monkeypatch.setattr(build, "library", lambda: library)
    for bits in (2, 4, 8):
        qtensor = quantized(bits, shape=(77, 96))
        state = CPU.prepack(qtensor)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for m in (1, 2, 3, 7, 13, 33, 100):
                x = torch.randn(m, 96).to(dtype)
                exact = x.double() @ qtensor.dequantize().double().T
                tolerance = {"atol": 1e-5 * exact.abs().max().item(), "rtol": torch.finfo(dtype).eps}
                torch.testing.assert_close(CPU.matmul(x, state, None).double(), exact, **tolerance)


def test_a_row_gives_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(threads):
    state = CPU.prepack(quantized(shape=(1000, 128)))
    x = torch.randn(3000, 128)  # more than is arranged at a time
    threads(1)
    whole = CPU.matmul(x, state, None)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(CPU.matmul(x, state, None), whole)
        for rows in (1, 2, 3, 5, 12, 700):
            assert torch.equal(CPU.matmul(x[:rows], state, None), whole[:rows])


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
        "from quantkit.qtensor import QTensor; from quantkit.spec import QuantSpec; "
        "q = QTensor.from_codes(torch.ones(512, 64, dtype=torch.uint8), torch.ones(512, 1), None, QuantSpec('int4')); "
        "k = KERNELS.get('cpu'); print(k.matmul(torch.ones(1, 64), k.prepack(q), None).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(-7.0 * 64 * 512), "")


@pytest.mark.parametrize("isa", ["portable", "native"])
def test_no_byte_out_of_place(isa, tmp_path):
    """Compile the sources with the address and undefined-behaviour sanitizers and run them on arrays of exact size."""
    driver = tmp_path / "driver"
    files = [str(path) for path in build.sources() if path.suffix == ".cpp"]
    command = [*build.compiler(), "-std=c++17", "-O1", "-g1", "-Wno-psabi", "-pthread", *build.ISA_FLAGS[isa]]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{build.sources()[0].parent}"]
    drivers = [str(Path(__file__).with_name(name)) for name in ("driver.cpp", "decoder_problems.cpp")]
    command += [*files, *drivers, "-o", str(driver)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([driver], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "problems, all right" in done.stdout


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_the_operator_keeps_torchs_rules(biased):
    operator = ops.wq_matmul()
    for symmetric in (True, False):
        state = CPU.prepack(quantized(symmetric=symmetric))
        for rows in (1, 40):
            bias = torch.randn(200) if biased else None
            arguments = (torch.randn(2, rows, 128), *state, bias)
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
            torch.testing.assert_close(ops._plain(*arguments), operator(*arguments), rtol=1e-4, atol=1e-4)


def test_the_operator_can_be_traced():
    state = CPU.prepack(quantized())
    operator = ops.wq_matmul()
    compiled = torch.compile(lambda x: F.relu(operator(x, *state, None)), backend="eager", fullgraph=True)
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
