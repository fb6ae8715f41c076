"""Statistics on the disk: calibrate once, quantize many times.

One safetensors file. Sites that share their statistics (they read the same tensor) share the stored tensors; the metadata
maps each site to them and carries token counts and the fingerprint of the calibration data.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.nn.sites import SiteStatistics
from quantkit.system.files import named_path
from quantkit.system.tensors import write_tensors

_VERSION = "1"


def save_statistics(path: str | Path, statistics: Mapping[str, SiteStatistics], fingerprint: str) -> None:
    """Write ``statistics`` (site name to results) and the ``fingerprint`` of their calibration data to ``path``."""
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    sites: dict[str, dict[str, object]] = {}
    for name, one in statistics.items():
        stored = {}
        for collector, result in one.results.items():
            owner = owners.setdefault(id(result), f"{name}|{collector}")
            tensors[owner] = result.contiguous()
            stored[collector] = owner
        sites[name] = {"results": stored, "tokens": one.tokens}
    metadata = {"quantkit_statistics": _VERSION, "fingerprint": fingerprint, "sites": json.dumps(sites)}
    write_tensors(path, tensors, metadata)


def load_statistics(path: str | Path) -> tuple[dict[str, SiteStatistics], str]:
    """Read what :func:`save_statistics` wrote; returns the statistics and the fingerprint of their data.

    Raises:
        FormatError: if the file is missing, damaged or something else.
    """
    path = named_path(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("quantkit_statistics") != _VERSION:
                raise FormatError(f"{path}: not a statistics file of version {_VERSION}; write one with save_statistics")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: cannot be read as calibration statistics ({error})") from error
    found: dict[str, SiteStatistics] = {}
    shared: dict[tuple[str, ...], SiteStatistics] = {}
    for name, facts in json.loads(metadata["sites"]).items():
        key = tuple(sorted(facts["results"].values()))
        if key not in shared:
            shared[key] = SiteStatistics({c: tensors[t] for c, t in facts["results"].items()}, tuple(facts["tokens"]))
        found[name] = shared[key]
    return found, metadata["fingerprint"]
