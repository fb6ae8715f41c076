"""Schemes by name.

Preset names follow the field's habit, ``w<bits>a<16|8>[-asym][-g<size>|-channel]``: ``w4a16`` is 4-bit symmetric
weights with 16-bit activations, ``w8a8`` 8-bit weights with activations that are rounded to 8 bits at run time, a scale per
token (``-static``: one scale per layer, found in calibration; ``-rotated``: rounded in a rotated basis, in which no channel
sticks out). A preset without a group takes the largest of 128, 64 and 32 that divides the most layers; ``w8a8`` has one scale
per channel, which is what integer products can use. With ``-g<size>`` the activations of ``w8a8`` have a scale per token and
group, too. ``fp8``, ``nf4``, ``mxfp4``, ``nvfp4`` are formats of their own (:data:`NAMED`), ``Q4_K_M`` and its like llama.cpp's
mixes for GGUF files (:data:`MIXES`).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from quantkit.errors import SpecError
from quantkit.registry import Registry
from quantkit.spec import (
    AUTO_GROUP_SIZES,
    BLOCK_GRIDS,
    ActivationSpec,
    QuantSpec,
    Scheme,
    block_spec,
    token_activations,
)

PRESETS: tuple[str, ...] = (
    "w2a16-asym", "w3a16", "w3a16-asym", "w4a16", "w4a16-asym", "w5a16", "w5a16-asym",
    "w6a16", "w6a16-asym", "w8a16", "w8a16-asym", "w4a8", "w4a8-asym", "w8a8", "w8a8-static", "w8a8-rotated",
)  # fmt: skip
"""Preset names offered in help and documentation; any of them also takes ``-g<size>`` or ``-channel``."""


NAMED: dict[str, tuple[str, tuple[int, int], str | None, Literal["dynamic", "static"] | None]] = {
    "fp8": ("fp8_e4m3", (1, -1), None, None),
    "fp8-tensor": ("fp8_e4m3", (-1, -1), None, None),
    "fp8-block": ("fp8_e4m3", (128, 128), None, None),
    "fp8-dynamic": ("fp8_e4m3", (1, -1), None, "dynamic"),
    "fp8-static": ("fp8_e4m3", (1, -1), None, "static"),
    "fp8-tensor-static": ("fp8_e4m3", (-1, -1), None, "static"),
    "nf4": ("nf4", (1, 64), None, None),
    "mxfp4": ("fp4_e2m1", (1, 32), "float8_e8m0fnu", None),
    "nvfp4": ("fp4_e2m1", (1, 16), "float8_e4m3fn", None),
}
"""Presets of formats that are not integers: dtype, block, the scale dtype if the format fixes it, and whether activations are
rounded to the same dtype: per token, at run time, or with one static scale per site."""


MIXES: dict[str, str] = {
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
    "Q2_K_S": "Q2_K", "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K",
}  # fmt: skip
"""llama.cpp's mixes of types of blocks, and the type that most layers get. As the scheme of a run a mix decides for every
layer, the embedding and the head included (:mod:`quantkit.formats.gguf.mixes`); a rule that names it means its main type."""

FALLBACKS: dict[str, str] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL"}
"""What takes the place of a type whose blocks do not divide a row, as in llama.cpp."""


_PRESET = re.compile(
    r"w(?P<bits>[2-8])a(?P<activation>16|8(?P<how>-static|-rotated)?)(?P<asym>-asym)?(?:-g(?P<group>\d+)|(?P<channel>-channel))?"
)


def largest_group_size(in_features: Iterable[int]) -> int:
    """Return the largest of 128, 64, 32 that divides the most values, or -1 (one scale per channel) if none divides any.

    One odd layer does not cost all others their groups: a scheme made for it is refused for that layer, by name.
    """
    sizes = list(in_features)
    fitting = {group: sum(size % group == 0 for size in sizes) for group in AUTO_GROUP_SIZES}
    best = max(AUTO_GROUP_SIZES, key=lambda group: (fitting[group], group))
    return best if fitting[best] or not sizes else -1


def preset(
    name: str,
    in_features: Iterable[int],
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    scale_dtype: str = "float16",
) -> Scheme:
    """Turn a preset name into a scheme for sites with these input sizes.

    Args:
        name: e.g. ``"w4a16"``, ``"w4a16-asym"``, ``"w4a16-asym-g64"``, ``"w8a16-channel"``.
        in_features: input size of every site the scheme will apply to; decides the automatic group size, which is the largest
            of 128, 64 and 32 that divides the most of them.
        group_size: overrides the automatic choice; -1 is one scale per channel. Not checked here: a size that does
            not divide a site is reported by :meth:`QuantSpec.rejects`.
        symmetric: overrides the name.
        scale_dtype: dtype of the stored scales.

    Raises:
        SpecError: for a name that is no preset, naming the nearest one, for two contradicting group sizes, or for something
            else than names and sizes.
    """
    in_features = _sizes(in_features)
    if not isinstance(name, str):
        raise SpecError(f"scheme is a {type(name).__name__}; want the name of a preset such as 'w4a16'")
    if group_size is not None and type(group_size) is not int:
        raise SpecError(f"group_size={group_size!r}: want a positive size, or -1 for one scale per channel")
    if name in NAMED:
        dtype, block, fixed, rounded = NAMED[name]
        if group_size is not None or symmetric is False:
            raise SpecError(f"scheme {name!r} fixes its block and is symmetric; leave group_size and symmetric out")
        activation = _activation(dtype, -1, rounded, scale_dtype) if rounded else None
        return Scheme(QuantSpec(dtype, block, True, fixed or scale_dtype), activation)
    match = _PRESET.fullmatch(name) if len(name) < 64 else None  # int() refuses numbers of thousands of digits
    if match is None:
        made = SCHEMES.get(name)
        if group_size is not None or symmetric is not None:
            raise SpecError(f"scheme {name!r} says itself what its group size and zero points are; leave the two out")
        return made if isinstance(made, Scheme) else made(in_features, scale_dtype)
    named = -1 if match["channel"] else int(match["group"]) if match["group"] else None
    if named is not None and group_size is not None and named != group_size:
        raise SpecError(f"scheme {name!r} and group_size={group_size} disagree; give one of them")
    group = named if named is not None else group_size
    eight, bits = match["activation"] != "16", int(match["bits"])
    if group is None:
        group = -1 if eight and bits == 8 else largest_group_size(in_features)
    if group == 0 or group < -1:
        raise SpecError(f"group_size={group}: want a positive size, or -1 for one scale per channel")
    symmetric = symmetric if symmetric is not None else match["asym"] is None
    activation = None
    if eight:
        activation = _activation("int8", group if bits == 8 else -1, (match["how"] or "").removeprefix("-"), scale_dtype)
    return Scheme(QuantSpec(f"int{bits}", (1, group), symmetric, scale_dtype), activation)


def _sizes(in_features: Iterable[int]) -> list[int]:
    """Return input sizes as a list, having checked that they are some."""
    listed = list(in_features) if isinstance(in_features, Iterable) and not isinstance(in_features, str | bytes) else None
    if listed is None or any(type(size) is not int or size < 1 for size in listed):
        raise SpecError(f"in_features={in_features!r}: want the input sizes of the layers, such as [4096, 11008]")
    return listed


def _activation(dtype: str, group: int, how: str, scale_dtype: str) -> ActivationSpec:
    """Return symmetric activations; a static scale is stored, so it has the dtype of the other stored scales."""
    if how == "static":
        return ActivationSpec(QuantSpec(dtype, (-1, -1), True, scale_dtype), dynamic=False)
    return dataclasses.replace(token_activations(dtype, group), rotated=how == "rotated")


SchemeMaker = Callable[[Sequence[int], str], Scheme]
"""Makes a scheme from the input sizes of the layers that it will apply to (none while only a name is checked) and the dtype of
stored scales that suits the checkpoint."""


def _meant(name: str) -> str | None:
    """Return the scheme that stores the number of bits which is all that ``w4``, ``int4`` and ``4bit`` say."""
    found = re.fullmatch(r"(?:w|u?int)?(\d)(?:[-_ ]?bits?)?", name.lower())
    return found and next((one for one in (f"w{found[1]}a16", f"w{found[1]}a16-asym") if one in PRESETS), None)


SCHEMES: Registry[Scheme | SchemeMaker] = Registry(
    "scheme", error=SpecError, hint="; append -g<size> or -channel to fix the group of an integer scheme", meant=_meant
)
"""Every scheme with a name of its own: the presets, and what other packages add."""


def _maker(name: str) -> SchemeMaker:
    return lambda in_features, scale_dtype: preset(name, in_features, scale_dtype=scale_dtype)


for _name in (*PRESETS, *NAMED):
    SCHEMES.register(_name)(_maker(_name))


def _block_maker(name: str) -> SchemeMaker:
    kind = MIXES.get(name, name)

    def make(in_features: Sequence[int], _scale_dtype: str) -> Scheme:
        fits = all(size % BLOCK_GRIDS[kind][3] == 0 for size in in_features)
        return Scheme(block_spec(kind if fits else FALLBACKS.get(kind, kind)))

    return make


for _name in (*MIXES, *(kind for kind in BLOCK_GRIDS if kind not in MIXES)):
    SCHEMES.register(_name)(_block_maker(_name))
