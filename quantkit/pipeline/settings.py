"""What a run of :func:`quantkit.quantize` is told beside model and scheme: where the checkpoint goes, and how to behave."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, Strict

from quantkit.errors import FormatError, QuantkitError, SpecError
from quantkit.formats.base import FORMATS
from quantkit.system.compute import Compute, known_device
from quantkit.system.progress import ProgressCallback, callback
from quantkit.system.settings import Flag, settings
from quantkit.system.workers import ALONE, Workers


def _known_format(name: str) -> str:
    try:
        FORMATS.get(name)
    except FormatError as error:
        raise ValueError(str(error)) from None
    return name


def _known_progress(choice: Any) -> Any:
    try:
        callback(choice)
    except QuantkitError as error:
        raise ValueError(str(error)) from None
    return choice


def _known_place(name: str) -> str:
    try:
        known_device(name)
    except SpecError as error:
        raise ValueError(str(error)) from None
    return name


def _known_workers(value: object) -> object:
    if not isinstance(value, Workers):
        raise ValueError("want what quantkit.system.workers.launched() yields; a recipe says nothing about workers")
    return value


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
    also: tuple["Output", ...] = ()

    def __post_init__(self) -> None:
        if any(one.path is None or one.also for one in self.also):
            raise ValueError("several outputs want a path each, and stand in one list")
        if not self.also:
            return  # what is wrong with one path is said where it is opened
        places = [Path(str(one.path)).resolve() for one in (self, *self.also) if one.path is not None]
        if len(set(places)) < len(places):
            raise ValueError("two outputs have one path; give each a directory of its own")

    @property
    def all(self) -> "tuple[Output, ...]":
        """This output alone, and those that go with it."""
        return (replace(self, also=()), *self.also)

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of all formats that are written, in order; empty if nothing is."""
        return tuple(one.format for one in self.all if one.path is not None)

    @property
    def keeps_together(self) -> bool:
        """Whether layers that engines run as one must have one scheme."""
        return any(one.fused and FORMATS.get(one.format).foreign for one in (self, *self.also))

    def to(self, out: str | Path | None) -> "Output":
        """Return these settings with the path that ``out=`` gives, if it gives one.

        Raises:
            FormatError: both name a path, and not the same.
        """
        if out is None:
            if self.also and self.path is None:
                raise FormatError("the first of several outputs has no path; give it one, or out=")
            return self
        if self.path is not None and Path(self.path) != Path(out):
            raise FormatError(f"out={str(out)!r} and output.path={str(self.path)!r} disagree; give one of them")
        return replace(self, path=out)


def output_of(value: object) -> object:
    """Return one output for a list of them: the first, which the others go with; anything else stays as it is.

    Raises:
        ValueError: an empty list.
    """
    if isinstance(value, str | bytes | Output) or not isinstance(value, Sequence):
        return value
    if not value:
        raise ValueError("an empty list; want at least one output with path and format")
    first, *others = value
    if isinstance(first, Output):
        return replace(first, also=(*first.also, *others))
    return {**first, "also": tuple(others)} if isinstance(first, dict) and others else first


def as_output(value: Any) -> Output:
    """Return :func:`output_of` of what a caller from Python gave; what is no output is left for others to refuse.

    Raises:
        FormatError: an empty list, or one with something else than outputs in it.
    """
    try:
        found = output_of(value)
    except ValueError as error:
        raise FormatError(f"output={value!r}: {error}") from None
    return found  # type: ignore[return-value]


def several(path: str | Path, formats: Sequence[str], *, overwrite: bool = False) -> Output:
    """Return the outputs of several formats: directories in ``path`` with their names; one format goes to ``path``.

    Raises:
        FormatError: an unknown format, or one twice.
    """
    if len(formats) == 1:
        return Output(path, formats[0], overwrite)
    if len(set(formats)) < len(formats):
        raise FormatError(f"formats {', '.join(formats)}: one is there twice; name each once")
    outputs = [Output(Path(path) / format, format, overwrite) for format in formats]
    return replace(outputs[0], also=tuple(outputs[1:]))


Outputs = Annotated[Output, BeforeValidator(output_of)]
"""One output or a list of them, in a recipe."""


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
        progress: ``"auto"`` shows a bar for each stage, on a terminal and in a notebook; None shows nothing; a function
            receives :class:`quantkit.Progress` events.
        workers: the processes that carry out the run together (:mod:`quantkit.system.workers`), which call the same function
            with the same arguments; the first writes.
    """

    strict: Flag = False
    resume: Flag = True
    device: Annotated[str, Strict(), AfterValidator(_known_place)] = "auto"
    compute: Compute | None = None
    max_memory: Annotated[ByteSize, Field(gt=0)] | None = None
    progress: Annotated[Any, AfterValidator(_known_progress)] = "auto"
    workers: Annotated[Any, AfterValidator(_known_workers)] = ALONE

    @property
    def report(self) -> ProgressCallback:
        """A callback for one operation."""
        return callback(self.progress)
