r"""What fits a machine: memory and time of serving a model, from its config and the machine's measured bandwidth.

With L layers that attend, H key/value heads of D channels, T tokens of context, U users at the same time, b bytes per number:

    keys and values  = U * L * T * H * 2 D * b          T at most the window in layers that slide over one
    memory           = weights + keys and values + what Python and torch need to exist
    time of a step   = (weights that a step reads + keys and values) / bandwidth
    tokens a second  = U / time of a step

A step reads every weight once, whatever the users, but of an embedding table one row each, and of E experts, of which a token
takes k, about E (1 - (1 - k/E)^U). Times are what reading alone takes: the least that a step can need where memory is what it
waits for, as it is for few users. Many users, and prompts, are bound by arithmetic and take longer. State of layers without
attention (state spaces, convolutions) does not grow with the context and is left out.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.checkpoint.check import layout_bytes, layout_of
from quantkit.checkpoint.contents import Contents
from quantkit.errors import SpecError
from quantkit.pipeline.memory import RUNTIME_BYTES
from quantkit.spec import Plan
from quantkit.system.compute import known_device
from quantkit.system.memory import available_bytes

KV = ("float", "int8")
"""How keys and values can be stored."""

_PROBE_BYTES = 16 << 20, 1 << 30
"""Least and most memory that is read to measure the bandwidth."""
_PROBE_S = 0.4


@dataclass(frozen=True, slots=True)
class Weights:
    """What the weights of a model take.

    Attributes:
        label: what the table calls them.
        total: bytes of all tensors.
        dense: bytes that every step reads.
        experts: bytes of stacks of experts.
        share: experts that a token takes, of all of a layer; 1 without experts.
    """

    label: str
    total: int
    dense: int
    experts: int
    share: float = 1.0

    def read(self, users: int) -> float:
        """Return the bytes that a step of so many users reads, one token each."""
        return self.dense + self.experts * (1 - (1 - self.share) ** users)


@dataclass(frozen=True, slots=True)
class ServingRow:
    """One line of the table.

    Attributes:
        weights: label of the weights.
        kv: how keys and values are stored.
        context: T, tokens of a user's context, full.
        users: U, at the same time.
        weight_bytes, kv_bytes, memory_bytes: of weights, of keys and values, and in all.
        fits: whether that is available now; None where the system does not say how much there is.
        ms: milliseconds of a step, which gives every user a token.
        tokens_per_s: of all users.
    """

    weights: str
    kv: str
    context: int
    users: int
    weight_bytes: int
    kv_bytes: int
    memory_bytes: int
    fits: bool | None
    ms: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory that is available (None: unknown), and where; ``bandwidths`` are bytes per second by the size measured on."""

    device: str
    available: int | None
    bandwidths: dict[int, float]

    @classmethod
    def measure(cls, sizes: Sequence[int], device: str = "auto") -> "Machine":
        """Measure how fast memory is read, on matrices as large as each of ``sizes`` (bytes), at most 1 GiB.

        What fits a cache is read faster, so a small model is faster than the memory. Takes about half a second for each size.
        """
        place = known_device(device)
        free = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else available_bytes()
        least, most = _PROBE_BYTES
        probes = sorted({min(max(size, least), most) for size in sizes})
        return cls(str(place), free, {probe: _bandwidth(probe, place) for probe in probes})

    def bandwidth(self, nbytes: float) -> float:
        """Return bytes per second of reading so many bytes, as the nearest measured size has it."""
        return self.bandwidths[min(self.bandwidths, key=lambda probe: abs(probe - nbytes))]


