"""From a scheme and rules to a plan: which layer gets which grid, decided and checked before any long work.

A plan is made from the model's structure alone, so it exists before a weight is read and apart from the quantizing; whoever
makes plans in another way (a search under a budget) gives :func:`quantkit.quantize` a mapping of layer names to schemes.

**The group size of a preset that names none** is the largest of 128, 64 and 32 that divides the input size of every layer the
scheme applies to. Where none does, the largest that divides the most layers is kept for those, and each of the others gets
the largest that divides it, or one scale per channel; layers that serving engines run as one get one that divides them all. The
notes and the coverage table say which.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quantkit.errors import SpecError, nearest
from quantkit.formats.base import FORMATS
from quantkit.formats.gguf.mixes import mix_plan
from quantkit.nn.sites import Site, Structure
from quantkit.pipeline.fused import fused_groups
from quantkit.pipeline.rules import EMBEDDING, HEAD, Rule, SchemeChoice, choice_of
from quantkit.presets import MIXES, SCHEMES
from quantkit.spec import AUTO_GROUP_SIZES, Plan, Scheme
from quantkit.system.tables import table_html

OUTSIDE = "outside the decoder layers, not named by a rule"


def scale_dtype_for(dtype: torch.dtype, *formats: str) -> str:
    """Return the dtype of a model's scales: the checkpoint's, in which its readers hold them; float16 for a float32 model.

    Formats that fix another one have that, the first of them where there are several.
    """
    if fixed := next((one for name in formats if (one := FORMATS.get(name).scale_dtype) is not None), None):
        return fixed
    return "bfloat16" if dtype == torch.bfloat16 else "float16"


@dataclass(frozen=True, slots=True)
class Resolution:
    """A scheme and rules applied to a model.

    Attributes:
        plan: layer name to scheme, in model order.
        skipped: names of layers that stay as they are, with the reason.
        notes: choices made for the user, to be told to the user.
        remarks: layer name to what is unusual about its scheme, for the coverage table.
        origin: how a plan was found that nobody wrote down: recorded in the checkpoint.
    """

    plan: dict[str, Scheme]
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    remarks: dict[str, str] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        schemes = Counter(scheme.describe() for scheme in self.plan.values())
        parts = [*(f"{count} layers {name}" for name, count in schemes.items()), f"{len(self.skipped)} left in float"]
        return f"Resolution({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        """Return what every layer gets, for notebooks: layers of one kind and scheme in one row."""
        groups = Counter((re.sub(r"\d+", "*", name), one.describe(), self.remarks.get(name)) for name, one in self.plan.items())
        groups.update((re.sub(r"\d+", "*", name), "float", reason) for name, reason in self.skipped.items())
        return table_html(("layers", "scheme", "remark", "number"), [(*key, count) for key, count in groups.items()])


def make_plan(
    structure: Structure, scheme: str | Scheme | SchemeChoice, rules: Sequence[Rule] = (), *, scale_dtype: str = "float16"
) -> Resolution:
    """Decide for every layer of a model what happens to it.

    Args:
        structure: what :func:`quantkit.hf.structure.describe` found.
        scheme: of every layer in the decoder blocks that no rule decides.
        rules: read from top to bottom; the last that matches a layer decides. See :mod:`quantkit.pipeline.rules`.
        scale_dtype: dtype of stored scales, for schemes that do not say their own.

    Raises:
        SpecError: a rule matches no layer, every layer is skipped, a group size does not divide a layer's input, or a tied
            embedding and head are given two schemes.
    """
    owner = owners(structure, rules)
    sites = [*structure.sites, *structure.after]
    found = Resolution({})
    notes: list[str] = []
    mix = choice_of(scheme).name in MIXES
    schemes = _mixed(structure, str(choice_of(scheme).name), owner, found) if mix else {}
    for index, rule in enumerate(rules) if mix else ((-1, None), *enumerate(rules)):
        mine = [site for site in sites if owner[site.name] == index and (rule or site in structure.sites)]
        label = f"rule {index + 1} ({rule.match!r})" if rule else "scheme"
        if rule and rule.skip:
            found.skipped.update({site.name: f"skipped by {label}" for site in mine})
        elif mine:
            assigned = _schemes_for(choice_of(scheme), rule, mine, label, scale_dtype)
            schemes |= assigned.plan
            found.remarks.update(assigned.remarks)
            notes += assigned.notes
        elif rule:
            notes.append(f"{label} has no effect: later rules decide every layer it matches")
    named = {name: owner[name] for name in sorted(structure.unreachable | structure.carried) if owner.get(name, -1) >= 0}
    found.skipped.update({name: f"skipped by rule {index + 1} ({rules[index].match!r})" for name, index in named.items()})
    left = [site.name for site in structure.outside if owner[site.name] < 0 and site.name not in schemes]
    found.skipped.update({name: OUTSIDE for name in left if name not in found.skipped})
    found.plan.update({site.name: schemes[site.name] for site in sites if site.name in schemes})
    if not found.plan:
        raise SpecError(f"nothing to quantize: the model has {len(sites)} layers and rules skip them all; remove a skip rule")
    return Resolution(found.plan, found.skipped, tuple(notes), found.remarks)


def _mixed(structure: Structure, name: str, owner: Mapping[str, int], found: Resolution) -> dict[str, Scheme]:
    """Return what a mix of llama.cpp's gives the layers that no rule decides; say of those that get nothing why."""
    mine = [site for site in (*structure.sites, *structure.after) if owner[site.name] < 0]
    schemes = mix_plan(structure, name)
    for site in mine:
        if site.name not in schemes:
            found.skipped[site.name] = f"{name}: no type of blocks divides its input size {site.in_features}"
    return {site.name: schemes[site.name] for site in mine if site.name in schemes}


