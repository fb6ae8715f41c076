"""Statistics of a model's layers as llama.cpp wants them: by the names of its tensors, the experts of a layer together."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.check import config_json
from quantkit.checkpoint.contents import contents_of
from quantkit.errors import CalibrationError
from quantkit.formats.gguf.architectures import targets
from quantkit.formats.gguf.imatrix import write_imatrix
from quantkit.hf.load import PreTrainedModel
from quantkit.nn.sites import SiteStatistics


def save_imatrix(
    path: str | Path,
    model: PreTrainedModel,
    statistics: Mapping[str, SiteStatistics],
    *,
    length: int = 512,
    source: str = "text",
) -> None:
    """Write statistics as an importance matrix for ``llama-quantize --imatrix``.

    Args:
        path: a file; replaced if it is there.
        model: whose layers they are.
        statistics: layer name to results, of which ``mean_square`` or ``hessian`` is used.
        length: tokens of a window, which the file records.
        source: name of the text, which the file records.

    Raises:
        FormatError: a model that is not written as GGUF.
        CalibrationError: statistics without either result.
    """
    contents = contents_of(model.config)
    entries = [entry for entry in contents.entries if entry.site is not None and entry.site.name in statistics]
    places = targets(config_json(model), [entry.name for entry in entries])
    found: dict[str, dict[int, tuple[Tensor, int]]] = {}
    for entry in entries:
        assert entry.site is not None
        target, site = places[entry.name], statistics[entry.site.name]
        own = site if target.expert is None else site.expert(target.expert)
        found.setdefault(target.name, {})[target.expert or 0] = _mean_square(entry.site.name, own), own.tokens[0]
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for name, experts in found.items():
        counts = torch.tensor([experts[index][1] for index in sorted(experts)], dtype=torch.float64)
        squares = torch.stack([experts[index][0] for index in sorted(experts)])
        sums[name] = squares * counts.unsqueeze(-1), counts
    most = max((max(one.tokens) for one in statistics.values()), default=0)
    write_imatrix(Path(path), sums, windows=-(-most // length), length=length, source=source)


def _mean_square(name: str, statistics: SiteStatistics) -> Tensor:
    """Return E[x^2] of every input channel, float64 (in,)."""
    results = statistics.results
    if "mean_square" in results:
        return results["mean_square"].double().cpu()
    if "hessian" in results:
        return results["hessian"].diagonal().double().cpu()
    raise CalibrationError(f"{name}: statistics {', '.join(results)} have no squares of inputs; collect mean_square")
