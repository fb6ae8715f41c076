"""``compressed-tensors``: its ``quantization_config``, read and written.

The config names one of the layouts of :mod:`quantkit.formats.codecs.compressed_tensors` per group of modules. The layout of 3,
5, 6 and 7-bit codes also depends on the ``version`` that wrote them (dense since 0.18). We write the dense layout and record
``version``; on reading, ``version`` decides. Readers up to 0.17 cannot read our 3, 5, 6 and 7-bit files.

Readers create scales in the checkpoint's dtype: a float16 scale in a bfloat16 checkpoint would be rounded when it is
loaded. So the scale dtype must be the checkpoint's dtype, or the checkpoint must be float32, which holds every float16
and bfloat16 exactly; then ``scale_dtype`` names the narrower type that the file holds.

Not representable here: embedding tables (and so tied heads; an untied head is a linear layer as any other), blocks of several
rows, NF4 (use ``native``), activations of other than 8 bits, stored ``weight_g_idx`` (act order by group, which
compressed-tensors itself has removed), KV-cache scales, sparsity, transforms.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import Codec, Held, Matcher, Stored, group_by_scheme
from quantkit.formats.codecs.compressed_tensors import (
    FP4_GRIDS,
    FP4_LAYOUTS,
    LAYOUTS,
    PackQuantized,
    WithInputScale,
    codec_named,
    fp4_name,
    layout_name,
)
from quantkit.formats.patterns import ModulePatterns, SearchTime
from quantkit.spec import ActivationSpec, QuantSpec, Scheme

VERSION = "0.18.0"
"""First compressed-tensors release whose ``pack-quantized`` is the dense layout that we write."""

_PADDED_BITS = (3, 5, 6, 7)
_SCALES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class CompressedTensors:
    """The dialect."""

    quant_method = "compressed-tensors"
    conv1d = False
    embeddings = False

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject what readers would misread; see the module's docstring."""
        spec = scheme.weight
        if spec.blocks is not None:
            return f"blocks {spec.blocks} go into GGUF files; use format gguf"
        if reason := spec.rejects(shape):
            return reason
        if spec.offset:
            return f"compressed-tensors stores zero points that are codes, not {spec.describe()}; use format mlx or native"
        if fp4 := fp4_name(spec):
            return f"activations beside {fp4} weights are not written; use format native" if scheme.activation else None
        if not spec.is_integer and (spec.dtype != "fp8_e4m3" or spec.strategy not in ("channel", "tensor")):
            return f"compressed-tensors {spec.describe()} is not written; use fp8 per channel or tensor, or format native"
        if spec.strategy == "block":
            return f"compressed-tensors integers have no blocks of {spec.block[0]} rows; use a group size, or format native"
        if dtype is not None and dtype not in (spec.scale_dtype, "float32"):
            return (
                f"scales are {spec.scale_dtype} but the checkpoint is {dtype}, and readers would round them to it; "
                f"use scale_dtype {dtype}, or format native"
            )
        if spec.strategy == "tensor" and spec.bits != 8:
            return f"compressed-tensors stores one scale per tensor only for 8 bits, not {spec.bits}; use channel"
        if scheme.activation is not None:
            return _rejects_activation(spec, scheme.activation)
        return None

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Write one group per scheme; a single scheme targets every Linear that ``ignore`` does not name."""
        by_scheme = group_by_scheme(plan)
        names = {layout_name(scheme) for scheme in by_scheme}
        groups = {}
        for i, (scheme, modules) in enumerate(by_scheme.items()):
            groups[f"group_{i}"] = {
                "targets": ["Linear"] if len(by_scheme) == 1 else modules,
                "weights": _weight_args(scheme.weight, dtype),
                "input_activations": _activation_args(scheme.activation, dtype) if scheme.activation else None,
                "output_activations": None,
                "format": layout_name(scheme),
            }
        return {
            "quant_method": self.quant_method,
            "version": VERSION,
            "format": names.pop() if len(names) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Read our own and other writers' configs; targets are matched in order, like compressed-tensors does.

        A config that does not name the dtype of scales means the one that the files have.
        """
        try:
            return _read_config(config, _scale_dtype(tensors) or dtype)
        except (KeyError, TypeError, AttributeError, ValueError, SpecError) as error:
            raise FormatError(f"quantization_config is malformed: {error!r}") from error


