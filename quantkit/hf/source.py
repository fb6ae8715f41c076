"""Names of models: what a user may write where a model is wanted, and its config without its weights."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

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
    options: dict[str, Any] = {"gguf_file": Path(place).name} if gguf else {}
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(Path(place).parent if gguf else place, **options)
    except ImportError as error:
        raise QuantkitError(
            f"reading {Path(place).name} needs the gguf package: pip install 'quantkit[demo]' ({error})"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise QuantkitError(f"cannot read the config of {source}: {error}; give a directory, a hub id, or demo") from error
    if getattr(config, "quantization_config", None):
        raise QuantkitError(f"{source} is already quantized; start from the float model")
    return config
