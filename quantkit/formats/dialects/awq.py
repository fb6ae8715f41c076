"""``awq``: its ``quantization_config``, read and written, and that of AutoRound's checkpoints in the same layout, read.

One grid for the whole model: 4 bits with zero points (``zero_point`` true) and one ``group_size`` (-1 for one group). Linear
modules that stay in float are named in ``modules_to_not_convert``, which readers look for anywhere in a module's name; so where
a name to be left out is part of one that is quantized, the plan is refused. No reader takes a quantized output head.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import Codec, Held, Matcher, Stored
from quantkit.formats.codecs.awq import AwqGemm, AwqGemv, rejects
from quantkit.formats.dialects.gptq import SUFFIXES, in_a_block, is_stored, refuse_unknown, rejects_scales, spec_of
from quantkit.spec import Scheme

_CODECS: dict[str, Codec] = {"gemm": AwqGemm(), "gemv": AwqGemv()}


def hidden(plan: Mapping[str, Scheme], ignore: Sequence[str], format: str) -> str | None:
    """Say which quantized layer is left out by readers that look for names of float layers anywhere in a name."""
    for name in ignore:
        if odd := next((one for one in plan if name in one), None):
            return f"{odd}: its name contains {name}, which stays in float: readers of {format} leave out both; use native"
    return None


class Awq:
    """The dialect."""

    quant_method = "awq"
    conv1d = False
    embeddings = False

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config is AWQ's."""
        if config.get("quant_method") == "auto-round":
            return "awq" in str(config.get("packing_format"))
        return config.get("quant_method") == self.quant_method

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject what the layout has no place for, and scales that readers would round."""
        if reason := rejects(scheme.weight, shape):
            return reason
        if scheme.activation is not None:
            return f"awq says nothing of activations ({scheme.describe()}); use compressed-tensors or native"
        return rejects_scales(scheme.weight, dtype)

    def rejects_plan(self, plan: Mapping[str, Scheme], ignore: Sequence[str]) -> str | None:
        """Reject several grids, an output head, and names that readers would take for those left in float."""
        schemes = list(dict.fromkeys(scheme.weight for scheme in plan.values()))
        if len(schemes) > 1:
            both = " and ".join(spec.describe() for spec in schemes[:2])
            return f"awq has one grid for all layers, here {both}; use gptq-v2, compressed-tensors or native"
        if head := next((name for name in plan if not in_a_block(name)), None):
            return f"{head}: readers of awq expect it in float; use gptq-v2, compressed-tensors or native"
        return hidden(plan, ignore, self.quant_method)

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Write the grid and what is left out."""
        spec = next(iter(plan.values())).weight
        return {
            "quant_method": self.quant_method,
            "bits": spec.bits,
            "group_size": spec.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignore) or None,
        }

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Read our own and other writers' configs."""
        try:
            return self._matcher(config, dtype, tensors)
        except (KeyError, TypeError, AttributeError, ValueError, SpecError) as error:
            raise FormatError(f"quantization_config is malformed: {error!r}") from error

    def _matcher(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        refuse_unknown(config)
        version = str(config.get("version", "gemm")).lower()
        wrapped = config.get("quant_method") == "auto-round"
        if version not in _CODECS or not (wrapped or config.get("zero_point", True)):
            raise FormatError(
                f"quantization_config: version={version!r}, zero_point={config.get('zero_point')!r}; "
                "quantkit reads gemm and gemv with zero points"
            )
        bits = config.get("bits", config.get("w_bit"))
        group = config.get("group_size", config.get("q_group_size"))
        spec_of({"bits": bits, "group_size": group, "sym": False}, "float16")
        left_out = [str(name) for name in config.get("modules_to_not_convert") or ()]
        left_out += [name for name, values in (config.get("extra_config") or {}).items() if int(values.get("bits", bits)) >= 16]

        def match(module: str) -> Stored | None:
            if not is_stored(module, tensors, SUFFIXES) or (not tensors and any(name in module for name in left_out)):
                return None
            scales = tensors.get(f"{module}.scales")
            scale_dtype = dtype if scales is None else str(scales.dtype).removeprefix("torch.")
            spec = spec_of({"bits": bits, "group_size": group, "sym": False}, scale_dtype)
            return Stored(Scheme(spec), _CODECS[version])

        return match
