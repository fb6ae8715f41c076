"""Account for every tensor of a source: which part of the model it fills, or that it is carried over as it is.

The tensors in a directory are not the parameters of the class that reads it. transformers renames, splits and joins tensors as
it loads them, fills a parameter that no tensor belongs to with random numbers, and passes over a tensor that it does not know.
All three are fine for who goes on training and none is for who quantizes: noise would be quantized with care, and layers for
predicting further tokens (``mtp.*``, ``model.layers.61.*``) would be lost without a word.

:func:`account` reads nothing but the headers of the files. It renames every tensor by transformers' own rules, carries out the
conversions on meta tensors, which have shapes and no data, and compares the result with an empty model. What comes out is a
:class:`~quantkit.hf.ledger.Ledger`, in which every tensor of the source stands exactly once, or one error that names everything
that is wrong.

A tensor that fills nothing is *carried over* if it belongs to a part that the class does not have, or is a buffer that older
releases stored. It is refused if it belongs to a part that the class does have, such as a bias of a layer without bias, one
more expert, or one more ordinary layer: then config and files are not of the same model.
"""

import copy
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from quantkit.errors import FormatError
from quantkit.formats.containers.base import Header
from quantkit.hf.ledger import Ledger
from quantkit.hf.weight_files import open_weights

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 4
_BUFFERS = re.compile(
    r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.(attn|attention|self_attn|crossattention)\.(masked_)?bias$|num_batches_tracked$"
)
"""Buffers that older releases stored and that models compute today."""


@dataclass
class _Faults:
    """What is wrong with a source, by kind."""

    kinds: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, what: str) -> None:
        self.kinds[kind].append(what)

    def refuse(self, where: Path, model: nn.Module, hint: str | None) -> None:
        if not self.kinds:
            return
        told = []
        for kind, names in self.kinds.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            told.append(f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}")
        way = hint or "copy or download the source again, or correct its config.json"
        raise FormatError(f"{where}: the tensors are not those of a {type(model).__name__}: {'; '.join(told)}. {way}")


@dataclass
class _Group:
    """The tensors that one conversion joins, and the conversion."""

    transform: Any
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for names in self.names.values() for name in names)


def account(path: Path, model: PreTrainedModel) -> Ledger:
    """Match the tensors in the files of a source with the model that its config describes.

    Args:
        path: the directory.
        model: the model, possibly on the meta device; it is not changed.

    Raises:
        FormatError: a file that is missing or damaged, a parameter that no tensor fills, a tensor of the wrong shape or kind,
            two for one place, or one that belongs to a part of the model without fitting into it. One error names all tensors.
    """
    with open_weights(path) as opened:
        headers = dict(opened.headers)
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    faults, groups, left = _Faults(), dict[str, _Group](), dict[str, str]()
    for name in sorted(headers, key=dot_natural_key):
        target, pattern = _place(name, renamings, converters, model.base_model_prefix, state)
        if target not in state:
            left[name] = target
            continue
        group = groups.get(target)
        if group is None:
            group = groups[target] = _Group(copy.deepcopy(by_pattern[pattern]) if pattern is not None else None)
        group.names[pattern or target].append(name)
        if group.transform is not None:
            group.transform.add_tensor(target, name, pattern, _meta(headers[name]))
    fills = _fill(groups, headers, state, model, faults)
    for name in _missing(fills, state, model):
        faults.add("missing", name)
    carried = _carry(left, model, faults)
    faults.refuse(path, model, _prefix_hint(headers, left, state))
    return Ledger(path, headers, fills, carried, functools.partial(open_weights, path))


def _meta(header: Header) -> Tensor:
    return torch.empty(header.shape, dtype=header.dtype, device="meta")


def _place(
    name: str, renamings: list[Any], converters: list[Any], prefix: str, state: dict[str, Tensor]
) -> tuple[str, str | None]:
    """Return the parameter that a tensor belongs to, and the pattern of the conversion on its way; as transformers does."""
    target, pattern = rename_source_key(name, renamings, converters, prefix, state)
    if target not in state and name in state:
        target, pattern = rename_source_key(name, [], [], prefix, state)
    return target, pattern


def _fill(
    groups: Mapping[str, _Group], headers: Mapping[str, Header], state: Mapping[str, Tensor], model: nn.Module, faults: _Faults
) -> dict[str, tuple[str, ...]]:
    """Return parameter to the tensors that fill it, with shapes compared; what does not fit is added to ``faults``."""
    fills: dict[str, tuple[str, ...]] = {}
    for target, group in groups.items():
        sources = group.sources
        if odd := _wrong_numbers(group):
            faults.add("of a list with gaps", odd)
        if group.transform is None and len(sources) > 1:
            faults.add("more than once", f"{' and '.join(sources)} are both {target}")
        for part, shape in _converted(target, group, headers, model, faults).items():
            fills[part] = sources
            if part not in state or shape is None:
                continue
            if shape != tuple(state[part].shape):
                named = part if len(sources) > 1 or sources[0] == part else f"{sources[0]} ({part})"
                faults.add("of another shape", f"{named} is {shape}, want {tuple(state[part].shape)}")
        if state[target].is_floating_point():
            for name in sources:
                if headers[name].dtype not in _FLOATS:
                    got = str(headers[name].dtype).removeprefix("torch.")
                    faults.add("of another dtype", f"{name} is {got}, want floating-point numbers of 16 or more bits")
    return fills


