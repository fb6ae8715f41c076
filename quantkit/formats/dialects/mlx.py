"""``mlx``: its ``quantization``, read and written; config.json has it under that name and as ``quantization_config``.

``group_size``, ``bits`` and ``mode`` (``affine``) are those of all layers; a layer with others has an entry under its name, or
``false`` if it stays in float. What the config cannot say, whether zero points are codes, is read from the biases. The other
modes (``mxfp4``, ``nvfp4``, ``mxfp8``) are not read.

An embedding table is quantized like a linear layer, and so is a tied head. mlx-lm stacks experts as it loads them: codes and
scales where they have Mixtral's names (``block_sparse_moe.experts.0.w1``; ``sanitize`` in its ``models/mixtral.py``, 0.32), so
that those are representable, the experts of a layer with one grid; of others (Qwen) the weights alone.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import Held, Matcher, Stored
from quantkit.formats.codecs.mlx import WIDE, MlxCodec, rejects
from quantkit.formats.dialects.gptq import is_stored, rejects_scales
from quantkit.numerics.offsets import zero_points
from quantkit.spec import QuantSpec, Scheme

log = logging.getLogger(__name__)

KEY = "quantization"
"""Where config.json has it first."""

_STACKED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of a model's config under the names that mlx-lm reads.

    transformers 5 writes them as ``rope_parameters``; mlx-lm 0.32 reads ``rope_theta`` and ``rope_scaling``, and takes 10000
    and no scaling where they are missing, without a word.
    """
    found = config.get("rope_parameters")
    if not isinstance(found, dict):
        return {}
    if "rope_theta" not in found:
        log.warning(
            "mlx-lm may not find the rotary settings of this model (rope_parameters); compare its answers with quantkit's"
        )
        return {}
    scaling = {key: value for key, value in found.items() if key != "rope_theta"}
    theta = {"rope_theta": found["rope_theta"]}
    return theta if scaling.get("rope_type", "default") == "default" else {**theta, "rope_scaling": scaling}


class Mlx:
    """The dialect; its configs name no ``quant_method``."""

    quant_method = "mlx"
    conv1d = False
    embeddings = True

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config is MLX's."""
        return (
            "quant_method" not in config and "bits" in config and "group_size" in config and "checkpoint_format" not in config
        )

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject what the layout has no place for."""
        if reason := rejects(scheme.weight, shape):
            return reason
        if scheme.activation is not None:
            return f"mlx says nothing of activations ({scheme.describe()}); use compressed-tensors or native"
        return rejects_scales(scheme.weight, dtype)

    def rejects_plan(self, plan: Mapping[str, Scheme], ignore: Sequence[str]) -> str | None:
        """Reject experts that mlx-lm does not stack."""
        grids: dict[str, dict[str, Any]] = {}
        for name, scheme in plan.items():
            if not re.search(r"\.experts\.\d+\.", name):  # another layer, or a stack by its name in memory
                continue
            stack = _stack(name)
            if stack is None:
                return f"{name}: mlx-lm looks for experts as stacks under names of its own; leave them in float, or use native"
            if grids.setdefault(stack, _entry(scheme.weight)) != _entry(scheme.weight):
                return f"{name}: mlx-lm stacks the experts of a layer, so that they want one grid; it is {scheme.describe()}"
        return None

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Write the commonest grid, and an entry for each layer with another."""
        grids = {name: _entry(scheme.weight) for name, scheme in plan.items()}
        usual = Counter(tuple(entry.items()) for entry in grids.values()).most_common(1)[0][0]
        others = {name: entry for name, entry in grids.items() if tuple(entry.items()) != usual}
        stacks = {stack: entry for name, entry in others.items() if (stack := _stack(name)) is not None}
        return {**dict(usual), **others, **stacks}

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Read our own and other writers' configs."""
        try:
            _refuse_modes(config)
            base = (_positive(config, "bits"), _positive(config, "group_size"))
        except (KeyError, TypeError, AttributeError, ValueError, SpecError) as error:
            raise FormatError(f"quantization_config is malformed: {error!r}") from error

        def match(module: str) -> Stored | None:
            own = config.get(module)
            if own is False or not is_stored(module, tensors, ("scales", "biases")):
                return None
            bits, group = (own.get("bits", base[0]), own.get("group_size", base[1])) if isinstance(own, dict) else base
            return _stored(module, bits, group, tensors)

        return match


def _stack(name: str) -> str | None:
    """Return what mlx-lm calls the stack that an expert goes into; None where it makes none."""
    found = re.fullmatch(r"(.+\.block_sparse_moe)\.experts\.\d+\.(w[123])", name)
    return f"{found[1]}.switch_mlp.{_STACKED[found[2]]}" if found is not None else None


def _entry(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits, "mode": "affine"}


def _positive(config: Mapping[str, Any], key: str) -> int:
    if type(value := config[key]) is not int or value < 1:
        raise FormatError(f"quantization_config.{key} is {value!r}; want a positive integer")
    return value


def _refuse_modes(config: Mapping[str, Any]) -> None:
    every = [("quantization_config", config), *((name, value) for name, value in config.items() if isinstance(value, dict))]
    for name, values in every:
        if (mode := values.get("mode", "affine")) != "affine":
            raise FormatError(f"{name}.mode is {mode!r}; quantkit reads affine alone")


def _stored(module: str, bits: int, group: int, tensors: Mapping[str, Held]) -> Stored:
    """Return how a module is stored, which its scales and biases say where there are files."""
    scales, shift = tensors.get(f"{module}.scales"), tensors.get(f"{module}.biases")
    if scales is None or shift is None or scales.shape != shift.shape or scales.dtype not in _DTYPES:
        return Stored(Scheme(QuantSpec(f"int{bits}", (1, group))), MlxCodec())  # the check of the tensors says what is wrong
    scale, bias = scales.read(), shift.read()
    points = zero_points(scale, bias, bits)
    if points is None:
        return Stored(Scheme(QuantSpec(f"int{bits}", (1, group), False, _DTYPES[scale.dtype], True)), MlxCodec())
    narrow = _narrowest(scale) if scale.dtype == WIDE else None
    if bool((points == 1 << (bits - 1)).all()):  # with zero points or without: the file does not say
        spec = QuantSpec(f"int{bits}", (1, group), True, narrow or _DTYPES[scale.dtype])
        return Stored(Scheme(spec), MlxCodec(wide=narrow is not None))
    if narrow is None:
        return Stored(Scheme(QuantSpec(f"int{bits}", (1, group), False, _DTYPES[scale.dtype], True)), MlxCodec())
    return Stored(Scheme(QuantSpec(f"int{bits}", (1, group), False, narrow)), MlxCodec())


def _narrowest(scale: torch.Tensor) -> str | None:
    """Return the half precision that holds all of ``scale``; None if neither does."""
    return next((name for name in ("float16", "bfloat16") if torch.equal(scale.to(_half(name)).float(), scale)), None)


def _half(name: str) -> torch.dtype:
    return torch.float16 if name == "float16" else torch.bfloat16
