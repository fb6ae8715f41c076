"""Identify what a module computes from its inputs and outputs.

Every function here tests candidates numerically (the norm whose formula gives this output, the activation that maps these
values to those), and never relies on names.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.hf.lowering.trace import TOKENS, Call, flat
from quantkit.kernels.program.definition import Norm
from quantkit.kernels.program.reference import ACTIVATIONS, normalize, rotate
from quantkit.nn.linear import QuantLinear

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "layer_norm_eps", "norm_eps", "rms_norm_eps")

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def error(got: Tensor, want: Tensor) -> float:
    """Return the largest absolute difference divided by the largest absolute value of ``want``; inf for different shapes."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def distance(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference divided by the norm of ``want``; inf for different shapes."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def agrees(got: Tensor, want: Tensor) -> bool:
    """Return whether ``got`` equals ``want`` up to rounding in the dtype of ``want``."""
    return error(got, want) < _TOLERANCE[want.dtype]


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two values are bitwise equal when flattened to (T, everything else)."""
    a, b = flat(a), flat(b)
    return a.shape == b.shape and torch.equal(a, b)


def best(candidates: Iterable[tuple[Any, Tensor]], want: Tensor) -> Any | None:
    """Return the name of the candidate nearest to ``want``, or None if it does not agree within the tolerance."""
    scored = [(error(got, want), name) for name, got in candidates]
    if not scored:
        return None
    least, name = min(scored, key=lambda pair: pair[0])
    return name if least < _TOLERANCE[want.dtype] else None


def as_norm(call: Call) -> Norm | None:
    """Return the norm that a call's module computes, or None if it is not a norm."""
    module = call.module
    if call.x.shape != call.y.shape or any(p.ndim > 1 for p in module.parameters()) or any(True for _ in module.children()):
        return None
    width = call.x.shape[-1]
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if any(part is not None and part.shape != (width,) for part in (weight, bias)):
        return None
    device = call.x.device
    probe = torch.randn(4, width, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [0.1], [1e-2], [1e-3]])
    probe = (probe + 0.3 * probe.abs().max(-1, keepdim=True).values).to(device, call.x.dtype)
    with torch.no_grad():
        want = module(probe)
    gains = [torch.ones(width, device=device)] if weight is None else [weight.detach().float(), 1 + weight.detach().float()]
    shift = None if bias is None else bias.detach().float()
    epsilons = {float(v) for name in _EPS_NAMES if isinstance(v := getattr(module, name, None), float)} or {1e-6, 1e-5}
    norms = [Norm(*parts) for parts in itertools.product((False, True), gains, (shift,), sorted(epsilons))]
    # Each row is compared relative to its own scale: a wrong epsilon shows in the smallest row only.
    scores = [(max(error(normalize(x.float(), norm), y) for x, y in zip(probe, want, strict=True)), norm) for norm in norms]
    least, norm = min(scores, key=lambda pair: pair[0])
    return norm if least < _TOLERANCE[want.dtype] else None


def as_activation(gate: Tensor, up: Tensor | None, want: Tensor) -> str | None:
    """Return the activation with ``act(gate) * up == want`` (``act(gate)`` where up is None)."""
    tried = ((name, act(gate) if up is None else act(gate) * up) for name, act in ACTIVATIONS.items())
    return best(tried, want)


