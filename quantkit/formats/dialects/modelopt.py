"""``modelopt``: its ``quantization_config`` and ``hf_quant_config.json``, read and written.

``quant_algo`` says how all layers are stored; ``MIXED_PRECISION`` has ``quantized_layers``, one by one. Linear modules that
stay in float, routers and heads among them, are named in ``ignore`` (``exclude_modules`` in the file of its own): readers take
every linear layer for quantized that is not. vLLM 0.32 looks for these names anywhere in a module's name, so a plan is refused
where one is part of a quantized layer's. The list may have wildcards (``*``, ``?``).

Not read: ``NVFP4``, whose activations are rounded to FP4 as well, block FP8 and MXFP8, AWQ variants with ``pre_quant_scale``,
key/value caches in FP8.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import Held, Matcher, Stored
from quantkit.formats.codecs.modelopt import SCHEMES, algorithm, codec_of
from quantkit.formats.dialects.awq import hidden
from quantkit.spec import Scheme
from quantkit.version import __version__

FILE = "hf_quant_config.json"
_MIXED = "MIXED_PRECISION"
_PRODUCER = {"name": "quantkit", "version": __version__}


class ModelOpt:
    """The dialect."""

    quant_method = "modelopt"
    conv1d = False
    embeddings = False

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config is this dialect's; some writers append what it holds (``modelopt_fp4``)."""
        return str(config.get("quant_method")).startswith(self.quant_method)

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject what no ``quant_algo`` says."""
        if reason := scheme.weight.rejects(shape):
            return reason
        if algorithm(scheme) is None:
            return (
                "modelopt stores fp8-tensor-static, fp8-dynamic (with float32 scales, as chosen where the format is named) "
                f"and nvfp4, not {scheme.describe()}; use compressed-tensors or native"
            )
        return None

    def rejects_plan(self, plan: Mapping[str, Scheme], ignore: Sequence[str]) -> str | None:
        """Reject names that readers would take for those left in float."""
        return hidden(plan, ignore, "modelopt")

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Write the algorithm, or the layers with theirs."""
        algorithms = {name: str(algorithm(scheme)) for name, scheme in plan.items()}
        kinds = set(algorithms.values())
        mixed = {"quantized_layers": {name: _entry(algo) for name, algo in algorithms.items()}} if len(kinds) > 1 else {}
        return {
            "quant_method": self.quant_method,
            **({"quant_algo": _MIXED} if mixed else _entry(kinds.pop())),
            **mixed,
            "kv_cache_scheme": None,
            "ignore": list(ignore),
            "producer": _PRODUCER,
        }

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Read our own and other writers' configs."""
        try:
            return self._matcher(config if "quantization" not in config else untwin(config))
        except (KeyError, TypeError, AttributeError, ValueError, SpecError) as error:
            raise FormatError(f"quantization_config is malformed: {error!r}") from error

    def _matcher(self, config: Mapping[str, Any]) -> Matcher:
        if (cache := config.get("kv_cache_scheme")) is not None:
            raise FormatError(f"quantization_config.kv_cache_scheme is {cache!r}, which quantkit cannot load yet")
        algo = str(config["quant_algo"]).upper()
        layers = {str(name): _known(entry) for name, entry in config["quantized_layers"].items()} if algo == _MIXED else None
        usual = None if layers is not None else _known(config)
        left_out = [str(name) for name in config.get("ignore") or ()]

        def match(module: str) -> Stored | None:
            if any(fnmatch.fnmatchcase(module, name) for name in left_out):
                return None
            scheme = usual if layers is None else layers.get(module)
            return None if scheme is None else Stored(scheme, codec_of(scheme))

        return match


def twin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of :data:`FILE` for a ``quantization_config``."""
    rest = {key: value for key, value in config.items() if key not in ("quant_method", "producer", "kv_cache_scheme", "ignore")}
    quantization = {**rest, "kv_cache_quant_algo": None, "exclude_modules": list(config["ignore"])}
    return {"producer": config["producer"], "quantization": quantization}


def untwin(content: Mapping[str, Any]) -> dict[str, Any]:
    """Reverse :func:`twin`."""
    found = content.get("quantization")
    if not isinstance(found, dict):
        raise FormatError(f"{FILE}: quantization is {found!r}, want a mapping")
    names = {"exclude_modules": "ignore", "kv_cache_quant_algo": "kv_cache_scheme"}
    return {"quant_method": "modelopt", **{names.get(str(key), str(key)): value for key, value in found.items()}}


def _entry(algo: str) -> dict[str, Any]:
    return {"quant_algo": algo, **({"group_size": 16} if algo == "W4A16_NVFP4" else {})}


def _known(entry: Mapping[str, Any]) -> Scheme:
    """Return the scheme of a config, or of one layer in it."""
    algo = str(entry["quant_algo"]).upper()
    if algo not in SCHEMES:
        raise FormatError(f"quant_algo {algo!r} cannot be loaded; quantkit reads {', '.join(SCHEMES)}")
    if algo == "W4A16_NVFP4" and entry.get("group_size") not in (None, 16):
        raise FormatError(f"quant_algo {algo}: group_size is {entry['group_size']!r}, want 16")
    return SCHEMES[algo]
