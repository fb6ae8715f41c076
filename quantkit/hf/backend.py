"""How a transformers model runs: natively, on pages through its modules, or one sequence after another.

The fastest way is native: a model that lowers to a program runs in one call on the CPU
(:class:`~quantkit.engine.native.NativeBackend`), in one recorded step on CUDA (:class:`~quantkit.engine.cuda.CudaBackend`).
Otherwise its own modules run on our pages (:class:`~quantkit.hf.paged.PagedBackend`), if that is proven right for it. What is
left runs on transformers' own cache (:class:`SequentialBackend`). Every step down says so: once in the log, counted in
:data:`FALLBACKS`.
"""

import collections
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.engine.backend import Backend, Copy, Memory, Span
from quantkit.engine.cuda import CudaBackend
from quantkit.engine.native import NativeBackend
from quantkit.errors import QuantkitError
from quantkit.hf.cache import TransformersStep, require_decoder
from quantkit.hf.native import Decoder, device_types, native_decoder
from quantkit.hf.paged import PagedBackend, context_tokens, describe_layers
from quantkit.kernels.cpu.decoder import NativeDecoder
from quantkit.kernels.cuda.decoder import CudaDecoder
from quantkit.nn.embedding import input_table
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.spec import KVScheme, QuantSpec, kv_preset

logger = logging.getLogger(__name__)

FALLBACKS: collections.Counter[str] = collections.Counter()
"""How often a model could not run natively, or not on pages, by model class and reason."""

ENGINES = ("auto", "native", "modules")
COMPUTE_MODES = ("float", "float32", "int8")
_NATIVE_KV = {KVScheme(): "float32", kv_preset("int8"): "int8"}
_INT4_TOKENS = QuantSpec("int4", (1, 32), False)
_CUDA_KV = {KVScheme(): "float", kv_preset("int8"): "int8", KVScheme(_INT4_TOKENS, _INT4_TOKENS): "int4"}


class SequentialBackend:
    """Run sequences one after another on transformers' own cache: for every decoder, whatever it remembers.

    Args:
        model: a causal language model.
        notice: why it does not run on pages.
    """

    shares_pages = rewinds = False
    engine = "modules, one sequence at a time"

    def __init__(self, model: PreTrainedModel, notice: str) -> None:
        self._model, self.notice = model, notice
        self.device, self.context_tokens = input_table(model)[1], context_tokens(model)
        self._steps: list[TransformersStep] = []

    def reserve(self, memory: Memory) -> None:
        """Make room for as many sequences; each allocates as it grows."""
        self._steps = [TransformersStep(self._model) for _ in range(memory.slots)]

    def bytes_for(self, memory: Memory) -> int:
        """Return 0: what is allocated belongs to transformers and is not known beforehand."""
        return 0

    def step(self, spans: Sequence[Span], copies: Sequence[Copy] = ()) -> Tensor:
        """Run ``spans`` one by one; of each the logits of at most its last token."""
        if copies or any(span.wanted > 1 for span in spans):
            raise QuantkitError(f"pages cannot be copied nor drafts verified: {self.notice}")
        found = []
        for span in spans:
            step = self._steps[span.slot]
            if span.fresh:
                step.reset()
            logits = step(torch.tensor([list(span.ids)], device=self.device), span.start)
            found.append(logits[: span.wanted])
        return torch.cat(found)


