"""Quantized weights that stay in the files of a checkpoint, and a model that is made of such: for models larger than memory."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint.contents import Entry, read_floats, read_site
from quantkit.checkpoint.loading import finish_model, put
from quantkit.checkpoint.read import Opened, open_checkpoint
from quantkit.formats.base import Stored
from quantkit.hf.load import PreTrainedModel
from quantkit.nn.install import install
from quantkit.nn.on_disk import OnDisk
from quantkit.nn.sites import Site
from quantkit.qtensor import empty_qtensor
from quantkit.spec import Scheme


def place_of(
    site: Site, scheme: Scheme, entries: Iterable[Entry], stored: Mapping[str, Stored], view: Callable[[str], Tensor]
) -> OnDisk:
    """Return where a site is.

    Args:
        site: a quantized site.
        scheme: its scheme.
        entries: of the checkpoint, its own among them.
        stored: entry name to how it is stored.
        view: returns a tensor of the checkpoint, mapped, by its full name.
    """
    own = [entry for entry in entries if entry.site == site]
    codecs = [(entry, stored[entry.name].codec) for entry in own]
    names = [f"{e.module}.{suffix}" for e, codec in codecs for suffix in codec.layout(scheme.weight, e.weight_shape)]
    views = {name: view(name) for name in names}
    read = functools.partial(read_site, site, own, dict(stored), views.__getitem__)
    like: Any = read() if scheme.static else empty_qtensor(scheme.weight, site.shape)
    return OnDisk.of(like, read, views.values())


def load_on_disk(path: str | Path) -> PreTrainedModel:
    """Load a quantized checkpoint, as :func:`quantkit.checkpoint.load` does, but leave all that is large in its mapped files.

    A quantized layer is read, and laid out for its kernel, when it is first run; until :meth:`QuantModule.release` is called.

    Raises:
        FormatError: as :func:`quantkit.checkpoint.load`.
    """
    with open_checkpoint(path) as opened:
        contents = opened.contents
        model: Any = contents.model
        for name, tensor in _floats(opened):
            put(model, name, tensor)
        schemes = opened.schemes
        view = functools.partial(opened.reader.read, copy=False)
        entries: dict[str, list[Entry]] = {}
        for entry in contents.entries:
            if entry.site is not None:
                entries.setdefault(entry.site.name, []).append(entry)
        for name, scheme in schemes.items():
            site = contents.sites[name]
            install(model, site, place_of(site, scheme, entries[name], opened.stored, view), scheme.activation)
        finish_model(model, opened)
    loaded: PreTrainedModel = model.requires_grad_(False).eval()
    return loaded


def _floats(opened: Opened) -> Iterable[tuple[str, Tensor]]:
    """Yield every unquantized parameter and buffer by its name in the model: as it is in the files, or put together."""
    whole: list[Entry] = []
    rest: list[Entry] = []
    for entry in opened.contents.entries:
        if entry.name not in opened.stored:
            (whole if _is_whole(entry, opened.contents.transposed) else rest).append(entry)
    for entry in whole:
        yield entry.source.pieces[0].parameter, opened.reader.read(entry.name, copy=False)
    yield from read_floats(opened.contents, rest, functools.partial(opened.reader.read, copy=False))


def _is_whole(entry: Entry, transposed: Sequence[str] | frozenset[str]) -> bool:
    """Say whether a tensor of a checkpoint is a parameter, number for number."""
    pieces = entry.source.pieces
    plain = len(pieces) == 1 and pieces[0].expert is None and pieces[0].matrices is None
    return plain and not entry.source.transposed and pieces[0].parameter not in transposed
