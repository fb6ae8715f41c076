"""What can be chosen: groups of layers that have one scheme, and the schemes that each may have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.checkpoint.check import config_of, dtype_name, layout_bytes, layout_of, rejections_in
from quantkit.checkpoint.contents import Contents, carried_layout, contents_of
from quantkit.checkpoint.shared import plan_for
from quantkit.errors import SpecError
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import PreTrainedModel
from quantkit.nn.sites import Site, Structure
from quantkit.pipeline.fused import fused_groups
from quantkit.pipeline.plan import Resolution, automatic_groups, make_plan, owners, scale_dtype_for
from quantkit.pipeline.rules import EMBEDDING, HEAD, Rule, SchemeChoice, choice_of
from quantkit.pipeline.settings import Output
from quantkit.quantizers.base import Quantizer
from quantkit.spec import AUTO_GROUP_SIZES, Scheme

FLOAT = "float"
"""The choice to leave layers as they are."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One scheme that a group may have.

    Attributes:
        choice: as the user wrote it.
        schemes: layer name to scheme; empty for layers that stay in float.
        nbytes: what the group takes in the checkpoint, all tensors counted.
    """

    choice: str
    schemes: Mapping[str, Scheme]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that serving engines run as one, or one layer alone, and what they may be."""

    sites: tuple[Site, ...]
    candidates: tuple[Candidate, ...]

    @property
    def name(self) -> str:
        """The layers' common name, such as ``"model.layers.0.self_attn.{q_proj,k_proj,v_proj}"``."""
        names = [site.name for site in self.sites]
        if len(names) == 1:
            return names[0]
        parent = names[0].rpartition(".")[0]
        while not all(name.startswith(f"{parent}.") for name in names):
            parent = parent.rpartition(".")[0]
        ends = list(dict.fromkeys(name[len(parent) + 1 :] for name in names))
        return f"{parent}.{{{','.join(ends)}}}" if len(ends) <= 4 else f"{parent}.*"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(site.numel for site in self.sites)


@dataclass(frozen=True)
class Menu:
    """Everything that is to be chosen for a model.

    Attributes:
        structure: the model's blocks and layers.
        groups: what is chosen, in model order; a layer that a rule decides has one candidate.
        base: what rules alone decide: layers that stay in float, and why.
        fixed_bytes: bytes of all other tensors of the checkpoint.
        files_bytes: bytes of what is beside the tensors, estimated: headers, config, tokenizer.
    """

    structure: Structure
    groups: tuple[Group, ...]
    base: Resolution
    fixed_bytes: int
    files_bytes: int

    @property
    def numel(self) -> int:
        """Number of weights of all groups."""
        return sum(group.numel for group in self.groups)


def make_menu(
    model: PreTrainedModel,
    structure: Structure,
    choices: Sequence[str | Scheme | SchemeChoice],
    rules: Sequence[Rule],
    method: Quantizer,
    *,
    include: Sequence[str],
    output: Output,
    files_bytes: int,
) -> Menu:
    """Work out which layers can have which of the choices.

    Args:
        model: its config and dtype decide what is stored.
        structure: from :func:`quantkit.hf.structure.describe`.
        choices: presets, schemes, and ``"float"``.
        rules: as for :func:`quantkit.quantize`; what they decide is not searched.
        method: the quantizer that will be used.
        include: ``"embedding"``, ``"head"``: searched too.
        output: format of the checkpoint, and whether layers that engines run as one get one scheme.
        files_bytes: see :class:`Menu`.

    Raises:
        SpecError: fewer than two choices, one twice, or one that no layer can have.
    """
    if odd := [name for name in include if name not in (EMBEDDING, HEAD)]:
        raise SpecError(f"include={odd[0]!r}: want {EMBEDDING!r} or {HEAD!r}")
    named, formats = _named(choices), tuple(one.format for one in output.all)
    contents = contents_of(config_of(model))
    dtype = scale_dtype_for(model.dtype, *formats)
    ends = [Rule(match=name, scheme=SchemeChoice(name="w8a16")) for name in dict.fromkeys(include)]
    base = make_plan(structure, SchemeChoice(name="w8a16"), [*rules, *ends], scale_dtype=dtype)
    decided = {name for name, index in owners(structure, rules).items() if index >= 0 and rules[index].scheme is not None}
    free = [site for site in (*structure.sites, *structure.after) if site.name in base.plan and site.name not in decided]
    maker = _Maker(contents, model, method, formats, {name: _groups(one, free) for name, one in named.items()}, named, dtype)
    groups = [maker.group(sites) for sites in _together(free, output.keeps_together)]
    if not groups:
        raise SpecError("nothing to search: rules decide every layer; leave some out")
    maker.refuse_unused()
    fixed = [
        Group((s,), (maker.candidate("by a rule", (s,), {s.name: base.plan[s.name]}),))
        for s in contents.sites.values()
        if s.name in decided and s.name in base.plan
    ]
    order = {name: index for index, name in enumerate(contents.sites)}
    every = sorted([*groups, *fixed], key=lambda group: order[group.sites[0].name])
    inside = {site.name for group in every for site in group.sites}
    rest = sum(
        layout_bytes(layout_of(contents, contents.model, {}, output.format, e))
        for e in contents.entries
        if not (e.site and e.site.name in inside)
    )
    return Menu(structure, tuple(every), base, rest + layout_bytes(carried_layout(ledger_of(model))), files_bytes)