def resolve(
    structure: Structure,
    scheme: str | Scheme | SchemeChoice | Plan | Resolution,
    rules: Sequence[Rule],
    scale_dtype: str,
) -> Resolution:
    """Return the plan that a user's scheme means: made from it and the rules, or the very plan that was given.

    Raises:
        SpecError: rules beside a plan, which says everything already; see also :func:`make_plan`.
    """
    if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
        raise SpecError(f"rules={rules!r}: want a list of quantkit.Rule")
    if isinstance(scheme, str | Scheme | SchemeChoice):
        return make_plan(structure, scheme, rules, scale_dtype=scale_dtype)
    if rules:
        raise SpecError("rules beside a plan: the plan says what each layer gets; give the rules to quantkit.plan")
    if isinstance(scheme, Resolution):
        return scheme
    if not isinstance(scheme, Mapping) or not all(isinstance(one, Scheme) for one in scheme.values()):
        raise SpecError(
            f"scheme={scheme!r}: want a name such as 'w4a16', a Scheme, or layer names with their Schemes; patterns and "
            "names of schemes go into rules=[Rule('*.mlp.*', 'w4a16')]"
        )
    return Resolution(dict(scheme))


def owners(structure: Structure, rules: Sequence[Rule]) -> dict[str, int]:
    """Return layer name to the index of the rule that decides it, -1 for the scheme of the run."""
    inside, after = [s.name for s in structure.sites], [s.name for s in structure.after]
    owner = dict.fromkeys([*inside, *after], -1)
    ends: dict[str, Rule] = {}
    for index, rule in enumerate(rules):
        if rule.match in (EMBEDDING, HEAD):
            hits = [_end(structure, rule.match)]
            ends[rule.match] = rule
        else:
            hits = [name for name in inside if _fits(rule, name)] + [name for name in after if name == rule.match]
        others = sorted(structure.unreachable | structure.carried)
        unreachable = [name for name in others if rule.skip and _fits(rule, name)]
        owner.update(dict.fromkeys(unreachable, index))
        if not hits and not unreachable:
            raise SpecError(
                f"rules[{index}]: match {rule.match!r} matches no layer; closest: {_closest(rule.match, list(owner))}"
            )
        owner.update(dict.fromkeys(hits, index))
    if structure.tied and len(ends) == 2 and len({(rule.scheme, rule.group_size, rule.skip) for rule in ends.values()}) > 1:
        raise SpecError("rules embedding and head: the two are one tied table; give one of them, or the same twice")
    return owner


def _fits(rule: Rule, name: str) -> bool:
    """Return whether a rule speaks of a layer: by its name, or by its module's where that reads its weight in its own way."""
    return rule.fits(name) or (name.endswith(".weight") and rule.fits(name.removesuffix(".weight")))


def _end(structure: Structure, what: str) -> str:
    """Return the name of the layer that ``embedding`` or ``head`` stands for in this model."""
    table = what == EMBEDDING or structure.tied
    sites = [structure.embedding] if table else [site for site in structure.outside if site.name == structure.head]
    if not sites or sites[0] is None:
        part = "input embedding that is a plain table" if table else "output head that is a plain linear layer"
        raise SpecError(f"rule {what!r}: the model has no {part}; leave it in float")
    return sites[0].name


def _schemes_for(default: SchemeChoice, rule: Rule | None, sites: list[Site], label: str, scale_dtype: str) -> Resolution:
    """Return the schemes of the layers that one rule (or none) decides, with what is to be told about their group sizes."""
    choice = choice_of(rule.scheme) if rule and rule.scheme else default
    group = rule.group_size if rule else None
    if group is not None and choice.full is None:
        choice = replace(choice, group_size=group)  # a rule's group size counts more than the run's
    if choice.name in SCHEMES and choice.resolve((), None, scale_dtype).weight.blocks is not None:
        each = {site.name: choice.resolve([site.in_features], group, scale_dtype) for site in sites}
        for site in sites:
            _refuse_misfits(each[site.name], [site], label)
        return Resolution(each)
    if group is not None or not choice.chooses_group:
        scheme = choice.resolve([site.in_features for site in sites], group, scale_dtype)
        _refuse_misfits(scheme, sites, label)
        return Resolution({site.name: scheme for site in sites})
    groups = automatic_groups(site.in_features for site in sites)
    of_site = {site.name: groups[site.in_features] for site in sites}
    for together in fused_groups(sites):
        if len({of_site[site.name] for site in together}) > 1:
            sizes = [site.in_features for site in together]
            common = next((group for group in AUTO_GROUP_SIZES if not any(size % group for size in sizes)), -1)
            of_site |= {site.name: common for site in together}
    plan = {site.name: choice.resolve([site.in_features], of_site[site.name], scale_dtype) for site in sites}
    for site in sites:
        _refuse_misfits(plan[site.name], [site], label)
    return Resolution(plan, {}, *_explain_groups(of_site, sites, label))


