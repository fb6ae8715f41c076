"""What a checkpoint format is: which codecs, which container, which dialect.

A tensor is stored as ``<module name in the checkpoint>.<suffix>``, e.g. ``model.layers.0.mlp.up_proj.weight_packed``. Formats
see names and shapes, never a model.

A format is added by one file that registers it::

    FORMATS.register("mine")(Format(codec_of, SafetensorsDirectory("mine"), MyDialect()))
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.containers.base import Container, Layout
from quantkit.qtensor import QTensor
from quantkit.registry import Registry
from quantkit.spec import QuantSpec, Scheme


class Codec(Protocol):
    """An exact mapping between a quantized tensor and tensors named by suffix."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """Return what :meth:`encode` produces for a weight of ``shape``: used to predict sizes and to check files."""
        ...

    def encode(self, qtensor: Any) -> dict[str, Tensor]:
        """Return the tensors of one weight by suffix, contiguous; the weight is of the kind that its dialect accepts."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> QTensor:
        """Reverse :meth:`encode`.

        Raises:
            FormatError: a tensor is missing, or its dtype, shape or content contradicts ``spec`` and ``shape``.
        """
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """How a config says that one module is stored: its scheme and the codec of its tensors."""

    scheme: Scheme
    codec: Codec


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor of a checkpoint's files, for a config that does not say everything.

    Attributes:
        dtype: its dtype.
        shape: its shape.
        read: returns a copy of its content.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Matcher = Callable[[str], Stored | None]
"""Checkpoint module name to how it is stored; None for a module that is not quantized."""


class Dialect(Protocol):
    """What ``quantization_config`` says, and what cannot be said in it.

    Attributes:
        quant_method: value of ``quantization_config.quant_method`` that announces this dialect.
        conv1d: its readers know transformers' Conv1D layers (GPT-2), not only Linear ones.
        embeddings: its readers know quantized weights that are no linear layer's: embedding tables, parameters that are read.
    """

    quant_method: str
    conv1d: bool
    embeddings: bool

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Say why a weight of ``shape`` (..., out, in) cannot be stored this way; None if it can.

        Args:
            scheme: the numbers.
            shape: shape of the weight; a stack of experts is judged by one expert.
            dtype: dtype of the checkpoint's unquantized weights (``"bfloat16"``), which some dialects impose on scales.
        """
        ...

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Return ``quantization_config``.

        Args:
            plan: checkpoint module name to scheme, every quantized module.
            ignore: checkpoint names of the modules that are linear but not quantized.
            dtype: dtype of the checkpoint's unquantized weights.
        """
        ...

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Read ``quantization_config``.

        Args:
            config: the dictionary that :meth:`dump_config` or another writer made.
            dtype: dtype of the checkpoint's unquantized weights.
            tensors: every tensor in the checkpoint by name.

        Raises:
            FormatError: it describes something that cannot be represented exactly.
        """
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of checkpoint.

    Attributes:
        codec: the codec of a scheme that :meth:`rejects` accepts.
        container: the files.
        dialect: the config.
        foreign: engines read it, too, that run several layers as one (:mod:`quantkit.pipeline.fused`).
        packed: transformers loads it without unpacking the weights, with the faults that :mod:`quantkit.hf.reader` knows.
        blocks: it holds the blocks of a GGUF file, as they are; no other format does.
        floats: it also holds models in which no layer is quantized.
        nearest: returns a weight with the nearest scales that it stores exactly, of those that a quantizer chose.
        scale_dtype: dtype of all stored scales, where the format fixes one; None for the checkpoint's.
        usage: which other programs load it, and how, for the model card; after "With".
        also: returns what else its readers look for in config.json, of what the model's config says there.
        recognises: says whether a ``quantization_config`` is this format's; None asks for the dialect's ``quant_method``.
        rejects_plan: says what cannot be stored in one checkpoint of what can be stored layer by layer; it is given checkpoint
            module names with their schemes and the names of linear modules that stay in float.
        refuses: says why a whole model cannot be stored, or None: it is given config.json, the names of all tensors, and
            tokenizer.json where that is known. None takes every model.
    """

    codec: Callable[[Scheme], Codec]
    container: Container
    dialect: Dialect
    foreign: bool = False
    packed: bool = False
    blocks: bool = False
    floats: bool = False
    nearest: Callable[[QTensor], QTensor] = lambda qtensor: qtensor
    scale_dtype: str | None = None
    usage: str = ""
    also: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    recognises: Callable[[Mapping[str, Any]], bool] | None = None
    rejects_plan: Callable[[Mapping[str, Scheme], Sequence[str]], str | None] = lambda plan, ignore: None
    refuses: Callable[[Mapping[str, Any], Iterable[str], Mapping[str, Any] | None], str | None] | None = None

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Say why a weight of ``shape`` (..., out, in) cannot be stored; see :meth:`Dialect.rejects`."""
        if scheme.weight.blocks is not None and not self.blocks:
            return f"blocks {scheme.weight.blocks} go into GGUF files; use format gguf"
        return self.dialect.rejects(scheme, shape, dtype)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Return whether a ``quantization_config`` is this format's."""
        if self.recognises is not None:
            return self.recognises(config)
        return config.get("quant_method") == self.dialect.quant_method


FORMATS: Registry[Format] = Registry("format", package="quantkit.formats", error=FormatError)
"""All formats by name."""


def check_layout(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Raise a FormatError unless ``tensors`` are exactly those of ``layout``."""
    if missing := sorted(layout.keys() - tensors.keys()):
        raise FormatError(f"missing {', '.join(missing)}; found {', '.join(sorted(tensors)) or 'nothing'}")
    if extra := sorted(tensors.keys() - layout.keys()):
        raise FormatError(f"unexpected {', '.join(extra)}; want only {', '.join(layout)}")
    for suffix, (dtype, shape) in layout.items():
        found = tensors[suffix]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise FormatError(f"{suffix}: {found.dtype} {tuple(found.shape)}, want {dtype} {shape}")


def group_by_scheme(plan: Mapping[str, Scheme]) -> dict[Scheme, list[str]]:
    """Return scheme to module names, in order of first appearance."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in plan.items():
        groups.setdefault(scheme, []).append(name)
    return groups


def nearest_stored(qtensor: QTensor, formats: Sequence[str]) -> QTensor:
    """Return a weight with the nearest scales that all formats hold; see :attr:`Format.nearest`."""
    for name in formats:
        qtensor = FORMATS.get(name).nearest(qtensor)
    return qtensor
