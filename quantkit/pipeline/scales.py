"""Do the scales of a plan fit the dtype that they are stored in? Asked of the weights, before any long work.

A float16 scale ends at 65504 above and has no digits left below 5e-7, so 8-bit weights of size 1e-5 have scales that it cannot
hold: all of them would become zero. Such a layer gets the next wider dtype that the format can store, and the coverage table
says so; where there is none, it is an error that names the layer, unless what is lost does not matter: single blocks of weights
a million times smaller than the rest, which are told of.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantkit.checkpoint.shared import same_numbers
from quantkit.errors import SpecError
from quantkit.nn.sites import Site, Structure, read_weight
from quantkit.numerics import grid
from quantkit.pipeline.plan import Resolution
from quantkit.spec import Scheme
from quantkit.system.memory import PageRelease

log = logging.getLogger(__name__)

WIDER = ("float16", "bfloat16", "float32")
"""Dtypes of scales in the order in which they are tried; the formats of FP4 have scales of their own."""

NEGLIGIBLE = 1e-4
"""Share of a layer's squared weights that may get lost without an error."""


@dataclass(frozen=True, slots=True)
class _Fit:
    """How the scales of a layer fit a dtype.

    Attributes:
        small: number of blocks whose scale is too small.
        blocks: number of blocks that are not all zero.
        share: share of the squared weights that is in them.
        large: the largest scale, if it is too large, else None.
    """

    small: int
    blocks: int
    share: float
    large: float | None

    @property
    def whole(self) -> bool:
        return not self.small and self.large is None

    @property
    def tolerable(self) -> bool:
        return self.large is None and self.share <= NEGLIGIBLE


def fit_scales(
    model: nn.Module, structure: Structure, resolution: Resolution, formats: Sequence[str], dtype: str
) -> Resolution:
    """Return the plan with wider scales for the layers that need them.

    Args:
        model: the float model, with its weights.
        structure: its layers.
        resolution: the plan.
        formats: names of the formats that are written, all of which must hold the scales.
        dtype: dtype of the checkpoint's unquantized weights, which some formats impose on scales.

    Raises:
        SpecError: a layer whose scales no dtype holds that the format can store.
    """
    plan, remarks, notes = dict(resolution.plan), dict(resolution.remarks), list(resolution.notes)
    changed: list[str] = []
    pages = PageRelease()
    for site in (*structure.sites, *structure.after):
        if (scheme := plan.get(site.name)) is None:
            continue
        weight = read_weight(model, site)
        chosen, remark = _choose(weight, site, scheme, formats, dtype)
        pages.add(weight)
        plan[site.name] = chosen
        if remark is not None:
            remarks[site.name] = "; ".join(filter(None, (remarks.get(site.name), remark)))
            changed.append(site.name)
    pages.flush()
    if changed:
        more = f"; {len(changed) - 1} more layers likewise" if len(changed) > 1 else ""
        notes.append(f"{changed[0]}: {remarks[changed[0]]}{more}")
        log.warning("%s", notes[-1])
    return replace(resolution, plan=plan, remarks=remarks, notes=tuple(notes))


def _choose(weight: Tensor, site: Site, scheme: Scheme, formats: Sequence[str], dtype: str) -> tuple[Scheme, str | None]:
    """Return the scheme with scales that hold the weight, and what is to be said about it."""
    if scheme.weight.blocks is not None:  # which have one kind of scales, and say themselves what these cannot hold
        return scheme, None
    own = scheme.weight.scale_dtype
    wanted, used = _wanted(weight, scheme)
    if _holds(wanted, used, own):
        return scheme, None
    sizes = _sizes(weight, scheme)
    first = _fit(wanted, used, sizes, own)
    for wider in WIDER[WIDER.index(own) + 1 :] if own in WIDER else ():
        candidate = replace(scheme, weight=replace(scheme.weight, scale_dtype=wider))
        refused = any(same_numbers(candidate, [site.shape[-2:]], format, dtype) is None for format in formats)
        fit = _fit(wanted, used, sizes, wider)
        if not refused and (fit.whole or (fit.tolerable and not first.tolerable)):
            return candidate, f"scales are {wider}, because {own} cannot hold them ({_range(wanted)})"
    if first.tolerable:
        return scheme, f"{first.small} of {first.blocks} blocks are too small for scales in {own} and become zero"
    what = "large" if first.large is not None else "small"
    other = (
        f"format {' with '.join(formats)} stores no wider ones here"
        if formats and own in WIDER
        else "nothing wider exists for it"
    )
    raise SpecError(
        f"{site.name}: its weights are too {what} for scales in {own} ({_range(wanted)}), and {other}; load the model in "
        "bfloat16 or float32, use format native, or skip the layer by a rule"
    )


def _matrices(weight: Tensor) -> Tensor:
    """Return a weight as (experts, out, in), to be looked at one by one: a stack may be most of a model."""
    return weight if weight.ndim == 3 else weight.unsqueeze(0)


def _wanted(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return the scales (n,) that a weight wants, and whether (n,) its blocks hold anything but zeros."""
    spec = scheme.weight
    wanted, used = [], []
    for part in _matrices(weight):
        one = torch.cat([grid.wanted_scales(part[rows], spec) for rows in grid.row_slices(part, spec)])
        used.append((one > 0).flatten())
        if spec.has_global_scale:
            one = one * grid.choose_global_scale(part.float().abs().amax(), spec)
            one = torch.where(torch.isfinite(one), one, torch.zeros_like(one))  # smaller than any global scale can lift
        wanted.append(one.flatten())
    return torch.cat(wanted), torch.cat(used)


def _sizes(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return the squared size (n,) of a weight's blocks, relative to its largest number."""
    most = float(weight.abs().amax()) or 1.0
    blocks = (grid.to_blocks(part.float(), scheme.weight).div(most) for part in _matrices(weight))
    return torch.cat([one.square_().sum(-1, dtype=torch.float64).flatten() for one in blocks])


def _holds(wanted: Tensor, used: Tensor, scale_dtype: str) -> bool:
    low, high = grid.scale_bounds(scale_dtype)
    return bool(((wanted >= low) | ~used).all()) and float(wanted.max()) <= high


def _fit(wanted: Tensor, used: Tensor, sizes: Tensor, scale_dtype: str) -> _Fit:
    low, high = grid.scale_bounds(scale_dtype)
    small = used & (wanted < low)
    largest = float(wanted.max())
    share = float(sizes[small].sum() / sizes.sum().clamp(min=1e-300))
    return _Fit(int(small.sum()), int(used.sum()), share, largest if not largest <= high else None)


def _range(wanted: Tensor) -> str:
    used = wanted[wanted > 0]
    return f"from {float(used.min()):.2g} to {float(used.max()):.2g}" if len(used) else "none above zero"