def automatic_groups(in_features: Iterable[int]) -> dict[int, int]:
    """Return input size to group size (-1: one scale per channel), for layers with these input sizes; see the module."""
    layers = Counter(in_features)
    fitting = {group: [size for size in layers if size % group == 0] for group in AUTO_GROUP_SIZES}
    common = max(AUTO_GROUP_SIZES, key=lambda group: (sum(layers[size] for size in fitting[group]), group))
    whole = next((group for group in AUTO_GROUP_SIZES if len(fitting[group]) == len(layers)), None)
    kept = whole or common
    return {
        size: kept if size in fitting[kept] else next((g for g in AUTO_GROUP_SIZES if size % g == 0), -1) for size in layers
    }


def _explain_groups(groups: Mapping[str, int], sites: list[Site], label: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the note about automatic group sizes, and a remark for every layer that differs from the most."""
    counts = Counter(groups.values())
    usual = counts.most_common(1)[0][0]
    sizes = ", ".join(map(str, sorted({site.in_features for site in sites})[:6]))
    if len(counts) == 1:
        fits = f"group size {usual}: the largest of 128, 64, 32 that divides"
        chosen = fits if usual > 0 else "one scale per channel: none of 128, 64, 32 divides"
        every = f"every input size of its {len(sites)} layers ({sizes})" if len(sites) > 1 else f"its input size {sizes}"
        return (f"{label}: {chosen} {every}",), {}
    remarks = {}
    for site in sites:
        own = groups[site.name]
        if own != usual:
            got = f"group size {own}" if own > 0 else "one scale per channel"
            alone = usual <= 0 or site.in_features % usual != 0
            why = f"{usual} does not divide its input size {site.in_features}" if alone else "layers that run with it need that"
            remarks[site.name] = f"{got}, because {why}"
    first = next(iter(remarks))
    most = f"{label}: group size {usual} for {counts[usual]} of its {len(sites)} layers"
    return (f"{most}; {len(remarks)} others differ: {first} has {remarks[first]}",), remarks


def _refuse_misfits(scheme: Scheme, sites: Sequence[Site], label: str) -> None:
    bad = [(site, reason) for site in sites if (reason := scheme.weight.rejects(site.shape))]
    if bad:
        more = f" (and {len(bad) - 1} more layers)" if len(bad) > 1 else ""
        raise SpecError(
            f"{bad[0][0].name}: {bad[0][1]}{more}; set by {label}; or leave group_size out to have one chosen, or give "
            "these layers another scheme by a rule, such as w8a16"
        )


def _closest(pattern: str, names: list[str]) -> str:
    """Return the three layer names most like a pattern, layer numbers aside."""
    literal = re.sub(r"^re:|[\\*?\[\]^$()+|]", "", pattern)
    ranked = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, literal, name).ratio())
    kinds: dict[str, str] = {}
    for name in ranked:
        kinds.setdefault(re.sub(r"\d+", "N", name), name)
    return ", ".join(list(kinds.values())[:3]) or "none (the model has no layers)"


def check_plan(plan: Plan, structure: Structure, format_name: str | None) -> None:
    """Ask every grid and the format about every layer, and report all refusals at once.

    Raises:
        SpecError: naming the first layer refused, why, how many more there are, and what to do.
    """
    if not plan:
        raise SpecError("nothing to quantize: the plan is empty")
    known = {site.name: site for site in (*structure.sites, *structure.after)}
    refused: list[str] = []
    for name, scheme in plan.items():
        if name not in known:
            raise SpecError(f"the plan names {name!r}, which is no layer of the model; {nearest(name, known)}")
        reason = scheme.weight.rejects(known[name].shape)
        if reason is None and scheme.weight.offset:
            reason = f"weights {scheme.weight.describe()} are only read; use zero points (-asym)"
        if known[name] == structure.embedding and (scheme.activation is not None or scheme.weight.block[0] != 1):
            reason = f"an embedding table wants float activations and a scale per row or group, not {scheme.describe()}"
        if known[name].read and scheme.activation is not None:
            reason = "its module multiplies by it in its own way, so its inputs cannot be rounded; give it a weight-only scheme"
        if reason is None and scheme.static and known[name] in structure.after:
            reason = "it stands outside the blocks, where no inputs are calibrated; use a scheme with dynamic activations"
        if reason is None and format_name is not None:
            reason = FORMATS.get(format_name).rejects(scheme, known[name].shape)
        if reason is not None:
            refused.append(f"{name}: {reason}")
    if not refused and format_name is not None and (reason := FORMATS.get(format_name).rejects_plan(plan, ())):
        refused.append(reason)
    if refused:
        more = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
        raise SpecError(f"{refused[0]}{more}")
