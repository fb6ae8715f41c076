"""What transformers cannot do with a compressed-tensors checkpoint, seen before the checkpoint is written.

transformers loads such a checkpoint into a model whose linear layers hold packed codes instead of a ``weight``. That goes wrong

- where the model initialises its layers by ``module.o_proj.weight``, which happens before the files are read: found by letting
  an empty model with packed layers initialise itself;
- for a float tensor that is put together with others as it is loaded (three convolutions in one, experts in a stack): what is
  not packed is dropped on the way. Seen from which tensors are a part of a parameter;
- for experts of two schemes, of which it knows one for the whole model: codes of the other come out wrong;
- for packed layers that share their weight, which it wants to tie by a ``weight`` that they do not have.

Of some schemes it says itself that it cannot unpack experts; that is a warning, because engines can.

All these are faults of that reader (transformers 5.17 to 5.24 with compressed-tensors 0.18 to 0.20), not of the files.
"""

import logging
from collections.abc import Collection, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.hf.names import CheckpointTensor
from quantkit.spec import Scheme

log = logging.getLogger(__name__)

READER = "transformers, which reads this format,"


def transformers_fault(
    model: PreTrainedModel,
    quantized: Mapping[str, Scheme],
    stored: Mapping[str, tuple[str, CheckpointTensor]],
    shared: Collection[str] = (),
) -> tuple[str, str] | None:
    """Return a layer or tensor and why transformers cannot read a checkpoint with it; None if nothing is known against it.

    Args:
        model: an empty model, of which nobody else knows: it is changed.
        quantized: name of a tensor in the checkpoint to the scheme it is quantized by.
        stored: name of every tensor in the float checkpoint to its parameter's name and its content.
        shared: names of parameters that several layers share.
    """
    for name in quantized:
        if stored[name][0] in shared:
            return name, f"{READER} does not load packed layers that share their weight; use native"
    experts = {name: quantized[name] for name, (_, source) in stored.items() if name in quantized and _gathered(source)}
    if reason := _experts_fault(experts):
        return reason
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, (parameter, source) in stored.items():
        if name not in quantized and name.endswith(".weight") and _is_a_part(source, shapes.get(parameter, ())):
            return name, f"{READER} drops a float tensor that it joins with others as it loads them; use native"
    packed = [stored[name][0] for name in quantized if name not in experts]
    return _initialising_fault(model, packed)


def _gathered(source: CheckpointTensor) -> bool:
    """Return whether a tensor is one matrix of a stack in memory."""
    return source.pieces[0].expert is not None


def _experts_fault(experts: Mapping[str, Scheme]) -> tuple[str, str] | None:
    """Return an expert that has another scheme than the first, and what becomes of it; None if they have one."""
    first = next(iter(experts.values()), None)
    for name, scheme in experts.items():
        if first is not None and scheme != first:
            both = f"{first.describe()} and {scheme.describe()}"
            return name, f"{READER} knows one scheme for the experts of all layers, here {both}; give them one, or use native"
    return None


def transformers_warning(quantized: Mapping[str, Scheme], stored: Mapping[str, tuple[str, CheckpointTensor]]) -> str | None:
    """Say which layers only other readers can unpack; None if there are none. For the arguments see :func:`transformers_fault`."""
    for name, scheme in quantized.items():
        weight = scheme.weight
        known = weight.strategy != "tensor" and (weight.symmetric if weight.is_integer else weight.dtype == "fp8_e4m3")
        if weight.is_integer and weight.bits == 8 and scheme.activation is not None:
            known = False
        if _gathered(stored[name][1]) and not known:
            return (
                f"{name}: {READER} does not load experts of {scheme.describe()}, unlike quantkit and engines; "
                "for transformers use symmetric integers without rounded inputs, FP8, or format native"
            )
    return None


def _is_a_part(source: CheckpointTensor, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor holds less than its parameter, whose shape is given."""
    if len(shape) < 2:
        return False
    rows = sum((p.matrices[1] - p.matrices[0]) * p.stop if p.matrices else p.stop - p.start for p in source.pieces)
    return _gathered(source) or (source.pieces[0].matrices is not None and rows < torch.Size(shape[:-1]).numel())


def _initialising_fault(model: PreTrainedModel, packed: list[str]) -> tuple[str, str] | None:
    """Let a model whose layers are packed initialise itself, and return what it trips over."""
    for name in packed:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if isinstance(owner, nn.Linear):
            owner._parameters.pop(attribute, None)
    seen = set()
    for path, module in model.named_modules():
        kind = (type(module), tuple(name for name, child in module.named_children() if _is_packed(child)), _is_packed(module))
        if kind in seen:
            continue
        seen.add(kind)
        try:
            with torch.no_grad():
                _initialiser(model, path)._init_weights(module)
        except AttributeError as error:
            if "attribute 'weight'" in str(error):
                why = f"{type(module).__name__} is initialised by a weight that packed layers lack"
                return packed[0], f"{READER} cannot load {type(model).__name__}: {why}; use native"
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            log.debug("%s cannot be initialised without memory: %s", type(module).__name__, error)
    return None


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "weight" not in module._parameters


def _initialiser(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Return the innermost model around a module, whose way of initialising transformers uses."""
    found = model
    for end in (index for index, letter in enumerate(path) if letter == "."):
        part = model.get_submodule(path[:end])
        found = part if isinstance(part, PreTrainedModel) else found
    return found
