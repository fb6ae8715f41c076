"""Names of models: what a user may write where a model is wanted, and its config without its weights.

A GGUF file's header holds the whole vocabulary, which transformers parses token by token, in seconds, for each thing that is
asked of it. So the config and the tokenizer of the last file are remembered, as long as its size and time stay what they were.
"""

import copy
import functools
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from quantkit.errors import QuantkitError
from quantkit.hf.demo_model import DEMO_MODEL, demo_model_path


def locate(source: str | Path) -> str | Path:
    """Return where a model is: ``"demo"`` becomes the embedded default's file, anything else stays as it is.

    (A directory that is called demo is written ``./demo``.)
    """
    return demo_model_path() if str(source) == DEMO_MODEL else source


def load_config(source: str | Path) -> PretrainedConfig:
    """Read the config of a hub id, directory or GGUF file, or of the embedded default; no weights are read.

    Raises:
        QuantkitError: the source is not there, cannot be read, or is already quantized.
    """
    place = locate(source)
    gguf = Path(place).suffix == ".gguf"
    try:
        config: PretrainedConfig = read_gguf(AutoConfig, Path(place)) if gguf else AutoConfig.from_pretrained(place)
    except ImportError as error:
        raise QuantkitError(
            f"reading {Path(place).name} needs the gguf package: pip install 'quantkit[demo]' ({error})"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise QuantkitError(f"cannot read the config of {source}: {error}; give a directory, a hub id, or demo") from error
    if getattr(config, "quantization_config", None):
        raise QuantkitError(f"{source} is already quantized; start from the float model")
    return config


def read_gguf(what: Any, path: Path) -> Any:
    """Return what ``AutoConfig`` or ``AutoTokenizer`` makes of a GGUF file, one's own to change; their errors pass through."""
    stat = path.stat()
    return copy.deepcopy(_read_gguf(what, path.absolute(), stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _read_gguf(what: Any, path: Path, size: int, written_ns: int) -> PretrainedConfig | PreTrainedTokenizerBase:
    found: PretrainedConfig | PreTrainedTokenizerBase = what.from_pretrained(path.parent, gguf_file=path.name)
    return found
