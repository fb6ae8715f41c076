"""Choose the backend that runs a transformers model: native, paged, or sequential.

A model that can be lowered to a decoder program runs natively: in one call per step on the CPU
(:class:`~quantkit.engine.native.NativeBackend`), in one CUDA graph on a GPU (:class:`~quantkit.engine.cuda.CudaBackend`).
Otherwise its own modules run on paged keys and values (:class:`~quantkit.hf.paged.PagedBackend`), if a check shows that this
gives the right logits. The remaining models run on transformers' own cache, one sequence after another
(:class:`SequentialBackend`). Every fallback is logged once and counted in :data:`FALLBACKS`.
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
from quantkit.nn.install import describe_compute
from quantkit.spec import KVScheme, QuantSpec, kv_preset
from quantkit.system.turns import turn

logger = logging.getLogger(__name__)

FALLBACKS: collections.Counter[str] = collections.Counter()
"""Number of fallbacks by message, which names the model class and the reason."""

ENGINES = ("auto", "native", "modules")
COMPUTE_MODES = ("auto", "exact", "float32", "int8")
_NATIVE_KV = {KVScheme(): "float32", kv_preset("int8"): "int8"}
_INT4_TOKENS = QuantSpec("int4", (1, 32), False)
_CUDA_KV = {KVScheme(): "float", kv_preset("int8"): "int8", KVScheme(_INT4_TOKENS, _INT4_TOKENS): "int4"}


class SequentialBackend:
    """Run sequences one after another on transformers' own cache. Works for every decoder, whatever its state is.

    Args:
        model: a causal language model.
        notice: why it does not run on pages, for users.
    """

    shares_pages = rewinds = False
    engine = "modules, one sequence at a time"

    def __init__(self, model: PreTrainedModel, notice: str) -> None:
        self._model, self.notice = model, notice
        self.device, self.context_tokens = input_table(model)[1], context_tokens(model)
        self._steps = [TransformersStep(model)]  # finds out now whether and how the model runs step by step

    def reserve(self, memory: Memory) -> None:
        """Prepare for ``memory.slots`` sequences, whose caches grow as needed."""
        self._steps = [TransformersStep(self._model) for _ in range(memory.slots)]

    def bytes_for(self, memory: Memory) -> int:
        """Return 0: the memory belongs to transformers and is not known in advance."""
        return 0

    def step(self, spans: Sequence[Span], copies: Sequence[Copy] = ()) -> Tensor:
        """Run ``spans`` one by one, each with logits after its last token at most; see :class:`Backend`.

        Raises:
            QuantkitError: copies, or a span with several logits.
        """
        if copies or any(span.num_logits > 1 for span in spans):
            raise QuantkitError(f"pages cannot be copied and drafts cannot be verified: {self.notice}")
        found = []
        for span in spans:
            step = self._steps[span.slot]
            if span.fresh:
                step.reset()
            with turn(self._model):
                logits = step(torch.tensor([list(span.ids)], device=self.device), span.start)
            found.append(logits[: span.num_logits])
        return torch.cat(found)


def make_backend(
    model: PreTrainedModel,
    kv: str | KVScheme = "float",
    *,
    engine: str = "auto",
    compute: str = "auto",
    batch_invariant: bool = False,
) -> Backend:
    """Return the fastest backend that can run ``model`` with these options.

    Args:
        model: a causal language model in eval mode.
        kv: how keys and values are stored: a scheme or its name.
        engine: ``"native"`` (one native call per step), ``"modules"`` (the model's own forward), or ``"auto"``: native if
            possible, else modules.
        compute: ``"exact"`` keeps activations in float, except that a bfloat16 model on a CPU rounds them to bfloat16, as its
            modules do, if this CPU is faster with it; ``"float32"`` never does that. ``"int8"`` rounds them
            in products with quantized weights, which is faster and less exact. ``"auto"`` does what the model was loaded with.
            Anything else than that needs the native CPU engine.
        batch_invariant: require that an answer does not depend on the other requests of a batch. The native CPU engine
            guarantees it always, the CUDA engine at the cost of speed, modules never.

    Raises:
        QuantkitError: an encoder-decoder model, one without logits, an unknown option, or an option that the engine lacks.
    """
    for option, value, known in (("engine", engine, ENGINES), ("compute", compute, COMPUTE_MODES)):
        if value not in known:
            raise QuantkitError(f"{option}={value!r}: want one of {', '.join(known)}")
    scheme = kv_preset(kv)
    require_decoder(model)
    with turn(model):
        return _make_backend(model, scheme, engine=engine, compute=compute, batch_invariant=batch_invariant)


def _make_backend(model: PreTrainedModel, scheme: KVScheme, *, engine: str, compute: str, batch_invariant: bool) -> Backend:
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
                exact=compute in ("exact", "float32") or (compute == "auto" and not _rounds(model)),
                bfloat16=narrow and compute != "float32",
                context_tokens=context_tokens(model),
            )
        if engine == "native":
            raise QuantkitError(f"{type(model).__name__} cannot run natively: {decoder}; use engine='modules'")
        _fall_back(f"{type(model).__name__} runs through its modules, not natively: {decoder}")
    if compute != "auto" and compute != ("int8" if _rounds(model) else "exact"):
        raise QuantkitError(
            f"compute={compute!r} needs the native CPU engine, and this model runs through its modules; leave it out"
            + ("" if compute == "float32" else f", or quantkit.load(..., compute={compute!r})")
        )
    if batch_invariant:
        raise QuantkitError("batch_invariant=True needs a native engine, and this model runs through its modules; leave it out")
    return _modules(model, scheme)


def describe_engine(model: PreTrainedModel) -> str:
    """Return a sentence that says how ``model`` runs with ``engine="auto"``."""
    with turn(model):
        decoder = _native(model, KVScheme())
    if isinstance(decoder, CudaDecoder):
        return f"cuda: {len(decoder.program.layers)} layers in one recorded step"
    if isinstance(decoder, NativeDecoder):
        return f"native: {decoder.program.extent} in one call per step"
    return f"modules: {decoder}"


def _rounds(model: PreTrainedModel) -> bool:
    """Return whether quantized layers of the model round their inputs to int8."""
    return describe_compute(model) not in ("", "exact")


def _native(model: PreTrainedModel, scheme: KVScheme, compute: str = "auto") -> Decoder | str:
    """Return the model's native decoder, or the reason why it cannot run natively with these options."""
    if device_types(model) == {"cuda"}:
        if scheme not in _CUDA_KV:
            return f"on CUDA keys and values can be float, int8 or int4 in groups of 32, not {scheme.describe()}"
        if compute == "int8":
            return "on CUDA activations are rounded only where the model's scheme says so"
    elif scheme not in _NATIVE_KV:
        return f"natively keys and values can be float or int8, not {scheme.describe()}"
    return native_decoder(model)


def _modules(model: PreTrainedModel, scheme: KVScheme) -> Backend:
    """Return a backend that runs the model's own modules: paged if possible, else sequential."""
    known = describe_layers(model)
    if not isinstance(known, str):
        return _named(PagedBackend(model, scheme, known), model)
    if scheme.quantized:
        raise QuantkitError(f"kv={scheme.describe()!r} needs paged keys and values, but {known}; use kv='float'")
    _fall_back(f"{known}: sequences run one after another on transformers' own cache")
    return _named(SequentialBackend(model, known), model)


def _named(backend: PagedBackend | SequentialBackend, model: PreTrainedModel) -> Backend:
    """Return a backend whose name says it where the model's layers round their inputs."""
    if _rounds(model):
        backend.engine = f"{backend.engine}, int8 activations"
    return backend


def _fall_back(notice: str) -> None:
    """Count a fallback, and log it the first time."""
    if not FALLBACKS[notice]:
        logger.warning("%s", notice)
    FALLBACKS[notice] += 1
