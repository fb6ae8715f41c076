"""Quantized layers while they are trained: a float weight that is seen only behind its rounding.

Stand-ins for :class:`~quantkit.nn.linear.QuantLinear`, :class:`~quantkit.nn.linear.QuantWeight` and
:class:`~quantkit.nn.embedding.QuantEmbedding` with ordinary parameters, for any training loop: the float weight, in the basis
it is stored in; its scales in float32, learned as in LSQ; zero points, which stay whole unless learned too; and the scale
of a static grid for the inputs, whose gradient is that of a learned clipping range (PACT, Choi et al. 2018, arXiv 1805.06085).
The arithmetic is in :mod:`quantkit.numerics.fake`: what a forward sees is what :meth:`FakeModule.result` stands for, bit for
bit, so that :func:`quantized` changes no output by more than the rounding of sums.

A weight that begins with codes chosen elsewhere is put inside their cells: :func:`quantkit.numerics.fake.nearest_in_cell`.

Memory: what a float32 layer takes, and while gradients are computed a copy of the rounded weight in the dtype of the products.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.errors import SpecError
from quantkit.kernels.functions.fake import register, spec_key
from quantkit.nn.adapters import AdaptedWeight, Frozen, new_adapter
from quantkit.nn.embedding import QuantEmbedding
from quantkit.nn.install import SAVING, forbid_saving
from quantkit.nn.linear import QuantLinear, QuantModule, QuantWeight
from quantkit.numerics import grid
from quantkit.numerics.fake import nearest_in_cell, stored_grid, weight_codes
from quantkit.numerics.inputs import InputQuantizer
from quantkit.qtensor import GridTensor, as_grid

NARROW = ("float8_e8m0fnu", "float8_e4m3fn")
"""Dtypes of scales that are too coarse to be learned: powers of two, and FP8. They stay as they are chosen."""


@dataclasses.dataclass(frozen=True, slots=True)
class Learned:
    """What a layer learns.

    Attributes:
        share: how far weights go from their codes' own values towards the float weight at the start, 0 to 1.
        learn_zero: learn the zero points of asymmetric integer grids, too (LSQ+).
        adapters: rank of low-rank changes that are learned in place of weights (:mod:`quantkit.nn.adapters`); 0 for weights.
        seed: decides the directions in which adapters begin.
    """

    share: float = 1.0
    learn_zero: bool = False
    adapters: int = 0
    seed: int = 0


class FakeModule(nn.Module):
    """A module with one weight that is trained behind its rounding.

    Args:
        module: the quantized layer that it stands in for.
        origin: the float weight, of the quantized one's shape and in its basis; None begins with the codes' own values.
        how: what is learned.

    Attributes:
        weight: float32 (out, in) or (experts, out, in), a parameter; frozen beside adapters.
        adapter_in: float32 (..., rank, in), a parameter, or None without adapters; ``adapter_out`` (..., out, rank) likewise.
        first_scale: the scales that adapters began with, a buffer; or None.
        scale: float32 (..., out_blocks, in_blocks), a parameter; frozen if its stored dtype is one of :data:`NARROW`.
        zero_point: uint8 of that shape; a float32 parameter where it is learned; None for a symmetric grid.
        global_scale: float32 (..., 1), or None; fixed.
        input_scale: float32 (..., 1), the scale of a static grid for the inputs, a parameter; or None.
        tied_to: as in :class:`~quantkit.nn.linear.QuantModule`.
    """

    weight: nn.Parameter
    adapter_in: nn.Parameter | None
    adapter_out: nn.Parameter | None
    first_scale: Tensor | None
    scale: nn.Parameter
    zero_point: Tensor | None
    global_scale: Tensor | None
    input_scale: nn.Parameter | None

    def __init__(self, module: QuantModule, origin: Tensor | None = None, how: Learned = Learned()) -> None:
        super().__init__()
        register()
        qtensor = as_grid(module.qtensor)
        if qtensor.spec.offset:
            raise SpecError(f"weights {qtensor.spec.describe()} are only read, and cannot be trained; start from a float model")
        self.spec, self.shape, self.activation, self.tied_to = qtensor.spec, qtensor.shape, module.activation, module.tied_to
        self._key = spec_key(self.spec)
        self._input_key = spec_key(self.activation.grid) if self.activation is not None else ""
        self.weight = nn.Parameter(_start(qtensor, origin, how.share), requires_grad=not how.adapters)
        self.scale = nn.Parameter(qtensor.scale.float(), requires_grad=self.learns_scale)
        zero = None if qtensor.zero_point is None else qtensor.zero_point.clone()
        if zero is not None and how.learn_zero:
            self.zero_point = nn.Parameter(zero.float())
        else:
            self.register_buffer("zero_point", zero)
        self.register_buffer("global_scale", qtensor.global_scale)
        inner, outer = new_adapter(self.shape, how.adapters, how.seed) if how.adapters else (None, None)
        self.register_parameter("adapter_in", None if inner is None else nn.Parameter(inner))
        self.register_parameter("adapter_out", None if outer is None else nn.Parameter(outer))
        self.register_buffer("first_scale", qtensor.scale.float() if how.adapters else None)
        given = qtensor.input_scale
        self.register_parameter("input_scale", None if given is None else nn.Parameter(given.float()))

    @property
    def learns_scale(self) -> bool:
        """Whether the stored dtype of scales is fine enough for them to be learned."""
        return self.spec.scale_dtype not in NARROW

    def share(self, other: "FakeModule") -> None:
        """Have the weight and the grid of another layer, which is tied to this one."""
        for name in ("weight", "scale", "zero_point", "global_scale", "adapter_in", "adapter_out", "first_scale"):
            setattr(self, name, getattr(other, name))

    def tensor(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """Return what the codes of the weight (of one expert) stand for, in ``dtype``; differentiable."""
        names = ("weight", "scale", "zero_point", "global_scale", "first_scale", "adapter_in", "adapter_out")
        found = [getattr(self, name) for name in names]
        if expert is not None:
            found = [None if part is None else part[expert] for part in found]
        *parts, first, inner, outer = found
        if first is not None:
            weight, scale, zero, global_scale = parts
            frozen = Frozen(weight, first, global_scale, self.spec, self._key)
            return AdaptedWeight.apply(inner, outer, scale, zero, frozen, dtype)  # type: ignore[no-any-return, no-untyped-call]
        return torch.ops.quantkit.fake_weight(*parts, self._key, dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Return the weight that is rounded, float32, with adapters folded in."""
        if self.first_scale is None:
            return self.weight
        frozen = Frozen(self.weight, self.first_scale, self.global_scale, self.spec, self._key)
        assert self.adapter_in is not None
        assert self.adapter_out is not None
        return frozen.whole(self.adapter_in, self.adapter_out, self.scale)

    @torch.no_grad()
    def result(self) -> GridTensor:
        """Return the weight as it is stored.

        Raises:
            SpecError: it holds NaN or infinity.
        """
        weight = self.whole()
        if not bool(torch.isfinite(weight).all() and torch.isfinite(self.scale).all()):
            raise SpecError("the weight or its scales hold NaN or infinity; train with a lower learning rate")
        stored = stored_grid(self.scale, self.zero_point, self.global_scale, self.spec)
        scale, zero, global_scale = stored
        qtensor = GridTensor.from_codes(weight_codes(weight, stored, self.spec), scale, zero, self.spec, global_scale)
        return dataclasses.replace(qtensor, input_scale=self._stored_input_scale())

    def quantized(self, qtensor: GridTensor) -> QuantModule:
        """Return the quantized layer that runs what has been learned."""
        raise NotImplementedError

    def rounded_inputs(self, x: Tensor, expert: int | None = None) -> Tensor:
        """Return inputs (..., in) as the product sees them; differentiable, also in the scale of a static grid."""
        inputs = InputQuantizer(self.activation)
        if self.activation is None or self.input_scale is None:
            return inputs(x)
        scale = self.input_scale if expert is None else self.input_scale[expert]
        rows = inputs.prepare_input(x).reshape(-1, x.shape[-1])
        rounded = torch.ops.quantkit.fake_weight(rows, scale.view(1, 1), None, None, self._input_key, x.dtype)
        return rounded.view(x.shape)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Return shape and grids for ``print(model)``."""
        inputs = f", inputs {self.activation.describe()}" if self.activation else ""
        return f"{'x'.join(map(str, self.shape))}, {self.spec.describe()}{inputs}"

    def _stored_input_scale(self) -> Tensor | None:
        if self.activation is None or self.input_scale is None:
            return None
        return grid.round_scale(self.input_scale.detach(), self.activation.grid.scale_dtype)


class FakeLinear(FakeModule):
    """A linear layer, ``y = x @ w.T + bias``, with a weight that is seen behind its rounding."""

    bias: nn.Parameter | None

    def __init__(self, module: QuantLinear, origin: Tensor | None = None, how: Learned = Learned()) -> None:
        super().__init__(module, origin, how)
        self.out_features, self.in_features = self.shape
        self.register_parameter("bias", None if module.bias is None else nn.Parameter(module.bias.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        weight = self.tensor(product_dtype(x))
        bias = self._parameters["bias"]
        return F.linear(self.rounded_inputs(x), weight, None if bias is None else bias.to(weight.dtype))

    def quantized(self, qtensor: GridTensor) -> QuantLinear:
        """Return the quantized layer."""
        return QuantLinear(qtensor, self._parameters["bias"], activation=self.activation)


class FakeExperts(FakeModule):
    """A stack of expert matrices that stands where a 3-D parameter stood, seen behind its rounding."""

    def matmul(self, x: Tensor, expert: int) -> Tensor:
        """Return ``x @ w[expert].T`` for x (..., in)."""
        return F.linear(self.rounded_inputs(x, expert), self.tensor(product_dtype(x), expert))

    def quantized(self, qtensor: GridTensor) -> QuantWeight:
        """Return the quantized stack."""
        return QuantWeight(qtensor, activation=self.activation)


class FakeEmbedding(FakeModule):
    """An embedding whose table is seen behind its rounding."""

    like: Tensor

    def __init__(self, module: QuantEmbedding, origin: Tensor | None = None, how: Learned = Learned()) -> None:
        super().__init__(module, origin, how)
        self.num_embeddings, self.embedding_dim = self.shape
        self.register_buffer("like", module.like.clone(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of int64 ``ids`` (...), (..., hidden)."""
        return F.embedding(ids, self.tensor(self.like.dtype))

    def quantized(self, qtensor: GridTensor) -> QuantEmbedding:
        """Return the quantized embedding."""
        return QuantEmbedding(qtensor, self.like.dtype)


