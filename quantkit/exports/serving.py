"""Files with which a server runs a checkpoint: made from templates, for the program and the checkpoint at hand.

=========  ================================  ==========================================================
target     formats                           files
=========  ================================  ==========================================================
vllm       what vLLM reads                   ``vllm.yaml``, ``deployment.yaml`` (Kubernetes)
ray        what vLLM reads                   ``serve.yaml`` (Ray Serve, with autoscaling)
triton     what vLLM reads                   ``triton/NAME/config.pbtxt``, ``triton/NAME/1/model.json``
ollama     gguf                              ``Modelfile``
=========  ================================  ==========================================================
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2

from quantkit import checkpoint
from quantkit.errors import FormatError, nearest
from quantkit.system.files import named_path, read_json, usable_path, write_atomic


class Server(NamedTuple):
    """A program: the formats that it reads, and its files by the template that makes each."""

    formats: tuple[str, ...]
    files: Mapping[str, str]


_VLLM: Final = ("compressed-tensors", "gptq", "gptq-v2", "awq", "modelopt")
SERVERS: Final[dict[str, Server]] = {
    "vllm": Server(_VLLM, {"vllm.yaml.j2": "vllm.yaml", "deployment.yaml.j2": "deployment.yaml"}),
    "ray": Server(_VLLM, {"serve.yaml.j2": "serve.yaml"}),
    "triton": Server(_VLLM, {"config.pbtxt.j2": "triton/{name}/config.pbtxt", "model.json.j2": "triton/{name}/1/model.json"}),
    "ollama": Server(("gguf",), {"Modelfile.j2": "Modelfile"}),
}
"""By the name that :func:`package` takes."""

MOST_CONTEXT, PORT = 8192, 8000
"""Longest context that is written where the model could have more: its memory grows with it. Port of the HTTP servers."""


def package(path: str | Path, server: str, *, overwrite: bool = False) -> list[Path]:
    """Write beside a checkpoint what a server needs to run it.

    Args:
        path: directory of a checkpoint.
        server: ``"vllm"``, ``"ray"``, ``"triton"`` or ``"ollama"``.
        overwrite: replace files of these names.

    Returns:
        The files that were written.

    Raises:
        FormatError: an unknown server, a checkpoint that it does not read, or a file that is there already.
    """
    folder = usable_path(named_path(path))
    if server not in SERVERS:
        raise FormatError(f"unknown server {server!r}; {nearest(server, SERVERS)}")
    facts, known = checkpoint.inspect(folder), SERVERS[server]
    if facts["format"] not in known.formats:
        raise FormatError(
            f"{server} does not read format {facts['format']}; it reads {', '.join(known.formats)}: quantkit convert {path} "
            f"--to {known.formats[0]} --out DIR"
        )
    values = _values(folder, facts)
    targets = {template: folder / name.format(name=values["name"]) for template, name in known.files.items()}
    if there := [target for target in targets.values() if target.exists() and not overwrite]:
        raise FormatError(f"{there[0]} is there already; pass overwrite=True to replace it")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantkit.exports"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["quoted"] = _quoted
    for template, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, environment.get_template(template).render(values))
    return list(targets.values())


def _quoted(value: Any) -> str:
    """Return a text as YAML, JSON, protobuf's text format and Modelfiles all quote it."""
    return json.dumps(value, ensure_ascii=False)


def _values(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the templates name."""
    config = read_json(folder / "config.json")
    longest = config.get("max_position_embeddings")
    return {
        "path": str(folder.resolve()),
        "folder": folder.resolve().name,
        "name": re.sub(r"[^a-z0-9-]+", "-", folder.resolve().name.lower()).strip("-") or "model",
        "dtype": {"float32": "float32", "bfloat16": "bfloat16"}.get(str(facts["dtype"]), "float16"),
        "context": min(longest, MOST_CONTEXT) if isinstance(longest, int) and longest > 0 else MOST_CONTEXT,
        "memory": f"{max(2 * int(facts['bytes']) >> 20, 1024)}Mi",
        "port": PORT,
        "stops": _stops(folder, config),
    }


def _stops(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the texts of the tokens that end an answer."""
    beside, tokenizer = folder / "generation_config.json", folder / "tokenizer.json"
    generation = read_json(beside) if beside.is_file() else {}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    wanted = set(ends if isinstance(ends, list) else [ends])
    added = read_json(tokenizer).get("added_tokens", []) if tokenizer.is_file() else []
    return [str(one["content"]) for one in added if isinstance(one, dict) and one.get("id") in wanted and "content" in one]
