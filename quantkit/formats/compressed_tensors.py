"""``compressed-tensors``: the checkpoints that vLLM, transformers and llm-compressor read.

Integer codes are signed there, so a stored 4-bit -8..7 is our 0..15; ``w = (q - zero_point) * scale`` in both worlds.

- ``pack-quantized``, weight only, 2 to 8 bits, a scale per group or channel: ``weight_packed`` int32
  (out, ceil(in * bits / 32)) holds ``q + 2^(bits-1)``, element i at bit ``i * bits`` of its row, low bits first;
  ``weight_scale`` (out, in / group_size), (out, 1) per channel; ``weight_shape`` int64 [out, in]; asymmetric grids add
  ``weight_zero_point`` int32 (ceil(out * bits / 32), in / group_size), packed like weights but down dimension 0.
- ``int-quantized``, 8 bits: ``weight`` int8 (out, in), ``weight_scale`` (out, in / group_size), (out, 1) or (1,),
  ``weight_zero_point`` int8 of that shape. It is chosen for schemes that also quantize activations (W8A8) and for one scale
  per tensor, which ``pack-quantized`` readers refuse.
- ``float-quantized``, FP8 e4m3 with one scale per channel or tensor, activations float or FP8: ``weight`` float8_e4m3fn
  (out, in), ``weight_scale`` (out, 1) or (1,).
- ``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``, weights only: ``weight_packed`` uint8 (out, in / 2), the even column in
  the low nibble; ``weight_scale`` FP8 e4m3 (out, in / 16) and ``weight_global_scale`` float32 (1,), which *divides*, or E8M0
  exponents uint8 (out, in / 32).

Activations are int8 or FP8 like the weights, or int8 with 2 to 7-bit weights (W4A8, ``pack-quantized``); per token, per token
and group, or with one static ``input_scale`` (1,) per layer.

Since compressed-tensors 0.18 packing is dense: elements cross word boundaries. Before, a word held floor(32 / bits)
elements and padding, which differs for 3, 5, 6 and 7 bits. We write the dense layout and record ``version``; on reading,
``version`` decides. Readers up to 0.17 cannot read our 3, 5, 6 and 7-bit files.

Readers create scales in the checkpoint's dtype: a float16 scale in a bfloat16 checkpoint would be rounded when it is
loaded. So the scale dtype must be the checkpoint's dtype, or the checkpoint must be float32, which holds every float16
and bfloat16 exactly; then ``scale_dtype`` names the narrower type that the file holds.

What transformers (5.23 with compressed-tensors 0.20) makes of our files: symmetric ones load compressed; asymmetric ones load
with ``CompressedTensorsConfig(dequantize=True)`` only, because the package prepares unpacked zero points for them; stacks
of experts load if they are symmetric; GPT-2's Conv1D layers are not recognised at all.

Not representable here: embedding tables (and so tied heads; an untied head is a linear layer as any other), blocks of several
rows, NF4 (use ``native``), activations of other than 8 bits, stored ``weight_g_idx`` (act order by group, which
compressed-tensors itself has removed), KV-cache scales, sparsity, transforms.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import FORMATS, Codec, Matcher, Stored, group_by_scheme
from quantkit.formats.compressed_codecs import FP4_GRIDS, FloatQuantized, Fp4Packed, IntQuantized, PackQuantized, WithInputScale
from quantkit.spec import QuantSpec, Scheme

VERSION = "0.18.0"
"""First compressed-tensors release whose ``pack-quantized`` is the dense layout that we write."""

_PADDED_BITS = (3, 5, 6, 7)
_FP4_FORMATS = tuple(f"{name}-pack-quantized" for name in FP4_GRIDS.values())
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", *_FP4_FORMATS)


class CompressedTensors:
    """The format ``compressed-tensors``."""

    quant_method = "compressed-tensors"
    stem = "model"
    conv1d = False
    embeddings = False

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject what readers would misread; see the module's docstring."""
        spec = scheme.weight
        if reason := spec.rejects(shape):
            return reason
        if fp4 := _fp4_name(spec):
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

    def codec(self, scheme: Scheme) -> Codec:
        """Return float-quantized for FP8, int-quantized for W8A8 and per-tensor scales, else pack-quantized."""
        codec = _codec(_format_name(scheme))
        return WithInputScale(codec, scheme.activation.scale_dtype) if scheme.activation and scheme.static else codec

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Write one group per scheme; a single scheme targets every Linear that ``ignore`` does not name."""
        by_scheme = group_by_scheme(plan)
        names = {_format_name(scheme) for scheme in by_scheme}
        groups = {}
        for i, (scheme, modules) in enumerate(by_scheme.items()):
            groups[f"group_{i}"] = {
                "targets": ["Linear"] if len(by_scheme) == 1 else modules,
                "weights": _weight_args(scheme.weight, dtype),
                "input_activations": _activation_args(scheme.activation, dtype) if scheme.activation else None,
                "output_activations": None,
                "format": _format_name(scheme),
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

    def load_config(self, config: Mapping[str, Any], scale_dtype: str) -> Matcher:
        """Read our own and other writers' configs; targets are matched in order, like compressed-tensors does."""
        try:
            return _read_config(config, scale_dtype)
        except (KeyError, TypeError, AttributeError, ValueError, SpecError, re.error) as error:
            raise FormatError(f"quantization_config is malformed: {error!r}") from error


