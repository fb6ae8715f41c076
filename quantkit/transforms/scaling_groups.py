r"""Transforms that move size between a layer's input channels and its weights: where that is possible, and how it is done.

For any positive s, :math:`W x = (W \operatorname{diag}(s)) (\operatorname{diag}(s)^{-1} x)`. If whatever produces x can take
up :math:`1/s`, the model computes what it computed before, but weights and activations have other sizes, and so other rounding
errors. A :class:`ChannelScaling` only says which s it wants, from the weights that read x and from statistics. Factors are
rounded to powers of two, so that nothing is rounded when they are multiplied in, whatever the model's dtype.

Which tensor is read by which sites, and who made it, is seen by watching one forward of each block; no architecture is known
by name. A tensor that sites read can be rescaled by s if one of these takes up 1/s:

- the norm whose output the tensor is: its weight (and bias), or its weight plus one where the norm multiplies by that;
- a linear site with as many outputs as the tensor has channels: its rows (and bias), as the value half of a gated MLP.

Each candidate is tried: factors (powers of two, so that nothing is rounded) are multiplied in, the block is run, and only if
its output did not change is the candidate taken. So a non-linearity in between, or a reader that is no site (a router), rules
itself out. Experts, and values shared by several query heads, are not rescaled.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError
from quantkit.nn.probing import rounding_noise, try_blocks
from quantkit.nn.sites import Block, Site, SiteStatistics, Structure, read_weight, write_weight
from quantkit.numerics.grid import choose_global_scale, powers_of_two
from quantkit.spec import Plan, Scheme
from quantkit.transforms.base import Transform, step_name

TOLERANCE = 1e-3
_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ScalingGroup:
    """Sites that read one tensor, and what can take up the inverse of their factors.

    Attributes:
        readers: the sites, whose columns are multiplied.
        producer: path of the norm or linear layer whose weight (and bias) is divided.
        site: the producer as a site, if it is a linear one.
        offset: what the producer adds to its weight before it multiplies: 1 for some norms, else 0.
    """

    readers: tuple[Site, ...]
    producer: str
    site: Site | None = None
    offset: float = 0.0


def probe_ids(model: nn.Module) -> Tensor:
    """Return the few tokens (1, T) on which invariance is tried."""
    return torch.arange(3, 3 + _TOKENS, device=next(model.parameters()).device).unsqueeze(0)


def find_groups(model: nn.Module, structure: Structure, chosen: Mapping[str, object]) -> list[ScalingGroup]:
    """Return every group whose readers are all in ``chosen``, in model order; the model is as before afterwards."""
    groups = []
    for trial in try_blocks(model, structure, probe_ids(model)):
        readers, makers = watch_readers(trial.module, trial.block, trial.run)
        for sites, maker in zip(readers, makers, strict=True):
            if not all(site.name in chosen for site in sites):
                continue
            for candidate in _candidates(model, trial.block, sites, maker):
                factors = torch.exp2(torch.arange(sites[0].in_features) % 3 - 1.0)
                with _undone(model, candidate):
                    rescale(model, candidate, factors)
                    now = trial.run()
                if _negligible(now[0] - trial.before[0], trial.update) and not trial.rest_changed(now, TOLERANCE):
                    groups.append(candidate)
                    break
    return groups


def _negligible(changed: Tensor, update: Tensor) -> bool:
    """Say whether every token's update (..., channels) of the stream stayed what it was.

    By the median channel: beside a massive one (some models have a channel ten thousand times larger than the others) a change
    of all the others would look small.
    """
    moved, size = (one.abs().flatten(0, -2).float().median(-1).values for one in (changed, update))
    return bool((moved <= TOLERANCE * size).all())


def layers_that_share_inputs(model: nn.Module, structure: Structure) -> list[tuple[Site, ...]]:
    """Return the layers of the blocks, those that read one tensor together (query, key and value; gate and up), in model order.

    Serving engines join such layers into one product, so that they want one scheme. A stack of experts stands alone.
    """
    groups: list[tuple[Site, ...]] = []
    for trial in try_blocks(model, structure, probe_ids(model)):
        readers, _ = watch_readers(trial.module, trial.block, trial.run)
        together = {site.name: sites for sites in readers for site in sites}
        groups += dict.fromkeys(together.get(site.name, (site,)) for site in trial.block.sites)
    return groups


def shared_global_scales(model: nn.Module, structure: Structure, plan: Plan) -> dict[str, Tensor]:
    """Return the global scale (1,) of every 2-D site in the blocks whose grid has one; those that read one tensor share it."""
    chosen = {name for name, scheme in plan.items() if scheme.weight.has_global_scale}
    found: dict[str, Tensor] = {}
    for group in layers_that_share_inputs(model, structure) if chosen else ():
        sites = [site for site in group if site.name in chosen and len(site.shape) == 2]
        if sites:
            largest = torch.stack([read_weight(model, site).abs().amax().float() for site in sites]).amax().view(1)
            found |= {site.name: choose_global_scale(largest, plan[site.name].weight) for site in sites}
    return found


def rescale(model: nn.Module, group: ScalingGroup, factors: Tensor) -> None:
    """Multiply the readers' columns by ``factors`` (in,) and divide the producer's channels by them."""
    for site in group.readers:
        write_weight(model, site, read_weight(model, site) * factors.to(read_weight(model, site)))
    module = model.get_submodule(group.producer)
    if group.site is not None:
        weight = read_weight(model, group.site)
        write_weight(model, group.site, weight / factors.to(weight).unsqueeze(-1))
    else:
        weight = module.get_parameter("weight").data
        module.weight.data = (weight + group.offset) / factors.to(weight) - group.offset  # type: ignore[union-attr]
    if getattr(module, "bias", None) is not None:
        module.bias.data = module.bias.data / factors.to(module.bias.data)  # type: ignore[union-attr, operator, arg-type]


class ChannelScaling(Transform, Protocol):
    """A transform that chooses a factor for every input channel of the layers that read one tensor."""

    def factors(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], statistics: SiteStatistics) -> Tensor:
        """Return s, positive float32 (in,); 1 leaves a channel as it is.

        Args:
            weights: float32 (out_i, in) of every layer that reads the tensor.
            schemes: how each of them will be quantized.
            statistics: results of :attr:`needs` for the tensor.
        """

    def apply(self, model: nn.Module, structure: Structure, plan: Plan, statistics: Mapping[str, SiteStatistics]) -> None:
        """Rescale every group of layers whose input something can take up; a group with a layer outside ``plan`` stays.

        Raises:
            CalibrationError: if no group was found, or the model's output changed after all.
        """
        groups = find_groups(model, structure, plan)
        if not groups:
            raise CalibrationError(f"{step_name(self)}: nothing in this model can be rescaled; leave it out")
        ids = probe_ids(model)
        with torch.no_grad():
            before = model(ids, use_cache=False).logits
            for group in groups:
                weights = [read_weight(model, site).float() for site in group.readers]
                found = statistics.get(group.readers[0].name) or SiteStatistics({}, ())  # none, where nothing is needed
                factors = self.factors(weights, [plan[site.name] for site in group.readers], found)
                rescale(model, group, powers_of_two(factors))
            changed = float((model(ids, use_cache=False).logits - before).abs().max())
        noise = rounding_noise(model, ids) if structure.entangled is not None else 0.0
        limit = max(10 * TOLERANCE, noise) * float(before.abs().max())
        if not changed <= limit:
            raise CalibrationError(f"{step_name(self)} changed the logits by {changed:.3g} (limit {limit:.3g}); leave it out")


def _candidates(model: nn.Module, block: Block, sites: tuple[Site, ...], maker: str | None) -> Iterator[ScalingGroup]:
    """Yield what might take up the factors, likeliest first."""
    features = sites[0].in_features
    if maker is not None:
        weight = getattr(model.get_submodule(maker), "weight", None)
        if isinstance(weight, Tensor) and tuple(weight.shape) == (features,):
            yield ScalingGroup(sites, maker)
            yield ScalingGroup(sites, maker, offset=1.0)
    for site in block.sites:
        if len(site.shape) == 2 and site.shape[0] == features and site not in sites:
            yield ScalingGroup(sites, site.module, site)


@contextlib.contextmanager
def _undone(model: nn.Module, group: ScalingGroup) -> Iterator[None]:
    """Give every parameter of a group its own memory back in the end."""
    modules = [model.get_submodule(site.module) for site in group.readers] + [model.get_submodule(group.producer)]
    before = [(p, p.data) for module in modules for p in module.parameters(recurse=False)]
    try:
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


def watch_readers(
    module: nn.Module, block: Block, run: Callable[[], object]
) -> tuple[list[tuple[Site, ...]], list[str | None]]:
    """Run a block; return the 2-D sites grouped by the tensor they read, and for each the module that returned it.

    Of a layer that runs several times the first time counts.
    """
    made: list[tuple[Tensor, str]] = []
    read: list[tuple[Tensor, list[Site]]] = []
    seen: set[str] = set()
    hooks = []
    for name, child in module.named_modules():
        path = f"{block.name}.{name}" if name else block.name

        def after(_module: nn.Module, _args: object, output: object, path: str = path) -> None:
            if isinstance(output, Tensor):
                made.append((output, path))

        hooks.append(child.register_forward_hook(after))
    for site in block.sites:
        if site.read or len(site.shape) != 2:
            continue
        child = module.get_submodule(site.module.removeprefix(block.name).removeprefix("."))

        def before(_module: nn.Module, args: tuple[Tensor, ...], site: Site = site) -> None:
            if site.name in seen:
                return
            seen.add(site.name)
            for x, sites in read:
                if x is args[0]:
                    sites.append(site)
                    return
            read.append((args[0], [site]))

        hooks.append(child.register_forward_pre_hook(before))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    makers = [next((path for y, path in made if y is x), None) for x, _ in read]
    return [tuple(sites) for _, sites in read], makers
