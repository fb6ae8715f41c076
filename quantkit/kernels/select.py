"""Choose the kernel that runs a weight: the available one with the highest priority.

Whether activations may be rounded to int8 on the way is the caller's decision, never the kernel's: ``"float"`` (the default)
leaves them as they are, ``"int8"`` asks for a kernel that rounds them, which is faster and has an error of its own.

A kernel answers :meth:`Kernel.rejects` with a reason or None, so an error can always print why each one said no.
``QUANTKIT_KERNEL=<name>`` forces one, whatever activations were asked for; a forced kernel that rejects is an error, never a
silent substitute.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.qtensor import QTensor
from quantkit.registry import Registry
from quantkit.spec import ActivationSpec, QuantSpec, WeightSpec

ComputeMode = Literal["float", "int8"]
"""What a kernel multiplies weights with: activations as they are, or rounded to int8 block by block."""

FORCE_VARIABLE = "QUANTKIT_KERNEL"
"""Environment variable that names the kernel to use."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a kernel is asked to run.

    Attributes:
        spec: which numbers the weight has.
        shape: (N, K) = (out, in) of the weight.
        device: device type, e.g. ``"cpu"``.
        dtype: dtype of the activations and of the output.
    """

    spec: WeightSpec
    shape: tuple[int, int]
    device: str
    dtype: torch.dtype

    def describe(self) -> str:
        """Return a short human name such as ``"int4 g64, out=576 in=576, float32 on cpu"``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.spec.describe()}, out={self.shape[0]} in={self.shape[1]}, {dtype} on {self.device}"


class Kernel(Protocol):
    """One way to multiply by a quantized weight. Its prepacked state serves every activation dtype it accepts.

    Attributes:
        priority: among kernels that accept a problem the highest wins.
        compute: what it makes of activations.
    """

    priority: int
    compute: ComputeMode

    def rejects(self, problem: Problem) -> str | None:
        """Say why ``problem`` cannot run here, or None if it can. May build the kernel's library (once)."""
        ...

    def prepack(self, qtensor: QTensor) -> Any:
        """Lay a 2-D weight out for :meth:`matmul`. The state may share memory with ``qtensor`` and is never written to."""
        ...

    def matmul(self, x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        """Return ``x @ w.T + bias``: x (..., K) to (..., N), in x's dtype and on its device; ``bias`` (N,) in x's dtype."""
        ...

    def unpack(self, state: Any, spec: WeightSpec) -> QTensor:
        """Reverse :meth:`prepack`: return the weight that ``state`` was made from, bit for bit; ``spec`` is its own."""
        ...

    def details(self) -> dict[str, str]:
        """Return facts about this machine worth showing in ``quantkit doctor``."""
        ...


@runtime_checkable
class RoundingKernel(Protocol):
    """A kernel that can also multiply activations rounded per token to 8 bits, without making floats of them again."""

    def rounds(self, spec: WeightSpec, activation: ActivationSpec) -> bool:
        """Say whether weights of ``spec`` can meet activations rounded to ``activation``; they are in its basis already."""
        ...

    def matmul_rounded(self, x: Tensor, state: Any, bias: Tensor | None, activation: ActivationSpec) -> Tensor:
        """Round x to ``activation`` and multiply; arguments and result are those of :meth:`Kernel.matmul`."""
        ...


KERNELS: Registry[Kernel] = Registry("kernel", package="quantkit.kernels", error=KernelError)
"""Every kernel by name."""


def check_compute(compute: str) -> None:
    """Raise a :class:`KernelError` unless ``compute`` is one of :data:`ComputeMode`."""
    if compute not in get_args(ComputeMode):
        raise KernelError(f"compute={compute!r}; want one of {', '.join(get_args(ComputeMode))}")


def select(problem: Problem, compute: ComputeMode = "float") -> Kernel:
    """Return the kernel to use for ``problem``.

    Args:
        problem: what to run.
        compute: ``"float"``, or ``"int8"`` for a kernel that rounds them.

    Raises:
        KernelError: if ``compute`` is neither, if ``QUANTKIT_KERNEL`` names an unknown kernel or one that rejects, or if
            every kernel rejects; the message has every kernel's reason.
    """
    check_compute(compute)
    forced = os.environ.get(FORCE_VARIABLE)
    if forced:
        kernel = KERNELS.get(forced)
        if kernel.rejects(problem) is None:
            return kernel
        raise KernelError(
            f"{FORCE_VARIABLE}={forced} cannot run {problem.describe()}; unset it or choose another:\n{_reasons(problem)}"
        )
    for _, kernel in sorted(KERNELS, key=lambda member: -member[1].priority):
        if kernel.compute == compute and kernel.rejects(problem) is None:
            return kernel
    raise KernelError(f"no kernel can run {problem.describe()} with {compute} activations:\n{_reasons(problem)}")


def report() -> list[dict[str, Any]]:
    """Return one row per kernel, best first.

    Its keys: ``kernel``, ``available``, ``reason`` (or None), ``priority``, ``compute``, ``details``.

    Availability is asked with a common problem (int4 g64, float32 on the CPU), so this may compile a library.
    """
    problem = Problem(QuantSpec("int4", (1, 64)), (64, 64), "cpu", torch.float32)
    rows = []
    for name, kernel in sorted(KERNELS, key=lambda member: -member[1].priority):
        reason = kernel.rejects(problem)
        rows.append(
            {
                "kernel": name,
                "available": reason is None,
                "reason": reason,
                "priority": kernel.priority,
                "compute": kernel.compute,
                "details": kernel.details(),
            }
        )
    return rows


def _reasons(problem: Problem) -> str:
    return "\n".join(
        f"  {name} ({kernel.compute} activations): {kernel.rejects(problem) or 'can run it'}" for name, kernel in KERNELS
    )
