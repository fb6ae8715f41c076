"""Watch a model's blocks on a few tokens, and try what a change of their weights changes.

Rewrites of a float model (:mod:`quantkit.transforms`) are found by trying: change weights of a block, run it again, compare.
Where blocks run one by one, a trial costs one block. Where they exchange more than the hidden state
(:func:`quantkit.nn.block_calls.why_entangled`), a trial runs the whole model, and its logits are compared as well: what a block
hands on beside its output shows there. That is slower by the number of blocks, on a few tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import SpecError
from quantkit.nn.block_calls import call_block, own_containers, record_block_calls
from quantkit.nn.sites import Block, Structure


@dataclass(frozen=True, slots=True)
class BlockTrial:
    """One block of a model with the tokens that reach it.

    Attributes:
        block: the block.
        module: its module.
        hidden: its input (B, T, H).
        before: what :meth:`run` returned before anything was changed.
        noise: how much of the largest logit rounding alone may change; 0 where logits are not looked at.
        run: runs the block and returns its output (B, T, H); of a model that only runs as a whole, its logits (B, T, V), too.
    """

    block: Block
    module: nn.Module
    hidden: Tensor
    before: tuple[Tensor, ...]
    noise: float
    run: Callable[[], tuple[Tensor, ...]]

    @property
    def update(self) -> Tensor:
        """Return what the block adds to the stream, (B, T, H), before anything was changed."""
        return self.before[0] - self.hidden

    def rest_changed(self, now: tuple[Tensor, ...], tolerance: float) -> bool:
        """Say whether more than the block's output has changed: the model's logits, by ``tolerance`` of the largest or more."""
        tolerance = max(tolerance, self.noise)
        pairs = zip(now[1:], self.before[1:], strict=True)
        return not all(float((new - old).abs().max()) <= tolerance * float(old.abs().max()) for new, old in pairs)


def try_blocks(model: nn.Module, structure: Structure, ids: Tensor) -> Iterator[BlockTrial]:
    """Yield every block of ``model`` with what reaches it for ``ids`` (B, T), in order; no gradients.

    Changes to a block's weights that are to stay must leave its output as it is.
    """
    if structure.entangled is not None:
        yield from _try_whole(model, structure, ids)
        return
    recorded = record_block_calls(model, structure, ids)
    hidden = recorded.hidden
    for block, call in zip(structure.blocks, recorded.calls, strict=True):
        module = model.get_submodule(block.name)

        def run(module: nn.Module = module, hidden: Tensor = hidden, call: Any = call) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (call_block(module, hidden, *own_containers(*call)),)

        before = run()
        yield BlockTrial(block, module, hidden, before, 0.0, run)
        hidden = before[0]


def rounding_noise(model: Any, ids: Tensor) -> float:
    """Return how much of the largest logit a model may change by rounding alone, on ``ids`` (B, T).

    Some models amplify rounding, as those that run their layers several times. Four times the change is returned that the
    logits show when every embedding is changed by up to one unit in its last place.
    """

    def shaken(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        factors = torch.rand(output.shape, generator=generator) * 2 - 1
        return output * (1 + torch.finfo(output.dtype).eps * factors.to(output.device)).to(output.dtype)

    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        hook = model.get_input_embeddings().register_forward_hook(shaken)
        try:
            changed = model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
    return 4 * float((changed - before).abs().max()) / max(float(before.abs().max()), 1e-30)


def _try_whole(model: nn.Module, structure: Structure, ids: Tensor) -> Iterator[BlockTrial]:
    noise = rounding_noise(model, ids)
    for block in structure.blocks:
        module = model.get_submodule(block.name)
        entered: list[Tensor] = []

        def run(module: nn.Module = module, entered: list[Tensor] = entered, name: str = block.name) -> tuple[Tensor, ...]:
            entered.clear()
            left: list[Tensor] = []
            with ExitStack() as hooks, torch.no_grad():
                hooks.callback(watch_block(module, entered.append, left.append))
                logits: Tensor = model(input_ids=ids, use_cache=False).logits
            if not left:
                raise SpecError(f"{name} is never called by {type(model).__name__}")
            return left[0], logits

        try:
            before = run()
        except SpecError:  # a block that never runs has nothing to try
            continue
        hidden = entered[0] if entered and entered[0].shape == before[0].shape else torch.zeros_like(before[0])
        yield BlockTrial(block, module, hidden, before, noise, run)


def watch_block(module: nn.Module, entering: Callable[[Tensor], None], leaving: Callable[[Tensor], None]) -> Callable[[], None]:
    """Show the hidden state that enters and that leaves a block at every call; returns what ends that."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = first_tensor((*args, *kwargs.values()))
        if hidden is not None:
            entering(hidden)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = first_tensor(output)
        if hidden is not None:
            leaving(hidden)

    handles = (module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def first_tensor(value: Any) -> Tensor | None:
    """Return the hidden state among what a block takes or returns: the first floating tensor, also in tuples or dicts."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)