KINDS: Mapping[type[QuantModule], type[Any]] = {
    QuantLinear: FakeLinear,
    QuantWeight: FakeExperts,
    QuantEmbedding: FakeEmbedding,
}
"""Class of a quantized layer to that of its stand-in."""


class _Swap:
    """Replace modules of a model by others, each object once wherever it stands."""

    kind: ClassVar[type[nn.Module]]

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places = [(name, one) for name, one in model.named_modules(remove_duplicate=False) if isinstance(one, self.kind)]

    def carry_out(self) -> None:
        made: dict[int, nn.Module] = {}
        for name, one in self.places:
            new = made.setdefault(id(one), nn.Module())
            if type(new) is nn.Module:
                new = made[id(one)] = self.other(name, one).train(one.training)
            parent, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(parent), attribute, new)

    def other(self, name: str, module: Any) -> nn.Module:
        raise NotImplementedError


class _Prepare(_Swap):
    kind = QuantModule

    def __init__(self, model: nn.Module, origins: Mapping[str, Tensor], how: Learned) -> None:
        super().__init__(model)
        self.origins, self.how, self.by_name = origins, how, dict[str, FakeModule]()
        for name, module in self.places:
            if type(module) not in KINDS:
                raise SpecError(
                    f"{name}: its module multiplies by its weight in its own way, which cannot be trained behind rounding; "
                    "leave it in float by a rule"
                )

    def other(self, name: str, module: QuantModule) -> nn.Module:
        owner = self.by_name.get(module.tied_to or name)
        how = dataclasses.replace(self.how, seed=zlib.crc32(name.encode()))
        made = KINDS[type(module)](module, self.origins.get(module.tied_to or name), how)
        assert isinstance(made, FakeModule)
        if owner is not None:
            made.share(owner)
        self.by_name.setdefault(module.tied_to or name, made)
        return made