def _fp4_name(spec: QuantSpec) -> str | None:
    return FP4_GRIDS.get((spec.dtype, spec.block, spec.scale_dtype))


def _format_name(scheme: Scheme) -> str:
    if fp4 := _fp4_name(scheme.weight):
        return f"{fp4}-pack-quantized"
    if not scheme.weight.is_integer:
        return "float-quantized"
    bytewise = scheme.activation is not None and scheme.weight.bits == 8
    return "int-quantized" if bytewise or scheme.weight.strategy == "tensor" else "pack-quantized"


def _codec(name: str) -> Codec:
    plain: dict[str, Codec] = {"float-quantized": FloatQuantized(), "int-quantized": IntQuantized()}
    return Fp4Packed() if name in _FP4_FORMATS else plain.get(name, PackQuantized())


def _rejects_activation(weight: QuantSpec, activation: QuantSpec) -> str | None:
    what = f"activations {activation.describe()}"
    if activation.rotated:
        return f"{what}: its readers would not rotate them; use format native, or w8a8 and transforms=rotate"
    if activation.is_integer != weight.is_integer:
        return f"{what} do not go with weights {weight.describe()}; use w8a8 or fp8-dynamic"
    if activation.bits != 8 or (activation.strategy == "group" and not activation.is_integer):
        return f"{what}: only int8 per token, group or tensor and FP8 per token or tensor can be stored"
    if not activation.dynamic and (weight.bits != 8 or weight.strategy not in ("channel", "tensor")):
        return f"{what} static: they need 8-bit weights per channel or tensor, not {weight.describe()}; use w8a8-static"
    return None


def _weight_args(spec: QuantSpec, dtype: str) -> dict[str, Any]:
    args = _args(spec, "tensor_group" if spec.has_global_scale else spec.strategy)
    if _fp4_name(spec):
        stored = f"torch.{spec.scale_dtype if spec.has_global_scale else 'uint8'}"
        return {**args, "scale_dtype": stored, "zp_dtype": stored}
    return args if spec.scale_dtype == dtype else {**args, "scale_dtype": f"torch.{spec.scale_dtype}"}


def _activation_args(spec: QuantSpec, dtype: str) -> dict[str, Any]:
    args = _args(spec, "token" if spec.strategy == "channel" else spec.strategy)
    return args if spec.dynamic or spec.scale_dtype == dtype else {**args, "scale_dtype": f"torch.{spec.scale_dtype}"}


def _args(spec: QuantSpec, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": spec.bits,
        "type": "int" if spec.is_integer else "float",
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": spec.group_size if spec.strategy == "group" else None,
        "dynamic": spec.dynamic,
    }


def _read_config(config: Mapping[str, Any], scale_dtype: str) -> Matcher:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key):
            raise FormatError(f"quantization_config.{key} is set, which quantkit cannot load yet; only weights are supported")
    if (status := config.get("quantization_status", "compressed")) != "compressed":
        raise FormatError(f"quantization_config.quantization_status is {status!r}, want 'compressed'; save it compressed")
    groups: list[tuple[list[str], Stored]] = []
    for name, group in config["config_groups"].items():
        how = group.get("format") or config.get("format")
        spec = _read_weight_args(group["weights"], scale_dtype, f"config_groups.{name}.weights", how)
        if group.get("output_activations"):
            raise FormatError(f"config_groups.{name}.output_activations is set, which quantkit cannot load")
        activation = _read_activation_args(group.get("input_activations"), name, spec)
        codec = _read_codec(how, spec, config.get("version"), name)
        if activation is not None and not activation.dynamic:
            codec = WithInputScale(codec, activation.scale_dtype)
        groups.append((list(group["targets"]), Stored(Scheme(spec, activation), codec)))
    ignore = list(config.get("ignore") or ())
    for pattern in (*ignore, *(target for targets, _ in groups for target in targets)):
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")

    def match(module: str) -> Stored | None:
        if any(_matches(module, pattern) for pattern in ignore):
            return None
        return next((stored for targets, stored in groups if any(_matches(module, t) for t in targets)), None)

    return match


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern in ("Linear", module)


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


def _read_activation_args(args: Mapping[str, Any] | None, group: str, weight: QuantSpec) -> QuantSpec | None:
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
    spec = QuantSpec(dtype, blocks[strategy], bool(args.get("symmetric", True)), "float32" if dynamic else named, dynamic)
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
    if name not in _FORMATS:
        raise FormatError(f"config_groups.{group}: format {name!r} cannot be loaded; known: {', '.join(_FORMATS)}")
    if (name in _FP4_FORMATS or _fp4_name(spec)) and name != f"{_fp4_name(spec)}-pack-quantized":
        raise FormatError(f"config_groups.{group}: format {name!r} does not store {spec.describe()}")
    if name != "pack-quantized" or spec.bits not in _PADDED_BITS:
        return _codec(name)
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None:
        raise FormatError(
            f"quantization_config.version is {version!r}: {spec.bits}-bit packing changed in compressed-tensors 0.18, so "
            "without the version the codes cannot be read; add the version that wrote the file"
        )
    return PackQuantized(padded=(int(found[1]), int(found[2])) < (0, 18))


FORMATS.register("compressed-tensors")(CompressedTensors())
