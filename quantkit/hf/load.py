"""Load float models from a hub id, a directory or a GGUF file."""

import copy
import json
import logging
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quantkit.errors import QuantkitError
from quantkit.hf.source import locate, own_code, read_gguf

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

_building = threading.Lock()
"""Held while transformers builds a model, for which it changes torch's default dtype and more, in the whole process."""


class _Thread(threading.local):
    """What is so in one thread only."""

    on_meta = False


_thread = _Thread()


def _onto_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Replace a parameter that a thread in :func:`_parameters_on_meta` gives to a module; leave those of others alone."""
    if not _thread.on_meta or parameter is None or parameter.is_meta:
        return None
    made = type(parameter)(parameter.to("meta"), requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made


register_module_parameter_registration_hook(_onto_meta)  # type: ignore[arg-type]  # it may return a parameter


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give modules that this thread makes parameters on the meta device, and real buffers."""
    _thread.on_meta = True
    try:
        yield
    finally:
        _thread.on_meta = False


def load_float(
    source: str | Path | PreTrainedModel,
    dtype: torch.dtype | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load an unquantized causal language model in evaluation mode on the CPU.

    Args:
        source: hub id, directory, ``.gguf`` file (dequantized), ``"demo"`` (the demo model), or a model, which is returned
            unchanged except that it is put in eval mode.
        dtype: dtype of the weights; None keeps the checkpoint's dtype (float32 for GGUF files that do not name one).
        tokenizer: returned instead of the source's own.
        trust_remote_code: run code from the hub repository.

    Returns:
        The model, and its tokenizer or None.

    Raises:
        QuantkitError: the source does not exist, cannot be read, is already quantized, or has another dtype.
    """
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
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise QuantkitError(
                f"{source} is already quantized, want a float model; load it with quantkit.load, or give the float model"
            )
        with _building:
            model = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype or "auto", trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise QuantkitError(own_code(source, error) or f"cannot load a model from {source}: {error}") from error
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

    Raises:
        QuantkitError: it wants code of its own to be run.
    """
    with tempfile.TemporaryDirectory() as directory:  # transformers corrects configs only as it reads them from a file
        Path(directory, "config.json").write_text(json.dumps(values), encoding="utf-8")
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except ValueError as error:
            if reason := own_code(source, error):
                raise QuantkitError(reason) from error
            raise
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
    build: Any = named._from_config if known else _from_config  # type: ignore[union-attr]
    with _building, _parameters_on_meta():
        try:
            model: PreTrainedModel = build(plain)
        except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise QuantkitError(f"cannot build a {names[0] if names else plain.model_type} from its config: {error}") from error
    model.tie_weights()
    model.train(False)
    return model


def _from_config(config: PretrainedConfig) -> Any:
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Dequantize a GGUF file into a plain model, and read its tokenizer."""
    if not path.is_file():
        raise QuantkitError(f"no such file: {path}")
    options: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
    if hasattr(transformers, "GgufConfig"):  # newer releases can keep GGUF blocks in memory, which is not wanted here
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        config = read_gguf(AutoConfig, path)
        with _building:
            loaded = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, config=config, trust_remote_code=False, **options
            )
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
