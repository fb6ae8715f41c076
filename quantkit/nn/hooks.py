"""What blocks are given and put out while a model runs as a whole, with the graph through which gradients come back."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from quantkit.nn.probing import first_tensor


@contextlib.contextmanager
def outputs_of(model: nn.Module, blocks: Sequence[str]) -> Iterator[list[Tensor]]:
    """Yield a list that gets the hidden state (B, T, H) of every block each time that it has run, with its graph.

    Args:
        model: runs inside the context.
        blocks: paths of its blocks.
    """
    found: list[Tensor] = []

    def keep(_part: nn.Module, _given: Any, output: Any) -> None:
        hidden = first_tensor(output)
        assert hidden is not None, "a block returns a hidden state"
        found.append(hidden)

    with contextlib.ExitStack() as hooks:
        for name in blocks:
            hooks.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        yield found


@contextlib.contextmanager
def inputs_of(model: nn.Module, block: str) -> Iterator[list[Tensor]]:
    """Yield a list that gets the hidden state (B, T, H) that a block is given, each time before it runs."""
    found: list[Tensor] = []

    def keep(_part: nn.Module, given: Any, named: Any) -> None:
        hidden = first_tensor(given if given else named)
        assert hidden is not None, "a block takes a hidden state"
        found.append(hidden)

    hook = model.get_submodule(block).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()