def _converted(
    target: str, group: _Group, headers: Mapping[str, Header], model: nn.Module, faults: _Faults
) -> dict[str, tuple[int, ...] | None]:
    """Return what a group of tensors becomes: parameter to shape; None for a shape that cannot be told without the data."""
    if group.transform is None:
        return {target: headers[group.sources[0]].shape}
    try:
        found = group.transform.convert(target, model=model, config=model.config)
    except NotImplementedError:  # an operation that has to look at the numbers
        return dict.fromkeys(group.transform.target_patterns and [target], None)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        faults.add("that cannot be put together", f"{target} of {_some(group.sources)} ({_line(error)})")
        return {target: None}
    parts = {name: part[0] if isinstance(part, list) else part for name, part in found.items()}
    return {name: tuple(part.shape) for name, part in parts.items()}


def _wrong_numbers(group: _Group) -> str | None:
    """Say which tensors of a list are not numbered 0, 1, 2, ...: transformers joins whatever is there."""
    if group.transform is None or not any(isinstance(one, MergeModulelist) for one in group.transform.operations):
        return None
    for names in group.names.values():
        rows = [tuple(re.findall(r"\d+", name)) for name in names]
        frames = {re.sub(r"\d+", "*", name) for name in names}
        columns = list(zip(*rows, strict=True)) if len({len(row) for row in rows}) == 1 else []
        varying = [column for column in columns if len(set(column)) > 1]
        numbers = sorted(map(int, varying[0])) if len(varying) == 1 else []
        if len(names) > 1 and (len(frames) > 1 or numbers != list(range(len(names)))):
            return f"{_some(names)} (want numbers 0 to {len(names) - 1})"
    return None


def _missing(fills: Mapping[str, tuple[str, ...]], state: Mapping[str, Tensor], model: PreTrainedModel) -> list[str]:
    """Return the parameters that nothing fills; one that is tied to a filled one is filled."""
    tied: dict[str, set[str]] = defaultdict(set)
    for target, source in model.all_tied_weights_keys.items():
        tied[source] |= {target, source}
    same = {name: members for members in tied.values() for name in members}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    computed = re.compile("|".join(f"({one})" for one in model._keys_to_ignore_on_load_missing or ()) or r"(?!)")
    return [
        name
        for name in state
        if name not in fills
        and not same.get(name, set()) & fills.keys()
        and (name in parameters or not (computed.search(name) or _BUFFERS.search(name)))
    ]


def _carry(left: Mapping[str, str], model: PreTrainedModel, faults: _Faults) -> tuple[str, ...]:
    """Return the tensors that are carried over, of those that fill nothing; the others are added to ``faults``."""
    known = re.compile("|".join(f"({one})" for one in model._keys_to_ignore_on_load_unexpected or ()) or r"(?!)")
    more: dict[tuple[str, str], set[str]] = defaultdict(set)
    owners = {name: _owner(model, target) for name, target in left.items()}
    for path, rest in owners.values():
        if isinstance(model.get_submodule(path), nn.ModuleList):
            number, _, inner = rest.partition(".")
            more[path, number].add(inner)
    carried = []
    for name, target in left.items():
        path, rest = owners[name]
        owner = model.get_submodule(path)
        number, _, inner = rest.partition(".")
        if not any(True for _ in owner.children()) and owner._parameters:
            faults.add("that the model has no place for", name)
        elif (path, number) in more and _is_ordinary(owner, more[path, number]):
            faults.add(
                f"of {path}.{number}, one more than the {sum(1 for _ in owner.children())} that config.json speaks of", name
            )
        elif known.search(target) or _BUFFERS.search(target) or not _inside_a_list(model, path):
            carried.append(name)
        else:
            faults.add("that the model has no place for", name)
    return tuple(carried)


def _owner(model: nn.Module, name: str) -> tuple[str, str]:
    """Return the path of the innermost module of the model that a name leads to, and the rest of the name."""
    module, path = model, ""
    parts = name.split(".")
    for index, part in enumerate(parts):
        child = module._modules.get(part)
        if child is None:
            return path, ".".join(parts[index:])
        module, path = child, f"{path}.{part}" if path else part
    return path, ""


def _inside_a_list(model: nn.Module, path: str) -> bool:
    """Say whether a module is one of a list of layers or experts, or part of one."""
    parts = path.split(".") if path else []
    return any(isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(len(parts)))


def _is_ordinary(owner: nn.Module, names: set[str]) -> bool:
    """Say whether tensors look like one more member of a list: each is called like one of the members' own."""
    own = {name for member in owner.children() for name in member.state_dict()}
    plain = {name for name in names if not _BUFFERS.search(name)}
    return isinstance(owner, nn.ModuleList) and bool(own) and {_unnumbered(n) for n in plain} <= {_unnumbered(n) for n in own}


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _prefix_hint(headers: Mapping[str, Header], left: Mapping[str, str], state: Mapping[str, Tensor]) -> str | None:
    """Say so if all names have a prefix too many."""
    if not headers or len(left) < len(headers):
        return None
    first = next(iter(headers))
    for end in (index + 1 for index, letter in enumerate(first) if letter == "."):
        prefix = first[:end]
        if all(name.startswith(prefix) for name in headers) and any(name.removeprefix(prefix) in state for name in headers):
            return f"All names begin with {prefix!r}: remove this prefix from the names in the files"
    return None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
