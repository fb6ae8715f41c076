"""Find what can be quantized in a model, without a table of architectures.

:func:`describe` looks at the module tree and answers three questions about every parameter:

* **Is it inside the decoder stack?** The stack is the ``nn.ModuleList`` with the most parameters (inside the text decoder, if
  the model has other towers). Its children are the blocks, in order of execution.
* **Is it a weight that multiplies activations?** These are the weights of ``nn.Linear`` and of transformers' ``Conv1D`` (stored
  transposed), and the 3-D stacks of experts that transformers runs through its experts interface. They become sites: inside
  the blocks, or ``outside`` (an untied output head, projections around the stack, other towers). So do, inside the blocks,
  weights that their module multiplies by in its own way (experts off that interface, linear layers with another forward): they
  are read there, and marked so.
* **If not, why?** Every other parameter is listed with a reason, so nothing is skipped silently.

Routers choose experts, and an error there sends a token to the wrong expert, so routers are never quantized. A router is
recognised by its place next to a module that holds experts: it is the child whose only matrix has one output per expert (or one
output in total, for the gate of a shared expert), or a child of a class of its own that contains exactly one matrix.

Only names, classes and shapes are used, so the model may be on the meta device. The cost is milliseconds.
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.errors import SpecError
from quantkit.hf.experts import expert_parameters, linears_in_place, uses_experts_interface
from quantkit.hf.ledger import ledger_of
from quantkit.hf.reads import weights_read_elsewhere
from quantkit.nn.linear import QuantModule
from quantkit.nn.sites import Block, Site, Structure

logger = logging.getLogger(__name__)

SMALLEST = 32
"""Rows and columns below which the matrices of a stack are taken for something other than weights."""

_Odd = dict[type, bool]
"""Class of a linear layer to whether it multiplies in its own way, and not as ``x @ weight.T + bias``."""


def describe(model: nn.Module) -> Structure:
    """Return the blocks of ``model``, their sites, and a reason for every parameter that is not a site.

    Every parameter name (including tied ones) is in exactly one of ``sites``, ``outside`` and ``skipped``.

    Args:
        model: a decoder-only transformers model, or any module with a ``ModuleList`` of layers; may be on the meta device.

    Raises:
        SpecError: an encoder-decoder model, a model without repeated layers, or one without quantizable weights.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise SpecError(
            f"{type(model).__name__} is an encoder-decoder model, want a decoder-only model; quantize its decoder alone"
        )
    stack = find_stack(model)
    sorted_out = _sort_parameters(model, stack)
    skipped = sorted_out.skipped
    stacks = [stack, *_equal_stacks(model, stack)]
    names = [f"{path}.{name}" for path in stacks for name, _ in model.get_submodule(path).named_children()]
    inside: dict[str, list[Site]] = {name: [] for name in names}
    outside: list[Site] = []
    for site in sorted_out.sites:
        block = next((name for name in names if f"{site.module}.".startswith(f"{name}.")), None)
        (outside if block is None else inside[block]).append(site)
    if not any(inside.values()):
        if any(isinstance(module, QuantModule) for module in model.modules()):
            raise SpecError(
                f"{type(model).__name__}: nothing to quantize in {stack}: its layers are quantized already, and quantizing "
                "changes a model itself; load the float model again, or quantize a copy of it each time (copy.deepcopy)"
            )
        raise SpecError(
            f"{type(model).__name__}: nothing to quantize in {stack} ({len(names)} layers): no nn.Linear, Conv1D or expert "
            f"stack with floating-point weights; reasons: {', '.join(sorted(set(skipped.values()))) or 'no parameters'}"
        )
    blocks = tuple(Block(name, tuple(sites)) for name, sites in inside.items())
    embedding, head, tied = _ends(model)
    ledger = ledger_of(model)
    kept = ledger.carried_headers if ledger is not None else {}
    return Structure(
        blocks,
        tuple(outside),
        skipped,
        embedding,
        head,
        tied,
        shared=frozenset(sorted_out.shared),
        unreachable=frozenset(sorted_out.unreachable),
        carried=frozenset(name for name, header in kept.items() if len(header.shape) > 1),
    )


def _ends(model: nn.Module) -> tuple[Site | None, str | None, bool]:
    """Return the input embedding as a site (None if it cannot be quantized), the name of the output head, and whether the
    two are tied."""
    if not hasattr(model, "get_input_embeddings"):
        return None, None, False
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    weight = getattr(embedding, "weight", None)
    tied = weight is not None and head is not None and getattr(head, "weight", None) is weight
    others = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and name.rpartition(".")[0] not in (names.get(id(embedding)), names.get(id(head)))
    ]
    site = None
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None and not (tied and type(head) is not nn.Linear)
    if plain and not others and isinstance(weight, Tensor) and weight.is_floating_point():
        path = names[id(embedding)]
        site = Site(path, path, "weight", tuple(weight.shape))
    return site, names.get(id(head)), tied


