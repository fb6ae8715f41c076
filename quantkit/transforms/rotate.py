r"""Rotation: replace channels by mixtures of all of them, in which no single one is an outlier.

For an orthogonal Q, :math:`W x = (W Q)(Q^T x)`. If everything that writes a tensor and everything that reads it is rotated,
the model computes what it did, but a value that stood in one channel is spread over all (Ashkboos et al. 2024, QuaRot, arXiv
2404.00456, section 4; Liu et al. 2024, SpinQuant, arXiv 2405.16406, whose R1 and R2 these are):

- the residual stream: embedding, output head, and every linear layer that writes to it or reads it through a norm. The norms'
  gains move into the layers that follow them first, because a gain per channel does not commute with a rotation;
- the values of each head, between the value and the output projection.

Both become part of the weights, so any program runs the checkpoint as it ran the original. A tied head is parted from the
embedding, which it no longer equals: the model grows by one table. The inputs of the MLP's second layer, behind a
non-linearity, would need a rotation at run time and stay as they are.

Q is a Hadamard matrix with random signs (:mod:`quantkit.numerics.hadamard`).

No architecture is known by name. What reads the residual stream through a norm is seen by watching each block
(:func:`quantkit.transforms.scaling_groups.find_groups`); what writes to it is every other layer with as many outputs as the
stream has channels; the pairs of value and output projections are found by trying. At the end the logits are compared: if they
changed, every weight is put back and the model is refused (norms with a mean or after the layers, experts, positions that are
added).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError, SpecError
from quantkit.nn.probing import try_blocks
from quantkit.nn.sites import Block, Site, SiteStatistics, Structure, read_weight, write_weight
from quantkit.numerics.hadamard import random_hadamard
from quantkit.spec import Plan
from quantkit.transforms.base import STEPS, Setup, Transform
from quantkit.transforms.scaling_groups import TOLERANCE, ScalingGroup, find_groups, probe_ids, rescale


@STEPS.register("rotate")
@dataclass(frozen=True)
class Rotate(Transform):
    """Rotate the residual stream and the values of the heads.

    Args:
        values: also rotate the values of every head.
        seed: of the random signs.
    """

    values: bool = True
    seed: int = 0

    def check(self, setup: Setup) -> None:
        """Refuse given statistics, and to part a tied head from an embedding where the two are to be quantized as one."""
        super().check(setup)
        table = setup.structure.embedding
        if setup.structure.tied and table is not None and table.name in setup.plan:
            raise SpecError(f"rotate parts the tied head from {table.name}, which was to be quantized as one; leave either out")

    def apply(self, model: nn.Module, structure: Structure, plan: Plan, statistics: Mapping[str, SiteStatistics]) -> None:
        """Rotate ``model`` in place; see :func:`rotate`."""
        rotate(model, structure, self)

    def rotation(self, size: int) -> Tensor:
        """Return the orthogonal matrix of ``size`` channels, float64."""
        return random_hadamard(size, self.seed)


_ROUNDING = {torch.float32: 10 * TOLERANCE, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest change of a logit, relative to the largest logit: rotated weights are rounded to the model's dtype anew."""


def rotate(model: nn.Module, structure: Structure, transform: Rotate) -> int:
    """Rotate ``model`` in place; it computes what it computed before. A tied head is untied.

    Args:
        model: the float model.
        structure: its blocks and sites.
        transform: which rotations.

    Returns:
        How many tensors were rotated: the residual stream, and the values of so many blocks.

    Raises:
        CalibrationError: the model cannot be rotated; nothing has changed then.
    """
    if stack := next((site for site in structure.sites if len(site.shape) == 3), None):
        raise CalibrationError(
            f"rotate: {stack.name} is a stack of experts, whose router reads the stream too; leave rotate out"
        )
    if structure.head is None or structure.embedding is None:
        raise CalibrationError("rotate: the model has no plain embedding and linear head; leave rotate out")
    undo = _remember(model, structure.head)
    with torch.no_grad():
        wanted = model(probe_ids(model), use_cache=False).logits
        try:
            reason, count = _rotate_all(model, structure, transform), 1
            if reason is None and transform.values:
                count += _rotate_values(model, structure, transform)
            changed = float((model(probe_ids(model), use_cache=False).logits - wanted).abs().max())
            if reason is None and not changed <= _ROUNDING.get(wanted.dtype, TOLERANCE) * float(wanted.abs().max()):
                reason = f"the logits would change by {changed:.3g}"
        except BaseException:
            undo()
            raise
        if reason is not None:
            undo()
            raise CalibrationError(f"rotate: {reason}; this model cannot be rotated, leave rotate out")
    return count


