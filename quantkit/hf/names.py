"""Find which rows of which parameter each checkpoint tensor holds.

In transformers 5 the parameters in memory are not the tensors in a file: mixtral's ``mlp.experts.gate_up_proj`` (experts, 2I,
H) is stored as ``block_sparse_moe.experts.0.w1.weight`` (I, H), ``...w3.weight`` and so on, and transformers converts between
the two when it loads and saves. A writer of quantized files needs that correspondence rather than the conversion itself. It is
found by letting transformers convert *tracers*: one tensor per parameter with all of its rows but at most two columns, in which
every element is a number that encodes its origin. The result gives, for every checkpoint tensor, the parameter, expert and rows
that it consists of, and whether it is transposed. There is no table per architecture. Conversions other than slicing, joining,
reordering rows and transposing are refused. A stack of matrices with another order of rows keeps its name and order in memory.

Memory: two int64 per output row of the model, a few megabytes for a billion parameters. Works on meta models.
"""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from quantkit.errors import FormatError


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``start:stop`` of a parameter.

    Attributes:
        parameter: name of the parameter (or persistent buffer) in the model.
        expert: index along the leading axis of a 3-D parameter; None for other parameters, or for several matrices of one.
        start, stop: range along the output axis (the only axis of a 1-D parameter).
        matrices: range along the leading axis, for a piece that has one itself; None for all other pieces.
    """

    parameter: str
    expert: int | None
    start: int
    stop: int
    matrices: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """The content of one checkpoint tensor.

    Attributes:
        pieces: joined along the output axis, or along the leading one where they have one.
        transposed: whether the joined tensor is stored transposed, (in, out).
    """

    pieces: tuple[Piece, ...]
    transposed: bool


def checkpoint_names(model: PreTrainedModel, transposed: Collection[str] = ()) -> dict[str, CheckpointTensor]:
    """Return the content of every tensor in a checkpoint of ``model``.

    Tied weights appear once; non-persistent buffers do not appear.

    Args:
        model: float model, possibly on the meta device. A model built from its config has the tensor names that readers of that
            config expect; a model loaded from files has the names in those files.
        transposed: names of parameters that are stored (..., in, out). Their pieces count output rows as well.

    Returns:
        Checkpoint tensor name to its content.

    Raises:
        FormatError: a checkpoint tensor does not consist of whole rows of parameters.
    """
    shapes = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys
    }
    names = list(shapes)
    bases: list[int] = []
    tracers: dict[str, Tensor] = {}
    base = 0
    for name, shape in shapes.items():
        bases.append(base)
        tracers[name] = _tracer(shape, base, name in transposed)
        base += 2 * _row_count(shape, name in transposed)
    try:
        converted = revert_weight_conversion(model, tracers)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise FormatError(
            f"{type(model).__name__}: transformers cannot convert its weights to checkpoint tensors: {error}"
        ) from error
    starts = torch.tensor(bases) // 2
    heights = torch.tensor([_height(shape, name in transposed) for name, shape in shapes.items()])
    found = {}
    for stored_name, tensor in converted.items():
        rows, swapped = _decode(stored_name, tensor)
        owners = torch.searchsorted(starts, rows, right=True) - 1
        local = rows - starts[owners]
        whole = _shuffled(owners, local, names, shapes, transposed) if tensor.ndim > 2 else None
        if whole is not None:
            found[whole.parameter] = CheckpointTensor((whole,), whole.parameter in transposed)
            continue
        pieces = _pieces(stored_name, owners, local, names, shapes, transposed, None if tensor.ndim > 2 else heights)
        found[stored_name] = CheckpointTensor(pieces, swapped)
    return found


def _row_count(shape: tuple[int, ...], transposed: bool) -> int:
    if len(shape) < 2:
        return shape[0] if shape else 1
    return torch.Size(shape[:-2]).numel() * shape[-1 if transposed else -2]


def _tracer(shape: tuple[int, ...], base: int, transposed: bool) -> Tensor:
    """Number the rows of a parameter: element (row, column) of the first two columns holds ``base + 2 * row + column``."""
    count = _row_count(shape, transposed)
    if len(shape) < 2:
        return (base + 2 * torch.arange(count)).reshape(shape)
    rows, columns = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    ids = (base + torch.arange(2 * count)).reshape(*shape[:-2], rows, 2)[..., : min(2, columns)]
    return ids.transpose(-1, -2).contiguous() if transposed else ids.contiguous()


def _decode(name: str, tensor: Tensor) -> tuple[Tensor, bool]:
    """Return the global row numbers of a converted tracer and whether its last two axes are swapped."""
    if tensor.ndim < 2:
        return tensor.reshape(-1) // 2, False
    for candidate, swapped in ((tensor, False), (tensor.transpose(-1, -2), True)):
        first = candidate[..., :1]
        if (
            candidate.shape[-1] <= 2
            and bool((first % 2 == 0).all())
            and torch.equal(candidate[..., 1:], first[..., : candidate.shape[-1] - 1] + 1)
        ):
            return candidate[..., 0].reshape(-1) // 2, swapped
    raise FormatError(f"{name}: transformers does not store it as whole rows of parameters; quantkit cannot write this model")


def _pieces(
    stored_name: str,
    owners: Tensor,
    local: Tensor,
    names: list[str],
    shapes: dict[str, tuple[int, ...]],
    transposed: Collection[str],
    heights: Tensor | None,
) -> tuple[Piece, ...]:
    """Merge consecutive rows of one parameter and expert into pieces; a 3-D checkpoint tensor consists of whole matrices.

    ``heights`` are the rows of one matrix of each parameter; None for a 3-D tensor.
    """
    if heights is None:
        return _stacks(stored_name, owners, local, names, shapes, transposed)
    experts, rows = local // heights[owners], local % heights[owners]
    breaks = (owners.diff() != 0) | (experts.diff() != 0) | (rows.diff() != 1)
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(owners)]
    pieces = []
    for first, last in itertools.pairwise(edges):
        name = names[int(owners[first])]
        expert = int(experts[first]) if len(shapes[name]) == 3 else None
        pieces.append(Piece(name, expert, int(rows[first]), int(rows[last - 1]) + 1))
    return tuple(pieces)


def _shuffled(
    owners: Tensor, local: Tensor, names: list[str], shapes: dict[str, tuple[int, ...]], transposed: Collection[str]
) -> Piece | None:
    """Return a whole stack that a tensor holds with the rows of its matrices in another order; None if it is anything else.

    It is written under its name in the model, in its own order: transformers reads both.
    """
    name = names[int(owners[0])]
    shape = shapes[name]
    rows = torch.arange(_row_count(shape, name in transposed))
    if len(shape) != 3 or len(local) != len(rows) or bool((owners != owners[0]).any()) or torch.equal(local, rows):
        return None
    height = shape[-1 if name in transposed else -2]
    in_place = torch.equal(local // height, rows // height) and torch.equal(local.sort().values, rows)
    return Piece(name, None, 0, height) if in_place else None


def _stacks(
    stored_name: str,
    owners: Tensor,
    local: Tensor,
    names: list[str],
    shapes: dict[str, tuple[int, ...]],
    transposed: Collection[str],
) -> tuple[Piece, ...]:
    """Return the ranges of whole matrices, consecutive along the leading axis of their parameter, that a tensor consists of."""
    pieces = []
    for part, rows in _runs(owners, local):
        name = names[int(owners[part])]
        shape = shapes[name]
        height = shape[-1 if name in transposed else -2]
        first, last = int(rows[0]), int(rows[-1]) + 1
        whole = (first, last) == (0, _row_count(shape, name in transposed))
        if len(shape) < 3 or (len(shape) > 3 and not whole) or first % height or last % height:
            raise FormatError(
                f"{stored_name}: transformers reorders the rows of {name} when it saves it; quantkit cannot write this model"
            )
        pieces.append(Piece(name, None, 0, height, (first // height, last // height)))
    # A tensor that is one whole parameter has all of its matrices, which goes without saying.
    return (replace(pieces[0], matrices=None),) if len(pieces) == 1 and whole else tuple(pieces)


def _runs(owners: Tensor, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the consecutive rows of one parameter: where they begin, and the rows."""
    breaks = (owners.diff() != 0) | (rows.diff() != 1)
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(owners)]
    for first, last in itertools.pairwise(edges):
        yield first, rows[first:last]


def _height(shape: tuple[int, ...], transposed: bool) -> int:
    """Return the number of rows of one matrix of a parameter."""
    return max(1, shape[-1 if transposed else -2] if len(shape) == 3 else _row_count(shape, transposed))