def _scale_dtype(tensors: Mapping[str, Held]) -> str | None:
    """Return the dtype that all scales have which are floats of the checkpoint; FP4's scales have dtypes of their own.

    None if there are none, or several: then a group that does not name its own has the checkpoint's.
    """
    found = {held.dtype for name, held in tensors.items() if name.endswith(".weight_scale")} & _SCALES
    names = sorted(str(dtype).removeprefix("torch.") for dtype in found)
    return names[0] if len(names) == 1 else None


def _rejects_activation(weight: QuantSpec, activation: ActivationSpec) -> str | None:
    what, grid = f"activations {activation.describe()}", activation.grid
    if activation.rotated:
        return f"{what}: its readers would not rotate them; use format native, or w8a8 and transforms=rotate"
    if grid.is_integer != weight.is_integer:
        return f"{what} do not go with weights {weight.describe()}; use w8a8 or fp8-dynamic"
    if grid.bits != 8 or (grid.strategy == "group" and not grid.is_integer):
        return f"{what}: only int8 per token, group or tensor and FP8 per token or tensor can be stored"
    if activation.static and (weight.bits != 8 or weight.strategy not in ("channel", "tensor")):
        return f"{what}: they need 8-bit weights per channel or tensor, not {weight.describe()}; use w8a8-static"
    return None


def _weight_args(spec: QuantSpec, dtype: str) -> dict[str, Any]:
    args = _args(spec, "tensor_group" if spec.has_global_scale else spec.strategy)
    if fp4_name(spec):
        stored = f"torch.{spec.scale_dtype if spec.has_global_scale else 'uint8'}"
        return {**args, "scale_dtype": stored, "zp_dtype": stored}
    return args if spec.scale_dtype == dtype else {**args, "scale_dtype": f"torch.{spec.scale_dtype}"}


def _activation_args(spec: ActivationSpec, dtype: str) -> dict[str, Any]:
    grid = spec.grid
    args = _args(grid, "token" if grid.strategy == "channel" else grid.strategy, spec.dynamic)
    return args if spec.dynamic or grid.scale_dtype == dtype else {**args, "scale_dtype": f"torch.{grid.scale_dtype}"}


def _args(spec: QuantSpec, strategy: str, dynamic: bool = False) -> dict[str, Any]:
    return {
        "num_bits": spec.bits,
        "type": "int" if spec.is_integer else "float",
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": spec.group_size if spec.strategy == "group" else None,
        "dynamic": dynamic,
    }


def _read_config(config: Mapping[str, Any], scale_dtype: str) -> Matcher:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key):
            raise FormatError(f"quantization_config.{key} is set, which quantkit cannot load yet; only weights are supported")
    if (status := config.get("quantization_status", "compressed")) != "compressed":
        raise FormatError(f"quantization_config.quantization_status is {status!r}, want 'compressed'; save it compressed")
    clock = SearchTime()
    groups: list[tuple[ModulePatterns, Stored]] = []
    for name, group in config["config_groups"].items():
        how = group.get("format") or config.get("format")
        spec = _read_weight_args(group["weights"], scale_dtype, f"config_groups.{name}.weights", how)
        if group.get("output_activations"):
            raise FormatError(f"config_groups.{name}.output_activations is set, which quantkit cannot load")
        activation = _read_activation_args(group.get("input_activations"), name, spec)
        codec = _read_codec(how, spec, config.get("version"), name)
        if activation is not None and activation.static:
            codec = WithInputScale(codec, activation.grid.scale_dtype)
        targets = ModulePatterns(group["targets"], clock, everything=frozenset(["Linear"]))
        groups.append((targets, Stored(Scheme(spec, activation), codec)))
    ignore = ModulePatterns(config.get("ignore") or (), clock, everything=frozenset(["Linear"]))

    def match(module: str) -> Stored | None:
        return None if ignore.match(module) else next((stored for targets, stored in groups if targets.match(module)), None)

    return match


