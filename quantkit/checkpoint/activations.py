"""How a checkpoint's layers multiply on a CPU: exactly, or with activations rounded to int8, which is about twice as fast.

Rounding activations (:mod:`quantkit.kernels.cpu.matmul`) has an error of its own. What it costs depends on the model, so it is
measured when a checkpoint is written, on the windows of its proof, and recorded beside the quantization's own divergence:

    quality.kl_mean                   KL(float || quantized), products exact
    quality.int8_activations.kl_mean  KL(quantized, products exact || quantized, activations rounded)

``compute="auto"`` rounds where the second is below :data:`SHARE` of the first: what the faster products add then drowns in what
the weights lost already. A checkpoint without the record (an older one, or another program's) is computed exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from quantkit.errors import KernelError
from quantkit.kernels import ComputeMode

ComputeChoice = Literal["auto", "exact", "int8"]
"""What a user may ask for: what the checkpoint records, or one of the two."""

SHARE = 0.05
"""Largest share of the quantization's own KL that int8 activations may add where nobody asked for them."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """How layers multiply, and why.

    Attributes:
        compute: in the words of kernels.
        reason: for users.
    """

    compute: ComputeMode
    reason: str

    def __str__(self) -> str:
        return f"{'int8 activations' if self.compute == 'int8' else 'exact'}: {self.reason}"


def check_choice(compute: str) -> None:
    """Raise a :class:`KernelError` unless ``compute`` is one of :data:`ComputeChoice`."""
    if compute not in get_args(ComputeChoice):
        raise KernelError(f"compute={compute!r}; want one of {', '.join(get_args(ComputeChoice))}")


def choose(record: Mapping[str, Any], compute: ComputeChoice = "auto", *, on_cpu: bool = True) -> Chosen:
    """Return how the layers of a checkpoint multiply.

    Args:
        record: the section of ``config.json`` that quantkit writes; empty where there is none. Nothing in it is trusted.
        compute: what the user asks for.
        on_cpu: whether the model runs on a CPU.

    Raises:
        KernelError: int8 activations were asked for on another device.
    """
    check_choice(compute)
    if not on_cpu:
        if compute == "int8":
            raise KernelError('compute="int8" rounds activations on a CPU; elsewhere only a scheme such as w8a8 does')
        return Chosen("float", "activations are rounded on a CPU only")
    if compute != "auto":
        return Chosen("int8" if compute == "int8" else "float", "asked for")
    quality = _section(record, "quality")
    cost = _section(quality, "int8_activations")
    if isinstance(why := cost.get("unmeasured"), str):
        return Chosen("float", f"what int8 activations cost could not be measured: {why}")
    added, own, tokens = _amount(cost, "kl_mean"), _amount(quality, "kl_mean"), _amount(cost, "tokens")
    if added is None or own is None or not tokens:
        return Chosen("float", "what int8 activations cost was not measured when this was written; compute=int8 takes them")
    share = added / own if own else float("inf") if added else 0.0
    text = f"{added:.2g} nats, {100 * share:.1f} % of the quantization's {own:.2g} ({tokens:.0f} tokens)"
    if share < SHARE:
        return Chosen("int8", f"they add a KL of {text}, below {SHARE:.0%}")
    return Chosen("float", f"int8 activations would add a KL of {text}, want below {SHARE:.0%}")


def _section(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _amount(record: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number that is not negative; None for anything else."""
    found = record.get(key)
    number = isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found < 1e308
    return float(found) if number else None  # type: ignore[arg-type]
