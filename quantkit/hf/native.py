"""The native decoder of a model: made once, kept as long as the model lives, made again when its weights have changed.

A parameter or buffer that has been replaced or written to since is noticed by its identity, address and version.
"""

import weakref

from torch import Tensor
from transformers import PreTrainedModel

from quantkit.errors import KernelError
from quantkit.hf.lower import CannotLower, lower
from quantkit.kernels.decoder import NativeDecoder, rejects
from quantkit.kernels.program import Program
from quantkit.memory import available_bytes, drop_pages, mapped_pages, return_freed_memory
from quantkit.nn.linear import QuantLinear, QuantWeight

_Mark = tuple[tuple[int, int, int], ...]


def native_decoder(model: PreTrainedModel) -> NativeDecoder | str:
    """Return the model's decoder, made if need be, or the reason why it has none."""
    if hooked := next((name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks), None):
        return f"{hooked or 'the model'} has forward hooks, which a native step would not call"
    mark = _mark(model)
    known = _decoders.get(model)
    if known is None or known[0] != mark:
        _decoders.pop(model, None)  # frees its copies of the weights before new ones are made
        made = _make(model)
        known = _decoders[model] = (_mark(model), made)  # making it may have let quantized layers release their codes
    return known[1]


_decoders: weakref.WeakKeyDictionary[PreTrainedModel, tuple[_Mark, NativeDecoder | str]] = weakref.WeakKeyDictionary()


def _make(model: PreTrainedModel) -> NativeDecoder | str:
    if next(model.parameters()).device.type != "cpu":
        return "its weights are not on the CPU"
    for name, part in model.named_modules():
        if isinstance(part, QuantLinear | QuantWeight) and part.activation is not None and part.activation.rotated:
            return f"the inputs of {name} are rotated at run time"
    try:
        program = lower(model)
        if reason := rejects(program) or _too_large(program):
            return reason
        _release(model)
        decoder = NativeDecoder(program)
        _release(model)
        return decoder
    except (CannotLower, KernelError) as error:
        return str(error)


def _release(model: PreTrainedModel) -> None:
    """Give back what proving and laying out touched: pages of mapped float weights, which only modules read, and freed heap."""
    drop_pages(mapped_pages(model.parameters()))
    return_freed_memory()


def _too_large(program: Program) -> str | None:
    """Float weights are laid out a second time: say so where that would take more than half of the free memory."""
    copied = sum(linear.weight.nbytes for linear in program.linears() if isinstance(linear.weight, Tensor))
    free = available_bytes()
    if free is None or copied < free / 2:
        return None
    return f"a second copy of its float weights takes {copied / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _mark(model: PreTrainedModel) -> _Mark:
    """Return what changes when a parameter or buffer of the model is replaced or written to."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((id(tensor), tensor.data_ptr(), _version(tensor)) for tensor in tensors)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
