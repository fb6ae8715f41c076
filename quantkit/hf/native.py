"""The native decoder of a model, for the CPU or CUDA, cached until the model's weights change.

A parameter or buffer that was replaced or written to is detected by its identity, address and version counter, a quantized
weight that was replaced by its module's ``revision``.
"""

import logging
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.errors import KernelError
from quantkit.hf.lowering.decode_step import compare, write_tape
from quantkit.hf.lowering.lower import CannotLower, lower
from quantkit.hf.lowering.trace import CannotWatch
from quantkit.kernels.cpu.decoder import KvPages, NativeDecoder, Rows, rejects
from quantkit.kernels.cuda import decoder, nvcc
from quantkit.kernels.cuda.decoder import CudaDecoder
from quantkit.kernels.cuda.matmul import DTYPES
from quantkit.kernels.program.definition import Program
from quantkit.kernels.program.tape import Tape
from quantkit.nn.linear import QuantModule
from quantkit.system.memory import available_bytes, drop_pages, mapped_pages, return_freed_memory

logger = logging.getLogger(__name__)

_Mark = tuple[tuple[int, int, int], ...]
Decoder = NativeDecoder | CudaDecoder


def native_decoder(model: PreTrainedModel) -> Decoder | str:
    """Return the model's decoder, building it at the first call, or the reason why it has none."""
    if hooked := next((name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks), None):
        return f"{hooked or 'the model'} has forward hooks, which native steps would not call"
    mark = _mark(model)
    known = _decoders.get(model)
    if known is None or known[0] != mark:
        _decoders.pop(model, None)  # free the old copies of the weights before making new ones
        made = _make(model)
        known = _decoders[model] = (mark, made)
    return known[1]


FIRST_TOKENS = 2048
"""Initial length of the rotary tables; an engine extends them as needed."""

_decoders: weakref.WeakKeyDictionary[PreTrainedModel, tuple[_Mark, Decoder | str]] = weakref.WeakKeyDictionary()


def _make(model: PreTrainedModel) -> Decoder | str:
    kinds = device_types(model)
    if kinds not in ({"cpu"}, {"cuda"}):
        return f"its weights are on {' and '.join(sorted(kinds))}, not on the CPU or on one CUDA device"
    try:
        return _make_on_cuda(model) if kinds == {"cuda"} else _make_on_cpu(model)
    except (CannotLower, KernelError) as error:
        return str(error)


def device_types(model: PreTrainedModel) -> set[str]:
    """Return the device types of a model's parameters; device names with numbers if they are on several CUDA devices."""
    devices = {parameter.device for parameter in model.parameters()}
    kinds = {device.type for device in devices}
    return kinds if len(devices) == 1 or kinds != {"cuda"} else {str(device) for device in devices}


def _make_on_cpu(model: PreTrainedModel) -> NativeDecoder | str:
    program = _lower(model)
    if reason := rejects(program) or _too_large(program):
        return reason
    _release(model)
    decoder = NativeDecoder(program)
    if isinstance(program, Tape):
        try:
            compare(program, model, lambda ids, _: _in_pieces(decoder, ids), 0)
        except CannotWatch as error:
            return f"native steps give other results than its modules: {error}"
    _release(model)
    return decoder


def _lower(model: PreTrainedModel) -> Program | Tape:
    """Return the program of a model of standard layers, else a tape."""
    try:
        return lower(model)
    except CannotLower as reason:
        logger.debug("%s: %s", type(model).__name__, reason)
        return write_tape(model)


def _in_pieces(decoder: NativeDecoder, ids: Tensor) -> Tensor:
    """Return the logits (T, V) of a sequence that is read as a prompt, then token by token, then several at once."""
    kv, found, start = KvPages(decoder.program, 1), [], 0
    for count in (5, 1, 1, len(ids) - 7):
        places = range(start, start + count)
        rows = Rows(ids[start : start + count].tolist(), places, [0] * count, np.zeros((1, 1)), range(count))
        found.append(decoder.run(rows, kv))
        start += count
    return torch.cat(found)


def _make_on_cuda(model: PreTrainedModel) -> CudaDecoder | str:
    if model.dtype not in DTYPES:
        return f"its dtype is {model.dtype}, the CUDA kernels want float16 or bfloat16"
    nvcc.library()
    program = lower(model)
    device = next(model.parameters()).device
    if reason := decoder.rejects(program) or _too_large_for_cuda(program, device):
        return reason
    return CudaDecoder(program, device=device, dtype=model.dtype, context_tokens=FIRST_TOKENS)


def _too_large_for_cuda(program: Program, device: torch.device) -> str | None:
    """Return a reason if a second copy of the weights, in the kernels' layout, would take nearly all free device memory."""
    if not torch.cuda.is_available():
        return None
    parts: list[Any] = [linear.weight for linear in program.linears()]
    sizes = [part.nbytes for part in dict.fromkeys(parts)]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    if sum(sizes) < 0.9 * free:
        return None
    return f"a second copy of its weights takes {sum(sizes) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on the device"


def _release(model: PreTrainedModel) -> None:
    """Release memory that building a decoder has touched: pages of mapped float weights, and freed heap."""
    drop_pages(mapped_pages(model.parameters()))
    return_freed_memory()


def _too_large(program: Program | Tape) -> str | None:
    """Return a reason if a second copy of the float weights would take more than half of the available memory."""
    copied = sum(linear.weight.nbytes for linear in program.linears() if isinstance(linear.weight, Tensor))
    free = available_bytes()
    if free is None or copied < free / 2:
        return None
    return f"a second copy of its float weights takes {copied / 1e9:.1f} GB, {free / 1e9:.1f} GB are available"


def _mark(model: PreTrainedModel) -> _Mark:
    """Return a value that changes when a parameter or buffer is replaced or written to, or a quantized weight is replaced."""
    tensors = [*model.parameters(), *model.buffers()]
    quantized = [part for part in model.modules() if isinstance(part, QuantModule)]
    return (
        *((id(tensor), tensor.data_ptr(), _version(tensor)) for tensor in tensors),
        *((id(part), hash(part.activation), part.revision) for part in quantized),
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
