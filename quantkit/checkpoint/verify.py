"""Verification: the files hold the model in memory, bit for bit."""

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from quantkit.checkpoint.contents import float_tensor, same_bits
from quantkit.checkpoint.publish import mark_incomplete
from quantkit.checkpoint.read import Opened, open_checkpoint
from quantkit.errors import FormatError, SpecError
from quantkit.hf.ledger import Ledger, ledger_of
from quantkit.nn.linear import QuantModule
from quantkit.qtensor import QTensor
from quantkit.spec import QuantSpec, Scheme
from quantkit.system.memory import PageRelease


def installed(model: nn.Module) -> dict[str, QTensor]:
    """Return layer name to quantized weight, everything in the model.

    Raises:
        SpecError: a weight that is not on a grid, which no format stores.
    """
    return {name: module.qtensor for name, module in _owners(model)}


def installed_plan(model: nn.Module) -> dict[str, Scheme]:
    """Return layer name to scheme of everything quantized in the model; raises as :func:`installed`."""
    return {name: Scheme(_grid_of(name, module), module.activation) for name, module in _owners(model)}


def _grid_of(name: str, module: QuantModule) -> QuantSpec:
    if not isinstance(module.spec, QuantSpec):
        raise SpecError(f"{name}: its weight {module.spec.describe()} is not on a grid; no format stores it")
    return module.spec


def _owners(model: nn.Module) -> Iterator[tuple[str, QuantModule]]:
    """Yield the modules whose weights a checkpoint holds under their names: all but tied heads."""
    for name, module in model.named_modules():
        if isinstance(module, QuantModule) and module.tied_to is None:
            yield name, module


def verify(path: str | Path, model: nn.Module) -> None:
    """Re-read a checkpoint and compare every code, scale, zero point and float tensor with the model in memory.

    Raises:
        FormatError: anything differs. The directory is then marked incomplete, so that nothing loads it.
    """
    try:
        _compare(Path(path), model)
    except FormatError as error:
        if Path(path).is_dir():
            mark_incomplete(Path(path), f"verification failed: {error}")
        raise


def _compare(path: Path, model: nn.Module) -> None:
    found = {name: module for name, module in _owners(model) if _grid_of(name, module)}
    with open_checkpoint(path) as opened:
        if found.keys() != opened.schemes.keys():
            odd = sorted(found.keys() ^ opened.schemes.keys())
            raise FormatError(f"{path}: {odd[0]} is quantized {'in memory only' if odd[0] in found else 'in the files only'}")
        pages = PageRelease()
        for name, module in found.items():
            file, memory = opened.qtensor(opened.contents.sites[name], copy=False), module.qtensor
            same = same_qtensor(file, memory)
            pages.add(*file.parts().values(), *module.release())
            if not same:
                raise FormatError(f"{path}: {name} differs from the model in memory; the disk or the format lost bits")
        for entry in opened.contents.entries:
            if entry.name in opened.stored:
                continue
            own = float_tensor(model, entry, opened.contents.transposed, copy=False)
            file_own = opened.reader.read(entry.name, copy=False)
            same = same_bits(file_own, own)
            pages.add(own, file_own)
            if not same:
                raise FormatError(f"{path}: {entry.name} differs from the model in memory; the disk lost bits")
        pages.flush()
        _compare_carried(path, opened, ledger_of(model))


def _compare_carried(path: Path, opened: Opened, ledger: Ledger | None) -> None:
    """Compare the tensors that were carried over with the files that they come from."""
    wanted = ledger.carried if ledger is not None else ()
    if set(wanted) != set(opened.carried):
        odd = sorted(set(wanted) ^ set(opened.carried))
        raise FormatError(f"{path}: {odd[0]} of the source is {'lost' if odd[0] in wanted else 'not one that is carried over'}")
    if ledger is None:
        return
    with ledger.tensors() as read:
        for name in wanted:
            if not same_bits(opened.reader.read(name, copy=False), read(name)):
                raise FormatError(f"{path}: {name} differs from the source in {ledger.path}; the disk lost bits")
            opened.reader.release()


def same_qtensor(a: QTensor, b: QTensor) -> bool:
    """Say whether two weights have the same grid, shape and, bit for bit, parts."""
    parts, others = a.parts(), b.parts()
    same = (a.spec, a.shape, parts.keys()) == (b.spec, b.shape, others.keys())
    return same and all(same_bits(parts[name], others[name]) for name in parts)
