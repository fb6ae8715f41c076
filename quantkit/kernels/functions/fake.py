"""``torch.ops.quantkit.fake_weight``: a weight behind its rounding, differentiable, as a torch operator.

Forward and backward are :func:`quantkit.numerics.fake.fake_weight` and :func:`quantkit.numerics.fake.fake_weight_gradient`,
which pass through memory once per operation. On the CPU, weights whose blocks are one row high on a grid of integers go through
compiled functions that pass once: they give the same numbers to the last bit, but for the sums of the gradients of scales.
A training step rounds every weight once and comes back once, so this decides whether rounding is small beside the products.
"""

import functools
import json
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import build
from quantkit.kernels.build import compiled
from quantkit.numerics import fake, grid
from quantkit.numerics.fake import WeightGrid
from quantkit.spec import QuantSpec

_SCHEMAS = (
    "fake_weight(Tensor weight, Tensor scale, Tensor? zero, Tensor? global_scale, str spec, ScalarType dtype) -> Tensor",
    "fake_weight_gradient(Tensor slope, Tensor weight, Tensor scale, Tensor? zero, Tensor? global_scale, str spec) "
    "-> (Tensor, Tensor, Tensor)",
)

_library: list[torch.library.Library] = []  # keeps the registration alive


@functools.cache
def register() -> None:
    """Register the operators, once.

    ``fake_weight`` takes the weight (..., out, in), scales as they are learned (float32), zero points (uint8, or float32 where
    they are learned too), the global scale, :func:`spec_key`, and the dtype of what it returns.
    """
    library = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    library.impl("fake_weight", _forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    library.impl("fake_weight_gradient", _gradient, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake("quantkit::fake_weight", _forward_shape, lib=library)
    torch.library.register_fake("quantkit::fake_weight_gradient", _gradient_shape, lib=library)
    torch.library.register_autograd("quantkit::fake_weight", _backward, setup_context=_keep, lib=library)
    _library.append(library)


def spec_key(spec: QuantSpec) -> str:
    """Return a grid's name for the operators."""
    return json.dumps(spec.to_dict())


@functools.cache
def _spec_of(key: str) -> QuantSpec:
    return QuantSpec.from_dict(json.loads(key))


def _forward(
    weight: Tensor, scale: Tensor, zero: Tensor | None, global_scale: Tensor | None, key: str, dtype: torch.dtype
) -> Tensor:
    spec = _spec_of(key)
    stored = fake.stored_grid(scale, zero, global_scale, spec)
    if not _fits(weight, dtype, spec):
        return fake.fake_weight(weight, stored, spec).to(dtype)
    weight = weight.contiguous()
    out = torch.empty(weight.shape, dtype=dtype)
    step, low = _group_values(stored, spec)
    groups, size = step.numel(), weight.numel() // step.numel()
    build.library().qk_fake(
        weight.data_ptr(), step.data_ptr(), low.data_ptr(), out.data_ptr(), 2**spec.bits - 1, groups, size,
        build.DTYPE_CODES[weight.dtype], build.DTYPE_CODES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _gradient(
    slope: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, global_scale: Tensor | None, key: str
) -> tuple[Tensor, Tensor, Tensor]:
    spec = _spec_of(key)
    stored = fake.stored_grid(scale, zero, global_scale, spec)
    if not _fits(weight, slope.dtype, spec):
        return fake.fake_weight_gradient(slope, weight, stored, spec)
    weight, slope = weight.contiguous(), slope.contiguous()
    by_weight = torch.empty(weight.shape)
    step, low = _group_values(stored, spec)
    by_scale, by_low = torch.empty_like(step), torch.empty_like(step)
    groups, size = step.numel(), weight.numel() // step.numel()
    build.library().qk_fake_gradient(
        weight.data_ptr(), step.data_ptr(), low.data_ptr(), slope.data_ptr(), by_weight.data_ptr(), by_scale.data_ptr(),
        by_low.data_ptr(), 2**spec.bits - 1, groups, size,
        build.DTYPE_CODES[weight.dtype], build.DTYPE_CODES[slope.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return by_weight, by_scale.mul_(fake.scale_factor(spec, tuple(weight.shape))), by_low.neg_()


def _fits(weight: Tensor, dtype: torch.dtype, spec: QuantSpec) -> bool:
    """Return whether the compiled functions can be used."""
    on_cpu = weight.device.type == "cpu" and weight.dtype in build.DTYPE_CODES and dtype in build.DTYPE_CODES
    return on_cpu and spec.is_integer and spec.block[0] == 1 and weight.numel() > 0 and compiled("rounding while training")


def _group_values(stored: WeightGrid, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the scale and the level of code 0 of every group, float32 and contiguous."""
    scale, zero, _ = stored
    step = scale.float().contiguous()
    return step, torch.full_like(step, -grid.zero_code(spec)) if zero is None else -zero.float().contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.key, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, zero, global_scale = ctx.saved_tensors
    by_weight, by_scale, by_zero = torch.ops.quantkit.fake_weight_gradient(slope, weight, scale, zero, global_scale, ctx.key)
    learned_zero = by_zero if zero is not None and zero.is_floating_point() else None
    return by_weight.to(weight.dtype), by_scale.to(scale.dtype), learned_zero, None, None, None


def _forward_shape(
    weight: Tensor, scale: Tensor, zero: Tensor | None, global_scale: Tensor | None, key: str, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _gradient_shape(
    slope: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, global_scale: Tensor | None, key: str
) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.empty_like(scale, dtype=torch.float32, memory_format=torch.contiguous_format)
    by_weight = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
    return by_weight, like, torch.empty_like(like)
