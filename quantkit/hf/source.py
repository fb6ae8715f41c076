"""Resolve the names by which users refer to models, and read configs without weights."""

import os
import re
from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig

from quantkit.errors import QuantkitError
from quantkit.hf.demo_model import DEMO_MODEL, demo_model_path
from quantkit.hf.gguf import read_gguf
from quantkit.hf.guard import names_source
from quantkit.hf.sizes import check_config_of

MODEL_FILES: Final = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.spm", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""What is fetched from the hub."""
_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
OTHER_FORMATS: Final = ("consolidated*", "original/*", "onnx/*", "*.fp16.safetensors")


def locate(source: str | Path) -> str | Path:
    """Return the path of the demo model's file for ``"demo"``, and any other source unchanged.

    A directory named demo can be given as ``./demo``.
    """
    return demo_model_path() if str(source) == DEMO_MODEL else source


def hub_name(source: str | Path) -> tuple[str, str | None]:
    """Return the id and the revision of what a user names as ``owner/name@revision``; any other source, and None.

    A revision is a branch, a tag or a commit of the hub. What exists here under the whole name is no hub id.
    """
    text = str(source)
    name, _, revision = text.partition("@")
    if not revision or not _HUB_ID.fullmatch(name) or os.path.lexists(text):
        return text, None
    return name, revision


def refuse_mistyped(source: str | Path) -> None:
    """Refuse what is meant as a path of this machine and is not there: the hub, asked for it, answers in riddles.

    Raises:
        QuantkitError: there is nothing at a path.
    """
    text = str(source)
    meant = isinstance(source, Path) or text.startswith((".", "~", os.sep)) or text.endswith(".gguf")
    if (meant or not _HUB_ID.fullmatch(hub_name(source)[0])) and not os.path.lexists(text):
        wanted = "a directory, a .gguf file, 'demo', or the id of a model on the hub (owner/name, owner/name@revision)"
        raise QuantkitError(f"cannot load a model from {text}: there is no such file or directory; want {wanted}")


def directory_of(source: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Return the directory of a model: itself, or of a hub id the cached snapshot, downloaded if need be.

    Only the files of a float model are fetched: no copies of the weights in other formats, and code only if it is trusted.

    Raises:
        QuantkitError: there is no such directory, and nothing of that name on the hub or in its cache.
    """
    refuse_mistyped(source)
    if Path(source).is_dir():
        return Path(source)
    found = _snapshot(source, [*MODEL_FILES, *(["*.py"] if trust_remote_code else [])])
    return found if any(found.glob("*.safetensors")) else _snapshot(source, ["pytorch_model*.bin"])


def _snapshot(source: str | Path, wanted: list[str]) -> Path:
    """Return the directory of the cache that holds files of a model of the hub, fetched if need be."""
    name, revision = hub_name(source)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=[*OTHER_FORMATS]))
    except LocalEntryNotFoundError as error:
        way_out = "give the path of a directory, or try again with a connection"
        raise QuantkitError(
            f"{source} is no directory here, not in the cache of the hub, and the hub cannot be reached; {way_out}"
        ) from error
    except (OSError, ValueError) as error:
        raise QuantkitError(f"cannot load a model from {source}: {error}") from error


@names_source("cannot read the config of")
def load_config(source: str | Path) -> PretrainedConfig:
    """Return the config of a hub id, directory, GGUF file or the demo model. No weights are read.

    Raises:
        QuantkitError: the source does not exist, cannot be read, or is already quantized.
    """
    place = locate(source)
    refuse_mistyped(place)
    gguf = Path(place).suffix == ".gguf"
    if not gguf and not os.path.exists(place):
        place = _snapshot(place, ["*.json"])
    try:
        if not gguf:
            check_config_of(place)
        config: PretrainedConfig = (
            read_gguf(AutoConfig, Path(place)) if gguf else AutoConfig.from_pretrained(place, trust_remote_code=False)
        )
    except ImportError as error:
        raise QuantkitError(
            f"reading {Path(place).name} needs the gguf package: pip install 'quantkit[demo]' ({error})"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        unreadable = f"cannot read the config of {source}: {error}; give a directory, a hub id, or demo"
        raise QuantkitError(own_code(source, error) or unreadable) from error
    if getattr(config, "quantization_config", None):
        raise QuantkitError(f"{source} is already quantized, want a float model; give the model that it was made from")
    return config


def own_code(source: str | Path, error: Exception) -> str | None:
    """Say so if transformers refused a model because it wants code of its own to be run; None if it was for something else.

    That code is never run because somebody answered a prompt, only where a program or a command says so.
    """
    if "trust_remote_code" not in str(error):
        return None
    return (
        f"{source} brings code of its own, which is not run unasked; if you trust who wrote it, say --trust-remote-code, or "
        "quantkit.open_model(..., trust_remote_code=True) and give the model itself in place of its name"
    )
