"""What a run of :func:`quantkit.quantize` is told beside model and scheme: where the checkpoint goes, and how to behave."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ByteSize, Field, Strict

from quantkit.errors import FormatError, QuantkitError, SpecError
from quantkit.formats.base import FORMATS
from quantkit.system.compute import Compute, known_device
from quantkit.system.progress import ProgressCallback, ignore
from quantkit.system.settings import Flag, settings


def _known_format(name: str) -> str:
    try:
        FORMATS.get(name)
    except FormatError as error:
        raise ValueError(str(error)) from None
    return name


def _known_place(name: str) -> str:
    try:
        known_device(name)
    except SpecError as error:
        raise ValueError(str(error)) from None
    return name


@settings(FormatError)
class Output:
    """Where a checkpoint goes, and in which format.

    Args:
        path: directory; None writes nothing.
        format: name in the registry of formats, such as ``"compressed-tensors"``, ``"gptq"``, ``"gguf"`` or ``"native"``.
        overwrite: replace a checkpoint that is already there, at the very end.
        fused: layers that serving engines run as one (query, key and value; gate and up; the experts of a layer) must have one
            scheme; False allows rules that part them, in a checkpoint for readers that do not join layers.

    Raises:
        FormatError: an unknown format, naming the nearest.
    """

    path: Annotated[str, Strict()] | Path | None = None
    format: Annotated[str, Strict(), AfterValidator(_known_format)] = "compressed-tensors"
    overwrite: Flag = False
    fused: Flag = True

    @property
    def keeps_together(self) -> bool:
        """Whether layers that engines run as one must have one scheme."""
        return self.fused and FORMATS.get(self.format).foreign

    def to(self, out: str | Path | None) -> "Output":
        """Return these settings with the path that ``out=`` gives, if it gives one.

        Raises:
            FormatError: both name a path, and not the same.
        """
        if out is None:
            return self
        if self.path is not None and Path(self.path) != Path(out):
            raise FormatError(f"out={str(out)!r} and output.path={str(self.path)!r} disagree; give one of them")
        return replace(self, path=out)


@settings(QuantkitError)
class Run:
    """How a run behaves.

    Args:
        strict: fail if a linear layer or expert would be left in float without a rule that says so, or falls back to plain
            rounding; the first is found before any work, the second when it happens.
        resume: continue an interrupted run of the same settings, or read back what it has finished; False starts over.
        device: where the block at work is: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``, the GPU if there is one.
        compute: device and dtype of the block at work; None is ``device`` in the model's dtype, the CPU in float32.
        max_memory: most memory that the process may take (its resident size), such as ``"4GiB"``, or bytes; the run keeps to
            it, or is refused before it begins. None: blocks leave memory as they are done with, activations of more than 1 GiB
            lie on the disk, and what that takes is taken.
        progress: receives :class:`quantkit.Progress` events.
    """

    strict: Flag = False
    resume: Flag = True
    device: Annotated[str, Strict(), AfterValidator(_known_place)] = "auto"
    compute: Compute | None = None
    max_memory: Annotated[ByteSize, Field(gt=0)] | None = None
    progress: Any = ignore

    @property
    def report(self) -> ProgressCallback:
        """The progress callback, typed."""
        callback: ProgressCallback = self.progress
        return callback