def _read_weight_args(args: Mapping[str, Any], scale_dtype: str, where: str, format: str | None) -> QuantSpec:
    for (fp4, size, scales), name in FP4_GRIDS.items():
        layout = ("tensor_group" if scales == "float8_e4m3fn" else "group", size[1], 4, "float")
        found = tuple(args.get(key) for key in ("strategy", "group_size", "num_bits", "type"))
        if format == f"{name}-pack-quantized" and found == layout and args.get("symmetric", True):
            return QuantSpec(fp4, size, True, scales)
    strategy = args.get("strategy") or ("group" if (args.get("group_size") or -1) > 0 else "channel")
    dtype = _read_dtype(args)
    if dtype is None or args.get("dynamic") or strategy not in ("group", "channel", "tensor"):
        raise FormatError(
            f"{where}: type={args.get('type')!r}, num_bits={args.get('num_bits')!r}, strategy={strategy!r}, "
            f"dynamic={args.get('dynamic')!r}; quantkit loads static integer or FP8 weights per group, channel or tensor"
        )
    if args.get("actorder") in ("group", "dynamic"):
        raise FormatError(f"{where}.actorder is {args['actorder']!r}: permuted groups (weight_g_idx) are not supported")
    block = {"channel": (1, -1), "tensor": (-1, -1)}.get(strategy)
    if block is None:
        group = args.get("group_size")
        if not isinstance(group, int) or group <= 0:
            raise FormatError(f"{where}.group_size is {group!r}; want a positive integer")
        block = (1, group)
    named = args.get("scale_dtype")
    return QuantSpec(
        dtype,
        block,
        bool(args.get("symmetric", True)),
        named.removeprefix("torch.") if named else scale_dtype,
    )


def _read_activation_args(args: Mapping[str, Any] | None, group: str, weight: QuantSpec) -> ActivationSpec | None:
    if not args:
        return None
    blocks = {"token": (1, -1), "tensor": (-1, -1), "group": (1, int(args.get("group_size") or -1))}
    dtype, dynamic, strategy = _read_dtype(args), args.get("dynamic", False), args.get("strategy")
    where = f"config_groups.{group}.input_activations"
    if dtype is None or not isinstance(dynamic, bool) or strategy not in blocks or (not dynamic and strategy != "tensor"):
        raise FormatError(
            f"{where}: type={args.get('type')!r}, strategy={strategy!r}, dynamic={dynamic!r}; quantkit knows only dynamic "
            "integers and FP8 per token, group or tensor, and static ones per tensor"
        )
    named = str(args.get("scale_dtype") or weight.scale_dtype).removeprefix("torch.")
    grid = QuantSpec(dtype, blocks[strategy], bool(args.get("symmetric", True)), "float32" if dynamic else named)
    spec = ActivationSpec(grid, dynamic)
    if reason := _rejects_activation(weight, spec):
        raise FormatError(f"{where}: {reason}")
    return spec


def _read_dtype(args: Mapping[str, Any]) -> str | None:
    """Return the name of a code dtype, or None for one that does not exist here."""
    bits = int(args["num_bits"])
    if args.get("type", "int") == "float":
        return "fp8_e4m3" if bits == 8 else None
    return f"int{bits}" if args.get("type", "int") == "int" else None


def _read_codec(name: str | None, spec: QuantSpec, version: str | None, group: str) -> Codec:
    if name not in LAYOUTS:
        raise FormatError(f"config_groups.{group}: format {name!r} cannot be loaded; known: {', '.join(LAYOUTS)}")
    if (name in FP4_LAYOUTS or fp4_name(spec)) and name != f"{fp4_name(spec)}-pack-quantized":
        raise FormatError(f"config_groups.{group}: format {name!r} does not store {spec.describe()}")
    if name != "pack-quantized" or spec.bits not in _PADDED_BITS:
        return codec_named(name)
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None:
        raise FormatError(
            f"quantization_config.version is {version!r}: {spec.bits}-bit packing changed in compressed-tensors 0.18, so "
            "without the version the codes cannot be read; add the version that wrote the file"
        )
    return PackQuantized(padded=(int(found[1]), int(found[2])) < (0, 18))