def _bandwidth(nbytes: int, device: torch.device) -> float:
    """Return bytes per second of products of a matrix with a vector: the best of several."""
    rows = max(nbytes // (4 * 4096), 1)
    matrix, vector = torch.ones(rows, 4096, device=device), torch.ones(4096, device=device)
    best, deadline, left = float("inf"), time.perf_counter() + _PROBE_S, 5
    while left > 0 or time.perf_counter() < deadline:
        left -= 1
        begin = time.perf_counter()
        float((matrix @ vector)[0])  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return matrix.nbytes / best


def weights_of(contents: Contents, plan: Plan, format: str, label: str) -> Weights:
    """Return what the weights of a model take under a plan (an empty one: as they are).

    Args:
        contents: of the model's checkpoint; its empty model has the dtype of the float weights.
        plan: layer name to scheme.
        format: of the checkpoint.
        label: for the table.
    """
    model = contents.model
    sizes = [(entry, layout_bytes(layout_of(contents, model, plan, format, entry))) for entry in contents.entries]
    total = sum(size for _, size in sizes)
    experts = sum(size for entry, size in sizes if entry.site and len(entry.site.shape) == 3)
    table: Any = model.get_input_embeddings()
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is table)
    looked_up = sum(size for entry, size in sizes if entry.source.pieces[0].parameter == name)
    if name in model.all_tied_weights_keys.values():
        looked_up = 0  # the head reads the whole table
    stacks = [site.shape[0] for site in contents.sites.values() if len(site.shape) == 3]
    config: Any = model.config.get_text_config(decoder=True)
    taken = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    share = taken / max(stacks) if stacks and taken else 1.0
    return Weights(label, total, total - experts - looked_up, experts, min(share, 1.0))


def kv_bytes(config: Any, tokens: int, number_bytes: float) -> float:
    """Return the bytes of keys and values of one user.

    Args:
        config: of a transformers model.
        tokens: T, of context.
        number_bytes: b, of one number, scales included.

    Raises:
        SpecError: the config does not say how many heads of what size there are.
    """
    text = config.get_text_config(decoder=True)
    layers, heads = text.num_hidden_layers, getattr(text, "num_attention_heads", None)
    if not heads:
        raise SpecError(f"{type(config).__name__} names no attention heads: the memory of its contexts is not known")
    numbers = 2 * (getattr(text, "num_key_value_heads", None) or heads) * _head_dim(text, heads)
    if getattr(text, "kv_lora_rank", None):  # compressed in the files, expanded in transformers' cache
        numbers = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    window = getattr(text, "sliding_window", None) or tokens
    lengths = {"full_attention": tokens, "sliding_attention": min(tokens, window), "chunked_attention": tokens}
    return float(sum(lengths.get(kind, 0) for kind in kinds) * numbers * number_bytes)


def _head_dim(text: Any, heads: int) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // heads)


def serving_table(
    contents: Contents,
    weights: Sequence[Weights],
    machine: Machine,
    *,
    contexts: Sequence[int],
    users: Sequence[int],
    kv: str = "float",
) -> list[ServingRow]:
    """Return what every kind of weights takes, for every context and number of users.

    Args:
        contents: of the model's checkpoint.
        weights: what is compared.
        machine: measured.
        contexts, users: T and U.
        kv: ``"float"``, in the model's dtype, or ``"int8"``, with a scale of 4 bytes per token and head.

    Raises:
        SpecError: numbers below 1, another ``kv``, or a model without attention.
    """
    if kv not in KV or min((*contexts, *users), default=0) < 1:
        raise SpecError(f"kv={kv!r}, contexts {list(contexts)}, users {list(users)}: want float or int8, and numbers from 1")
    config: Any = contents.model.config
    text = config.get_text_config(decoder=True)
    number: float = contents.model.dtype.itemsize
    if kv == "int8":
        number = 1 + 4 / _head_dim(text, getattr(text, "num_attention_heads", None) or 1)
    rows = []
    for one in weights:
        for context in contexts:
            for count in users:
                stored = count * kv_bytes(config, context, number)
                memory = one.total + stored + RUNTIME_BYTES
                read = one.read(count) + stored
                seconds = read / machine.bandwidth(read)
                fits = None if machine.available is None else memory <= machine.available
                sizes = (one.total, round(stored), round(memory))
                rows.append(ServingRow(one.label, kv, context, count, *sizes, fits, 1e3 * seconds, count / seconds))
    return rows