def find_stack(model: nn.Module) -> str:
    """Return the path of the ModuleList with the most parameters, inside the text decoder if the model names one.

    A list inside a model with a kind of config of its own, as towers for images and sound have, counts only without another.

    Raises:
        SpecError: there is no ModuleList with parameters.
    """
    sizes: dict[str, int] = {
        name: size for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and (size := _weights(module))
    }
    if not sizes:
        raise SpecError(f"{type(model).__name__}: no repeated layers; want an nn.ModuleList of decoder layers")
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    within = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    own = [name for name in sizes if not any(f"{name}.".startswith(tower) for tower in towers(model))] or list(sizes)
    text = [name for name in own if id(model.get_submodule(name)) in within]
    return max(text or own, key=sizes.__getitem__)


def _equal_stacks(model: nn.Module, stack: str) -> list[str]:
    """Return the paths of other lists of as many layers of the same classes: some models alternate between two stacks."""
    layers, beside = [type(layer) for layer in model.get_submodule(stack).children()], tuple(towers(model))
    lists = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and name != stack)
    return [
        name
        for name, part in lists
        if [type(layer) for layer in part.children()] == layers and not f"{name}.".startswith((f"{stack}.", *beside))
    ]


def towers(model: nn.Module) -> list[str]:
    """Return the paths, each with a dot, of models inside the model whose config is neither its own nor its text's kind."""
    if not isinstance(model, PreTrainedModel):
        return []
    kinds = (type(model.config), type(model.config.get_text_config(decoder=True)))
    parts = ((name, part) for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel))
    return [f"{name}." for name, part in parts if type(part.config) not in kinds]


def _weights(module: nn.Module) -> int:
    """Return how many weights a module has, float or quantized."""
    quantized = sum(part.numel for part in module.modules() if isinstance(part, QuantModule))
    return quantized + sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Every parameter of a model: sites in order of registration, and the others by name with a reason."""

    sites: list[Site] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)


def _sort_parameters(model: nn.Module, stack: str) -> _Sorted:
    """Decide for every parameter name whether it is a site, or why not."""
    owners = owners_of(model)
    stacks = tuple(f"{path}." for path in (stack, *_equal_stacks(model, stack)))
    routers = {name for path in stacks for name in _routers(model, path[:-1])}
    readers = weights_read_elsewhere(model)
    config = model.config.get_text_config(decoder=True) if isinstance(model, PreTrainedModel) else None
    odd: _Odd = {}
    found = _Sorted()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if owners[name] != name:
            found.skipped[name] = f"tied to {owners[name]}"
            found.shared.append(name)
        elif name in routers:
            found.skipped[name] = "router"
        else:
            verdict = _as_site(path, module, attribute, parameter, odd, config)
            if isinstance(verdict, Site) and path in readers and attribute == "weight":
                verdict = f"{readers[path]} reads its weight"
            if isinstance(verdict, Site) and verdict.read and not name.startswith(stacks):
                verdict = "its module multiplies by it in its own way"
            if isinstance(verdict, Site):
                found.sites.append(verdict)
                continue
            found.skipped[name] = verdict or _reason(module, attribute, parameter)
            if verdict:
                found.unreachable.append(name)
    return found


def owners_of(model: nn.Module) -> dict[str, str]:
    """Return parameter name to the name under which the parameter is stored, which is another where several names share it.

    That is the embedding's if one of them is an embedding, else the first that transformers does not call tied to another.
    """
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of[id(parameter)].append(name)
    tied = getattr(model, "all_tied_weights_keys", {})  # a module that is not transformers' own declares none
    owners: dict[str, str] = {}
    for names in names_of.values():
        tables = (name for name in names if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding))
        owner = next(tables, next((name for name in names if name not in tied), names[0]))
        owners |= dict.fromkeys(names, owner)
    return owners


def _as_site(path: str, module: nn.Module, attribute: str, parameter: Tensor, seen: _Odd, config: Any) -> Site | str | None:
    """Return the site of a parameter, the reason why a linear layer's weight is none, or None for any other parameter."""
    shape = tuple(parameter.shape)
    if isinstance(module, nn.Linear | Conv1D) and attribute == "weight":
        if not parameter.is_floating_point():
            return f"weight is {parameter.dtype}, not floating point"
        if type(module) not in seen:
            seen[type(module)] = type(module) not in (nn.Linear, Conv1D) and _forward_differs(module)
        if seen[type(module)]:
            return Site(f"{path}.{attribute}", path, attribute, shape, read=True)
        transposed = isinstance(module, Conv1D)
        return Site(path, path, attribute, shape[::-1] if transposed else shape, transposed)
    if parameter.ndim == 3 and uses_experts_interface(module) and attribute in expert_parameters(module):
        transposed = bool(getattr(module, "is_transposed", False))
        shape = (shape[0], shape[2], shape[1]) if transposed else shape
        return Site(f"{path}.{attribute}", path, attribute, shape, transposed)
    if _is_matrix_of_its_own(module, parameter):
        transposed = config is not None and bool(linears_in_place(module, attribute, config))
        shape = (shape[0], shape[2], shape[1]) if transposed else shape
        return Site(f"{path}.{attribute}", path, attribute, shape, transposed, read=True)
    return None


