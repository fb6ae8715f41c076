"""Which numbers exist: the formats a tensor can be stored in, and the schemes that combine them.

A :class:`QuantSpec` names a grid (dtype, block that shares a scale, symmetric or not, scale dtype). It does not say how
codes were chosen (a quantizer's business) nor where they are stored (a format's).
Presets by name are in :mod:`quantkit.presets`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from quantkit.dtypes import DTYPES, SCALE_DTYPES
from quantkit.errors import SpecError, nearest

AUTO_GROUP_SIZES = (128, 64, 32)
"""Group sizes a preset tries, largest first."""

BLOCK_GRIDS: Mapping[str, tuple[str, int, bool, int]] = {
    "Q4_0": ("int4", 32, True, 32), "Q4_1": ("int4", 32, False, 32), "Q5_0": ("int5", 32, True, 32),
    "Q5_1": ("int5", 32, False, 32), "Q8_0": ("int8", 32, True, 32), "IQ4_NL": ("iq4_nl", 32, True, 32),
    "Q2_K": ("int2", 16, False, 256), "Q3_K": ("int3", 16, True, 256), "Q4_K": ("int4", 32, False, 256),
    "Q5_K": ("int5", 32, False, 256), "Q6_K": ("int6", 16, True, 256), "IQ4_XS": ("iq4_nl", 32, True, 256),
}  # fmt: skip
"""Types of ggml's blocks: dtype of codes, weights that share a scale, whether there is no minimum, weights of a block."""


def _want(value: object, /, **kinds: type) -> None:
    """Raise SpecError for a field of ``value`` that is not of its kind; annotations alone check nothing."""
    for name, kind in kinds.items():
        if not isinstance(found := getattr(value, name), kind):
            raise SpecError(f"{type(value).__name__}: {name}={found!r} is a {type(found).__name__}, want a {kind.__name__}")


