"""Load float models from a hub id, a directory or a GGUF file."""

import copy
import dataclasses
import functools
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from quantkit.dtypes import float_dtype
from quantkit.errors import DiskError, FormatError, QuantkitError, shorten
from quantkit.hf.account import account
from quantkit.hf.building import building, parameters_on_meta
from quantkit.hf.code import know_code, trust_code
from quantkit.hf.gguf import load_gguf
from quantkit.hf.guard import names_source
from quantkit.hf.ledger import Ledger, keep_ledger, ledger_of
from quantkit.hf.made import lies_on_disk, made_in
from quantkit.hf.mend import mend
from quantkit.hf.sizes import check_config_of, check_sizes
from quantkit.hf.source import directory_of, locate, own_code
from quantkit.hf.ties import settle_ties
from quantkit.hf.weight_files import has_weights

__all__ = [
    "PreTrainedModel",
    "PretrainedConfig",
    "empty_model",
    "load_float",
    "load_tokenizer",
    "read_config",
    "read_generation_config",
]

_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.tiktoken", "*.spm")

log = logging.getLogger(__name__)


@names_source("cannot load a model from")
def load_float(
    source: str | Path | PreTrainedModel,
    dtype: torch.dtype | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    scratch: Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load an unquantized language model, as the class that its config names, in evaluation mode on the CPU.

    Every tensor in the files is accounted for before any is read (:mod:`quantkit.hf.account`); the account goes with the model.

    Args:
        source: hub id, directory, ``.gguf`` file (dequantized), ``"demo"`` (the demo model), or a model, which is returned
            unchanged except that it is put in eval mode.
        dtype: dtype of the weights, or its name; None keeps the checkpoint's (float32 for GGUF files that do not name one).
        tokenizer: returned instead of the source's own.
        trust_remote_code: run the code that the source brings with it; see :func:`quantkit.hf.code.trust_code`.
        scratch: a directory for what is made as the model is loaded and is too much for memory (:mod:`quantkit.hf.made`);
            None keeps it in memory whatever it is.

    Returns:
        The model, and its tokenizer or None.

    Raises:
        QuantkitError: the source does not exist, cannot be read, is already quantized, or has another dtype.
        FormatError: its tensors are not those of the model that its config describes.
    """
    dtype = float_dtype(dtype)
    if isinstance(source, PreTrainedModel):
        if dtype is not None and source.dtype != dtype:
            raise QuantkitError(f"the model is {source.dtype}, want dtype={dtype}; convert it with model.to first")
        source.train(False)
        mend(source)
        return source, tokenizer
    source = locate(source)
    path = Path(source)
    if path.suffix == ".gguf":
        model, found = _load_gguf(path, dtype)
        return model, tokenizer or found
    directory = directory_of(source, trust_remote_code=trust_remote_code)
    try:
        check_config_of(directory)
        if trust_remote_code:
            trust_code(directory)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise QuantkitError(
                f"{source} is already quantized, want a float model; load it with quantkit.load, or give the float model"
            )
        model = _load_directory(directory, config, dtype, scratch, trusts_code=trust_remote_code)
    except DiskError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise QuantkitError(own_code(source, error) or f"cannot load a model from {source}: {error}") from error
    model.train(False)
    model.config.name_or_path = str(source)
    mend(model)
    settle_ties(model, model.config)
    return model, tokenizer or load_tokenizer(directory, trust_remote_code=trust_remote_code)


def _load_directory(
    path: Path, config: PretrainedConfig, dtype: torch.dtype | None, scratch: Path | None, *, trusts_code: bool
) -> PreTrainedModel:
    """Account for the tensors in a directory, and then load them."""
    if (path / "adapter_config.json").is_file():
        raise QuantkitError(f"{path} holds an adapter (adapter_config.json); merge it into its model and give that")
    empty = empty_model(config)
    ledger = account(path, empty)
    folder = scratch if lies_on_disk(empty, ledger) else None
    load: Any = class_of(config)
    options = {"trust_remote_code": False}  # never left to a prompt
    model: PreTrainedModel
    with building, made_in(folder, ledger):
        model, info = load.from_pretrained(path, config=config, dtype=dtype or "auto", output_loading_info=True, **options)
    parameters = {name for name, _ in model.named_parameters()}
    if random := sorted(parameters & set(info["missing_keys"])):
        raise FormatError(
            f"{path}: transformers filled {', '.join(random[:5])} with random numbers; the files do not hold them"
        )
    _restore_padding(model, ledger)
    keep_ledger(model, dataclasses.replace(ledger, trusts_code=trusts_code))
    return model


def _restore_padding(model: nn.Module, ledger: Ledger) -> None:
    """Give embeddings back the row of the padding token, which some classes set to zero after they have loaded it."""
    with ledger.open() as opened:
        for name, module in model.named_modules():
            if not isinstance(module, nn.Embedding) or module.padding_idx is None:
                continue
            sources, weight = ledger.fills.get(f"{name}.weight", ()), module.weight.data
            stored = opened.read(sources[0], copy=False) if len(sources) == 1 else None
            if stored is not None and stored.shape == weight.shape:
                weight[module.padding_idx] = stored[module.padding_idx].to(weight.dtype)


def adopt(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that somebody else has loaded, in evaluation mode and with what :func:`load_float` sees to."""
    model.train(False)
    know_code(model)
    mend(model)
    settle_ties(model, model.config)
    warn_of_lost(model)
    return model


def warn_of_lost(model: PreTrainedModel) -> None:
    """Say which tensors are in the directory that a model was loaded from and not in the model: by transformers, not by us.

    They cannot be carried over, since the model may have become another since; whoever wants that gives the directory.
    """
    path = Path(getattr(getattr(model, "config", None), "name_or_path", None) or "/")  # a plain module has no config
    if ledger_of(model) is not None or not has_weights(path):
        return
    try:
        lost = account(path, model).carried
    except QuantkitError as error:
        log.info("%s is no longer what the model was loaded from: %s", path, error)
        return
    if lost:
        log.warning(
            "%s holds %d tensors that a %s does not know (%s ...): they will not be in a checkpoint of this model; give "
            "quantize the directory to have them carried over",
            path,
            len(lost),
            type(model).__name__,
            lost[0],
        )


def class_of(config: PretrainedConfig) -> Any:
    """Return the class of the model that a config describes: the one it names, or what transformers takes for its type.

    A class that cannot generate (a bare decoder, a classifier) is passed over: what is quantized is a language model.
    """
    names = config.architectures or []
    named = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate():
        return named
    return AutoModelForImageTextToText if type(config) in AutoModelForImageTextToText._model_mapping else AutoModelForCausalLM


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a hub id or directory; None, with a log message, if it has no usable one.

    The message is a warning where there are files of a tokenizer: whoever has them expects one.
    """
    path = Path(source)
    level = logging.WARNING if any(any(path.glob(name)) for name in _TOKENIZER_FILES) else logging.INFO
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except ImportError as error:
        log.warning("the tokenizer of %s cannot be loaded: %s", source, error)
        return None
    except MemoryError:
        raise
    except Exception as error:  # it is made of files from anywhere, as a config is; TypeError is a file that is not there
        text = shorten(f"{type(error).__name__}: {error}", 400)
        log.log(level, "%s has no usable tokenizer (%s); copy its files again if it should have one", source, text)
        return None
    if not isinstance(tokenizer.model_max_length, int | float):
        log.info("%s: model_max_length is %r, want a number; it is taken for no limit", source, tokenizer.model_max_length)
        tokenizer.model_max_length = VERY_LARGE_INTEGER
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):  # what transformers makes of a directory without
        log.info("%s has no tokenizer", source)
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
    check_sizes(values, f"config of {source}")
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


@names_source("cannot read the generation config of")
def read_generation_config(path: str | Path) -> GenerationConfig:
    """Return the generation config in a directory."""
    config: GenerationConfig = GenerationConfig.from_pretrained(path)
    return config


def architectures_of(model: PreTrainedModel) -> list[str]:
    """Return what a config says of a model's class: its name, or a name that only the source's own readers know."""
    names = model.config.architectures or []
    foreign = names and isinstance(names[0], str) and not hasattr(transformers, names[0])
    return list(names) if foreign else [type(model).__name__]


@names_source("cannot build the model of")
def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model from its config, with parameters on the meta device and real buffers.

    Raises:
        QuantkitError: transformers cannot build a model from this config.
    """
    plain = copy.deepcopy(config)
    plain.__dict__.pop("quantization_config", None)
    names = plain.architectures or []
    chosen = class_of(plain)
    if isinstance(chosen, type) and issubclass(chosen, PreTrainedModel):
        build: Any = chosen._from_config
    else:
        build = functools.partial(chosen.from_config, trust_remote_code=False)
    with building, parameters_on_meta():
        try:
            model: PreTrainedModel = build(plain)
        except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise QuantkitError(f"cannot build a {names[0] if names else plain.model_type} from its config: {error}") from error
        model.tie_weights()
    model.train(False)
    mend(model)
    return model


def _load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Make a plain model of what a GGUF file holds: transformers refuses to save one that it loaded from there."""
    config, state, tokenizer = load_gguf(path, dtype)
    model = empty_model(config)
    model.config.architectures = [type(model).__name__]
    model.config.name_or_path = str(path)
    missing, _ = model.load_state_dict(
        {name: state[name] for name in state if name in model.state_dict()}, strict=False, assign=True
    )
    with building:
        model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise QuantkitError(
            f"{path}: {len(missing)} parameters are missing, such as {', '.join(left[:5])}; the file does not fit its config"
        )
    model.config.dtype = model.dtype
    model.train(False)
    return model, tokenizer
