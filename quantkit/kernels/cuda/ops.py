"""The CUDA kernels as torch operators ``torch.ops.quantkit.*``, each with a schema, a fake, the kernel and plain torch.

:func:`ops` registers them once and returns the namespace. On CUDA tensors, an operator launches its kernel (and compiles the
library at the first use); on other devices it computes the same in plain torch, against which the kernels are tested. No
operator has a derivative.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.kernels.cuda import attention, calls, layout, norms, prefill, sampling
from quantkit.kernels.cuda.attention import LayerPages, Rope, Where
from quantkit.kernels.cuda.layout import Fragments
from quantkit.kernels.functions.sampling import Draw

_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero, int rows, int columns, int group, int bits, int zero_code"
_PAGES = "Tensor{} keys, Tensor{} values, Tensor{}? key_scales, Tensor{}? value_scales, str kind"
_WHERE = "Tensor positions, Tensor slots, Tensor table"
_ROPE = "Tensor? cos, Tensor? sin, int dim, bool interleaved, Tensor? q_gain, Tensor? k_gain, float eps"

SCHEMAS = {
    "fragment_matmul": f"(Tensor x, {_WEIGHT}, Tensor? bias, str form, str? activation=None) -> Tensor",
    "rounded_matmul": (
        f"(Tensor x, Tensor scales, {_WEIGHT}, Tensor? bias, str form, str? activation, ScalarType dtype) -> Tensor"
    ),
    "head_matmul": f"(Tensor x, {_WEIGHT}, Tensor? bias, str form) -> (Tensor, Tensor)",
    "fragment_experts": f"(Tensor x, Tensor offsets, {_WEIGHT}, str? activation=None) -> Tensor",
    "residual_norm": (
        "(Tensor x, Tensor? residual, Tensor? gain, Tensor? shift, int kind, float eps, float factor, str rounding)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "gated_activation": "(Tensor x, str activation, bool gated) -> Tensor",
    "next_tokens": (
        "(Tensor logits, Tensor temperature, Tensor top_k, Tensor rest, Tensor min_p, Tensor seed, Tensor positions,"
        " Tensor? slots=None, Tensor(a!)? newest=None, Tensor? bests=None) -> Tensor"
    ),
    "append_pages": (f"(Tensor qkv, int heads, {_ROPE}, {_WHERE}, {_PAGES.format('(a!)', '(b!)', '(c!)', '(d!)')}) -> Tensor"),
    "attend_pages": (
        f"(Tensor q, {_WHERE}, {_PAGES.format('', '', '', '')}, float scale, int? window, float? softcap, int? splits)"
        " -> Tensor"
    ),
    "attend_prompt_pages": (
        f"(Tensor q, {_WHERE}, {_PAGES.format('', '', '', '')}, Tensor tiles, float scale, int? window, float? softcap)"
        " -> Tensor"
    ),
}
"""Operator to its arguments and results.

``form`` of a product: ``"codes"`` (activations are not rounded), ``"fp8 codes"`` (the same for fp8 weights), ``"int8"`` or
``"fp8"`` (activations rounded per token; ``rounded_matmul`` takes their codes and scales). With ``activation``, the rows of the
weight and the bias alternate between gate and up, and the result is ``activation(gate) * up`` (tokens, rows / 2), computed from
a gate and an up that are rounded to the dtype of the result.
"""

ROUNDED: Final = {"int8": "int8", "fp8": "fp8_e4m3"}
"""Forms of a product that round activations, and what they round to (:data:`quantkit.kernels.cuda.norms.ROUNDINGS`)."""

_library: list[torch.library.Library] = []  # keeps the registration alive


@functools.cache
def ops() -> Any:
    """Register the operators once and return ``torch.ops.quantkit``."""
    library = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in SCHEMAS.items():
        plain, cuda, fake = _IMPLEMENTATIONS[name]
        library.define(name + schema)  # type: ignore[no-untyped-call]
        library.impl(name, plain, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        library.impl(name, cuda, "CUDA")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"quantkit::{name}", fake, lib=library)
    _library.append(library)
    return torch.ops.quantkit


SURE_CODES_ROWS: Final = 64
"""Up to this many tokens, products read the codes directly on every device. Estimated from arithmetic, not measured."""


def takes_codes(tokens: int, form: str) -> bool:
    """Return whether a product with this many tokens reads the codes directly; otherwise the weight is expanded first."""
    return form != "fp8 codes" and tokens < calls.DENSE_TOKENS


def _split(arguments: tuple[Any, ...]) -> tuple[Fragments, Tensor | None, str, str | None]:
    """Return weight, bias, form and activation from the arguments of an operator; torch omits the last one if it is None."""
    bias, form, activation = (*arguments[8:], None)[:3]
    return Fragments(*arguments[:8]), bias, form, activation


def multiply(x: Tensor, *arguments: Any) -> Tensor:
    """Compute ``fragment_matmul`` with the kernels; x is (tokens, K), contiguous."""
    weight, bias, form, activation = _split(arguments)
    if form in ROUNDED:
        return multiply_rounded(*norms.round_tokens(x, ROUNDED[form]), *weight, bias, form, activation, x.dtype)
    if _goes_to_prompt(x, weight, form):
        return prefill.matmul(x, weight, bias, activation)
    if takes_codes(len(x), form):
        return calls.matmul(x, weight, bias, activation=activation)
    return _multiply_dense(x, weight, bias, form, activation)


def multiply_head(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute ``head_matmul`` with the kernels: logits, and the largest one in every 64 for the operator ``next_tokens``."""
    weight, bias, form, _ = _split(arguments)
    bests = x.new_empty((len(x), weight.tiles, 2), dtype=torch.int32)
    if _goes_to_prompt(x, weight, form):
        return prefill.matmul(x, weight, bias, bests=bests), bests
    return calls.matmul(x, weight, bias, bests=bests), bests