@dataclass(frozen=True, slots=True, eq=False)
class RotaryReading:
    """An interpretation of a call's output as rotary tables.

    Attributes:
        call: the call of the rotary module.
        interleaved: see :class:`~quantkit.kernels.program.definition.Rotary`.
        columns: the half of the module's columns that holds the dim / 2 distinct angles.
    """

    call: Call
    interleaved: bool
    columns: slice

    @property
    def dim(self) -> int:
        """Number of rotated channels."""
        return int(self.call.y.shape[-1])

    def explains(self, before: Tensor, after: Tensor) -> bool:
        """Return whether rotating ``before`` gives ``after``, both (T, heads, head_dim)."""
        if self.dim > before.shape[-1]:
            return False
        cos, sin = (flat(part).float()[:, self.columns] for part in self.call.outputs)
        return agrees(rotate(before.float(), cos, sin, self.dim, self.interleaved).to(after.dtype), after)

    def tables(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the module for positions 0 to tokens - 1, float32 (tokens, dim / 2) on the CPU."""

        def longer(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():  # the module uses only its dtype and device
                return torch.zeros(1, 1, 1, 1, device=value.device)
            return torch.arange(tokens, device=value.device).expand(*value.shape[:-1], tokens)

        args, kwargs = self.call.arguments
        with torch.no_grad():
            parts = self.call.module(*map(longer, args), **{name: longer(value) for name, value in kwargs.items()})
        cos, sin = (flat(part).float()[:, self.columns].contiguous().cpu() for part in parts)
        return cos, sin


def rotary_readings(call: Call) -> Iterator[RotaryReading]:
    """Yield the possible interpretations of a call's output as rotary tables; none if it cannot be that."""
    if len(call.outputs) != 2 or call.outputs[0].shape != call.outputs[1].shape:
        return
    cos, sin = (flat(part).float() for part in call.outputs)
    dim = cos.shape[1]
    radius = torch.full_like(cos, float(cos[0, 0].square())).to(call.y.dtype)
    if dim % 2 or len(cos) != TOKENS or not agrees(cos.square() + sin.square(), radius):
        return
    if torch.equal(cos[:, : dim // 2], cos[:, dim // 2 :]):  # cat(angles, angles)
        yield RotaryReading(call, False, slice(0, dim // 2))
        yield RotaryReading(call, True, slice(0, dim // 2))
    elif torch.equal(cos[:, ::2], cos[:, 1::2]):  # each angle twice
        yield RotaryReading(call, True, slice(0, dim, 2))


def factor(after: Tensor, before: Tensor, config: Any, slack: float = 1.0) -> float | None:
    """Return s with ``after == s * before``: 1, or the nearest number that the config or its hidden size suggests, or None.

    Args:
        after, before: floating tensors of one shape.
        config: config of the decoder.
        slack: factor of the tolerance, for an ``after`` that is a difference of larger numbers.
    """
    if same(after, before):
        return 1.0
    if after.shape != before.shape:
        return None
    a, b = after.double().flatten(), before.double().flatten()
    fitted = float((a @ b) / (b @ b).clamp_min(1e-300))
    known = [1.0, *_numbers(config)]
    value = min(known, key=lambda number: abs(number - fitted))
    if abs(value - fitted) > 1e-2 * abs(fitted):
        value = fitted
    return value if error(before.float() * value, after) < slack * _TOLERANCE[after.dtype] else None


def soft_cap(after: Tensor, before: Tensor, config: Any) -> float | None:
    """Return the number c of the config with ``after == c * tanh(before / c)``, or None."""
    return best(((c, c * torch.tanh(before.float() / c)) for c in _numbers(config) if c > 0), after)


def _numbers(config: Any) -> list[float]:
    """Return the numbers of a config, their inverses, and the square root of the hidden size, exact and in bfloat16."""
    values = [float(v) for v in vars(config).values() if isinstance(v, int | float) and not isinstance(v, bool) and v]
    root = float(config.hidden_size) ** 0.5
    return [*values, *(1 / v for v in values), root, float(torch.tensor(root, dtype=torch.bfloat16))]


def find(calls: Iterable[Call], *, x: Tensor | None = None, y: Tensor | None = None) -> Iterator[Call]:
    """Yield the calls with input ``x`` and output ``y``; None matches everything."""
    for call in calls:
        if (x is None or same(call.x, x)) and (y is None or same(call.y, y)):
            yield call


def matrix(call: Call) -> Any | None:
    """Return the weight of a linear layer as a program holds it (a float tensor or the quantized module), else None."""
    module = call.module
    if isinstance(module, QuantLinear):
        return module
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        return None
    # A subclass may compute something else.
    plain = type(module) is nn.Linear or error(nn.functional.linear(call.x, weight, bias), call.y) < 1e-6
    return weight.detach() if plain else None
