"""Parts of a model that a decode step meets: experts, functions inside of them, and what is handed on from token to token."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedConfig

from quantkit.hf.experts import expert_parameters
from quantkit.hf.lowering import tidy
from quantkit.hf.lowering.operations.handle import handle
from quantkit.hf.lowering.record import Recorder
from quantkit.hf.lowering.trace import TOKENS
from quantkit.kernels.program.definition import Linear
from quantkit.kernels.program.tape import Expert, Steps
from quantkit.nn.linear import QuantWeight


def inside(function: Any, width: int, like: Tensor) -> Steps:
    """Return the steps that a function takes on a vector of ``width`` elements."""
    recorder = Recorder(handle)
    first = recorder.value(width)
    x = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(0)).to(like)
    recorder.track(x, recorder.elements(first), 0)
    with _disable_current_modes(), recorder:
        y = function(x)
    result = recorder.run(recorder.ids(y)[0].reshape(-1))
    steps, _ = tidy.needed(recorder.steps, result, [])
    return Steps(tuple(steps), recorder.widths, result)


def experts_of(module: Any) -> Iterator[Expert]:
    """Yield every expert of a module."""
    names = expert_parameters(module)
    stacks = [getattr(module, name) for name in names]
    biases = [getattr(module, f"{name}_bias").detach() if module.has_bias else None for name in names]
    for expert in range(stacks[0].shape[0]):
        parts = []
        for stack, bias in zip(stacks, biases, strict=True):
            own = None if bias is None else bias[expert]
            if isinstance(stack, QuantWeight):
                parts.append(Linear(stack, (stack.shape[1], stack.shape[2]), own, expert=expert))
            else:
                weight = stack.detach()[expert]
                weight = weight.T if module.is_transposed else weight
                parts.append(Linear(weight, (weight.shape[0], weight.shape[1]), own))
        yield Expert(*parts)


def states_in(holders: Iterable[Any], depth: int = 4) -> Iterator[tuple[Any, Any, Tensor]]:
    """Yield container, key and tensor of everything with a row per sequence that a cache, or a module by itself, holds."""
    seen: set[int] = set()
    waiting = [(holder, depth) for holder in holders]
    while waiting:
        holder, left = waiting.pop(0)
        if id(holder) in seen or not left:
            continue
        seen.add(id(holder))
        container = holder if isinstance(holder, list | dict) else vars(holder)
        for key, held in list(container.items() if isinstance(container, dict) else enumerate(container)):
            if isinstance(held, Tensor):
                if held.shape[:1] == (TOKENS,) and held.is_floating_point():
                    yield container, key, held
            elif isinstance(held, list | dict) or _is_cache(held):
                waiting.append((held, left - 1))


def _is_cache(held: Any) -> bool:
    """Return whether a value may be a part of a cache."""
    return type(held).__module__.startswith("transformers.") and not isinstance(held, nn.Module | PreTrainedConfig)


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """Return the plain attributes of every module, in which some keep the state of one batch."""
    return [vars(module) for module in model.modules()]
