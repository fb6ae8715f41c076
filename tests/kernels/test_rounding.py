"""The compiled search and sweep do what their plain forms do, on every instruction set."""

import pytest
import torch
from torch import Tensor

from quantkit.errors import KernelError, SpecError
from quantkit.kernels import build
from quantkit.kernels.functions import rounding
from quantkit.numerics import grid, search
from quantkit.numerics import sweep as plain
from quantkit.quantizers.gptq import inverse_factor
from quantkit.spec import QuantSpec

SPECS = [
    QuantSpec("int4", (1, 32)),
    QuantSpec("int4", (1, 32), symmetric=False, scale_dtype="bfloat16"),
    QuantSpec("int3", (1, 12), symmetric=False),
    QuantSpec("int8"),
    QuantSpec("int2", symmetric=False, scale_dtype="float32"),
]


@pytest.fixture(params=["native", "avx512", "avx2", "portable"])
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "native" and request.param not in _runnable():
        pytest.skip(f"this CPU cannot run {request.param}")
    lib = build.load(request.param)
    monkeypatch.setattr(build, "library", lambda: lib)


def _runnable() -> set[str]:
    from pathlib import Path

    flags = set(Path("/proc/cpuinfo").read_text().split())
    wants = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, "avx2": {"avx2", "fma", "f16c"}, "portable": set()}
    return {name for name, need in wants.items() if need <= flags}


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def weighted_loss(weight: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, importance: Tensor) -> float:
    back = grid.dequantize(grid.quantize(weight, *qparams, spec), *qparams, spec)
    return float(((weight - back).double().square() * importance).sum())


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
@pytest.mark.parametrize("rows", [1, 37])
def test_search_finds_what_the_plain_search_finds(spec: QuantSpec, rows: int) -> None:
    weight, hessian = problem(rows, 96)
    weight[0, :32] = 0  # a block of zeros has no range
    importance = hessian.diagonal().clone()
    importance[:36] = 0  # and one has no importance
    for refit in (False, True):
        found = rounding.search_qparams(weight, spec, importance, refit=refit)
        want = search.search_qparams(weight, spec, importance, refit=refit)
        assert found[0].dtype == want[0].dtype
        losses = [weighted_loss(weight, one, spec, importance) for one in (found, want)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # near ties may be decided by the last bit of a sum


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("spec", [*SPECS, QuantSpec("int4", (7, 32)), QuantSpec("int4", (-1, -1))], ids=QuantSpec.describe)
@pytest.mark.parametrize(("rows", "columns"), [(7, 96), (70, 192)])
def test_sweep_gives_the_codes_of_the_plain_sweep(spec: QuantSpec, rows: int, columns: int) -> None:
    weight, hessian = problem(rows, columns)
    order = hessian.diagonal().argsort(descending=True)
    factor, _ = inverse_factor(hessian[order][:, order], 0.01)
    qparams = grid.choose_qparams(weight, spec)
    codes = rounding.sweep(weight, qparams, spec, order, factor)
    want = plain.sweep(weight, qparams, spec, order, factor)
    # A flipped tie changes the rest of its row, so rows are compared by their loss and most rows by their codes.
    same = (codes == want).all(1).float().mean()
    assert same > 0.8
    losses = []
    for one in (codes, want):
        error = weight - grid.dequantize(one, *qparams, spec)
        losses.append(float(((error @ hessian) * error).sum()))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.usefixtures("_isa")
def test_a_symmetric_grid_puts_its_extra_level_where_the_largest_weights_are() -> None:
    spec = QuantSpec("int2", (1, 32))
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(7))
    importance = torch.rand(96, generator=torch.Generator().manual_seed(8))
    for searched in (rounding.search_qparams, search.search_qparams):
        scale, _ = searched(weight, spec, importance)
        mirrored, _ = searched(-weight, spec, importance)
        assert bool((scale < 0).any())
        assert bool((scale > 0).any())
        losses = [weighted_loss(one, (s, None), spec, importance) for one, s in ((weight, scale), (-weight, mirrored))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert losses[0] < 0.95 * weighted_loss(weight, (scale.abs(), None), spec, importance)


def test_threads_do_not_change_the_result() -> None:
    weight, hessian = problem(130, 96)
    factor, _ = inverse_factor(hessian, 0.01)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            qparams = rounding.search_qparams(weight, SPECS[1], hessian.diagonal())
            results.append((*qparams, rounding.sweep(weight, qparams, SPECS[1], torch.arange(96), factor)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_overflowing_scale_is_refused() -> None:
    with pytest.raises(SpecError, match="not finite in float16"):
        rounding.search_qparams(torch.full((2, 32), 1e9), SPECS[0])


def test_without_a_compiler_the_plain_forms_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> None:
        raise KernelError("no C++ compiler in this test")

    weight, hessian = problem(8, 96)
    factor, _ = inverse_factor(hessian, 0.01)
    monkeypatch.setattr(build, "library", missing)
    build.warn_once.cache_clear()
    qparams = rounding.search_qparams(weight, SPECS[0], hessian.diagonal())
    codes = rounding.sweep(weight, qparams, SPECS[0], torch.arange(96), factor)
    assert torch.equal(codes, plain.sweep(weight, qparams, SPECS[0], torch.arange(96), factor))
    assert caplog.text.count("computed in plain torch, many times slower, because: no C++ compiler in this test") == 1
