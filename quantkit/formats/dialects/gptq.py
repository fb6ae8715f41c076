"""``gptq``: its ``quantization_config``, read and written, and that of AutoRound's checkpoints in the same layout, read.

The config has one grid for all layers (``bits``, ``group_size``, -1 for one group, ``sym``) and ``dynamic``, an ordered
mapping of ``+:`` or ``-:`` and a regular expression that is matched from the beginning of a module's name: the first that
matches overrides the grid, or leaves the module in float. Of several schemes the commonest becomes the grid, the others rules;
linear modules that stay in float get ``-:`` rules. Rules also match the names that vLLM gives to layers it joins.

``checkpoint_format`` says truthfully which of the two layouts of :mod:`quantkit.formats.codecs.gptq` is written: ``gptq``,
which every reader knows, for symmetric grids, and ``gptq_v2`` under the name ``gptq-v2`` for all.

Which layers are quantized is read from the files, because older configs do not say it. AutoRound's configs (``quant_method``
``auto-round``, ``packing_format`` ``auto_round:auto_gptq``) have ``extra_config`` by module instead of ``dynamic``.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import Held, Matcher, Stored
from quantkit.formats.codecs.gptq import GptqCodec, counts_up, order_fault, rejects
from quantkit.formats.patterns import ModulePatterns, SearchTime
from quantkit.spec import QuantSpec, Scheme
from quantkit.version import __version__

log = logging.getLogger(__name__)

JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""What vLLM calls layers that it joins."""

SUFFIXES = ("qweight", "qzeros", "scales")
"""The tensors by which a quantized module is known in a file."""

_UNKNOWN: Mapping[str, tuple[Any, ...]] = {
    "pack_dtype": (None, "int32"),
    "is_marlin_format": (None, False),
    "rotation": (None, ""),
    "adapter": (None, {}),
    "data_type": (None, "int"),
    "act_bits": (None, 16, 32),
    "super_bits": (None,),
}
"""Keys that change what the numbers mean, with the values that do not."""


