"""``compressed-tensors``: the checkpoints that vLLM, transformers and llm-compressor read.

Integer codes are signed there, so a stored 4-bit -8..7 is our 0..15; ``w = (q - zero_point) * scale`` in both worlds.

- ``pack-quantized``, weight only, 2 to 8 bits, a scale per group or channel: ``weight_packed`` int32
  (out, ceil(in * bits / 32)) holds ``q + 2^(bits-1)``, element i at bit ``i * bits`` of its row, low bits first;
  ``weight_scale`` (out, in / group_size), (out, 1) per channel; ``weight_shape`` int64 [out, in]; asymmetric grids add
  ``weight_zero_point`` int32 (ceil(out * bits / 32), in / group_size), packed like weights but down dimension 0.
- ``int-quantized``, 8 bits with one scale per channel or tensor: ``weight`` int8 (out, in), ``weight_scale`` (out, 1) or
  (1,), ``weight_zero_point`` int8 of that shape. It is chosen for schemes that also quantize activations (W8A8) and
  for one scale per tensor, which ``pack-quantized`` readers refuse.
- ``float-quantized``, FP8 e4m3 with one scale per channel or tensor, activations float or FP8 per token: ``weight``
  float8_e4m3fn (out, in), ``weight_scale`` (out, 1) or (1,).

Since compressed-tensors 0.18 packing is dense: elements cross word boundaries. Before, a word held floor(32 / bits)
elements and padding, which differs for 3, 5, 6 and 7 bits. We write the dense layout and record ``version``; on reading,
``version`` decides. Readers up to 0.17 cannot read our 3, 5, 6 and 7-bit files.

Readers create scales in the checkpoint's dtype: a float16 scale in a bfloat16 checkpoint would be rounded when it is
loaded. So the scale dtype must be the checkpoint's dtype, or the checkpoint must be float32, which holds every float16
and bfloat16 exactly; then ``scale_dtype`` names the narrower type that the file holds.

What transformers (5.23 with compressed-tensors 0.20) makes of our files: symmetric ones load compressed; asymmetric ones load
with ``CompressedTensorsConfig(dequantize=True)`` only, because the package prepares unpacked zero points for them; stacks
of experts load if they are symmetric; GPT-2's Conv1D layers are not recognised at all.

Not representable here: blocks of several rows, NF4, FP4 (use ``native``), activation grids other than dynamic 8-bit, stored
``weight_g_idx`` (act order by group, which compressed-tensors itself has removed), KV-cache scales, sparsity, transforms.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import FORMATS, Codec, Layout, Matcher, Stored, check_layout, group_by_scheme
from quantkit.numerics import grid
from quantkit.numerics.dtypes import SCALE_DTYPES
from quantkit.numerics.pack import pack, packed_words, unpack
from quantkit.qtensor import QTensor
from quantkit.spec import QuantSpec, Scheme

VERSION = "0.18.0"
"""First compressed-tensors release whose ``pack-quantized`` is the dense layout that we write."""

_PADDED_BITS = (3, 5, 6, 7)
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized")


@dataclass(frozen=True, slots=True)
class PackQuantized:
    """Codec of ``pack-quantized``; ``padded`` is the layout of releases before 0.18, which is only read."""

    padded: bool = False

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        _, cols = grid.block_size(spec, shape)
        if len(shape) != 2:
            raise FormatError(
                f"compressed-tensors stores (out, in) weights, not {shape}; encode experts one by one, or use native"
            )
        out, columns = shape
        layout: Layout = {
            "weight_packed": (torch.int32, (out, self._words(columns, spec.bits))),
            "weight_scale": (SCALE_DTYPES[spec.scale_dtype], (out, columns // cols)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not spec.symmetric:
            layout["weight_zero_point"] = (torch.int32, (self._words(out, spec.bits), columns // cols))
        return layout

    def encode(self, qtensor: QTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        self.layout(qtensor.spec, qtensor.shape)
        tensors = {
            "weight_packed": qtensor.packed.contiguous(),
            "weight_scale": qtensor.scale.contiguous(),
            "weight_shape": torch.tensor(qtensor.shape, dtype=torch.int64),
        }
        if qtensor.zero_point is not None:
            tensors["weight_zero_point"] = pack(qtensor.zero_point.T.contiguous(), qtensor.spec.bits).T.contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> QTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        if (stated := tuple(tensors["weight_shape"].tolist())) != shape:
            raise FormatError(f"weight_shape says {stated}, the model says {shape}")
        zero = None
        if not spec.symmetric:
            zero = self._unpack(tensors["weight_zero_point"].T.contiguous(), spec.bits, shape[0]).T.contiguous()
        packed = tensors["weight_packed"]
        if self.padded:
            packed = pack(self._unpack(packed, spec.bits, shape[1]), spec.bits)
        return QTensor(packed, tensors["weight_scale"], zero, spec, shape)

    def _words(self, columns: int, bits: int) -> int:
        return -(-columns // (32 // bits)) if self.padded else packed_words(columns, bits)

    def _unpack(self, packed: Tensor, bits: int, columns: int) -> Tensor:
        if not self.padded:
            return unpack(packed, bits, columns)
        shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
        codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # (rows, words, codes per word)
        return codes.flatten(-2)[..., :columns].to(torch.uint8)


class IntQuantized:
    """Codec of ``int-quantized``: one signed byte per weight."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if len(shape) != 2 or spec.bits != 8:
            raise FormatError(f"int-quantized stores 8-bit (out, in) weights, not {spec.describe()} {shape}")
        scale_shape = (1,) if spec.strategy == "tensor" else (shape[0], 1)
        layout: Layout = {"weight": (torch.int8, shape), "weight_scale": (SCALE_DTYPES[spec.scale_dtype], scale_shape)}
        if not spec.symmetric:
            layout["weight_zero_point"] = (torch.int8, scale_shape)
        return layout

    def encode(self, qtensor: QTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        layout = self.layout(qtensor.spec, qtensor.shape)
        scale_shape = layout["weight_scale"][1]
        tensors = {"weight": _flip_sign(qtensor.codes()).view(torch.int8), "weight_scale": qtensor.scale.reshape(scale_shape)}
        if qtensor.zero_point is not None:
            tensors["weight_zero_point"] = _flip_sign(qtensor.zero_point).view(torch.int8).reshape(scale_shape)
        return {suffix: tensor.contiguous() for suffix, tensor in tensors.items()}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> QTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        zero = None if spec.symmetric else _flip_sign(tensors["weight_zero_point"].view(torch.uint8)).reshape(-1, 1)
        codes = _flip_sign(tensors["weight"].contiguous().view(torch.uint8))
        return QTensor.from_codes(codes, tensors["weight_scale"].reshape(-1, 1), zero, spec)


class FloatQuantized:
    """Codec of ``float-quantized``: one FP8 number per weight."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if len(shape) != 2 or spec.dtype != "fp8_e4m3" or spec.strategy not in ("channel", "tensor"):
            raise FormatError(
                f"float-quantized stores fp8_e4m3 (out, in) weights per channel or tensor, not {spec.describe()} {shape}"
            )
        scale_shape = (1,) if spec.strategy == "tensor" else (shape[0], 1)
        return {"weight": (torch.float8_e4m3fn, shape), "weight_scale": (SCALE_DTYPES[spec.scale_dtype], scale_shape)}

    def encode(self, qtensor: QTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        layout = self.layout(qtensor.spec, qtensor.shape)
        scale = qtensor.scale.reshape(layout["weight_scale"][1]).contiguous()
        return {"weight": qtensor.codes().view(torch.float8_e4m3fn), "weight_scale": scale}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> QTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        codes = tensors["weight"].contiguous().view(torch.uint8)
        return QTensor.from_codes(codes, tensors["weight_scale"].reshape(-1, 1), None, spec)


def _flip_sign(codes: Tensor) -> Tensor:
    """Exchange offset-binary and two's complement in uint8."""
    return codes ^ 0x80


class CompressedTensors:
    """The format ``compressed-tensors``."""

    quant_method = "compressed-tensors"
    stem = "model"
    conv1d = False

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject what readers would misread; see the module's docstring."""
        spec = scheme.weight
        if reason := spec.rejects(shape):
            return reason
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
        codecs: dict[str, Codec] = {"float-quantized": FloatQuantized(), "int-quantized": IntQuantized()}
        return codecs.get(_format_name(scheme), PackQuantized())

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Write one group per scheme; a single scheme targets every Linear that ``ignore`` does not name."""
        by_scheme = group_by_scheme(plan)
        names = {_format_name(scheme) for scheme in by_scheme}
        groups = {}
        for i, (scheme, modules) in enumerate(by_scheme.items()):
            groups[f"group_{i}"] = {
                "targets": ["Linear"] if len(by_scheme) == 1 else modules,
                "weights": _weight_args(scheme.weight, dtype),
                "input_activations": _activation_args(scheme.activation) if scheme.activation else None,
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


def _format_name(scheme: Scheme) -> str:
    if not scheme.weight.is_integer:
        return "float-quantized"
    return "int-quantized" if scheme.activation is not None or scheme.weight.strategy == "tensor" else "pack-quantized"


def _rejects_activation(weight: QuantSpec, activation: QuantSpec) -> str | None:
    if weight.bits != 8 or weight.strategy not in ("channel", "tensor"):
        return f"quantized activations need int8 weights per channel or tensor, not {weight.describe()}; use w8a8"
    if activation.is_integer != weight.is_integer:
        return f"activations {activation.describe()} do not go with weights {weight.describe()}; use w8a8 or fp8-dynamic"
    if activation.bits != 8 or not activation.dynamic or activation.strategy not in ("channel", "tensor"):
        return f"activations {activation.describe()}: only dynamic int8 per token or tensor can be stored"
    return None


def _weight_args(spec: QuantSpec, dtype: str) -> dict[str, Any]:
    args = {
        "num_bits": spec.bits,
        "type": "int" if spec.is_integer else "float",
        "symmetric": spec.symmetric,
        "strategy": spec.strategy,
        "group_size": spec.group_size if spec.strategy == "group" else None,
        "dynamic": False,
    }
    return args if spec.scale_dtype == dtype else {**args, "scale_dtype": f"torch.{spec.scale_dtype}"}


def _activation_args(spec: QuantSpec) -> dict[str, Any]:
    strategy = "token" if spec.strategy == "channel" else "tensor"
    return {
        "num_bits": spec.bits,
        "type": "int" if spec.is_integer else "float",
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": None,
        "dynamic": True,
    }


def _read_config(config: Mapping[str, Any], scale_dtype: str) -> Matcher:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key):
            raise FormatError(f"quantization_config.{key} is set, which quantkit cannot load yet; only weights are supported")
    if (status := config.get("quantization_status", "compressed")) != "compressed":
        raise FormatError(f"quantization_config.quantization_status is {status!r}, want 'compressed'; save it compressed")
    groups: list[tuple[list[str], Stored]] = []
    for name, group in config["config_groups"].items():
        spec = _read_weight_args(group["weights"], scale_dtype, f"config_groups.{name}.weights")
        if group.get("output_activations"):
            raise FormatError(f"config_groups.{name}.output_activations is set, which quantkit cannot load")
        activation = _read_activation_args(group.get("input_activations"), name)
        codec = _read_codec(group.get("format") or config.get("format"), spec, config.get("version"), name)
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


def _read_weight_args(args: Mapping[str, Any], scale_dtype: str, where: str) -> QuantSpec:
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


def _read_activation_args(args: Mapping[str, Any] | None, group: str) -> QuantSpec | None:
    if not args:
        return None
    blocks = {"token": (1, -1), "tensor": (-1, -1)}
    dtype = _read_dtype(args)
    if dtype is None or args.get("dynamic") is not True or args.get("strategy") not in blocks:
        raise FormatError(
            f"config_groups.{group}.input_activations: type={args.get('type')!r}, strategy={args.get('strategy')!r}, "
            f"dynamic={args.get('dynamic')!r}; quantkit knows only dynamic integers and FP8 per token or tensor"
        )
    return QuantSpec(dtype, blocks[args["strategy"]], bool(args.get("symmetric", True)), "float32", True)


def _read_dtype(args: Mapping[str, Any]) -> str | None:
    """Return the name of a code dtype, or None for one that does not exist here."""
    bits = int(args["num_bits"])
    if args.get("type", "int") == "float":
        return "fp8_e4m3" if bits == 8 else None
    return f"int{bits}" if args.get("type", "int") == "int" else None


def _read_codec(name: str | None, spec: QuantSpec, version: str | None, group: str) -> Codec:
    if name not in _FORMATS:
        raise FormatError(f"config_groups.{group}: format {name!r} cannot be loaded; known: {', '.join(_FORMATS)}")
    if name == "float-quantized":
        return FloatQuantized()
    if name == "int-quantized":
        return IntQuantized()
    if spec.bits not in _PADDED_BITS:
        return PackQuantized()
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None:
        raise FormatError(
            f"quantization_config.version is {version!r}: {spec.bits}-bit packing changed in compressed-tensors 0.18, so "
            "without the version the codes cannot be read; add the version that wrote the file"
        )
    return PackQuantized(padded=(int(found[1]), int(found[2])) < (0, 18))


FORMATS.register("compressed-tensors")(CompressedTensors())
