"""Put a quantized weight where the float one was.

A linear layer's whole module is replaced by a :class:`~quantkit.nn.linear.QuantLinear` that keeps its bias, an embedding's by a
:class:`~quantkit.nn.embedding.QuantEmbedding`; of an experts module only the 3-D parameter is replaced, by a
:class:`~quantkit.nn.linear.QuantWeight` of the same name, and of a module that reads its parameter in its own way by a
:class:`~quantkit.nn.parameter.QuantParameter`. The float weight is freed as soon as nobody else holds it.
"""

from typing import Any

from torch import Tensor, nn

from quantkit.errors import SpecError
from quantkit.kernels import ComputeMode
from quantkit.kernels.select import check_compute
from quantkit.nn.embedding import QuantEmbedding
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.nn.parameter import QuantParameter
from quantkit.nn.sites import Site
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor, QTensor
from quantkit.spec import ActivationSpec, QuantSpec


def install(model: nn.Module, site: Site, qtensor: QTensor, activation: ActivationSpec | None = None) -> None:
    """Replace the weight of ``site`` in ``model``, in place.

    The new module takes the old one's training flag and name; forward hooks of a replaced linear layer are lost.

    Args:
        model: the model that holds the site (its weights may be on meta).
        site: a site of that model, not yet replaced.
        qtensor: the quantized weight, (out, in) or (experts, out, in) also where the parameter was stored transposed.
        activation: what the layer's inputs are rounded to; None leaves them alone.

    Raises:
        SpecError: if the site is not there, shapes differ, or another module shares the weight (replacing it here would
            silently part the two; a head that shares an embedding's table is replaced together with it).
    """
    module, weight = _find(model, site)
    if tuple(qtensor.shape) != site.shape:
        raise SpecError(f"{site.name}: quantized weight has shape {tuple(qtensor.shape)}, want {site.shape}")
    if isinstance(module, nn.Embedding):
        _install_table(model, site, weight, qtensor, activation)
        return
    own = f"{site.module}.{site.parameter}"
    sharing = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight and name != own]
    if sharing:
        raise SpecError(f"{site.name}: its weight is shared with {', '.join(sharing)}; leave both in float or untie them")
    if site.read or len(site.shape) == 3:
        if site.read and activation is not None:
            raise SpecError(f"{site.name}: its inputs cannot be rounded, because its module multiplies by it in its own way")
        stands_in = QuantParameter(qtensor, weight.dtype) if site.read else QuantWeight(qtensor, activation=activation)
        del module._parameters[site.parameter]
        module.add_module(site.parameter, stands_in.train(module.training))
        return
    _replace(model, site.module, QuantLinear(qtensor, getattr(module, "bias", None), activation=activation))


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
    getattr(model, "all_tied_weights_keys", {}).clear()  # what was tied there is one GridTensor now


def set_compute(model: nn.Module, compute: ComputeMode) -> None:
    """Say what the quantized layers of ``model`` make of their inputs from now on: ``"float"``, nothing, or ``"int8"``.

    Raises:
        KernelError: if ``compute`` is neither.
    """
    check_compute(compute)
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantWeight):
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
    setattr(model.get_submodule(parent), own, rounded)
    model.config.tie_word_embeddings = False