class _Convert(_Swap):
    kind = FakeModule

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.results: dict[int, GridTensor] = {}

    def other(self, name: str, module: FakeModule) -> nn.Module:
        try:
            qtensor = self.results.get(id(module.weight)) or module.result()
        except SpecError as error:
            raise SpecError(f"{name}: {error}") from error
        self.results[id(module.weight)] = qtensor
        made = module.quantized(qtensor)
        made.tied_to = module.tied_to
        return made


def trainable(model: nn.Module, origins: Mapping[str, Tensor], how: Learned = Learned()) -> None:
    """Put a trainable stand-in where each quantized layer of ``model`` is, in place.

    Args:
        model: with quantized layers. What transformers can save of it from then on is the state of training.
        origins: layer name to float weight, of the quantized one's shape and in its basis; other layers begin with the codes'
            own values.
        how: what is learned.

    Raises:
        SpecError: a layer whose module reads its weight in its own way.
    """
    swap = _Prepare(model, origins, how)
    swap.carry_out()
    for part in model.modules():
        for method in SAVING:
            part.__dict__.pop(method, None)


def quantized(model: nn.Module) -> None:
    """Put the quantized layer where each trainable stand-in of ``model`` is, in place.

    Raises:
        SpecError: a weight holds NaN or infinity, parameters are spread over processes, or there is no such layer.
    """
    swap = _Convert(model)
    if not swap.places:
        raise SpecError("the model has no layer that is being trained; make one by quantkit.prepare")
    if sharded := next((name for name, one in model.named_parameters() if hasattr(one, "full_tensor")), None):
        raise SpecError(
            f"{sharded} is spread over processes (fully_shard); gather the state with get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict, and load it into a "
            "prepared model of one process"
        )
    swap.carry_out()
    for name, _ in swap.places:
        forbid_saving(model, name)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a product with x runs in: autocast's where that is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _start(qtensor: GridTensor, origin: Tensor | None, share: float) -> Tensor:
    """Return the weight that training begins with; it has the codes of ``qtensor``."""
    if origin is None:
        return qtensor.dequantize()
    if tuple(origin.shape) != qtensor.shape:
        raise SpecError(f"a float weight {tuple(origin.shape)} for a quantized one {qtensor.shape}; want the same shape")
    stored = (qtensor.scale, qtensor.zero_point, qtensor.global_scale)
    return nearest_in_cell(origin.to(qtensor.device), qtensor.codes(), stored, qtensor.spec, share)