class Gptq:
    """The dialect of one ``checkpoint_format``.

    Args:
        version: 1 for ``gptq``, 2 for ``gptq_v2``.
    """

    quant_method = "gptq"
    conv1d = False
    embeddings = False

    def __init__(self, version: int) -> None:
        self.version = version
        self.checkpoint_format = "gptq" if version == 1 else "gptq_v2"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config is this version's."""
        if config.get("quant_method") == "auto-round":
            return self.version == 1 and "awq" not in str(config.get("packing_format"))
        if config.get("quant_method", config.get("method", "gptq" if "checkpoint_format" in config else None)) != "gptq":
            return False
        return (_checkpoint_format(config) == "gptq_v2") == (self.version == 2)

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject what the layout has no place for, and scales that readers would round."""
        spec = scheme.weight
        if reason := rejects(spec, shape):
            return reason
        if scheme.activation is not None:
            return f"gptq says nothing of activations ({scheme.describe()}); use compressed-tensors or native"
        if self.version == 1 and not spec.symmetric:
            return (
                "gptq stores zero points less one, so that 0 has no place in it; use format gptq-v2, awq or compressed-tensors"
            )
        return rejects_scales(spec, dtype)

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Write the commonest scheme, and rules for the rest."""
        counts = Counter(scheme.weight for scheme in plan.values())
        base = counts.most_common(1)[0][0]
        dynamic: dict[str, dict[str, Any]] = {}
        inside = [name for name in ignore if in_a_block(name)]
        for expression in expressions(inside, [name for name in plan if name not in inside]):
            dynamic[f"-:{expression}"] = {}
        for spec in counts:
            mine = [name for name, scheme in plan.items() if scheme.weight == spec]
            rest = [name for name, scheme in plan.items() if scheme.weight != spec]
            if spec != base:
                dynamic |= dict.fromkeys((f"+:{one}" for one in expressions(with_joined(mine), with_joined(rest))), _grid(spec))
        return {
            "quant_method": self.quant_method,
            **_grid(base),
            "desc_act": False,
            "lm_head": any(not in_a_block(name) for name in plan),
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
            "dynamic": dynamic,
            "meta": {"quantizer": [f"quantkit:{__version__}"]},
        }

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Read our own and other writers' configs."""
        try:
            found = _checkpoint_format(config) or "gptq"
            if config.get("quant_method") == "auto-round":
                found = "gptq"
            if found != self.checkpoint_format:
                raise FormatError(f"quantization_config.checkpoint_format is {found!r}; quantkit reads gptq and gptq_v2")
            refuse_unknown(config)
            return self._matcher(config, dtype, tensors)
        except (KeyError, TypeError, AttributeError, ValueError, SpecError) as error:
            raise FormatError(f"quantization_config is malformed: {error!r}") from error

    def _matcher(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        base = {key: config[key] for key in ("bits", "group_size", "sym", "desc_act") if key in config}
        spec_of(base, "float16")
        rules = _rules(config.get("dynamic") or {}, config.get("extra_config") or {})
        head = bool(config.get("lm_head", False))

        def match(module: str) -> Stored | None:
            if not is_stored(module, tensors, SUFFIXES):
                return None
            overrides = next((values for fits, values in rules if fits(module)), {})
            if (
                overrides is None
                or int(overrides.get("bits", 4)) >= 16
                or (not tensors and not head and not in_a_block(module))
            ):
                return None
            scales = tensors.get(f"{module}.scales")
            spec = spec_of({**base, **overrides}, dtype if scales is None else str(scales.dtype).removeprefix("torch."))
            return self._stored(module, spec, bool({**base, **overrides}.get("desc_act", False)), tensors)

        return match

    def _stored(self, module: str, spec: QuantSpec, desc_act: bool, tensors: Mapping[str, Held]) -> Stored:
        """Return how a module is stored, having looked at its g_idx where that may be in any order."""
        held = tensors.get(f"{module}.g_idx")
        indexed = held is not None or not tensors
        if desc_act and held is not None:
            index = held.read()
            columns = index.numel()
            if reason := order_fault(index, columns, spec.group_size):
                raise FormatError(f"{module}: {reason}")
            if not counts_up(index, spec.group_size):
                free = QuantSpec(spec.dtype, (1, 1), spec.symmetric, spec.scale_dtype)
                return Stored(Scheme(free), GptqCodec(self.version, True, spec.group_size))
        if desc_act and tensors and held is None:
            raise FormatError(f"{module}: desc_act is true, but there is no g_idx that says which channels make a group")
        return Stored(Scheme(spec), GptqCodec(self.version, indexed))


def is_stored(module: str, tensors: Mapping[str, Held], suffixes: Iterable[str]) -> bool:
    """Return whether the files hold a module as codes; without files, whether they may."""
    return not tensors or any(f"{module}.{suffix}" in tensors for suffix in suffixes)


def rejects_scales(spec: QuantSpec, dtype: str | None) -> str | None:
    """Say why readers that hold scales in the checkpoint's dtype would round them; None if they do not."""
    if spec.scale_dtype not in ("float16", "bfloat16", "float32") or (
        dtype is not None and dtype not in (spec.scale_dtype, "float32")
    ):
        return (
            f"scales are {spec.scale_dtype} but the checkpoint is {dtype}, and readers would round them to it; "
            f"use scale_dtype {dtype}, or format native"
        )
    return None


def spec_of(values: Mapping[str, Any], scale_dtype: str) -> QuantSpec:
    """Return the grid that ``bits``, ``group_size`` and ``sym`` say."""
    bits, group = values["bits"], values.get("group_size", -1)
    if type(bits) is not int or type(group) is not int or not isinstance(values.get("sym", True), bool):
        raise FormatError(
            f"quantization_config: bits={bits!r}, group_size={group!r}, sym={values.get('sym')!r}; want two integers and a bool"
        )
    return QuantSpec(f"int{bits}", (1, group), values.get("sym", True), scale_dtype)


def refuse_unknown(config: Mapping[str, Any]) -> None:
    """Refuse keys that change what the numbers mean in a way that is not known here."""
    for key, harmless in _UNKNOWN.items():
        if (value := config.get(key)) not in harmless:
            raise FormatError(f"quantization_config.{key} is {value!r}, which quantkit cannot load")


def _checkpoint_format(config: Mapping[str, Any]) -> str | None:
    """Return what the config calls its layout; GPTQModel writes ``format`` as well."""
    found = [str(config[key]) for key in ("checkpoint_format", "format") if config.get(key)]
    if len(set(found)) > 1:
        raise FormatError(f"quantization_config: checkpoint_format is {found[0]!r} and format {found[1]!r}; want one of them")
    return found[0] if found else None


def _grid(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric}


def in_a_block(name: str) -> bool:
    """Return whether a module stands in a numbered layer; an output head does not."""
    return re.search(r"\.\d+\.", name) is not None


def with_joined(names: Iterable[str]) -> list[str]:
    """Return names together with those that vLLM gives to what it joins of them."""
    found = dict.fromkeys(names)
    for name in list(found):
        parent, _, last = name.rpartition(".")
        for joined, parts in JOINED.items():
            if last in parts:
                found[f"{parent}.{joined}"] = None
        if ".experts." in name:
            found[f"{name.partition('.experts.')[0]}.experts"] = None
    return list(found)


def expressions(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return regular expressions that match ``names`` and none of ``others``, few where names differ only in their numbers."""
    rest = {_frame(name) for name in others}
    frames: dict[str, list[str]] = {}
    for name in names:
        frames.setdefault(_frame(name), []).append(name)
    return [
        f"^{frame}$" if frame not in rest else f"^(?:{'|'.join(re.escape(name) for name in members)})$"
        for frame, members in frames.items()
    ]


def _frame(name: str) -> str:
    """Return a name as a regular expression in which numbers are any."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _rules(
    dynamic: Mapping[str, Any], extra: Mapping[str, Any]
) -> list[tuple[Callable[[str], bool], Mapping[str, Any] | None]]:
    """Return which modules get which overrides, in order; None leaves a module in float."""
    clock = SearchTime()
    rules: list[tuple[Callable[[str], bool], Mapping[str, Any] | None]] = []
    for pattern, values in dynamic.items():
        fits = ModulePatterns([f"re:{pattern.removeprefix('-:').removeprefix('+:')}"], clock).match
        refuse_unknown(values)
        rules.append((fits, None if pattern.startswith("-:") else dict(values)))
    for name, values in extra.items():
        refuse_unknown(values)
        fits = ModulePatterns([name], clock).match
        rules.append((fits, {key: values[key] for key in ("bits", "group_size", "sym") if values.get(key) is not None}))
    return rules
