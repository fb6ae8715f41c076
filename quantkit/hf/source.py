"""Resolve the names by which users refer to models, and read configs without weights.

The header of a GGUF file contains the whole vocabulary, and transformers needs seconds to parse it, for the config and for the
tokenizer alike. Both are therefore cached for the last file, until its size or modification time changes.
"""

import copy
import functools
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from quantkit.errors import QuantkitError
from quantkit.hf.demo_model import DEMO_MODEL, demo_model_path


def locate(source: str | Path) -> str | Path:
    """Return the path of the demo model's file for ``"demo"``, and any other source unchanged.

    A directory named demo can be given as ``./demo``.
    """
    return demo_model_path() if str(source) == DEMO_MODEL else source


def load_config(source: str | Path) -> PretrainedConfig:
    """Return the config of a hub id, directory, GGUF file or the demo model. No weights are read.

    Raises:
        QuantkitError: the source does not exist, cannot be read, or is already quantized.
    """
    place = locate(source)
    gguf = Path(place).suffix == ".gguf"
    try:
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

    That code is never run because somebody asked at a prompt, only where a program says ``trust_remote_code=True``.
    """
    if "trust_remote_code" not in str(error):
        return None
    return (
        f"{source} brings code of its own, which is not run unasked; if you trust it, load the model with transformers and "
        "trust_remote_code=True, and give the model itself in place of its name"
    )


def read_gguf(what: Any, path: Path) -> Any:
    """Return the config or tokenizer of a GGUF file, as a copy that the caller may change.

    Args:
        what: ``AutoConfig`` or ``AutoTokenizer``; their errors are not caught.
        path: the file.
    """
    stat = path.stat()
    return copy.deepcopy(_read_gguf(what, path.absolute(), stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _read_gguf(what: Any, path: Path, size: int, written_ns: int) -> PretrainedConfig | PreTrainedTokenizerBase:
    found: PretrainedConfig | PreTrainedTokenizerBase = what.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    return found