def make_backend(
    model: PreTrainedModel,
    kv: str | KVScheme = "float",
    *,
    engine: str = "auto",
    compute: str = "float",
    batch_invariant: bool = False,
) -> Backend:
    """Return the best backend for ``model``.

    Args:
        model: a causal language model in eval mode.
        kv: how keys and values are stored: a scheme or its name.
        engine: ``"native"`` (one call per step), ``"modules"`` (transformers' own forward), or ``"auto"``, the first that can.
        compute: ``"int8"`` rounds inputs where they meet quantized weights: faster, less exact; the CPU's native engine alone
            does it. Modules round them where the model was loaded to, which that engine does too. On a CPU they are float32,
            but those of a bfloat16 model are rounded to bfloat16 where they meet bfloat16 weights and the CPU is faster for it;
            ``"float32"`` keeps them.
        batch_invariant: an answer is the same whatever runs beside it: always so on the CPU's native engine, slower on CUDA's;
            modules do not promise it.

    Raises:
        QuantkitError: an encoder-decoder model, one without logits, an unknown engine, or options that the engine lacks.
    """
    for option, value, known in (("engine", engine, ENGINES), ("compute", compute, COMPUTE_MODES)):
        if value not in known:
            raise QuantkitError(f"{option}={value!r}: want one of {', '.join(known)}")
    scheme = kv_preset(kv)
    require_decoder(model)
    if engine != "modules":
        decoder = _native(model, scheme, compute)
        if isinstance(decoder, CudaDecoder):
            longest, kind = context_tokens(model), _CUDA_KV[scheme]
            return CudaBackend(decoder, kv=kind, context_tokens=longest, batch_invariant=batch_invariant)
        if isinstance(decoder, NativeDecoder):
            narrow = model.dtype == torch.bfloat16
            return NativeBackend(
                decoder,
                kv="bfloat16" if narrow and not scheme.quantized else _NATIVE_KV[scheme],
                exact=compute != "int8" and not _rounds(model),
                bfloat16=narrow and compute != "float32",
                context_tokens=context_tokens(model),
            )
        if engine == "native":
            raise QuantkitError(f"{type(model).__name__} cannot run natively: {decoder}; engine='modules' can run it")
        _fall_back(f"{type(model).__name__} runs through its modules, not natively: {decoder}")
    if compute != "float":
        raise QuantkitError(f"compute={compute!r}: only the native engine chooses it, modules run as they were loaded")
    if batch_invariant:
        raise QuantkitError("batch_invariant=True: modules do not promise it, and this model runs through them")
    return _modules(model, scheme)


def describe_engine(model: PreTrainedModel) -> str:
    """Say in a sentence how ``model`` would generate with ``engine="auto"``."""
    decoder = _native(model, KVScheme())
    if isinstance(decoder, CudaDecoder):
        return f"cuda: {len(decoder.program.layers)} layers in one recorded step"
    if isinstance(decoder, NativeDecoder):
        return f"native: {len(decoder.program.layers)} layers in one call per step"
    return f"modules: {decoder}"


def _rounds(model: PreTrainedModel) -> bool:
    """Say whether the model was loaded to round activations."""
    return any(m.compute == "int8" for m in model.modules() if isinstance(m, QuantLinear | QuantWeight))


def _native(model: PreTrainedModel, scheme: KVScheme, compute: str = "float") -> Decoder | str:
    if device_types(model) == {"cuda"}:
        if scheme not in _CUDA_KV:
            return f"on CUDA it stores keys and values in float, int8 or int4 of 32 channels, not as {scheme.describe()}"
        if compute != "float" or _rounds(model):
            return "on CUDA it rounds activations where the weights' scheme says so, not on demand"
    elif scheme not in _NATIVE_KV:
        return f"it stores keys and values in float or int8, not as {scheme.describe()}"
    return native_decoder(model)


def _modules(model: PreTrainedModel, scheme: KVScheme) -> Backend:
    known = describe_layers(model)
    if not isinstance(known, str):
        return PagedBackend(model, scheme, known)
    if scheme.quantized:
        raise QuantkitError(f"kv={scheme.describe()!r} needs keys and values in pages, but {known}; use kv='float'")
    _fall_back(f"{known}: sequences run one after another on transformers' own cache")
    return SequentialBackend(model, known)


def _fall_back(notice: str) -> None:
    """Count a fallback, and log it once."""
    if not FALLBACKS[notice]:
        logger.warning("%s", notice)
    FALLBACKS[notice] += 1
