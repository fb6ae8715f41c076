"""Load float models from a hub id, a directory or a GGUF file."""

import copy
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quantkit.dtypes import float_dtype
from quantkit.errors import QuantkitError
from quantkit.hf.sizes import check_config_of, check_sizes
from quantkit.hf.source import locate, read_gguf

__all__ = [
    "PreTrainedModel",
    "PretrainedConfig",
    "empty_model",
    "load_float",
    "load_tokenizer",
    "read_config",
    "read_generation_config",
]

log = logging.getLogger(__name__)


def load_float(
    source: str | Path | PreTrainedModel,
    dtype: torch.dtype | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load an unquantized causal language model in evaluation mode on the CPU.

    Args:
        source: hub id, directory, ``.gguf`` file (dequantized), ``"demo"`` (the demo model), or a model, which is returned
            unchanged except that it is put in eval mode.
        dtype: dtype of the weights, or its name; None keeps the checkpoint's (float32 for GGUF files that do not name one).
        tokenizer: returned instead of the source's own.
        trust_remote_code: run code from the hub repository.

    Returns:
        The model, and its tokenizer or None.

    Raises:
        QuantkitError: the source does not exist, cannot be read, is already quantized, or has another dtype.
    """
    dtype = float_dtype(dtype)
    if isinstance(source, PreTrainedModel):
        if dtype is not None and source.dtype != dtype:
            raise QuantkitError(f"the model is {source.dtype}, want dtype={dtype}; convert it with model.to first")
        source.train(False)
        return source, tokenizer
    source = locate(source)
    path = Path(source)
    if path.suffix == ".gguf":
        model, found = _load_gguf(path, dtype)
        return model, tokenizer or found
    try:
        check_config_of(source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise QuantkitError(
                f"{source} is already quantized, want a float model; load it with quantkit.load, or give the float model"
            )
        model = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype or "auto", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise QuantkitError(f"cannot load a model from {source}: {error}") from error
    model.train(False)
    return model, tokenizer or load_tokenizer(source, trust_remote_code=trust_remote_code)


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a hub id or directory; None, with a log message, if it has no usable one."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        log.info("%s has no usable tokenizer: %s", source, error)
        return None
    return tokenizer


def read_config(values: Mapping[str, Any], source: str | Path) -> PretrainedConfig:
    """Return the config that a mapping describes, whatever it says; transformers' own errors pass through.

    Args:
        values: what config.json would hold.
        source: where they come from; recorded in the config.
    """
    check_sizes(values, source)
    with tempfile.TemporaryDirectory() as directory:  # transformers corrects configs only as it reads them from a file
        Path(directory, "config.json").write_text(json.dumps(values), encoding="utf-8")
        config: PretrainedConfig = AutoConfig.from_pretrained(directory)
    config.name_or_path = str(source)
    return config


def read_generation_config(path: str | Path) -> GenerationConfig:
    """Return the generation config in a directory."""
    config: GenerationConfig = GenerationConfig.from_pretrained(path)
    return config


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model from its config, with parameters on the meta device and real buffers.

    Raises:
        QuantkitError: transformers cannot build a model from this config.
    """
    plain = copy.deepcopy(config)
    plain.__dict__.pop("quantization_config", None)
    names = plain.architectures or []
    named = getattr(transformers, names[0], None) if names else None
    known = isinstance(named, type) and issubclass(named, PreTrainedModel)
    build: Any = named._from_config if known else AutoModelForCausalLM.from_config  # type: ignore[union-attr]
    with init_empty_weights(include_buffers=False):
        try:
            model: PreTrainedModel = build(plain)
        except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise QuantkitError(f"cannot build a {names[0] if names else plain.model_type} from its config: {error}") from error
    model.tie_weights()
    model.train(False)
    return model


def _load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Dequantize a GGUF file into a plain model, and read its tokenizer."""
    if not path.is_file():
        raise QuantkitError(f"no such file: {path}")
    options: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
    if hasattr(transformers, "GgufConfig"):  # newer releases can keep GGUF blocks in memory, which is not wanted here
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        config = read_gguf(AutoConfig, path)
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, **options)
        tokenizer: PreTrainedTokenizerBase = read_gguf(AutoTokenizer, path)
    except ImportError as error:
        raise QuantkitError(f"reading {path.name} needs the gguf package: pip install 'quantkit[demo]' ({error})") from error
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise QuantkitError(f"cannot read {path}: {error}") from error
    # transformers marks a model loaded from GGUF as quantized and then refuses to save it, so its weights are moved to a
    # new model.
    loaded.config.architectures = [type(loaded).__name__]
    model = empty_model(loaded.config)
    model.config.dtype = loaded.dtype
    state = {name: tensor for name, tensor in loaded.state_dict().items() if name in model.state_dict()}
    missing, _ = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise QuantkitError(
            f"{path}: {len(missing)} parameters are missing, such as {', '.join(left[:5])}; the file does not fit its config"
        )
    model.generation_config = loaded.generation_config
    model.train(False)
    return model, tokenizer
