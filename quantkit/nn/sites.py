"""Sites and blocks: the algorithm's view of a model, free of any model class.

A :class:`Site` is one weight matrix (or a 3-D stack of expert matrices) that can be quantized, always seen as
(out, in) or (experts, out, in) whatever way its module stores it. A :class:`Block` is one decoder layer: the unit that is
calibrated, quantized and written at a time.
"""

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)
DerivedT = TypeVar("DerivedT")


@dataclass(frozen=True, slots=True)
class Site:
    """One quantizable weight.

    Attributes:
        name: unique name: the module path, plus ``.<parameter>`` when the parameter is not called ``weight``.
        module: path of the module that owns the parameter.
        parameter: attribute of the parameter on that module.
        shape: (out, in) or (experts, out, in).
        transposed: the parameter is stored with its last two axes swapped (Conv1D, some expert stacks).
    """

    name: str
    module: str
    parameter: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def in_features(self) -> int:
        """Size of the input (reduction) axis."""
        return self.shape[-1]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, slots=True)
class Block:
    """One repeated layer of the model: the path of its module and its sites in the order they are registered."""

    name: str
    sites: tuple[Site, ...]


@dataclass(frozen=True, slots=True)
class Structure:
    """What can be quantized in a model.

    Attributes:
        blocks: the decoder layers in order of execution.
        outside: sites outside every block (an untied output head, projections around the stack); left alone unless named.
        skipped: parameter name to reason, for every remaining parameter (norms, biases, embeddings, routers).
        embedding: the table of the input embedding, (vocabulary, hidden), if it can be quantized. It stays among ``skipped``,
            because it multiplies nothing, and is left alone unless asked for.
        head: name of the output head, or None.
        tied: the head is the embedding's own table.
        shared: names in ``skipped`` that are stored, and counted, under another name.
        unreachable: names in ``skipped`` of linear layers and experts that would be quantized if they could be replaced.
        carried: names of matrices in the source's files that the model's class does not know; they are copied as they are.
        entangled: why blocks cannot be run one by one, so that the whole model has to run; None if they can, or if nobody has
            tried yet (:func:`quantkit.nn.block_calls.why_entangled` does).
    """

    blocks: tuple[Block, ...]
    outside: tuple[Site, ...]
    skipped: dict[str, str]
    embedding: Site | None = None
    head: str | None = None
    tied: bool = False
    shared: frozenset[str] = frozenset()
    unreachable: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()
    entangled: str | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites inside blocks, in order."""
        return tuple(site for block in self.blocks for site in block.sites)

    @property
    def ends(self) -> frozenset[str]:
        """Names of the input embedding and the output head, as far as the model has them."""
        return frozenset(name for name in (self.embedding.name if self.embedding else None, self.head) if name is not None)

    @property
    def after(self) -> tuple[Site, ...]:
        """The embedding, if it can be quantized, and the sites outside the blocks: what is quantized after them."""
        return (*((self.embedding,) if self.embedding else ()), *self.outside)


def read_weight(model: nn.Module, site: Site) -> Tensor:
    """Return the site's weight as (out, in) or (experts, out, in): a view of the parameter, detached."""
    weight: Tensor = getattr(model.get_submodule(site.module), site.parameter)
    return weight.detach().transpose(-1, -2) if site.transposed else weight.detach()


def write_weight(model: nn.Module, site: Site, value: Tensor) -> None:
    """Give the site's parameter a new value, (out, in) or (experts, out, in), in the parameter's dtype and device.

    The parameter gets new memory: the old may be shared, or a file's pages, which writing would make copies of for good.
    """
    parameter: Tensor = getattr(model.get_submodule(site.module), site.parameter)
    value = value.to(parameter.device, parameter.dtype)
    parameter.data = value.transpose(-1, -2).contiguous() if site.transposed else value


def sharing_copy(model: ModelT) -> ModelT:
    """Return a copy of ``model`` whose parameters share the memory of the original's.

    A parameter of either that gets a new value gets new memory with it (:func:`write_weight`), so the other stays what it is.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared)


@dataclass
class SiteStatistics:
    """Results of the collectors of one layer; for a 3-D site every result has a leading expert axis.

    Layers that read the same tensor share one of these.

    Attributes:
        results: collector name to result.
        tokens: number of rows seen, per expert for a 3-D site.
    """

    results: dict[str, Tensor]
    tokens: tuple[int, ...]
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derived(self, how: Callable[["SiteStatistics"], DerivedT]) -> DerivedT:
        """Return ``how(self)``, computed once for all layers that share these statistics.

        Args:
            how: a frozen dataclass with a ``__call__``: its fields are everything the result depends on beside the statistics,
                and equal values share one result.
        """
        if how not in self._derived:
            self._derived[how] = how(self)
        found: DerivedT = self._derived[how]
        return found

    def expert(self, index: int) -> "SiteStatistics":
        """Return the statistics of one expert."""
        return SiteStatistics({name: value[index] for name, value in self.results.items()}, (self.tokens[index],))
