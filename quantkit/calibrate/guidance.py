r"""How much every token counts for the predictions, layer by layer: weights for the second moments that quantizers use.

GPTQ and its kin keep a layer's outputs close to the float model's, on average over tokens, as if every token mattered alike. To
second order the KL divergence of the predictions cares about the output error :math:`e_t` of a token as
:math:`\tfrac12 (\delta_t^T e_t)^2`, with :math:`\delta_t` the gradient of a drawn prediction's log-probability with respect to
the output (:mod:`quantkit.calibrate.backward`). Averaged over output channels that is a weight per token and layer,

.. math:: \omega_t = \|\delta_t\|, \qquad H = E[\omega_t\, x_t x_t^T],

and H in place of :math:`E[x_t x_t^T]` makes any method for the squared output error one for the end loss (Kim, El Halabi,
Park, Lee, Song 2025, GuidedQuant, arXiv 2505.07004, with one group of output channels and :math:`\|\delta_t\|^2`). The root
of their weight is taken because every :math:`\delta_t` comes of one drawn token: its square is a fair but wild estimate, a few
tokens then outweigh all others, and on SmolLM2 the root loses a tenth less. Weights are those of the float model; the x that
they are applied to may be those behind quantized layers.

Cost: a forward and a backward pass over the calibration text without gradients of weights, about as much as three forward
passes. Memory: four bytes per token and layer, and during the pass the inputs of all blocks for as many batches at a time as
take :data:`CHUNK_BYTES`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from quantkit.calibrate.backward import Backward, Counted, Watcher
from quantkit.nn.sites import Site, Structure
from quantkit.system.compute import Compute
from quantkit.system.progress import ProgressCallback

TokenWeights = Mapping[str, Sequence[Tensor]]
"""Layer name to one float32 (B, T) per batch, 1 on average."""

CHUNK_BYTES = 1 << 30
"""What the inputs of all blocks may take; batches that are larger together are passed one part after the other."""


def token_weights(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    *,
    counted: Counted = (),
    compute: Compute,
    progress: ProgressCallback,
    seed: int = 0,
) -> TokenWeights:
    """Return the weights of all tokens for every matrix in a model's blocks.

    Layers of experts, whose rows are no tokens in order, and parameters that are read in place have none, nor have layers that
    a batch did not reach or whose gradients vanish: there all tokens count alike.

    Args:
        model: the float model, not changed.
        structure: its blocks and layers.
        batches: int64 token ids (B, T), without padding.
        counted: which tokens' predictions count.
        compute: where blocks run.
        progress: gets two events per block.
        seed: of the tokens that are drawn from the model's predictions.

    Raises:
        CalibrationError: logits that are not finite.
    """
    names = {site.name for site in structure.sites if len(site.shape) == 2 and not site.read}
    norms: dict[str, list[Tensor | None]] = {name: [] for name in names}

    def visit(site: Site, found: Sequence[Tensor | None]) -> None:
        norms[site.name] += found

    width = max(min(site.shape) for site in structure.sites) * len(structure.blocks) * compute.dtype.itemsize
    for number, part in enumerate(_parts([ids.numel() * width for ids in batches])):
        texts, marks = batches[part], counted[part] if counted else ()
        passes = Backward(model, structure, texts, names, lambda _products: _Norms(), compute, progress, "guide", marks)
        passes.run(visit, seed + number)
    return {name: weights for name, found in norms.items() if (weights := _weights(found, len(batches)))}


def _parts(sizes: Sequence[int]) -> list[slice]:
    """Cut batches of these sizes into runs of at most :data:`CHUNK_BYTES`, or of one batch."""
    parts, start, taken = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and taken + size > CHUNK_BYTES:
            parts.append(slice(start, index))
            start, taken = index, 0
        taken += size
    return [*parts, slice(start, len(sizes))]


def _weights(norms: Sequence[Tensor | None], batches: int) -> Sequence[Tensor]:
    """Return the weights of a layer's tokens from the squared lengths of their gradients; nothing if some are not known."""
    roots = [one.double().sqrt() for one in norms if one is not None]
    mean = float(sum(one.sum() for one in roots)) / max(1, sum(one.numel() for one in roots))
    return [(one / mean).float() for one in roots] if len(roots) == batches and 0 < mean < float("inf") else []


def by_batch(weights: TokenWeights | None, batches: int) -> list[Mapping[str, Tensor]]:
    """Return the weights of every batch, by layer; nothing where there are none."""
    return [{name: each[index] for name, each in weights.items()} for index in range(batches)] if weights else []


class _Norms(Watcher[Sequence[Tensor | None]]):
    """Keeps the squared length of the gradient of every token's output, batch by batch."""

    def __init__(self) -> None:
        self.looks_ahead = False
        self._done: dict[str, list[Tensor | None]] = {}
        self._now: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def on(self, model: nn.Module, sites: Sequence[Site], *, forward: bool = True) -> Iterator[None]:
        """Watch the outputs of ``sites``."""
        undo = [model.get_submodule(site.module).register_forward_hook(self._hook(site.name)) for site in sites]
        self._done |= {site.name: [] for site in sites}
        try:
            yield
        finally:
            for one in undo:
                one.remove()

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def back(gradient: Tensor) -> None:
            squares = gradient.detach().float().square().sum(-1).cpu()
            self._now[name] = self._now[name] + squares if name in self._now else squares  # a layer may be called twice

        def after(_module: nn.Module, _args: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(back)

        return after

    def gather(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Note what the batch that has just run back has left."""
        for site in sites:
            self._done[site.name].append(self._now.pop(site.name, None))

    def found(self, site: Site, tokens: int) -> Sequence[Tensor | None]:
        """Return the squared lengths of a layer, by batch."""
        return self._done.pop(site.name)

    def of_table(self, site: Site, windows: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return nothing: a table's rows are no products."""
        return ()