def _named(choices: Sequence[str | Scheme | SchemeChoice]) -> dict[str, SchemeChoice | None]:
    if isinstance(choices, str) or len(choices) < 2:
        raise SpecError(
            f"choices={choices!r}: want at least two, such as ['w3a16-asym-g64', 'w4a16-asym-g64', 'w8a16', 'float']"
        )
    named: dict[str, SchemeChoice | None] = {}
    for one in choices:
        choice = None if one == FLOAT else choice_of(one)
        name = one if isinstance(one, str) else repr(one)
        if name in named or (choice is not None and choice in named.values()):
            raise SpecError(f"choices: {name!r} is given twice")
        named[name] = choice
    if len([choice for choice in named.values() if choice is not None]) < 1:
        raise SpecError("choices: only 'float'; add a scheme")
    return named


def _groups(choice: SchemeChoice | None, sites: Sequence[Site]) -> dict[int, int] | None:
    """Return input size to group size, for a choice that leaves it open; None for any other."""
    return automatic_groups(site.in_features for site in sites) if choice is not None and choice.chooses_group else None


def _together(sites: Sequence[Site], fused: bool) -> list[tuple[Site, ...]]:
    """Return the layers in the parts that are chosen for together, in order."""
    joined = fused_groups(sites) if fused else []
    member = {site.name: group for group in joined for site in group}
    found: dict[str, tuple[Site, ...]] = {}
    for site in sites:
        group = member.get(site.name, (site,))
        found.setdefault(group[0].name, group)
    return list(found.values())


class _Maker:
    """Makes the candidates of groups, and remembers why choices were refused."""

    def __init__(
        self,
        contents: Contents,
        model: PreTrainedModel,
        method: Quantizer,
        formats: tuple[str, ...],
        sizes: Mapping[str, dict[int, int] | None],
        named: Mapping[str, SchemeChoice | None],
        scale_dtype: str,
    ) -> None:
        self.contents, self.model, self.method, self.format = contents, model, method, formats[0]
        self.sizes, self.named, self.scale_dtype = sizes, named, scale_dtype
        plans = {name: self._plan_of(one) for name, one in named.items() if one is not None}
        dtype = dtype_name(model)
        self.stored = {name: rejections_in(contents, plan, self.format, dtype) for name, plan in plans.items()}
        for other in formats[1:]:  # written with the same codes
            for name, plan in plans.items():
                self.stored[name] = plan_for(contents, plan, other, dtype)[1] | self.stored[name]
        self.refused: dict[str, str] = {}
        self.used: set[str] = set()

    def group(self, sites: tuple[Site, ...]) -> Group:
        """Return the group of layers with every choice that they can have, the smallest first.

        Raises:
            SpecError: they can have none.
        """
        found = []
        for name, choice in self.named.items():
            schemes = {} if choice is None else self._schemes(choice, sites, self.sizes[name])
            reason = self._refuses(schemes, sites, self.stored[name]) if choice is not None else None
            if reason is not None:
                self.refused.setdefault(name, reason)
                continue
            self.used.add(name)
            found.append(self.candidate(name, sites, schemes))
        if not found:
            raise SpecError(
                f"{sites[0].name}: it can have none of the choices: {next(iter(self.refused.values()))}; add 'float'"
            )
        return Group(sites, tuple(sorted(found, key=lambda one: one.nbytes)))

    def candidate(self, name: str, sites: Sequence[Site], schemes: Mapping[str, Scheme]) -> Candidate:
        """Return a choice with the bytes that it takes."""
        mine = {site.name for site in sites}
        entries = [e for e in self.contents.entries if e.site and e.site.name in mine]
        layouts = [layout_of(self.contents, self.contents.model, schemes, self.format, entry) for entry in entries]
        return Candidate(name, schemes, sum(map(layout_bytes, layouts)))

    def refuse_unused(self) -> None:
        """Raise what keeps a choice from being used anywhere."""
        unused = [name for name in self.named if name not in self.used]
        if unused:
            raise SpecError(f"choices: no layer can have {unused[0]!r}: {self.refused[unused[0]]}; leave it out")

    def _schemes(self, choice: SchemeChoice, sites: Sequence[Site], sizes: dict[int, int] | None) -> dict[str, Scheme]:
        wanted = {site.name: sizes[site.in_features] if sizes else None for site in sites}
        if len(set(wanted.values())) > 1:
            inputs = [site.in_features for site in sites]
            common = next((group for group in AUTO_GROUP_SIZES if not any(size % group for size in inputs)), -1)
            wanted = dict.fromkeys(wanted, common)
        return {s.name: choice.resolve([s.in_features], wanted[s.name], self.scale_dtype) for s in sites}

    def _plan_of(self, choice: SchemeChoice) -> dict[str, Scheme]:
        """Return the plan that gives a choice to every layer that its grid divides."""
        found = {s.name: choice.resolve([s.in_features], None, self.scale_dtype) for s in self.contents.sites.values()}
        return {name: one for name, one in found.items() if not one.weight.rejects(self.contents.sites[name].shape)}

    def _refuses(self, schemes: Mapping[str, Scheme], sites: Sequence[Site], stored: Mapping[str, str]) -> str | None:
        ends = self.contents.structure.ends
        for site in sites:
            scheme = schemes[site.name]
            reason = scheme.weight.rejects(site.shape) or stored.get(site.name)
            if reason is None and site.name not in ends:
                reason = self.method.rejects(scheme)
            if reason is None and site == self.contents.structure.embedding and scheme.activation is not None:
                reason = "an embedding table wants float activations"
            if reason is not None:
                return f"{site.name}: {reason}"
        return None