def _is_matrix_of_its_own(module: nn.Module, parameter: Tensor) -> bool:
    """Return whether a parameter is a weight that its module of experts multiplies by: a matrix or a stack of matrices."""
    kind = type(module).__name__.lower()
    if isinstance(module, nn.Embedding | _ConvNd) or "norm" in kind or not parameter.is_floating_point():
        return False
    if parameter.ndim not in (2, 3) or not ("expert" in kind or "moe" in kind):
        return False
    return min(parameter.shape[-2:]) >= SMALLEST and parameter.shape[0] > 1


def _forward_differs(module: nn.Module) -> bool:
    """Return whether a subclass of nn.Linear or Conv1D multiplies in its own way: its output is not x @ weight.T + bias."""
    trial = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    fresh = {name: p if p is None else torch.randn(p.shape, generator=generator) for name, p in module._parameters.items()}
    trial.__dict__["_parameters"] = {name: p if p is None else nn.Parameter(p) for name, p in fresh.items()}
    weight = fresh["weight"]
    assert weight is not None
    weight = weight.T if isinstance(module, Conv1D) else weight
    x = torch.randn(3, weight.shape[1], generator=generator)
    name = type(module).__name__
    try:
        with torch.no_grad():
            got = type(module).forward(trial, x)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        logger.debug("%s is not a plain linear layer: %s", name, error)
        return True
    want = functional.linear(x, weight, fresh.get("bias"))
    same = isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-3, atol=1e-3)
    return not same


def _reason(module: nn.Module, attribute: str, parameter: Tensor) -> str:
    """Return what kind of parameter this is, for one that is neither a site nor tied nor part of a router."""
    kind = type(module).__name__
    if attribute == "bias" or attribute.endswith("_bias"):
        return "bias"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in kind.lower():
        return "norm"
    if isinstance(module, _ConvNd):
        return "convolution"
    return f"{parameter.ndim}-D parameter" + ("" if parameter.ndim < 2 else f" of {kind}, which is not a linear layer")


def _routers(model: nn.Module, stack: str) -> Iterator[str]:
    """Yield the names of the weights in the stack that choose experts, or scale a shared expert."""
    for path, module in model.get_submodule(stack).named_modules(prefix=stack):
        if path == stack:
            continue
        if isinstance(module, nn.Linear) and "router" in path[len(stack) :].lower():
            yield f"{path}.weight"
        children = dict(module.named_children())
        gate_widths = {count for child in children.values() if (count := _expert_count(child))}
        for name, child in children.items():
            bare = isinstance(child, nn.Linear | Conv1D)
            matrices = [(inner, p) for inner, p in child.named_parameters() if p.ndim > 1 and (bare or p.squeeze().ndim > 1)]
            if not gate_widths or _expert_count(child) or len(matrices) != 1 or isinstance(child, nn.Embedding | _ConvNd):
                continue
            inner, weight = matrices[0]
            outputs = weight.shape[1] if isinstance(child, Conv1D) else weight.shape[0]
            if not bare or outputs in (1, *gate_widths):
                yield f"{path}.{name}.{inner}"


def _expert_count(module: nn.Module) -> int | None:
    """Return the number of experts that a module holds, as 3-D parameters or as a list of equal modules; None if none."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        members = list(module.children())
        same = len({type(member) for member in members}) == 1
        return len(members) if len(members) > 1 and same and any(p.ndim > 1 for p in members[0].parameters()) else None
    if isinstance(module, _ConvNd):
        return None
    leading = {p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3 and p.shape[0] > 1}
    return leading.pop() if len(leading) == 1 else None
