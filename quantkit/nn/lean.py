"""Run a whole model that does not fit memory: weights lie in mapped files, and those of a block leave memory after the block.

Pages of a mapped file that were read stay in memory, and a quantized layer keeps its kernel's layout, so that one forward of a
model takes the memory of all of it. Here a block gives back both once it has run. Several forwards go
through the model side by side, each block for all of them before the next, so that a block is read and laid out once.

What the forwards compute is what they compute alone. Small models had better keep all they have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import greenlet
from torch import Tensor, nn

from quantkit.nn.linear import QuantModule
from quantkit.system.memory import drop_pages, mapped_pages, return_freed_memory


def let_go(part: nn.Module) -> None:
    """Drop from memory what a part of a model has in mapped files; the next use reads it again."""
    views: list[Tensor] = list(part.parameters())
    for module in part.modules():
        if isinstance(module, QuantModule):
            views += module.release()
    drop_pages(mapped_pages(views))
    return_freed_memory()


@contextmanager
def leaving(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Let each of some blocks leave memory after every run of it, as long as the context lasts; without any, change nothing."""
    if not blocks:
        yield
        return
    with ExitStack() as hooks:
        for name in blocks:
            hooks.callback(model.get_submodule(name).register_forward_hook(lambda part, *_: let_go(part)).remove)
        yield
    let_go(model)


def side_by_side(model: nn.Module, blocks: Sequence[str], forwards: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Return what ``forwards`` of a model return; each block runs for all of them, and leaves memory, before the next one does.

    Args:
        model: in evaluation mode, without gradients.
        blocks: paths of its blocks; without any, one forward runs after the other.
        forwards: each runs the whole model once.
    """
    if not blocks:
        return [forward() for forward in forwards]
    parent = greenlet.getcurrent()
    entered: list[nn.Module] = []

    def wait(part: nn.Module, *_: Any) -> None:
        entered.append(part)
        parent.switch()

    found: dict[int, Tensor] = {}
    runs = [greenlet.greenlet(lambda i=i, run=run: found.__setitem__(i, run())) for i, run in enumerate(forwards)]
    with ExitStack() as hooks:
        for name in blocks:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(wait).remove)
        try:
            while running := [run for run in runs if not run.dead]:
                left = list(dict.fromkeys(entered))
                entered.clear()
                for run in running:
                    run.switch()
                for part in left:
                    let_go(part)
        finally:
            for run in runs:
                if not run.dead:
                    run.throw()
    let_go(model)
    return [found[i] for i in range(len(runs))]
