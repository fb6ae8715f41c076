"""Resolve the names by which users refer to models, and read configs without weights."""

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from quantkit.errors import QuantkitError
from quantkit.hf.demo_model import DEMO_MODEL, demo_model_path
from quantkit.hf.gguf import read_gguf


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
        config: PretrainedConfig = read_gguf(AutoConfig, Path(place)) if gguf else AutoConfig.from_pretrained(place)
    except ImportError as error:
        raise QuantkitError(
            f"reading {Path(place).name} needs the gguf package: pip install 'quantkit[demo]' ({error})"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise QuantkitError(f"cannot read the config of {source}: {error}; give a directory, a hub id, or demo") from error
    if getattr(config, "quantization_config", None):
        raise QuantkitError(f"{source} is already quantized, want a float model; give the model that it was made from")
    return config
