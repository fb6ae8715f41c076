"""Put a quantized weight where the float one was.

A linear layer's whole module is replaced by a :class:`~quantkit.nn.linear.QuantLinear` that keeps its bias, an embedding's by a
:class:`~quantkit.nn.embedding.QuantEmbedding`; of an experts module only the 3-D parameter is replaced, by a
:class:`~quantkit.nn.linear.QuantWeight` of the same name, and of a module that reads its parameter in its own way by a
:class:`~quantkit.nn.parameter.QuantParameter`. The float weight is freed as soon as nobody else holds it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn

from quantkit.errors import KernelError, QuantkitError, SpecError
from quantkit.kernels import ComputeMode
from quantkit.kernels.select import FORCE_VARIABLE, Problem, check_compute, select
from quantkit.nn.embedding import QuantEmbedding
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.nn.parameter import QuantParameter
from quantkit.nn.sites import Site
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor, QTensor
from quantkit.spec import ActivationSpec, QuantSpec

SAVING: Final = ("save_pretrained", "push_to_hub")
"""Methods of transformers' models that write float checkpoints."""


def install(model: nn.Module, site: Site, qtensor: QTensor, activation: ActivationSpec | None = None) -> None:
    """Replace the weight of ``site`` in ``model``, in place.

    The new module takes the old one's training flag and name; forward hooks of a replaced linear layer are lost.

    Args:
        model: the model that holds the site (its weights may be on meta).
        site: a site of that model, not yet replaced.
        qtensor: the quantized weight, (out, in) or (experts, out, in) also where the parameter was stored transposed.
        activation: what the layer's inputs are rounded to; None leaves them alone.

    Raises:
        SpecError: if the site is not there, shapes differ, or a module of another class shares the weight. All others that
            share it are replaced together with it, also a head that shares an embedding's table.
    """
    module, weight = _find(model, site)
    if tuple(qtensor.shape) != site.shape:
        raise SpecError(f"{site.name}: quantized weight has shape {tuple(qtensor.shape)}, want {site.shape}")
    forbid_saving(model, site.module)
    if isinstance(module, nn.Embedding):
        _install_table(model, site, weight, qtensor, activation)
        return
    sharing = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    kind = type(module)
    if odd := [name for name in sharing if type(model.get_submodule(name.rpartition(".")[0])) is not kind]:
        raise SpecError(f"{site.name}: its weight is shared with {odd[0]}, which is no {kind.__name__}; leave both in float")
    _forget_ties(model, sharing)
    if site.read or len(site.shape) == 3:
        if site.read and activation is not None:
            raise SpecError(f"{site.name}: its inputs cannot be rounded, because its module multiplies by it in its own way")
        stack: QuantParameter | QuantWeight = (
            QuantWeight(qtensor, activation=activation)
            if not site.read
            else (QuantParameter(qtensor, weight.dtype, transposed=site.transposed))
        )
        for holder in {id(part): part for part in map(model.get_submodule, _paths(sharing))}.values():
            del holder._parameters[site.parameter]
            holder.add_module(site.parameter, stack.train(module.training))
        return
    replaced: dict[Any, QuantLinear] = {}
    for path in [site.module, *_paths(sharing)]:
        holder = model.get_submodule(path)
        if isinstance(holder, QuantLinear):
            continue  # it stands in a part that itself stands in several places
        bias = getattr(holder, "bias", None)
        known = replaced.get(id(bias))
        linear = known or replaced.setdefault(id(bias), QuantLinear(qtensor, bias, activation=activation))
        linear.tied_to = None if id(bias) == next(iter(replaced)) else site.name
        _replace(model, path, linear)


def forbid_saving(model: nn.Module, path: str) -> None:
    """Let transformers' own way of saving raise an error, in ``model`` and in every part of it that holds ``path``.

    It would write the parts of quantized weights under names that no reader knows, without a word in the config, and readers
    would fill those layers with random numbers.
    """
    names = path.split(".")
    for part in (model.get_submodule(".".join(names[:end])) for end in range(len(names) + 1)):
        for method in SAVING:
            if hasattr(type(part), method):
                setattr(part, method, refuse_saving)


def refuse_saving(*_arguments: Any, **_options: Any) -> NoReturn:
    """Stand in for ``save_pretrained`` and ``push_to_hub`` of a quantized model.

    Raises:
        QuantkitError: always.
    """
    raise QuantkitError(
        "save_pretrained and push_to_hub would write files of a quantized model that nothing can load; write a checkpoint with "
        "quantkit.save(model, path), and push that directory with quantkit.push_to_hub(path, 'owner/name')"
    )


def _paths(parameters: list[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in parameters]


def _forget_ties(model: nn.Module, names: list[str]) -> None:
    """Strike parameters that are no more from the list of tied ones, which transformers would look for."""
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in names:
        tied.pop(name, None)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.train(model.get_submodule(path).training))


