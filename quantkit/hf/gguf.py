"""Read GGUF files into plain float models, once: what was read is kept in the user's cache.

transformers takes half a minute of Python for a file of 93 MB: the header, which holds the whole vocabulary, is parsed anew
for config, tokenizer and weights. Config, tokenizer and dequantized weights are therefore kept in
``<cache>/gguf/<key>/`` in transformers' own formats, and always read from there, so that the first answer and later ones are
the same. The key covers every byte of the file and the versions of the libraries that read it. Weights that take more than
:data:`LIMIT_BYTES` dequantized are not kept, and read again each time; where the cache cannot be written or is turned off
(``quantkit cache --off``), nothing is.
"""

import functools
import hashlib
import importlib.metadata
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from quantkit.errors import QuantkitError
from quantkit.hf.building import building, parameters_on_meta
from quantkit.hf.gguf_header import refuse_hostile
from quantkit.hf.gguf_rotary import TENSORS, stretch
from quantkit.system.files import (
    atomic_path,
    cache_dir,
    cache_switch,
    known_sha256,
    private_directory,
    sha256_file,
    sync_directory,
)

LIMIT_BYTES: Final = 1 << 30
"""Largest dequantized weights that are kept."""

_ACCOUNT: Final = "every tensor accounted for, rotary scaling and sizes read"
"""What was asked of a file before what it says was kept."""

_SIZES: Final = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Keys of a file, after its architecture's name, and what a config calls them."""

_SIZED: Final = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
"""Architectures whose files mean that by it; Gemma 4 has two sizes of heads, which transformers reads itself."""

log = logging.getLogger(__name__)


def read_gguf(what: Any, path: Path) -> Any:
    """Return the config or tokenizer of a GGUF file.

    Args:
        what: ``AutoConfig`` or ``AutoTokenizer``; their errors are not caught.
        path: the file.
    """
    place = _place(path)
    kept = place / what.__name__ if place else None
    if kept is None or not kept.is_dir():
        found = _read(what, path)
        if kept is None or cache_switch().exists():
            return found
        try:
            _keep(found, kept)
        except OSError as error:
            log.info("cannot keep what %s says in %s: %s", path, kept, error)
            return found
    return what.from_pretrained(kept, trust_remote_code=False)


@functools.lru_cache(maxsize=1)
def _header(path: Path, _changed: int) -> Any:
    """Return a reader of a file, which takes seconds to make: the whole vocabulary is in the header."""
    import gguf

    return gguf.GGUFReader(path)


def _read(what: Any, path: Path) -> Any:
    """Let transformers read a config or a tokenizer, and add to a config what it passes over."""
    refuse_hostile(path)
    try:
        found = what.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except (QuantkitError, ImportError):
        raise
    except Exception as error:  # whatever a hostile file makes of libraries that trust it
        raise QuantkitError(f"cannot read {path}: {error or type(error).__name__}") from error
    if what is AutoConfig:
        try:
            header = _header(path, path.stat().st_mtime_ns)
            _resize(header, found)
            stretch(header, found)
        except QuantkitError as error:
            raise QuantkitError(f"{path}: {error}; give the model that the file was made from") from error
    return found


def _resize(reader: Any, config: Any) -> None:
    """Write into a config how wide heads and experts are, which transformers derives, or takes from its defaults."""
    kind = reader.fields["general.architecture"].contents()
    for key, attribute in _SIZES.items() if kind in _SIZED else ():
        if (field := reader.fields.get(f"{kind}.{key}")) is not None and hasattr(config, attribute):
            setattr(config, attribute, int(field.contents()))


def load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[Any, Mapping[str, Tensor], PreTrainedTokenizerBase]:
    """Return config, dequantized weights and tokenizer of a GGUF file.

    Args:
        path: the file.
        dtype: of the weights; None for what the file names, or float32.

    Raises:
        QuantkitError: it is not there, is damaged, or holds a model that transformers cannot read.
    """
    if not path.is_file():
        raise QuantkitError(f"no such file: {path}")
    try:
        config = read_gguf(AutoConfig, path)
        tokenizer: PreTrainedTokenizerBase = read_gguf(AutoTokenizer, path)
        return config, _weights(path, config, dtype), tokenizer
    except ImportError as error:
        raise QuantkitError(f"reading {path.name} needs the gguf package: pip install 'quantkit[demo]' ({error})") from error
    except QuantkitError:
        raise
    except Exception as error:  # see _read
        raise QuantkitError(f"cannot read {path}: {error or type(error).__name__}") from error
    finally:
        _header.cache_clear()  # a vocabulary in memory, and the file's mapping


