"""What a run leaves on the disk so that it can be killed at any instant and continued to byte-identical files.

The directory holds ``run.json`` (a fingerprint of everything that decides the result) and, for every finished block,
``block-<i>.safetensors`` (its quantized sites, their losses and notes). ``chain-<i>.safetensors`` is what block i handed to
the next one; only the newest is kept. Each file appears atomically, the chain before its block, so a block that is there can
be continued from.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quantkit.calibrate.data import Batch
from quantkit.calibrate.data import fingerprint as data_fingerprint
from quantkit.errors import FormatError
from quantkit.nn.sites import SiteStatistics
from quantkit.qtensor import PARTS, GridTensor
from quantkit.quantizers.base import Quantized
from quantkit.spec import QuantSpec
from quantkit.system.files import atomic_path, write_json
from quantkit.version import __version__


def fingerprint(model: nn.Module, settings: Mapping[str, Any], statistics: Mapping[str, SiteStatistics] | None = None) -> str:
    """Return a SHA-256 over settings, model and statistics: names, shapes, dtypes and a spread of each tensor's bytes."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    known = [(f"{site}|{name}", value) for site, one in (statistics or {}).items() for name, value in one.results.items()]
    for name, tensor in (*model.named_parameters(), *known):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().contiguous()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


class ResumeStore:
    """The resume directory of one run.

    Args:
        path: directory; created when the first block is written.
        run: fingerprint of the run.

    Raises:
        FormatError: if the directory holds another run.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        state = path / "run.json"
        if state.exists():
            found = json.loads(state.read_text()).get("run")
            if found != run:
                raise FormatError(
                    f"{path} holds the unfinished state of another run (other model, scheme, calibration or version); "
                    "delete it, or pass resume=False to start over"
                )

    def finished(self) -> int:
        """Return how many leading blocks are finished."""
        count = 0
        while self._block(count).exists():
            count += 1
        return count

    def save(self, index: int, quantized: Mapping[str, Quantized], chain: Sequence[Tensor]) -> None:
        """Record block ``index`` as finished, together with its outputs (one (B, T, H) per batch)."""
        if not (self.path / "run.json").exists():
            write_json(self.path / "run.json", {"run": self.run})
        if chain:
            with atomic_path(self._chain(index)) as temporary:
                save_file({f"{i:05d}": hidden.contiguous() for i, hidden in enumerate(chain)}, temporary)
        tensors: dict[str, Tensor] = {}
        notes: dict[str, str] = {}
        for name, one in quantized.items():
            q = one.qtensor
            tensors |= {f"{name}|{part}": value for part in PARTS if (value := getattr(q, part)) is not None}
            tensors |= {} if one.bias is None else {f"{name}|bias": one.bias}
            facts = {
                "spec": q.spec.to_dict(),
                "shape": q.shape,
                "loss": one.loss,
                "notes": one.notes,
                "fell_back": one.fell_back,
            }
            notes[name] = json.dumps(facts)
        with atomic_path(self._block(index)) as temporary:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata=notes)
        self._chain(index - 1).unlink(missing_ok=True)

    def load(self, index: int) -> dict[str, Quantized]:
        """Return the quantized sites of finished block ``index``."""
        result: dict[str, Quantized] = {}
        with safe_open(self._block(index), "pt") as file:
            keys = set(file.keys())
            for name, text in (file.metadata() or {}).items():
                facts = json.loads(text)
                # Cloned, so that the values do not depend on the file's mapping or on its alignment.
                parts: dict[str, Any] = {k: file.get_tensor(f"{name}|{k}").clone() for k in PARTS if f"{name}|{k}" in keys}
                parts = {"zero_point": None, **parts}
                qtensor = GridTensor(spec=QuantSpec.from_dict(facts["spec"]), shape=tuple(facts["shape"]), **parts)
                bias = file.get_tensor(f"{name}|bias").clone() if f"{name}|bias" in keys else None
                result[name] = Quantized(qtensor, facts["loss"], tuple(facts["notes"]), facts["fell_back"], bias)
        return result

    def load_chain(self, index: int) -> list[Tensor]:
        """Return the outputs of finished block ``index``."""
        with safe_open(self._chain(index), "pt") as file:
            return [file.get_tensor(key).clone() for key in sorted(file.keys())]

    def clear(self) -> None:
        """Remove everything: the run is finished."""
        self.remove(self.path)

    @staticmethod
    def remove(path: Path) -> None:
        """Delete a resume directory, of whatever run, if it exists."""
        if path.exists():
            shutil.rmtree(path)

    def _block(self, index: int) -> Path:
        return self.path / f"block-{index:05d}.safetensors"

    def _chain(self, index: int) -> Path:
        return self.path / f"chain-{index:05d}.safetensors"


def versions() -> dict[str, str]:
    """Return the versions that decide a run's result."""
    return {"quantkit": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}}


def settings_of(methods: Sequence[object], plan: Mapping[str, Any], batches: Sequence[Batch]) -> dict[str, Any]:
    """Collect what decides a run's result, for :func:`fingerprint`; batches count by size too, since the chain keeps them."""
    return {
        "methods": [repr(method) for method in methods],
        "plan": {name: scheme.to_dict() for name, scheme in plan.items()},
        "calibration": [data_fingerprint(batches), *(tuple(batch.ids.shape) for batch in batches)],
        "versions": versions(),
    }
