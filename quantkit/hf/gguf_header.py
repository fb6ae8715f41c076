"""A look at a GGUF file before other libraries read it, and what it says of itself.

The libraries that read the file trust its numbers: they build as many layers as it names, in the sizes that it names. Here no
number counts for more than the tensors that are really in the file.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Final

from quantkit.errors import FormatError
from quantkit.formats.gguf.file import FLOATS, GgufHeader

_SIZES: Final = (
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "vocab_size",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
)
"""Keys that are at most as large as the largest dimension of a tensor."""


def refuse_hostile(path: Path) -> None:
    """Refuse a file whose header is not whole, or names sizes that its tensors do not have.

    Raises:
        FormatError: what is wrong.
    """
    header = GgufHeader(path, every=True)
    try:
        kind = header.keys.get("general.architecture")
        if not isinstance(kind, str) or not header.tensors:
            raise FormatError(f"{path}: general.architecture is {kind!r}, {len(header.tensors)} tensors; no model")
        largest = max((size for stored in header.tensors.values() for size in stored.shape), default=0)
        limits = {"block_count": len(header.tensors), **dict.fromkeys(_SIZES, largest)}
        for name, most in limits.items():
            value = header.keys.get(f"{kind}.{name}", 0)
            if not isinstance(value, int) or not 0 <= value <= most:
                raise FormatError(f"{path}: {kind}.{name} is {value!r}, and nothing in the file is larger than {most}")
    finally:
        header.close()


def inspect_gguf(path: Path) -> dict[str, Any]:
    """Describe a GGUF file without reading its tensors; see :func:`quantkit.checkpoint.inspect`.

    Raises:
        FormatError: it is none, or damaged.
    """
    header = GgufHeader(path, every=True)
    try:
        tensors, keys, nbytes = header.tensors, dict(header.keys), path.stat().st_size
    finally:
        header.close()
    weights, counts, sizes = Counter[str](), Counter[str](), Counter[str]()
    for stored in tensors.values():
        number = 1
        for size in stored.shape:
            number *= size
        weights[stored.type] += number
        counts[stored.type] += 1
        sizes[stored.type] += stored.nbytes
    blocks = [kind for kind in weights if kind not in FLOATS]
    quantized, quantized_bytes = (sum(of[kind] for kind in blocks) for of in (weights, sizes))
    every, stored_bytes = sum(weights.values()), sum(sizes.values())
    floats = sorted({kind for kind in weights if kind in FLOATS})
    return {
        "path": str(path),
        "format": "gguf",
        "model": keys.get("general.architecture"),
        "dtype": ", ".join(floats) or None,
        "schemes": [{"scheme": kind, "describe": kind, "layers": counts[kind]} for kind in sorted(blocks)],
        "modules": {name.removesuffix(".weight"): one.type for name, one in tensors.items() if one.type not in FLOATS},
        "parameters": every,
        "quantized_parameters": quantized,
        "quantized_bytes": quantized_bytes,
        "quantized_bits_per_weight": quantized_bytes * 8 / quantized if quantized else 0.0,
        "carried_over": {"tensors": 0, "bytes": 0, "names": []},
        "tensor_bytes": stored_bytes,
        "bytes": nbytes,
        "bits_per_weight": nbytes * 8 / every if every else 0.0,
        "shards": {path.name: nbytes},
        "compute": "dequantized when it is loaded",
        "metadata": {name: value for name, value in keys.items() if not name.startswith("tokenizer.")},
    }
