"""Other products of a 4-bit weight, for ``benchmarks/gpu.py``: each is made, checked, and timed beside ours.

Whoever cannot run is named with the reason, and the rest goes on.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.qtensor import GridTensor

Call = Callable[[Tensor], Tensor]


class Peer(NamedTuple):
    """One contender.

    Attributes:
        make: lays a symmetric int4 weight out and returns ``x @ w.T`` for bfloat16 x (tokens, K).
        tokens: beyond so many nobody uses it.
        error: largest relative error against the weight that it was given.
    """

    make: Callable[[GridTensor], Call]
    tokens: int
    error: float


def tinygemm(weight: GridTensor) -> Call:
    """Return torch's own int4 product; its scales are bfloat16."""
    codes = weight.codes().view(weight.shape[0], -1, 2)
    packed = torch._convert_weight_to_int4pack((codes[..., 0] << 4 | codes[..., 1]).contiguous(), 8)
    scale = weight.scale.T.contiguous().bfloat16()
    both = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
    return lambda x: torch._weight_int4pack_mm(x, packed, weight.spec.group_size, both)


def plain_triton(weight: GridTensor) -> Call:
    """Return the plain Triton product."""
    import gpu_triton

    return gpu_triton.product(weight)


def humming(weight: GridTensor) -> Call:
    """Return the product of humming-kernels (github.com/inclusionAI/humming), as its README calls it (0.1.19).

    It rounds a float weight to its own 4-bit grid with the same groups, so it is checked less closely.
    """
    from humming.layer import HummingLayer

    n, k = weight.shape
    config = {"dtype": "int4", "group_size": weight.spec.group_size}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_unquantized(weight.dequantize(torch.bfloat16))
    layer.transform()
    return lambda x: layer(x)


PEERS = {"tinygemm": Peer(tinygemm, 64, 2e-2), "triton": Peer(plain_triton, 4096, 5e-3), "humming": Peer(humming, 4096, 0.15)}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def prepare(weights: list[GridTensor], missing: dict[str, str]) -> dict[str, list[Call]]:
    """Return a call per weight of every peer that can be made; ``missing`` takes the others' reasons."""
    made: dict[str, list[Call]] = {}
    for name, peer in PEERS.items():
        try:
            made[name] = [peer.make(weight) for weight in weights]
        except Exception as error:  # whatever goes wrong inside other people's code, the run goes on
            missing[name] = _reason(weights[0].shape, error)
    return made


def contenders(
    made: dict[str, list[Call]], x: Tensor, want: Tensor, missing: dict[str, str]
) -> tuple[dict[str, list[Callable[[], Tensor]]], dict[str, float]]:
    """Return calls on x (tokens, K) of the peers that are meant for so many tokens and right, and all their errors.

    Args:
        made: of :func:`prepare`.
        x: bfloat16.
        want: what the first weight makes of it.
        missing: takes the reasons of those that fail or are wrong.
    """
    calls: dict[str, list[Callable[[], Tensor]]] = {}
    errors: dict[str, float] = {}
    for name, products in made.items():
        if len(x) > PEERS[name].tokens:
            continue
        try:
            wrong = errors[f"{name}_error"] = relative_error(products[0](x), want)
            if not wrong < PEERS[name].error:
                raise ArithmeticError(f"off by {wrong:.3g}")
        except Exception as error:
            missing[name] = _reason((len(x), *want.shape[1:], x.shape[1]), error)
            continue
        calls[name] = [partial(product, x) for product in products]
    return calls, errors


def _reason(sizes: tuple[int, ...], error: Exception) -> str:
    return f"{' x '.join(map(str, sizes))}: {type(error).__name__}: {str(error)[:200]}"
