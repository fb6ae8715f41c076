"""llama.cpp's mixes: which type of blocks every tensor gets when a file is made as ``Q4_K_M``.

The rules are those of ``llama_tensor_get_type`` in llama.cpp's ``llama-quant.cpp`` (as of July 2026, with importances), so
that a file written here has the same types, tensor for tensor, and the same bytes as ``llama-quantize`` makes:

- the output head, or the token table where the two are tied, has Q6_K (Q8_0 where blocks of 256 do not fit);
- values, the way back of the feed-forward part and the output projection of attention get more bits in some layers;
- a row that 256 does not divide gets blocks of 32: Q4_K becomes Q5_0, Q5_K Q5_1, Q6_K Q8_0, Q2_K and Q3_K Q4_0, IQ4_XS IQ4_NL.
"""

from dataclasses import dataclass
from typing import Final

from quantkit.nn.sites import Site, Structure
from quantkit.presets import FALLBACKS, MIXES
from quantkit.spec import BLOCK_GRIDS, Scheme, block_spec

_VALUES, _KEYS, _BACK, _OUT, _JOINED = "attn_v", "attn_k", "ffn_down", "attn_output", "attn_qkv"
_ROLES: Final = {
    "v_proj": _VALUES, "k_proj": _KEYS, "o_proj": _OUT, "down_proj": _BACK, "w2": _BACK, "qkv_proj": _JOINED,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Model:
    """What the rules ask about a model: layers, those with values of their own, heads per key head, and experts."""

    layers: int
    values: int
    shared: int
    experts: int


def mix_plan(structure: Structure, name: str) -> dict[str, Scheme]:
    """Return the scheme of every layer, the embedding and the head included, that a mix gives; None of its blocks fits: absent.

    Args:
        structure: of the model.
        name: one of :data:`quantkit.presets.MIXES`.
    """
    heads = {_role(site): site.shape[-2] for site in structure.sites}
    queries = next((site.shape[-2] for site in structure.sites if site.name.endswith("q_proj")), 0)
    values = [index for index, block in enumerate(structure.blocks) if any(_role(site) == _VALUES for site in block.sites)]
    model = _Model(
        len(structure.blocks),
        len(values),
        queries // heads[_KEYS] if heads.get(_KEYS) else 1,
        max((site.shape[0] for site in structure.sites if len(site.shape) == 3), default=1),
    )
    found: dict[str, str] = {}
    for index, block in enumerate(structure.blocks):
        for site in block.sites:
            role = _role(site)
            nth = values.index(index) if role in (_VALUES, _JOINED) and index in values else index
            found[site.name] = _fitting(_type(name, role, nth, model), site)
    for site in structure.after:
        ends = site.name == structure.head or (site == structure.embedding and structure.tied)
        found[site.name] = _fitting(_head(MIXES[name], site) if ends else MIXES[name], site)
    return {site: Scheme(block_spec(kind)) for site, kind in found.items() if kind}


def _role(site: Site) -> str:
    """Return what a layer does, by its own name."""
    return _ROLES.get(site.name.rpartition(".")[2], "")


def _fitting(kind: str, site: Site) -> str:
    """Return the type, or the one in its place where its blocks do not divide a row; nothing where neither fits."""
    for one in (kind, FALLBACKS.get(kind)):
        if one is not None and site.in_features % BLOCK_GRIDS[one][3] == 0:
            return one
    return ""


def _head(kind: str, site: Site) -> str:
    if site.in_features % BLOCK_GRIDS[kind][3]:
        return "Q8_0"
    return kind if kind == "Q8_0" else "Q6_K"


def _more(index: int, count: int) -> bool:
    """Whether a layer is among those with more bits: the first and last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _type(name: str, role: str, index: int, model: _Model) -> str:
    kind = MIXES[name]
    if role == _VALUES:
        return _values(name, kind, index, model)
    if role == _KEYS and model.experts == 8:
        return "Q8_0"
    if role == _BACK:
        return _back(name, kind, index, model)
    if role == _OUT:
        if model.experts == 8:
            fifth = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if name in fifth else kind
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name, kind)
    if role == _JOINED:
        return {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}.get(name, kind)
    return kind


def _values(name: str, kind: str, index: int, model: _Model) -> str:
    many = model.shared >= 4
    if name == "Q2_K":
        kind = "Q4_K" if many else "Q3_K"
    elif name == "Q2_K_S" and many:
        kind = "Q4_K"
    elif name == "Q3_K_M":
        kind = "Q5_K" if index < 2 else "Q4_K"
    elif name == "Q3_K_L" or (name in ("IQ4_NL", "IQ4_XS") and many) or (name == "Q4_K_S" and index < 4):
        kind = "Q5_K"
    elif name in ("Q4_K_M", "Q5_K_M") and _more(index, model.values):
        kind = "Q6_K"
    if model.layers == 80 and model.shared == 8 and kind in ("Q3_K", "Q4_K"):  # Llama 70B
        kind = "Q5_K"
    return "Q8_0" if model.experts == 8 else kind


def _back(name: str, kind: str, index: int, model: _Model) -> str:
    early, first = index < model.layers // 8, index < model.layers // 16
    if name in ("Q2_K", "Q3_K_L"):
        return "Q3_K" if name == "Q2_K" else "Q5_K"
    if name == "Q3_K_M":
        return "Q5_K" if first else "Q4_K"
    if name in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more(index, model.layers) else kind
    return {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K", "Q4_0": "Q4_1", "Q5_0": "Q5_1"}.get(name, kind) if early else kind
