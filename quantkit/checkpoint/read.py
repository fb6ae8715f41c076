"""Reading: everything is validated before a model is built, and nothing in a file is trusted."""

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.activations import choose
from quantkit.checkpoint.contents import Contents, contents_of, read_site, same_bits
from quantkit.checkpoint.publish import is_marked
from quantkit.checkpoint.record import check_sums
from quantkit.errors import FormatError, QuantkitError
from quantkit.formats.base import FORMATS, Format, Held, Matcher, Stored
from quantkit.formats.containers.base import Reader
from quantkit.hf.gguf_header import inspect_gguf
from quantkit.hf.load import read_config
from quantkit.nn.sites import Site
from quantkit.qtensor import QTensor
from quantkit.spec import Scheme
from quantkit.system.files import named_path

RECORD = "quantkit"
"""Section of the config with what the writer recorded."""

MIN_BITS = 2
"""Bits of the narrowest weight that any format stores."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose files agree with its config.

    Attributes:
        path: the directory.
        config: the model's config with ``quantization_config``.
        format_name: name in the registry.
        contents: what the model's config says a checkpoint holds.
        stored: entry name to how it is stored, for every quantized tensor.
        reader: the tensors.
        carried: names of the tensors that the model's class does not know, as the writer recorded them.
    """

    path: Path
    config: dict[str, Any]
    format_name: str
    contents: Contents
    stored: dict[str, Stored]
    reader: Reader
    carried: tuple[str, ...] = ()

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Site name to scheme."""
        return {e.site.name: self.stored[e.name].scheme for e in self.contents.entries if e.site and e.name in self.stored}

    def qtensor(self, site: Site, *, copy: bool = True) -> QTensor:
        """Read and decode one quantized site; without ``copy`` it may be views of the files, good while they are open.

        Raises:
            FormatError: tensors contradict the scheme or each other, or a scale is NaN or infinite.
        """
        try:
            found = read_site(site, self.contents.entries, self.stored, lambda name: self.reader.read(name, copy=copy))
        except QuantkitError as error:
            raise FormatError(f"{self.path}: {error}") from error
        for name, tensor in found.parts().items():
            if not _is_finite(tensor):
                raise FormatError(
                    f"{self.path}: {site.name}: {name} holds NaN or infinity, which no writer stores; copy it again"
                )
        return found


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[Opened]:
    """Open and validate a quantized checkpoint.

    Raises:
        FormatError: it is unfinished, damaged, not quantized, or its config contradicts its tensors.
    """
    path = named_path(path)
    if reason := is_marked(path):
        raise FormatError(f"{path} is marked incomplete: {reason}")
    name, rule, config = _find_format(path)
    with rule.container.reader(path) as reader:
        where = path / rule.container.key_file
        contents = _contents(path, where, config, reader)
        matcher = _matcher(where, rule, config, reader)
        stored = _match_entries(where, contents, matcher, rule)
        carried = _carried(where, config)
        _check_tensors(path, contents, stored, reader, carried)
        yield Opened(path, config, name, contents, stored, reader, carried)


def _find_format(path: Path) -> tuple[str, Format, dict[str, Any]]:
    """Return name and value of the format of a checkpoint, and its config."""
    odd: str | None = None
    for name, rule in FORMATS:
        config = rule.container.config(path)
        if config is None:
            continue
        where, quantization = path / rule.container.key_file, config.get("quantization_config")
        if not isinstance(quantization, dict):
            odd = f"{where} has no quantization_config: a float model; load it with transformers, or quantize it"
        elif rule.claims(quantization):
            return name, rule, config
        else:
            known = ", ".join(dict.fromkeys(other.dialect.quant_method for _, other in FORMATS))
            odd = f"{where}: quant_method is {quantization.get('quant_method')!r}; quantkit reads {known}"
    files = ", ".join(dict.fromkeys(rule.container.key_file for _, rule in FORMATS))
    absent = "has none of the files of a checkpoint" if path.is_dir() else "is not a directory; want a checkpoint with one of"
    raise FormatError(odd or f"{path} {absent}: {files}")


def _contents(path: Path, where: Path, values: Mapping[str, Any], reader: Reader) -> Contents:
    try:
        config = read_config(values, path)
        layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    except QuantkitError as error:
        raise FormatError(f"{where}: {error}") from error
    except Exception as error:  # transformers validates with exceptions of many libraries; none of them may pass for ours
        raise FormatError(f"{where}: transformers cannot read it: {error}") from error
    if layers > len(reader.headers):
        raise FormatError(f"{where}: {layers} layers, but the files hold only {len(reader.headers)} tensors")
    most = 8 * sum(header.nbytes for header in reader.headers.values()) // MIN_BITS
    try:
        return contents_of(config, most_weights=most)
    except QuantkitError as error:
        raise FormatError(f"{where}: {error}") from error


def _matcher(where: Path, rule: Format, config: Mapping[str, Any], reader: Reader) -> Matcher:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    tensors = {
        name: Held(header.dtype, header.shape, functools.partial(reader.read, name)) for name, header in reader.headers.items()
    }
    try:
        return rule.dialect.load_config(config["quantization_config"], dtype, tensors)
    except QuantkitError as error:
        raise FormatError(f"{where}: {error}") from error


def _match_entries(where: Path, contents: Contents, matcher: Matcher, rule: Format) -> dict[str, Stored]:
    """Find which entries are quantized, and check that every site is so as a whole and fits its grid."""
    stored: dict[str, Stored] = {}
    seen: dict[str, Scheme | None] = {}
    for entry in contents.entries:
        if entry.site is None or (entry.site == contents.structure.embedding and not rule.dialect.embeddings):
            continue
        found = matcher(entry.module)
        scheme = found.scheme if found else None
        if seen.setdefault(entry.site.name, scheme) != scheme:
            raise FormatError(f"{where}: the parts of {entry.site.name} have different schemes; {entry.module} differs")
        if found is None:
            continue
        if reason := found.scheme.weight.rejects(entry.weight_shape):
            raise FormatError(f"{where}: {entry.module}: {reason}")
        stored[entry.name] = found
    if not stored and not rule.floats:
        raise FormatError(f"{where}: quantization_config names no weight of this model")
    return stored


def _carried(where: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the tensors that our writer recorded as carried over from the source."""
    section = config.get(RECORD, {})
    if not isinstance(section, dict):
        raise FormatError(
            f"{where}: {RECORD} is a {type(section).__name__}, want what quantkit has noted; copy the whole checkpoint again"
        )
    names = section.get("carried_over", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise FormatError(f"{where}: {RECORD}.carried_over is no list of different names; copy the whole checkpoint again")
    return tuple(names)


def _check_tensors(
    path: Path, contents: Contents, stored: Mapping[str, Stored], reader: Reader, carried: tuple[str, ...]
) -> None:
    """Compare the names, dtypes and shapes in the files with what the config promises."""
    expected: set[str] = set()
    dtypes = {name: tensor.dtype for name, tensor in contents.model.state_dict().items()}
    for entry in contents.entries:
        if entry.name in stored:
            how = stored[entry.name]
            try:
                layout = how.codec.layout(how.scheme.weight, entry.weight_shape)
            except QuantkitError as error:
                raise FormatError(f"{path}: {entry.module}: {error}") from error
            for suffix, (dtype, shape) in layout.items():
                expected.add(f"{entry.module}.{suffix}")
                _check_tensor(path, reader, f"{entry.module}.{suffix}", shape, (dtype,))
        else:
            expected.add(entry.name)
            own = dtypes[entry.source.pieces[0].parameter]
            _check_tensor(path, reader, entry.name, entry.shape, _FLOATS if own.is_floating_point else (own,))
    if odd := sorted(expected & set(carried)):
        raise FormatError(f"{path}: {odd[0]} is recorded as carried over, but belongs to the model")
    if lost := [name for name in carried if name not in reader.headers]:
        raise FormatError(
            f"{path}: tensor {lost[0]}, carried over from the source, is missing; copy the whole checkpoint again"
        )
    expected |= set(carried)
    _check_ties(path, contents, reader)
    ignorable = getattr(contents.model, "_keys_to_ignore_on_load_unexpected", None) or []
    no_bias = {f"{entry.module}.bias" for entry in contents.entries if entry.name in stored}  # AutoGPTQ wrote zeros for them
    extra = [
        name
        for name in reader.headers
        if name not in expected
        and not (name in no_bias and not bool(reader.read(name).any()))
        and name not in contents.model.all_tied_weights_keys
        and not any(re.search(pattern, name) for pattern in ignorable)
    ]
    if extra:
        hint = "; permuted groups (weight_g_idx) are not supported" if any(n.endswith("weight_g_idx") for n in extra) else ""
        raise FormatError(f"{path}: {len(extra)} tensors that the config does not account for: {', '.join(extra[:3])}{hint}")


def _check_ties(path: Path, contents: Contents, reader: Reader) -> None:
    """Refuse a tensor of its own in the place of one that the config calls tied: it would be passed over."""
    for target, source in contents.model.all_tied_weights_keys.items():
        if target not in reader.headers:
            continue
        same = source in reader.headers and same_bits(reader.read(target), reader.read(source, copy=False))
        if not same:
            raise FormatError(
                f"{path}: the config ties {target} to {source}, but the files hold another {target}; set tie_word_embeddings "
                "to false in config.json if the tensor is meant"
            )
    reader.release()


def _check_tensor(path: Path, reader: Reader, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    header = reader.headers.get(name)
    if header is None:
        raise FormatError(f"{path}: tensor {name} is missing, though the config promises it; copy the whole checkpoint again")
    if header.dtype not in dtypes or header.shape != shape:
        want = f"{' or '.join(str(dtype) for dtype in dtypes)} {shape}"
        raise FormatError(f"{path}/{header.file}: {name} is {header.dtype} {header.shape}, the config promises {want}")


def _is_finite(tensor: Tensor) -> bool:
    """Say whether all numbers are finite; narrow floats are widened, since torch does not ask them."""
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def inspect(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Describe a checkpoint without loading it: formats, schemes, bytes, shards, metadata. JSON-able.

    Args:
        path: its directory; or a GGUF file, whoever wrote it.
        verify: read every tensor and compare it with its checksum.

    Raises:
        FormatError: as :func:`load`.
    """
    if (file := named_path(path)).suffix == ".gguf" and file.is_file():
        if verify:
            raise FormatError(f"{file} has no checksums to verify it with; leave verify out")
        return inspect_gguf(file)
    with open_checkpoint(path) as opened:
        if verify:
            check_sums(opened.path, opened.reader)
        weights = {e.name: torch.Size(e.shape).numel() for e in opened.contents.entries if e.name in opened.stored}
        prefixes = {e.module: e.name for e in opened.contents.entries if e.name in opened.stored}
        quantized_bytes = sum(
            h.nbytes for n, h in opened.reader.headers.items() if n.rpartition(".")[0] in prefixes and n not in _bias(prefixes)
        )
        kept = {name: opened.reader.headers[name] for name in opened.carried}
        every = sum(torch.Size(e.shape).numel() for e in opened.contents.entries)
        every += sum(torch.Size(header.shape).numel() for header in kept.values())
        files = {f: (opened.path / f).stat().st_size for f in sorted({h.file for h in opened.reader.headers.values()})}
        return {
            "path": str(path),
            "format": opened.format_name,
            "model": (opened.config.get("architectures") or [opened.config.get("model_type")])[0],
            "dtype": opened.config.get("dtype") or opened.config.get("torch_dtype"),
            "schemes": _scheme_table(opened),
            "modules": {name: scheme.weight.describe() for name, scheme in opened.schemes.items()},
            "parameters": every,
            "quantized_parameters": sum(weights.values()),
            "quantized_bytes": quantized_bytes,
            "quantized_bits_per_weight": quantized_bytes * 8 / sum(weights.values()) if weights else 0.0,
            "carried_over": {
                "tensors": len(kept),
                "bytes": sum(header.nbytes for header in kept.values()),
                "names": list(kept),
            },
            "tensor_bytes": sum(header.nbytes for header in opened.reader.headers.values()),
            "bytes": sum(files.values()),
            "bits_per_weight": sum(files.values()) * 8 / every,
            "shards": files,
            "compute": str(choose(opened.config.get(RECORD, {}))),
            "metadata": {key: value for key, value in opened.config.get(RECORD, {}).items() if key != "carried_over"},
        }


def _bias(modules: Mapping[str, str]) -> set[str]:
    return {f"{module}.bias" for module in modules}


def _scheme_table(opened: Opened) -> list[dict[str, Any]]:
    counts: dict[Scheme, int] = {}
    for scheme in opened.schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    return [{"scheme": scheme.to_dict(), "describe": scheme.weight.describe(), "layers": n} for scheme, n in counts.items()]
