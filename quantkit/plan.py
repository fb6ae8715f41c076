"""From a scheme to a plan: which site gets which grid, decided and checked before any long work."""

import fnmatch
from collections.abc import Iterable, Sequence

from quantkit.errors import SpecError, nearest
from quantkit.formats.base import FORMATS
from quantkit.nn.sites import Site, Structure
from quantkit.spec import Plan, Scheme, preset


def select_sites(sites: Iterable[Site], ignore: Sequence[str]) -> list[Site]:
    """Return the sites whose names match none of the ``ignore`` patterns (shell globs, or the last parts of a name).

    Raises:
        SpecError: for a pattern that matches no site, naming the closest one.
    """
    chosen = list(sites)
    for pattern in ignore:
        hit = {s.name for s in chosen if fnmatch.fnmatch(s.name, pattern) or s.name.endswith(f".{pattern}")}
        if not hit:
            raise SpecError(
                f"ignore: {pattern!r} matches no site; {nearest(pattern, {s.name.rsplit('.', 1)[-1] for s in chosen})}"
            )
        chosen = [site for site in chosen if site.name not in hit]
    return chosen


def make_plan(
    structure: Structure,
    scheme: str | Scheme,
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    ignore: Sequence[str] = (),
    scale_dtype: str = "float16",
) -> dict[str, Scheme]:
    """Give every site in the model's blocks the same scheme.

    Args:
        structure: what :func:`quantkit.hf.structure.describe` found.
        scheme: a preset name, or a full scheme.
        group_size: fixed group size for a preset; None takes the largest of 128, 64, 32 that divides every site.
        symmetric: overrides the preset's name.
        ignore: globs or trailing names of sites to leave alone.
        scale_dtype: dtype of stored scales, for a preset.

    Raises:
        SpecError: for an unknown scheme, an ignore pattern that matches nothing, or nothing left to quantize.
    """
    sites = select_sites(structure.sites, ignore)
    if not sites:
        raise SpecError("nothing to quantize: every site of the model is ignored")
    if isinstance(scheme, str):
        sizes = [site.in_features for site in sites]
        scheme = preset(scheme, sizes, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    elif group_size is not None or symmetric is not None:
        raise SpecError("group_size and symmetric go with a preset name; a full Scheme already says both")
    return {site.name: scheme for site in sites}


def check_plan(plan: Plan, structure: Structure, format_name: str | None) -> None:
    """Ask every grid and the format about every site, and report all refusals at once.

    Raises:
        SpecError: naming the first site refused, why, how many more there are, and what to do.
    """
    known = {site.name: site for site in (*structure.sites, *structure.outside)}
    refused: list[str] = []
    for name, scheme in plan.items():
        if name not in known:
            raise SpecError(f"plan names {name!r}, which is no site of the model; {nearest(name, known)}")
        reason = scheme.weight.rejects(known[name].shape)
        if reason is None and format_name is not None:
            reason = FORMATS.get(format_name).rejects(scheme, known[name].shape)
        if reason is not None:
            refused.append(f"{name}: {reason}")
    if refused:
        more = f" (and {len(refused) - 1} more sites)" if len(refused) > 1 else ""
        raise SpecError(f"{refused[0]}{more}")
