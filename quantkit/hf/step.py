"""Choose how a model generates: natively, one call per step, or through its modules.

``"auto"`` runs natively what the CPU backend can run, and says once per model class why it does not run the rest; the count is
in :data:`FALLBACKS`. A native decoder is made once per model and kept as long as the model lives; it is made again when a
parameter or buffer has been replaced or written to since.
"""

import logging
import os
import weakref
from collections import Counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.engine.native import NativeStep, quantize_head
from quantkit.errors import KernelError, QuantkitError
from quantkit.hf.cache import TransformersStep
from quantkit.hf.lower import CannotLower, lower
from quantkit.kernels.decoder import NativeDecoder, rejects
from quantkit.kernels.program import Program

log = logging.getLogger(__name__)

ENGINES = ("auto", "native", "modules")
ACTIVATIONS = ("float", "int8")
HEADS = ("float", "int8")

FALLBACKS: Counter[tuple[str, str]] = Counter()
"""How often a model ran through its modules though "auto" would have run it natively, by (class, reason)."""

_Mark = tuple[tuple[int, int, int], ...]


def open_step(
    model: PreTrainedModel,
    engine: str = "auto",
    *,
    activations: str = "float",
    head: str = "float",
    kv: str | None = None,
) -> NativeStep | TransformersStep:
    """Return a step that runs ``model`` for one sequence.

    Args:
        model: a causal language model of transformers in evaluation mode, quantized or not.
        engine: ``"native"`` (the lowered decoder; CPU), ``"modules"`` (transformers' own forward), or ``"auto"``.
        activations: ``"int8"`` rounds activations to int8 where they meet quantized weights: faster, less exact; native only.
        head: ``"int8"`` rounds a float output head to int8, 64 weights to a scale, in the native copy alone.
        kv: how a native step stores keys and values: "float32", "bfloat16" or "int8"; None is as transformers does, except that
            float16 models have float32 ones.

    Raises:
        QuantkitError: an unknown engine, a model that ``"native"`` cannot run (with the reason), options that modules lack.
    """
    options = (("engine", engine, ENGINES), ("activations", activations, ACTIVATIONS), ("head", head, HEADS))
    for option, value, known in options:
        if value not in known:
            raise QuantkitError(f"{option}={value!r}: want one of {', '.join(known)}")
    if engine != "modules":
        decoder = native_decoder(model, head)
        if isinstance(decoder, NativeDecoder):
            kv = kv or ("bfloat16" if model.dtype == torch.bfloat16 else "float32")
            return NativeStep(decoder, kv=kv, exact=activations == "float")
        name = type(model).__name__
        if engine == "native":
            raise QuantkitError(f"{name} cannot run natively: {decoder}; engine='modules' can run it")
        if not FALLBACKS[name, decoder]:
            log.warning("%s runs through its modules, not natively: %s", name, decoder)
        FALLBACKS[name, decoder] += 1
    if (activations, head, kv) != ("float", "float", None):
        raise QuantkitError(f"activations={activations!r}, head={head!r}, kv={kv!r}: only the native engine has them")
    return TransformersStep(model)


def native_decoder(model: PreTrainedModel, head: str = "float") -> NativeDecoder | str:
    """Return the model's decoder, made if need be, or the reason why it has none; ``head`` as in :func:`open_step`."""
    mark = (head, _mark(model))
    known = _decoders.get(model)
    if known is None or known[0] != mark:
        _decoders.pop(model, None)  # frees its copies before others are made
        known = _decoders[model] = (mark, _make(model, head))
    return known[1]


_decoders: weakref.WeakKeyDictionary[PreTrainedModel, tuple[tuple[str, _Mark], NativeDecoder | str]]
_decoders = weakref.WeakKeyDictionary()


def _make(model: PreTrainedModel, head: str) -> NativeDecoder | str:
    if next(model.parameters()).device.type != "cpu":
        return "its weights are not on the CPU"
    if hooked := next((name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks), None):
        return f"{hooked or 'the model'} has forward hooks, which a native step would not call"
    try:
        program = lower(model)
        if reason := rejects(program) or _too_large(program):
            return reason
        return NativeDecoder(quantize_head(program) if head == "int8" else program)
    except (CannotLower, KernelError) as error:
        return str(error)


def _too_large(program: Program) -> str | None:
    """Float weights are laid out a second time: say so where that would take more than half of the free memory."""
    copied = sum(linear.weight.nbytes for linear in program.linears() if isinstance(linear.weight, Tensor))
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return None
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if copied < free / 2:
        return None
    return f"a second copy of its float weights takes {copied / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _mark(model: PreTrainedModel) -> _Mark:
    """Return what changes when a parameter or buffer of the model is replaced or written to."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((id(tensor), tensor.data_ptr(), _version(tensor)) for tensor in tensors)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def describe_engine(model: PreTrainedModel) -> str:
    """Say in a sentence how ``model`` would generate with ``engine="auto"``."""
    decoder = native_decoder(model)
    if isinstance(decoder, NativeDecoder):
        return f"native: {len(decoder.program.layers)} layers in one call per step"
    return f"modules: {decoder}"
