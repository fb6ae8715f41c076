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


def plan_ends(
    structure: Structure,
    embedding: str | Scheme | None,
    head: str | Scheme | None,
    scale_dtype: str = "float16",
) -> dict[str, Scheme]:
    """Return the schemes of the input embedding and the output head, where they are to be quantized.

    A head that is tied to the embedding is the same table: either argument speaks for both, and they must not disagree.

    Args:
        structure: what :func:`quantkit.hf.structure.describe` found.
        embedding: preset name or scheme of the embedding; None leaves it in float.
        head: the same for the head.
        scale_dtype: dtype of stored scales, for presets.

    Raises:
        SpecError: the model has no such part that can be quantized, or a tied table is given two schemes.
    """
    if structure.tied and embedding is not None and head is not None and embedding != head:
        raise SpecError(f"embedding {embedding!r} and head {head!r} are one tied table; give one of them, or the same twice")
    sites = {site.name: site for site in structure.after}
    wanted = {"embedding": embedding, "head": head}
    found: dict[str, Scheme] = {}
    for what, scheme in wanted.items():
        if scheme is None:
            continue
        table = what == "embedding" or structure.tied
        site = structure.embedding if table else sites.get(structure.head or "")
        if site is None:
            part = "input embedding that is a plain table" if table else "output head that is a plain linear layer"
            raise SpecError(f"{what}: the model has no {part}; leave it in float")
        found[site.name] = preset(scheme, [site.in_features], scale_dtype=scale_dtype) if isinstance(scheme, str) else scheme
    return found


def check_plan(plan: Plan, structure: Structure, format_name: str | None) -> None:
    """Ask every grid and the format about every site, and report all refusals at once.

    Raises:
        SpecError: naming the first site refused, why, how many more there are, and what to do.
    """
    if not plan:
        raise SpecError("nothing to quantize: the plan is empty")
    known = {site.name: site for site in (*structure.sites, *structure.after)}
    refused: list[str] = []
    for name, scheme in plan.items():
        if name not in known:
            raise SpecError(f"plan names {name!r}, which is no site of the model; {nearest(name, known)}")
        reason = scheme.weight.rejects(known[name].shape)
        if known[name] == structure.embedding and (scheme.activation is not None or scheme.weight.block[0] != 1):
            reason = f"an embedding table wants float activations and a scale per row or group, not {scheme.describe()}"
        if reason is None and scheme.static and known[name] in structure.after:
            reason = "it stands outside the blocks, where no inputs are calibrated; use a scheme with dynamic activations"
        if reason is None and format_name is not None:
            reason = FORMATS.get(format_name).rejects(scheme, known[name].shape)
        if reason is not None:
            refused.append(f"{name}: {reason}")
    if refused:
        more = f" (and {len(refused) - 1} more sites)" if len(refused) > 1 else ""
        raise SpecError(f"{refused[0]}{more}")


def check_together(plan: Plan, structure: Structure, *, learner: str | None, rotated: bool) -> None:
    """Refuse what does not go together with the schemes of a plan.

    Args:
        plan: the sites and their schemes.
        structure: the model's.
        learner: what learns codes or scales from activations (``"distillation"``), or None.
        rotated: whether the residual stream is rotated.

    Raises:
        SpecError: learning of grids that are no integers or of static input scales; rotation, which parts a tied head from
            the embedding, where the two are to be quantized as one.
    """
    for name, scheme in plan.items():
        if learner and not scheme.weight.is_integer:
            raise SpecError(f"{name}: {learner} learns integer grids, not {scheme.weight.dtype}; leave it out")
        if learner and scheme.static:
            raise SpecError(f"{name}: {learner} does not keep static input scales; leave it out, or use a dynamic scheme")
        if rotated and structure.tied and structure.embedding is not None and name == structure.embedding.name:
            raise SpecError(f"rotate parts the tied head from {name}, which was to be quantized as one; leave either out")
