r"""What every layer's errors cost in a quantized model: errors interact, and scores of a float model cannot see how.

Let E be what quantization has added to the weights. The KL divergence from the float model, as a function of :math:`\alpha E`,
is nearly quadratic in :math:`\alpha`, so that half of its slope at :math:`\alpha = 1` is the KL itself, and the slope is a sum
over layers:

.. math:: KL \approx \tfrac12 \sum_l \langle \nabla_{W_l} KL, \; E_l \rangle

Every term is the share of a layer, with all that it does together with the errors of others: positive where they add up,
negative where it makes up for them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quantkit.calibrate.backward import frozen
from quantkit.kernels.functions.learning import divergence_gradient
from quantkit.mixed.watch import Watch
from quantkit.nn.sites import Site
from quantkit.system.progress import Progress, ProgressCallback


class _Products(Watch):
    """Adds up the products of gradients with changes of weights.

    Args:
        changes: layer name to E, (out, in) or (experts, out, in).
    """

    def __init__(self, changes: Mapping[str, Tensor]) -> None:
        super().__init__({}, compensates=False)
        self.changes = changes
        self.shares = dict.fromkeys(changes, 0.0)

    def _back(self, site: Site, part: int, x: Tensor, gradient: Tensor) -> None:
        change = self.changes[site.name]
        change = change if change.ndim == 2 else change[part]
        moved = x.detach().float() @ change.to(x.device, torch.float32).T
        self.shares[site.name] += float((moved * gradient.float()).sum(dtype=torch.float64))

    def _add_read(self, site: Site, gradient: Tensor) -> None:
        self.shares[site.name] += float((gradient * self.changes[site.name].to(gradient)).sum(dtype=torch.float64))


def shares(
    model: nn.Module,
    changed: nn.Module,
    changes: Mapping[Site, Tensor],
    windows: Sequence[Tensor],
    progress: ProgressCallback,
) -> tuple[dict[str, float], float]:
    """Return layer name to its share of the KL, and the KL, in nats per token.

    Args:
        model: the float model.
        changed: the same model with changed weights.
        changes: what has been added to its layers, (out, in) or (experts, out, in).
        windows: int64 token ids (B, T), without padding.
        progress: gets one event per window.
    """
    watch, sites = _Products({site.name: change for site, change in changes.items()}), list(changes)
    rows = [row for ids in windows for row in ids.split(1)]
    device, total = next(changed.parameters()).device, 0.0
    table: nn.Module = changed.get_input_embeddings()  # type: ignore[operator]
    undo = table.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
    try:
        with frozen(changed), watch.on(changed, sites, forward=False):
            for number, ids in enumerate(rows):
                with torch.no_grad():
                    wanted = model(input_ids=ids.to(device), use_cache=False).logits
                with torch.enable_grad():
                    logits = changed(input_ids=ids.to(device), use_cache=False).logits
                lost, slope = divergence_gradient(logits.detach().flatten(0, 1), wanted.flatten(0, 1))
                logits.backward(slope.view_as(logits))
                total += lost
                watch.gather(changed, sites)
                progress(Progress("search", number + 1, len(rows), "shares of the loss"))
    finally:
        undo.remove()
    tokens = sum(ids.numel() for ids in rows)
    return {name: share / 2 / tokens for name, share in watch.shares.items()}, total / tokens