def clear() -> int:
    """Remove everything that is kept; return its bytes."""
    size = used_bytes()
    shutil.rmtree(cache_dir() / "gguf", ignore_errors=True)
    return size


def used_bytes() -> int:
    """Return the bytes of everything that is kept."""
    return sum(file.stat().st_size for file in (cache_dir() / "gguf").rglob("*") if file.is_file())


def _place(path: Path) -> Path | None:
    """Return where what a GGUF file says is kept; None if others could have put something there."""
    try:
        folder = private_directory("gguf")
    except OSError as error:
        log.warning("%s; reading %s itself", error, path)
        return None
    versions = [importlib.metadata.version(name) for name in ("transformers", "gguf")]
    key = hashlib.sha256("\n".join([known_sha256(path), *versions, _ACCOUNT]).encode()).hexdigest()
    return folder / key[:32]


def _keep(found: Any, kept: Path) -> None:
    """Save a config or a tokenizer as a whole directory, which is there at once or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".", suffix=".tmp") as scratch:
        made = Path(scratch, "made")
        found.save_pretrained(made)
        try:
            made.rename(kept)
        except OSError:
            if not kept.is_dir():  # where it is, another process was faster
                raise
    sync_directory(kept.parent)


def _weights(path: Path, config: Any, dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    """Return name to dequantized tensor, mapped from the cache if it is there.

    The name of a file that is kept ends with its SHA-256, which is compared before anything of it is used.
    """
    place, label = _place(path), str(dtype or "own").removeprefix("torch.")
    for kept in place.glob(f"{label}-*.safetensors") if place else ():
        try:
            if kept.stem == f"{label}-{known_sha256(kept)}":
                return load_file(kept)
        except (OSError, SafetensorError) as error:
            log.info("cannot read %s: %s", kept, error)
        log.warning("%s is damaged; reading %s again", kept, path)
        kept.unlink(missing_ok=True)
    state = _dequantize(path, config, dtype)
    if place and not cache_switch().exists() and sum(tensor.nbytes for tensor in state.values()) <= LIMIT_BYTES:
        try:
            with atomic_path(place / f"{label}.new") as temporary:
                save_file(state, temporary)
            kept = place / f"{label}-{sha256_file(place / f'{label}.new')}.safetensors"
            (place / f"{label}.new").replace(kept)
        except OSError as error:
            log.info("cannot keep the weights of %s in %s: %s", path, place, error)
    return state


def _refuse_unknown(path: Path, config: Any, model: PreTrainedModel) -> None:
    """Refuse a file with tensors that transformers passes over without a word: the model would not be the file's.

    Such are layers that predict further tokens. Factors of rotary embeddings went into the config.
    """
    reader = _header(path, path.stat().st_mtime_ns)
    kind = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=config.to_dict())
    known = get_gguf_hf_weights_map(model, processor)
    names = [tensor.name for tensor in reader.tensors if tensor.name not in TENSORS]
    if lost := [name for name in names if name not in known and name.removesuffix(".weight") not in known]:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise QuantkitError(
            f"{path}: {len(lost)} of its tensors are unknown to transformers, which would leave them out: "
            f"{', '.join(lost[:5])}{more}; give the model that the file was made from (a directory with safetensors files)"
        )


def _dequantize(path: Path, config: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    options: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
    if hasattr(transformers, "GgufConfig"):  # newer releases can keep GGUF blocks in memory, which is not wanted here
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    load: Any = AutoModelForCausalLM.from_pretrained
    options |= {"gguf_file": path.name, "config": config, "trust_remote_code": False, "output_loading_info": True}
    loaded: PreTrainedModel
    with building:
        with parameters_on_meta():
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _refuse_unknown(path, config, empty)
        loaded, info = load(path.parent, **options)
    if random := sorted(name for name, _ in loaded.named_parameters() if name in info["missing_keys"]):
        more = f" and {len(random) - 5} more" if len(random) > 5 else ""
        raise QuantkitError(
            f"{path}: {len(random)} missing: {', '.join(random[:5])}{more}; the file does not fit its config: download it again"
        )
    tied = loaded.all_tied_weights_keys
    return {name: tensor.contiguous() for name, tensor in loaded.state_dict().items() if name not in tied}