def _install_table(model: nn.Module, site: Site, weight: Tensor, qtensor: QTensor, activation: ActivationSpec | None) -> None:
    """Replace an embedding, and with it the linear layers that share its table: they get the same codes."""
    if activation is not None:
        raise SpecError(f"{site.name}: a table has no inputs to round; use a scheme with float activations")
    sharing = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    heads = [path for name in sharing if (path := name.rpartition(".")[0]) != site.module]
    if odd := [path for path in heads if type(model.get_submodule(path)) is not nn.Linear]:
        raise SpecError(f"{site.name}: its table is shared with {odd[0]}, which is no nn.Linear; leave it in float")
    _replace(model, site.module, QuantEmbedding(qtensor, weight.dtype))
    for path in heads:
        head = QuantLinear(qtensor, getattr(model.get_submodule(path), "bias", None))
        head.tied_to = site.name
        _replace(model, path, head)
    _forget_ties(model, sharing)  # they are one GridTensor now


def set_compute(model: nn.Module, compute: ComputeMode) -> int:
    """Say what the quantized layers of ``model`` make of their inputs on a CPU from now on.

    Args:
        model: any model.
        compute: ``"float"``, nothing, or ``"int8"``, rounded in every layer that a kernel does so for; others stay exact.

    Returns:
        The number of layers that round.

    Raises:
        KernelError: ``compute`` is neither, or no kernel rounds for any of the layers; the message has the kernels' reasons.
    """
    check_compute(compute)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear | QuantWeight)]
    refused = {one.spec: reason for one in layers if compute == "int8" and (reason := _cannot_round(one))}
    for module in layers:
        module.compute = "float" if module.spec in refused else compute
    rounding = sum(module.compute == "int8" for module in layers)
    if refused and not rounding:
        raise KernelError(next(iter(refused.values())))
    return rounding


def _cannot_round(layer: QuantLinear | QuantWeight) -> str | None:
    """Return the reasons why no kernel of this CPU rounds the inputs of a layer; None if one does."""
    try:
        kernel = select(Problem(layer.spec, (layer.shape[-2], layer.shape[-1]), "cpu", torch.float32), "int8")
    except KernelError as error:
        return str(error)
    return None if kernel.compute == "int8" else f"{FORCE_VARIABLE} asks for a kernel that leaves activations as they are"


def describe_compute(model: nn.Module) -> str:
    """Return how the quantized layers of ``model`` multiply: ``"exact"``, ``"int8 activations"``, or in how many of them.

    Empty for a model without such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear | QuantWeight)]
    rounding = sum(module.compute == "int8" and module.device.type == "cpu" for module in layers)
    if not rounding:
        return "exact" if layers else ""
    return "int8 activations" + (f" in {rounding} of {len(layers)} layers" if rounding < len(layers) else "")


@contextlib.contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Switch off the rounding of activations in quantized layers, which would blur the comparison of values.

    A difference of the last bit decides how a value is rounded, and from layer to layer more of them: two ways to run a model
    that are both right then differ as much as rounded activations differ from exact ones.

    Activations that are rounded in a rotated basis stay as they are, because the rotation is part of the rounding.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear | QuantWeight)]
    before = [(module, module.compute, module.activation) for module in layers]
    try:
        for module in layers:
            if module.compute != "float":
                module.compute = "float"
            if module.activation is not None and not module.activation.rotated:
                module.activation = None
        yield
    finally:
        for module, compute, activation in before:
            module.activation = activation
            if module.compute != compute:
                module.compute = compute


def _find(model: nn.Module, site: Site) -> tuple[nn.Module, Tensor]:
    """Return the module and the float parameter of a site, checked against the site's shape."""
    try:
        module = model.get_submodule(site.module)
    except AttributeError as error:
        raise SpecError(f"{site.name}: {type(model).__name__} has no module {site.module!r}") from error
    weight = module._parameters.get(site.parameter)
    if weight is None:
        raise SpecError(
            f"{site.name}: {type(module).__name__} has no float parameter {site.parameter!r}; is it quantized already?"
        )
    shape = tuple(weight.shape)
    shape = (*shape[:-2], shape[-1], shape[-2]) if site.transposed else shape
    if shape != site.shape:
        raise SpecError(f"{site.name}: the model's weight has shape {shape} (out, in), the site says {site.shape}")
    return module, weight


HEAD_SPEC = QuantSpec("int8", (1, 64))
"""The default grid: 8.25 bits a weight."""


def quantize_head(model: Any, spec: QuantSpec = HEAD_SPEC) -> None:
    """Round the output head of ``model`` to nearest on ``spec``, in place; a head that is quantized already stays.

    A tied embedding is left in float, and the config says that the two are no longer tied.

    Raises:
        SpecError: the model has no linear head, or the grid does not fit it.
    """
    head: Any = model.get_output_embeddings()
    if isinstance(head, QuantLinear):
        return
    if type(head) is not nn.Linear:
        kind = "none" if head is None else type(head).__name__
        raise SpecError(f"{type(model).__name__}: the output head is {kind}, want nn.Linear; leave it as it is")
    weight: Tensor = head.weight.detach().float()
    scale, zero = grid.choose_qparams(weight, spec)
    qtensor = GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec)
    name = next(name for name, module in model.named_modules() if module is head)
    parent, _, own = name.rpartition(".")
    rounded = QuantLinear(qtensor, head.bias).train(head.training)
    forbid_saving(model, parent)
    setattr(model.get_submodule(parent), own, rounded)
    model.config.tie_word_embeddings = False
