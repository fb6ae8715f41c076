"""The native decoder of a model, on the CPU or on CUDA: made once, kept as long as the model lives, made again when its weights
have changed.

A parameter or buffer that has been replaced or written to since is noticed by its identity, address and version, a quantized
weight that has been replaced by its module's revision.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.errors import KernelError
from quantkit.hf.lowering.lower import CannotLower, lower
from quantkit.kernels.cpu.decoder import NativeDecoder, rejects
from quantkit.kernels.cuda import decoder, nvcc
from quantkit.kernels.cuda.decoder import CudaDecoder
from quantkit.kernels.cuda.matmul import DTYPES
from quantkit.kernels.program.definition import Program
from quantkit.nn.linear import QuantModule
from quantkit.system.memory import available_bytes, drop_pages, mapped_pages, return_freed_memory

_Mark = tuple[tuple[int, int, int], ...]
Decoder = NativeDecoder | CudaDecoder


def native_decoder(model: PreTrainedModel) -> Decoder | str:
    """Return the model's decoder, made if need be, or the reason why it has none."""
    if hooked := next((name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks), None):
        return f"{hooked or 'the model'} has forward hooks, which a native step would not call"
    mark = _mark(model)
    known = _decoders.get(model)
    if known is None or known[0] != mark:
        _decoders.pop(model, None)  # frees its copies of the weights before new ones are made
        made = _make(model)
        known = _decoders[model] = (mark, made)
    return known[1]


FIRST_TOKENS = 2048
"""Positions that rotary tables are made for at first; an engine asks for what it needs."""

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
    """Return where a model's parameters are; several CUDA devices by number."""
    devices = {parameter.device for parameter in model.parameters()}
    kinds = {device.type for device in devices}
    return kinds if len(devices) == 1 or kinds != {"cuda"} else {str(device) for device in devices}


def _make_on_cpu(model: PreTrainedModel) -> NativeDecoder | str:
    program = lower(model)
    if reason := rejects(program) or _too_large(program):
        return reason
    _release(model)
    decoder = NativeDecoder(program)
    _release(model)
    return decoder


def _make_on_cuda(model: PreTrainedModel) -> CudaDecoder | str:
    if model.dtype not in DTYPES:
        return f"its activations are {model.dtype}, the CUDA kernels take float16 or bfloat16"
    nvcc.library()
    program = lower(model)
    device = next(model.parameters()).device
    if reason := decoder.rejects(program) or _too_large_for_cuda(program, device):
        return reason
    return CudaDecoder(program, device=device, dtype=model.dtype, context_tokens=FIRST_TOKENS)


def _too_large_for_cuda(program: Program, device: torch.device) -> str | None:
    """Weights are laid out a second time: say so where that would take nearly all of the free memory."""
    if not torch.cuda.is_available():
        return None
    parts: list[Any] = [linear.weight for linear in program.linears()]
    sizes = [part.nbytes for part in dict.fromkeys(parts)]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    if sum(sizes) < 0.9 * free:
        return None
    return f"a second copy of its weights takes {sum(sizes) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on the device"


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
    """Return what changes when a parameter or buffer of the model is replaced or written to, or a quantized weight replaced."""
    tensors = [*model.parameters(), *model.buffers()]
    quantized = [part for part in model.modules() if isinstance(part, QuantModule)]
    return (
        *((id(tensor), tensor.data_ptr(), _version(tensor)) for tensor in tensors),
        *((id(part), 0, part.revision) for part in quantized),
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
