"""The function that runs the experts of mixture-of-experts layers, with float or quantized weights.

transformers stores the experts of a layer as 3-D parameters and looks up the function that runs them by name in
``ALL_EXPERTS_FUNCTIONS``. :func:`enable_experts` registers :func:`experts_forward` there as ``"quantkit"`` and selects it for a
model. For tokens ``x``, chosen experts ``e`` and routing weights ``r``:

.. math:: y_t = \\sum_k r_{tk} \\; D_{e_{tk}} \\, a(U_{e_{tk}} x_t)

where ``a`` is the module's own gate or activation. Rows are sorted by expert once, each expert multiplies one contiguous
slice, and the results are put back into token order before they are summed over k in float32.

The flags that transformers sets on such a module are respected: ``has_gate`` (``gate_up_proj`` or ``up_proj``), ``has_bias``,
``is_transposed`` (float parameters only: a :class:`~quantkit.nn.linear.QuantWeight` is always (experts, out, in)) and
``has_post_expert_norm`` (newer releases). Additional memory: tokens x top_k rows of each activation.

Calibration observes the inputs of each expert through :mod:`quantkit.nn.probes`.
"""

from typing import Any

import torch
import transformers.quantizers.base
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from quantkit.nn.probes import probe_of, shows_all_experts, watcher_of

NAME = "quantkit"
"""Name of the experts function in transformers' registry."""


def uses_experts_interface(module: nn.Module) -> bool:
    """Return whether transformers looks up the function that runs this module's experts."""
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "config"))


def expert_parameters(module: nn.Module) -> tuple[str, str]:
    """Return the names of a module's two expert stacks, in the order in which they are used."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def linears_in_place(module: nn.Module, attribute: str, config: Any) -> dict[str, int]:
    """Return what transformers puts in place of one expert's part of a stack when it loads a quantized checkpoint of the model.

    It takes some modules of experts apart into linear layers then, and looks for their weights one by one.

    Args:
        module: experts that transformers does not run through its interface.
        attribute: name of the stack, (experts, in, out).
        config: of the text model.

    Returns:
        Name of a linear layer to the number of its rows, in the order in which the stack holds them; empty if there is no such
        thing, or it does not fit.
    """
    patch = getattr(transformers.quantizers.base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {}).get(type(module).__name__)
    parameter = module._parameters.get(attribute)
    if patch is None or parameter is None or parameter.ndim != 3:
        return {}
    with torch.device("meta"):
        first = next(patch["module_name"](config).children())
    wanted = ("gate_proj", "up_proj") if attribute == "gate_up_proj" else (attribute,)
    linears = {name: part for name, part in first.named_children() if isinstance(part, nn.Linear) and name in wanted}
    rows = {name: linears[name].out_features for name in wanted if name in linears}
    fits = {part.in_features for part in linears.values()} == {parameter.shape[1]} and sum(rows.values()) == parameter.shape[2]
    return rows if fits else {}


def enable_experts(model: nn.Module) -> tuple[str, ...]:
    """Let every experts module of ``model`` that uses transformers' experts interface run :func:`experts_forward`.

    Changes the experts implementation in the configs of these modules. Idempotent; does nothing to a dense model.

    Returns:
        The paths of the modules that were changed.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    switched = []
    for path, module in model.named_modules():
        if uses_experts_interface(module):
            module.config._experts_implementation = NAME
            switched.append(path)
    return tuple(switched)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the chosen experts of each token and return their weighted sum.

    Args:
        module: experts module with the flags of transformers' interface; its stacks are parameters or ``QuantWeight``.
        hidden_states: floating (tokens, in).
        top_k_index: int64 (tokens, k); an index outside the range of experts contributes nothing.
        top_k_weights: floating (tokens, k).

    Returns:
        (tokens, out) in the dtype of ``hidden_states``.
    """
    tokens, k = top_k_index.shape
    up_name, down_name = expert_parameters(module)
    experts = getattr(module, up_name).shape[0]
    if shows_all_experts(module):
        top_k_index, top_k_weights = _everyone(top_k_index, top_k_weights, experts)
        k = experts
    flat = top_k_index.reshape(-1)
    kept = ((flat >= 0) & (flat < experts)).nonzero().squeeze(-1)  # rows of (tokens * k,) that have a real expert
    order = kept[torch.argsort(flat[kept], stable=True)]
    ids = flat[order]
    counts = torch.bincount(ids, minlength=experts).tolist()

    rows = _multiply(module, up_name, hidden_states[order // k], ids, counts)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = _multiply(module, down_name, rows, ids, counts)
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    exact = torch.promote_types(rows.dtype, torch.float32)
    chosen = top_k_weights.reshape(-1)[order].to(exact).unsqueeze(-1)
    rows = torch.where(chosen == 0, 0.0, rows.to(exact) * chosen)  # an expert that was not chosen may well overflow

    placed = rows.new_zeros(tokens * k, rows.shape[-1]).index_copy(0, order, rows)
    return placed.view(tokens, k, rows.shape[-1]).sum(1).to(hidden_states.dtype)


def _everyone(index: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return (tokens, experts) indices and weights that choose every expert, those that were not chosen with weight 0."""
    real = (index >= 0) & (index < experts)
    spread = weights.new_zeros(len(index), experts)
    spread.scatter_add_(1, index.clamp(0, experts - 1), torch.where(real, weights, 0))
    return torch.arange(experts, device=index.device).expand(len(index), experts), spread


def _multiply(module: Any, name: str, x: Tensor, ids: Tensor, counts: list[int]) -> Tensor:
    """Multiply rows ``x`` (rows, in), sorted by expert, by their expert's matrix and add its bias: (rows, out)."""
    probe = probe_of(module)
    if probe is not None:
        probe(name, x, ids)
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    outputs, start = [], 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        part, start = x[start : start + count], start + count
        if not isinstance(weight, Tensor):  # a QuantWeight
            product = weight.matmul(part, expert)
        else:
            product = functional.linear(part, weight[expert].T if module.is_transposed else weight[expert])
        outputs.append(product if bias is None else product + bias[expert])
    if outputs:
        product = torch.cat(outputs)
        if (watcher := watcher_of(module)) is not None:
            watcher(name, x, product, ids)
        return product
    stored_transposed = isinstance(weight, Tensor) and module.is_transposed
    return x.new_zeros(0, weight.shape[-1 if stored_transposed else -2])