class WeightSpec(Protocol):
    """Which numbers a weight can have: a grid, :class:`QuantSpec`, is the only kind so far. Equal specs are equal values."""

    def describe(self) -> str:
        """Return a short human name."""
        ...

    def rejects(self, shape: tuple[int, ...]) -> str | None:
        """Say why a weight of ``shape`` (..., out, in) cannot have them; None if it can."""
        ...


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """One grid of numbers.

    Attributes:
        dtype: a row of :data:`quantkit.dtypes.DTYPES`, e.g. ``"int4"``.
        block: rows x columns of a weight (out, in) that share one scale; -1 means all. ``(1, 128)`` is a group of 128
            input channels, ``(1, -1)`` per output channel, ``(-1, -1)`` per tensor.
        symmetric: the zero point is the middle code and is not stored.
        scale_dtype: dtype of stored scales; scales are rounded to it before codes are chosen.
        offset: an asymmetric grid whose zero point is no code: what is stored is the value of code 0, in the dtype of the
            scales. Only read, from files whose writers rounded both (MLX).
        blocks: a key of :data:`BLOCK_GRIDS` where scales are those of a GGUF file: small integers times a float16 of the whole
            block, and minimums in place of zero points (:mod:`quantkit.numerics.ggml`). :func:`block_spec` makes such specs.
    """

    dtype: str
    block: tuple[int, int] = (1, -1)
    symmetric: bool = True
    scale_dtype: str = "float16"
    offset: bool = False
    blocks: str | None = None

    def __post_init__(self) -> None:
        _want(self, dtype=str, block=tuple, symmetric=bool, scale_dtype=str, offset=bool)
        if self.blocks is not None or self.dtype == "iq4_nl":
            self._check_blocks()
            return
        if self.dtype not in DTYPES:
            raise SpecError(f"unknown dtype {self.dtype!r}; {nearest(self.dtype, DTYPES)}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise SpecError(f"unknown scale_dtype {self.scale_dtype!r}; {nearest(self.scale_dtype, SCALE_DTYPES)}")
        if not self.is_integer and not self.symmetric:
            raise SpecError(f"dtype {self.dtype} has no zero point; use symmetric=True")
        if self.offset and self.symmetric:
            raise SpecError("a grid with an offset is asymmetric; use symmetric=False")
        if self.is_integer and self.scale_dtype == "float8_e8m0fnu":
            raise SpecError(f"scale_dtype float8_e8m0fnu goes with fp4_e2m1, fp8_e4m3 and nf4, not {self.dtype}; use float16")
        if self.has_global_scale and self.dtype != "fp4_e2m1":
            raise SpecError(f"scale_dtype float8_e4m3fn goes with fp4_e2m1 (NVFP4), not {self.dtype}; use float16")
        if len(self.block) != 2 or any(type(b) is not int or b == 0 or b < -1 for b in self.block):
            raise SpecError(f"block={self.block!r}: want two sizes, each positive or -1 for all")

    def _check_blocks(self) -> None:
        if self.blocks is None or self.blocks not in BLOCK_GRIDS:
            raise SpecError(f"unknown type of blocks {self.blocks!r}; {nearest(str(self.blocks), BLOCK_GRIDS)}")
        dtype, group, symmetric, _ = BLOCK_GRIDS[self.blocks]
        if (self.dtype, self.block, self.symmetric, self.scale_dtype) != (dtype, (1, group), symmetric, "float16"):
            raise SpecError(f"blocks {self.blocks} fix the other fields; make such a spec with block_spec({self.blocks!r})")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return DTYPES[self.dtype].bits

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers with a zero point, and not names of a table's values."""
        return DTYPES[self.dtype].values is None

    @property
    def has_global_scale(self) -> bool:
        """Whether scales are so narrow that the whole tensor has one more, in float32 (NVFP4)."""
        return self.scale_dtype == "float8_e4m3fn"

    @property
    def group_size(self) -> int:
        """Input channels that share a scale; -1 for all of them."""
        return self.block[1]

    @property
    def strategy(self) -> str:
        """One of ``"tensor"``, ``"channel"``, ``"group"``, ``"block"``."""
        rows, cols = self.block
        if rows == 1:
            return "channel" if cols == -1 else "group"
        return "tensor" if (rows, cols) == (-1, -1) else "block"

    def describe(self) -> str:
        """Return a short human name such as ``"int4 g64 asym"``."""
        if self.blocks is not None:
            return self.blocks
        shape = f"g{self.group_size}" if self.strategy == "group" else self.strategy
        return f"{self.dtype} {shape}{'' if self.symmetric else ' offset' if self.offset else ' asym'}"

    def rejects(self, shape: tuple[int, ...]) -> str | None:
        """Say why a weight of ``shape`` (..., out, in) cannot be blocked this way; None if it can."""
        if self.blocks is not None:
            size = BLOCK_GRIDS[self.blocks][3]
            instead = "use Q8_0, Q5_0, Q4_0 or IQ4_NL" if shape[-1] % 32 == 0 else "leave it in float"
            fits = shape[-1] % size == 0
            return None if fits else f"in={shape[-1]} is not a multiple of {size}, a block of {self.blocks}; {instead}"
        for axis, size, block in (("out", shape[-2], self.block[0]), ("in", shape[-1], self.block[1])):
            if block != -1 and size % block:
                smaller = [g for g in (*AUTO_GROUP_SIZES, 16, 8) if size % g == 0 and g < block]
                way_out = f"use {smaller[0]} or channel" if smaller else "use channel"
                what = "group_size" if axis == "in" else "block rows"
                return f"{axis}={size} is not a multiple of {what} {block}; {way_out}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; :meth:`from_dict` reverses it."""
        found: dict[str, Any] = dataclasses.asdict(self) | {"block": list(self.block)}
        usual: dict[str, Any] = {"blocks": None, "offset": False}  # left out, as they were before there were others
        return {name: value for name, value in found.items() if name not in usual or value != usual[name]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QuantSpec":
        """Build a spec from :meth:`to_dict` output; an unknown key is a :class:`SpecError`."""
        if not isinstance(data, Mapping):
            raise SpecError(f"QuantSpec: {data!r} is a {type(data).__name__}, want what to_dict returned")
        known = {f.name for f in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise SpecError(f"unknown QuantSpec key {key!r}; {nearest(str(key), known)}")
        if "dtype" not in data:
            raise SpecError("QuantSpec: 'dtype' is missing")
        block = data.get("block", (1, -1))
        return cls(**{**data, "block": tuple(block) if isinstance(block, list | tuple) else block})


def block_spec(name: str) -> QuantSpec:
    """Return the numbers of one of ggml's types of blocks, such as ``"Q4_K"``.

    Raises:
        SpecError: an unknown name.
    """
    if name not in BLOCK_GRIDS:
        raise SpecError(f"unknown type of blocks {name!r}; {nearest(str(name), BLOCK_GRIDS)}")
    dtype, group, symmetric, _ = BLOCK_GRIDS[name]
    return QuantSpec(dtype, (1, group), symmetric, blocks=name)


_ACTIVATION_KEYS = ("dynamic", "rotated")


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """How the inputs of a layer are rounded before they meet its weight.

    Attributes:
        grid: the numbers that inputs are rounded to; a row is a token, so block ``(1, -1)`` has a scale per token, ``(1, n)``
            per token and n channels, ``(-1, -1)`` one for everything.
        dynamic: the scale is found at run time and never stored; otherwise the layer has one stored scale, found in
            calibration.
        rotated: inputs are multiplied by a Hadamard matrix before they are rounded, and the weight is stored multiplied by it:
            :func:`quantkit.numerics.hadamard.hadamard_transform`.

    Raises:
        SpecError: a static grid other than symmetric with one scale per tensor, or blocks of several tokens.
    """

    grid: QuantSpec
    dynamic: bool = True
    rotated: bool = False

    def __post_init__(self) -> None:
        _want(self, grid=QuantSpec, dynamic=bool, rotated=bool)
        if not self.dynamic and (self.grid.block != (-1, -1) or not self.grid.symmetric):
            raise SpecError(f"static activations {self.grid.describe()}: want a symmetric grid with one scale per tensor")
        if self.grid.offset:
            raise SpecError(f"activations {self.grid.describe()}: want zero points that are codes, or none")
        if self.grid.strategy == "block":
            raise SpecError(f"activations {self.grid.describe()}: want one scale per tensor, per token, or per token and group")

    @property
    def static(self) -> bool:
        """Whether the scale is found in calibration and stored."""
        return not self.dynamic

    def describe(self) -> str:
        """Return a short human name such as ``"int8 channel rotated"``."""
        return f"{self.grid.describe()}{' rotated' if self.rotated else ''}{' static' if self.static else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping, the grid's keys and two more; :meth:`from_dict` reverses it."""
        return {**self.grid.to_dict(), "dynamic": self.dynamic, "rotated": self.rotated}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ActivationSpec":
        """Build a spec from :meth:`to_dict` output; an unknown key is a :class:`SpecError`."""
        if not isinstance(data, Mapping):
            raise SpecError(f"ActivationSpec: {data!r} is a {type(data).__name__}, want what to_dict returned")
        grid = {key: value for key, value in data.items() if key not in _ACTIVATION_KEYS}
        return cls(QuantSpec.from_dict(grid), bool(data.get("dynamic", False)), bool(data.get("rotated", False)))


def token_activations(dtype: str, group: int = -1) -> ActivationSpec:
    """Return activations rounded at run time to a symmetric grid with a float32 scale per token (and group of channels)."""
    return ActivationSpec(QuantSpec(dtype, (1, group), True, "float32"))


TOKEN_INT8 = token_activations("int8")
"""Activations of ``a8`` presets: symmetric int8, dynamic, one scale per token."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one layer is quantized: the grid of its weight and, optionally, what its inputs are rounded to.

    Raises:
        SpecError: rotated inputs of weights with a scale for the whole tensor (NVFP4).
    """

    weight: QuantSpec
    activation: ActivationSpec | None = None

    def __post_init__(self) -> None:
        _want(self, weight=QuantSpec)
        if self.activation is not None:
            _want(self, activation=ActivationSpec)
            if self.weight.blocks is not None:
                raise SpecError(f"blocks {self.weight.blocks} of a GGUF file go with float activations; leave activation out")
        if self.rotated and self.weight.has_global_scale:
            raise SpecError(f"{self.describe()}: inputs of NVFP4 weights cannot be rotated; use another scheme")

    @property
    def static(self) -> bool:
        """Whether the scale of activations is found in calibration and stored."""
        return self.activation is not None and self.activation.static

    @property
    def rotated(self) -> bool:
        """Whether inputs are rotated at run time and the weight is stored rotated."""
        return self.activation is not None and self.activation.rotated

    def describe(self) -> str:
        """Return a short human name such as ``"int8 channel, inputs int8 channel"``."""
        if self.activation is None:
            return self.weight.describe()
        return f"{self.weight.describe()}, inputs {self.activation.describe()}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; :meth:`from_dict` reverses it.

        Weight and activation have the same keys in files, so the weight's say that it is neither dynamic nor rotated.
        """
        weight = {**self.weight.to_dict(), **dict.fromkeys(_ACTIVATION_KEYS, False)}
        return {"weight": weight, "activation": self.activation and self.activation.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Scheme":
        """Build a scheme from :meth:`to_dict` output."""
        if not isinstance(data, Mapping) or not isinstance(data.get("weight"), Mapping):
            raise SpecError(f"Scheme: {data!r} has no weight; want what to_dict returned")
        weight, activation = dict(data["weight"]), data.get("activation")
        if odd := [key for key in _ACTIVATION_KEYS if weight.pop(key, False)]:
            raise SpecError(f"a weight cannot be {' and '.join(odd)}, only activations can")
        return cls(QuantSpec.from_dict(weight), ActivationSpec.from_dict(activation) if activation else None)


@dataclass(frozen=True, slots=True)
class KVScheme:
    """How the key/value memory of a model is stored.

    Keys and values are seen as one matrix (tokens of a page, channels of a head) per page and head, so block ``(1, 32)``
    shares a scale among 32 channels of one token, and ``(-1, 1)`` among the tokens of a page, per channel.

    Attributes:
        key: grid of keys; None keeps the model's float dtype.
        value: grid of values; None likewise.
        recent: so many of the newest tokens are read in float.
        rotate: store keys and values rotated by a Hadamard matrix, which spreads outliers over the channels.

    Raises:
        SpecError: float keys and values with ``recent`` or ``rotate``, a negative ``recent``, or a block other than
            ``(1, n)``, ``(1, -1)`` and ``(-1, 1)``.
    """

    key: QuantSpec | None = None
    value: QuantSpec | None = None
    recent: int = 0
    rotate: bool = False

    def __post_init__(self) -> None:
        _want(self, recent=int, rotate=bool)
        for name in ("key", "value"):
            if getattr(self, name) is not None:
                _want(self, **{name: QuantSpec})
        if self.recent < 0 or (self.quantized is False and (self.recent or self.rotate)):
            raise SpecError(f"recent={self.recent}, rotate={self.rotate}: they need a grid for keys or values, and recent >= 0")
        for spec in (self.key, self.value):
            if spec is not None and spec.block[0] != 1 and spec.block != (-1, 1):
                raise SpecError(f"block={spec.block} of a key/value grid: want (1, n), (1, -1) or (-1, 1)")

    @property
    def quantized(self) -> bool:
        """Whether anything is stored in fewer bits."""
        return self.key is not None or self.value is not None

    def describe(self) -> str:
        """Return a short human name such as ``"keys int4 block asym, values int4 g32 asym, 64 recent in float"``."""
        if not self.quantized:
            return "float"
        parts = [
            f"{what} {spec.describe() if spec else 'float'}" for what, spec in (("keys", self.key), ("values", self.value))
        ]
        parts += [f"{self.recent} recent in float"] if self.recent else []
        return ", ".join([*parts, *(["rotated"] if self.rotate else [])])


KV_PRESETS: Mapping[str, KVScheme] = {
    "float": KVScheme(),
    "int8": KVScheme(QuantSpec("int8"), QuantSpec("int8")),
    "int4": KVScheme(
        QuantSpec("int4", block=(-1, 1), symmetric=False), QuantSpec("int4", block=(1, 32), symmetric=False), recent=64
    ),
}
"""Key/value schemes by name: ``int8`` has a scale per token and head; ``int4`` scales keys per channel and values per token
and 32 channels, as KIVI does (Liu et al. 2024, arXiv 2402.02750), with a recent window in float."""


def kv_preset(name: str | KVScheme) -> KVScheme:
    """Return the scheme called ``name``, or ``name`` itself if it is one.

    Raises:
        SpecError: an unknown name.
    """
    if isinstance(name, KVScheme):
        return name
    if not isinstance(name, str) or name not in KV_PRESETS:
        raise SpecError(f"unknown key/value scheme {name!r}; {nearest(str(name), KV_PRESETS)}")
    return KV_PRESETS[name]


Plan = Mapping[str, Scheme]
"""Site name to scheme: every site that will be quantized, in model order. A site that is absent stays as it is."""
