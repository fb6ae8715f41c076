"""Layers that serving engines run as one, and so want quantized alike.

vLLM and others join query, key and value into one product, gate and up, the two first products of multi-head latent attention,
and run all experts of a layer by one kernel. A checkpoint that gives the parts of such a product different schemes, or leaves
one in float, is refused by them or loaded wrongly. quantkit and transformers read it.
"""

from collections.abc import Iterable, Mapping

from quantkit.errors import SpecError
from quantkit.nn.sites import Site, Structure
from quantkit.spec import Plan

TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""What engines join, by the last part of the layers' names; the same in every architecture that has such layers."""


def fused_groups(sites: Iterable[Site]) -> list[tuple[Site, ...]]:
    """Return the layers that engines run as one, in model order; those that stand alone are left out."""
    groups: dict[tuple[str, object], list[Site]] = {}
    for site in sites:
        parent, _, last = site.name.rpartition(".")
        together = next((names for names in TOGETHER if last in names), None)
        parts = site.name.split(".")
        if "experts" in parts:
            groups.setdefault((".".join(parts[: parts.index("experts") + 1]), "experts"), []).append(site)
        elif together is not None and len(site.shape) == 2:
            groups.setdefault((parent, together), []).append(site)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def refuse_parted(structure: Structure, plan: Plan, skipped: Mapping[str, str]) -> None:
    """Make sure that layers which engines run as one have one scheme, or are all in float.

    Args:
        structure: the model's blocks and layers.
        plan: layer name to scheme.
        skipped: name to reason of layers that stay in float.

    Raises:
        SpecError: naming the first two layers that differ, and what to do.
    """
    for group in fused_groups(structure.sites):
        schemes = {site.name: plan.get(site.name) for site in group}
        if len(set(schemes.values())) == 1:
            continue
        first, own = next(iter(schemes.items()))
        other, differs = next((name, scheme) for name, scheme in schemes.items() if scheme != own)
        said = [f"{own.describe() if own else 'float'}", f"{differs.describe() if differs else 'float'}"]
        why = f" ({reason})" if (reason := skipped.get(other) or skipped.get(first)) else ""
        names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in schemes))
        raise SpecError(
            f"{first} gets {said[0]} and {other} {said[1]}{why}, but serving engines run {names} as one layer with one scheme; "
            "give them the same by one rule, or say fused=False in output, for readers that do not join layers"
        )