def _multiply_head_plain(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weight, y = Fragments(*arguments[:8]), multiply_plain(x, *arguments)
    wide = torch.where(y < torch.inf, y.float(), torch.inf)
    tiles = F.pad(wide, (0, weight.tiles * layout.TILE_ROWS - weight.rows), value=-torch.inf).unflatten(-1, (weight.tiles, -1))
    values, index = tiles.max(-1)
    rows = index.int() + layout.TILE_ROWS * torch.arange(weight.tiles, dtype=torch.int32, device=x.device)
    return y, torch.stack([values.view(torch.int32), rows], -1)


def _goes_to_prompt(x: Tensor, weight: Fragments, form: str) -> bool:
    return form == "codes" and len(x) > SURE_CODES_ROWS and prefill.works(x.device, x.dtype, weight.bits)


def multiply_rounded(codes: Tensor, scales: Tensor, *arguments: Any) -> Tensor:
    """Compute ``rounded_matmul`` with the kernels; codes are (tokens, K), contiguous."""
    (weight, bias, form, activation), dtype = _split(arguments[:-1]), arguments[-1]
    if takes_codes(len(codes), form):
        return calls.matmul(codes, weight, bias, activation=activation, x_scales=scales, dtype=dtype)
    return _multiply_dense((codes.float() * scales[:, None]).to(dtype), weight, bias, form, activation)


def _multiply_dense(x: Tensor, weight: Fragments, bias: Tensor | None, form: str, activation: str | None) -> Tensor:
    y = calls.dense_matmul(x, weight, bias, fp8="fp8" in form)
    return y if activation is None else norms.activate(y, activation, interleaved=True)


def multiply_plain(x: Tensor, *arguments: Any) -> Tensor:
    """Compute ``fragment_matmul`` in plain torch; this is its definition."""
    weight, bias, form, activation = _split(arguments)
    if form in ROUNDED:
        _, codes, scales = norms.norm_plain(x, None, None, None, kind=norms.NONE, rounding=ROUNDED[form])
        return _multiply_rounded_plain(codes, scales, *weight, bias, form, activation, x.dtype)
    return _multiply_floats(x.float(), weight, bias, form, activation, x.dtype)


def _multiply_rounded_plain(codes: Tensor, scales: Tensor, *arguments: Any) -> Tensor:
    return _multiply_floats(codes.float() * scales[:, None], *_split(arguments[:-1]), arguments[-1])


def _multiply_floats(
    x: Tensor, weight: Fragments, bias: Tensor | None, form: str, activation: str | None, dtype: torch.dtype
) -> Tensor:
    floats = layout.dequantize(weight, "fp8" in form)[0]
    return _gated_plain(F.linear(x, floats, None if bias is None else bias.float()).to(dtype), activation)


def _gated_plain(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else norms.activate_plain(y, activation, interleaved=True)


def _multiply_fake(x: Tensor, *arguments: Any) -> Tensor:
    weight, _, _, activation = _split(arguments)
    return x.new_empty((x.shape[0], weight.rows // (1 if activation is None else 2)))


def _multiply_rounded_fake(codes: Tensor, scales: Tensor, *arguments: Any) -> Tensor:
    return _multiply_fake(codes, *arguments[:-1]).to(arguments[-1])


def _experts(x: Tensor, offsets: Tensor, *arguments: Any) -> Tensor:
    return calls.matmul(x, Fragments(*arguments[:8]), offsets=offsets, activation=(*arguments[8:], None)[0])


def _experts_plain(x: Tensor, offsets: Tensor, *arguments: Any) -> Tensor:
    floats, ends = layout.dequantize(Fragments(*arguments[:8])), offsets.tolist()
    parts = [F.linear(x[start:end].float(), w) for w, start, end in zip(floats, ends[:-1], ends[1:], strict=True)]
    return _gated_plain(torch.cat(parts).to(x.dtype), (*arguments[8:], None)[0])


def _experts_fake(x: Tensor, offsets: Tensor, *arguments: Any) -> Tensor:
    weight, activation = Fragments(*arguments[:8]), (*arguments[8:], None)[0]
    return x.new_empty((x.shape[0], weight.rows // (1 if activation is None else 2)))


def _norm(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(
        x: Tensor,
        residual: Tensor | None,
        gain: Tensor | None,
        shift: Tensor | None,
        kind: int,
        eps: float,
        factor: float,
        rounding: str,
    ) -> Any:
        total, y, scales = function(x, residual, gain, shift, kind=kind, eps=eps, factor=factor, rounding=rounding)
        return total.clone() if total is x else total, y, scales  # an operator must not return its argument

    return run


def _norm_fake(x: Tensor, residual: Any, gain: Any, shift: Any, kind: int, eps: float, factor: float, rounding: str) -> Any:
    stored = {"float": x.dtype, "int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}[rounding]
    scales = x.new_empty(0 if rounding == "float" else x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x, dtype=stored), scales


def _append(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(qkv: Tensor, heads: int, *rest: Any) -> Any:
        return function(qkv, heads, Rope(*rest[:7]), Where(*rest[7:10]), LayerPages(*rest[10:]))

    return run


def _append_fake(qkv: Tensor, heads: int, *rest: Any) -> Tensor:
    keys = rest[10]
    return qkv.new_empty((qkv.shape[0], heads, qkv.shape[1] // (heads + 2 * keys.shape[1])))


def _attend(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(q: Tensor, *rest: Any) -> Any:
        scale, window, softcap, splits = rest[8:]
        where, pages = Where(*rest[:3]), LayerPages(*rest[3:8])
        return function(q, where, pages, scale=scale, window=window, softcap=softcap, splits=splits)

    return run


def _attend_prompt(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(q: Tensor, *rest: Any) -> Any:
        tiles, scale, window, softcap = rest[8:]
        return function(q, Where(*rest[:3]), LayerPages(*rest[3:8]), tiles, scale=scale, window=window, softcap=softcap)

    return run


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "fragment_matmul": (multiply_plain, multiply, _multiply_fake),
    "rounded_matmul": (_multiply_rounded_plain, multiply_rounded, _multiply_rounded_fake),
    "head_matmul": (
        _multiply_head_plain,
        multiply_head,
        lambda x, *rest: (_multiply_fake(x, *rest), x.new_empty((len(x), -(-rest[3] // 64), 2), dtype=torch.int32)),
    ),
    "fragment_experts": (_experts_plain, _experts, _experts_fake),
    "residual_norm": (_norm(norms.norm_plain), _norm(norms.norm), _norm_fake),
    "gated_activation": (
        norms.activate_plain,
        norms.activate,
        lambda x, activation, gated: x.new_empty((x.shape[0], x.shape[1] // (2 if gated else 1))),
    ),
    "next_tokens": (
        lambda logits, *rest: sampling.sample_plain(logits, Draw(*rest[:5]), *rest[5:]),
        lambda logits, *rest: sampling.sample(logits, Draw(*rest[:5]), *rest[5:]),
        lambda logits, *rest: logits.new_empty(logits.shape[0], dtype=torch.int32),
    ),
    "append_pages": (_append(attention.append_plain), _append(attention.append), _append_fake),
    "attend_pages": (
        _attend(attention.attend_plain),
        _attend(attention.attend),
        lambda q, *rest: torch.empty_like(q),
    ),
    "attend_prompt_pages": (
        _attend_prompt(attention.attend_prompt_plain),
        _attend_prompt(attention.attend_prompt),
        lambda q, *rest: torch.empty_like(q),
    ),
}