def _remember(model: Any, head_name: str) -> Callable[[], None]:
    """Return a function that puts every weight, and the tie of the head, back to what it is now."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    head, tied, keys = model.get_submodule(head_name), model.config.tie_word_embeddings, model.all_tied_weights_keys.copy()
    table = head.weight

    def undo() -> None:
        head.weight = table
        model.config.tie_word_embeddings = tied
        model.all_tied_weights_keys.update(keys)
        for parameter, value in before:
            parameter.data = value

    return undo


def _rotate_all(model: Any, structure: Structure, transform: Rotate) -> str | None:
    """Move the norms' gains into their readers and rotate the residual stream; say why that is not possible, or None."""
    assert structure.embedding is not None
    assert structure.head is not None
    width = structure.embedding.in_features
    groups = [g for g in find_groups(model, structure, {s.name: s for s in structure.sites}) if g.site is None]
    readers = {site.name for group in groups for site in group.readers if site.in_features == width}
    final, head = _final_norm(model, structure), model.get_submodule(structure.head)
    if final is None:
        return "the head does not read a norm"
    _untie(model, head)
    for producer, offset in [*((group.producer, group.offset) for group in groups), (final, _offset(groups))]:
        gain: Tensor = model.get_submodule(producer).weight.detach() + offset
        if not bool((gain != 0).all()):
            return f"{producer} has a gain of zero"
        sites = next((group.readers for group in groups if group.producer == producer), ())
        rescale(model, ScalingGroup(sites, producer, offset=offset), gain)
        if producer == final:
            head.weight.data = head.weight.data * gain.to(head.weight)
    rotation = transform.rotation(width)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            module.weight.data = _times(module.weight.data, rotation)
    head.weight.data = _times(head.weight.data, rotation)
    for site in structure.sites:
        weight, bias = read_weight(model, site), getattr(model.get_submodule(site.module), "bias", None)
        if site.name in readers:
            write_weight(model, site, _times(weight, rotation))
        elif site.shape[0] == width:
            write_weight(model, site, _times(weight.T, rotation).T.contiguous())
            if bias is not None:
                bias.data = _times(bias.data, rotation)
    return None


def _times(tensor: Tensor, rotation: Tensor) -> Tensor:
    """Return ``tensor @ rotation``, computed in float64 and rounded once."""
    return (tensor.double() @ rotation.to(tensor.device)).to(tensor.dtype)


def _offset(groups: list[ScalingGroup]) -> float:
    """Return what the norms add to their weights, which the last one does as the others do."""
    return groups[0].offset if groups else 0.0


def _final_norm(model: nn.Module, structure: Structure) -> str | None:
    """Return the path of the module with one weight per channel whose output the head reads."""
    assert structure.head is not None
    made: list[tuple[Tensor, str]] = []
    read: list[Tensor] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1:

                def after(_module: nn.Module, _args: object, output: Tensor, name: str = name) -> None:
                    made.append((output, name))

                hooks.callback(module.register_forward_hook(after).remove)

        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            read.append(args[0])

        hooks.callback(model.get_submodule(structure.head).register_forward_pre_hook(note).remove)
        model(probe_ids(model), use_cache=False)
    # a model may cut the last positions out on the way, which makes a view
    return next((name for y, name in made if read and y.data_ptr() == read[0].data_ptr()), None)


def _untie(model: Any, head: Any) -> None:
    """Give the head a weight of its own."""
    if model.config.tie_word_embeddings:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys.clear()


def _rotate_values(model: nn.Module, structure: Structure, transform: Rotate) -> int:
    """Rotate the values of every head where a pair of layers allows it; return in how many blocks."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    if not size:
        return 0
    rotation, count = transform.rotation(size), 0
    for trial in try_blocks(model, structure, probe_ids(model)):
        limit = TOLERANCE * float(trial.update.abs().max())
        for value, out in _pairs(trial.block, size):
            parts = [p for site in (value, out) for p in model.get_submodule(site.module).parameters(recurse=False)]
            kept = [part.data for part in parts]
            _rotate_heads(model, value, out, rotation)
            now = trial.run()
            if float((now[0] - trial.before[0]).abs().max()) <= limit and not trial.rest_changed(now, TOLERANCE):
                count += 1
                break
            for part, data in zip(parts, kept, strict=True):
                part.data = data
    return count


def _pairs(block: Block, size: int) -> Iterator[tuple[Site, Site]]:
    """Yield layers that might make the values of heads, with layers that might read them."""
    for out in block.sites:
        for value in block.sites:
            fits = value.shape[0] % size == 0 and out.shape[1] % size == 0 and value.shape[0] <= out.shape[1]
            if value is not out and fits and value.shape[1] == out.shape[0]:
                yield value, out


def _rotate_heads(model: nn.Module, value: Site, out: Site, rotation: Tensor) -> None:
    """Rotate the rows (and the bias) of ``value`` and the columns of ``out``, head by head."""
    size = rotation.shape[0]
    rows = read_weight(model, value).T.unflatten(-1, (-1, size))  # (in, heads, size)
    write_weight(model, value, _times(rows, rotation).flatten(-2).T.contiguous())
    columns = read_weight(model, out).unflatten(-1, (-1, size))  # (out, heads, size)
    write_weight(model, out, _times(columns, rotation).flatten(-2))
    bias = getattr(model.get_submodule(value.module), "bias", None)
    if bias is not None:
        bias.data = _times(bias.data.unflatten(0, (-1, size)), rotation).flatten()
