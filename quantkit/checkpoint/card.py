"""The model card: a README.md beside the weights that says what they are, what was measured, and how to load them.

It is made of what config.json records, so it says the same on every machine: no dates, no paths.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from quantkit.formats.base import FORMATS
from quantkit.system.files import write_atomic

CARD: Final = "README.md"
_MARK: Final = "<!-- This card is quantkit's: it is written anew with the model. Remove this line to keep your changes. -->"

_FACTS: Final = (
    ("quantizer", ("quantizer",), ""),
    ("calibration", ("calibration", "tokens"), " tokens"),
    ("bits per quantized weight", ("bits_per_weight",), ""),
    ("measured on", ("quality", "text"), ""),
    ("measured over", ("quality", "tokens"), " tokens"),
    ("KL to the float model, mean", ("quality", "kl_mean"), " nats per token"),
    ("KL to the float model, 99th percentile", ("quality", "kl_p99"), " nats per token"),
    ("KL that int8 activations on a CPU add", ("quality", "int8_activations", "kl_mean"), " nats per token"),
    ("most likely token is the float model's", ("quality", "same_top1"), " of all tokens"),
    ("perplexity", ("quality", "perplexity"), ""),
    ("perplexity of the float model", ("quality", "base_perplexity"), ""),
)
"""Label, place in what config.json records, and unit."""


def write_card(stage: Path, out: Path, config: Mapping[str, Any], facts: Mapping[str, Any], base: str) -> None:
    """Write the card into ``stage``, unless it would replace a README.md that somebody has written.

    Args:
        stage: directory of the checkpoint before it is published.
        out: where it will be published. What is there stays, unless it is a card of ours.
        config: what config.json holds.
        facts: label to text, what else is known of the files.
        base: where the float model came from; named if it is the hub.
    """
    if not is_users_card(out):
        write_atomic(stage / CARD, card(config, facts, base))


def is_users_card(out: Path) -> bool:
    """Return whether a directory has a README.md that is not quantkit's to replace."""
    return (out / CARD).exists() and _MARK not in (out / CARD).read_text(encoding="utf-8", errors="replace")


def card(config: Mapping[str, Any], facts: Mapping[str, Any], base: str) -> str:
    """Return the text of the card; see :func:`write_card`."""
    record = config["quantkit"]
    method, kind = record["format"], config["architectures"][0]
    named = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None
    head = ["---", *([f"base_model: {named}"] if named else []), "tags:", "- quantkit", f"- {method}", "---", ""]
    title = f"# {named or kind}, quantized by quantkit"
    rows = [("model class", f"`{kind}`"), *_rows(record), *((label, str(text)) for label, text in facts.items())]
    table = ["| | |", "|---|---|", *(f"| {label} | {_cell(text)} |" for label, text in rows)]
    how = _how_to_load(kind, method, config.get("quantization_config", {}))
    return "\n".join([*head, _MARK, "", title, "", *table, "", *how]) + "\n"


def _rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return label and text of what was recorded, as far as it was: users may record what they like."""
    rows = [("format", f"{record['format']}, written by quantkit {record['version']}")]
    schemes = record.get("schemes")
    if isinstance(schemes, dict):
        rows.append(("schemes", ", ".join(f"{name} ({count} layers)" for name, count in schemes.items())))
    for label, path, unit in _FACTS:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str | int | float):
            text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            rows.append((label, f"{text}{unit}"))
    return rows


def _how_to_load(kind: str, method: str, quantization: Mapping[str, Any]) -> list[str]:
    own = [
        "## How to load it",
        "",
        "```python",
        "import quantkit",
        "",
        'model = quantkit.load("path/to/this/directory")',
        "```",
        "",
    ]
    if method == "gguf":
        return [*own, "With llama.cpp:", "", "```sh", "llama-cli -m path/to/this/directory/model.gguf", "```"]
    if method != "compressed-tensors":
        usage = FORMATS.get(method).usage
        return [*own, f"With {usage}" if usage else f"The format `{method}` is read by quantkit alone."]
    return [
        *own,
        *_with_transformers(kind, quantization["config_groups"].values()),
        "",
        "With vLLM:",
        "",
        "```sh",
        "vllm serve path/to/this/directory",
        "```",
    ]


def _with_transformers(kind: str, groups: Collection[Mapping[str, Any]]) -> list[str]:
    """Return how transformers reads it: packed zero points only as it dequantizes, and that only where all layers are alike."""
    packed = [group for group in groups if group["format"] == "pack-quantized" and not group["weights"]["symmetric"]]
    if packed and len(groups) > 1:
        return [
            "transformers, with compressed-tensors up to 0.20, does not read models in which layers differ and some have zero "
            "points (`-asym`)."
        ]
    names = f"CompressedTensorsConfig, {kind}" if packed else kind
    options = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if packed else ""
    return [
        "With transformers (and `pip install compressed-tensors`):",
        "",
        "```python",
        f"from transformers import {names}",
        "",
        f'model = {kind}.from_pretrained("path/to/this/directory"{options})',
        "```",
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
