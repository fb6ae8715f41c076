"""The container of ``onnx``: safetensors files, and a graph that points into them.

``onnx.safetensors`` (or several) holds every tensor once. ``model.onnx`` names file, offset and length of each as its external
data, which ONNX Runtime maps into memory; ``genai_config.json`` tells onnxruntime-genai how to run it. Files are written as in
:mod:`quantkit.formats.containers.directory`, and read without the onnx package.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from quantkit.formats.containers.base import Layout, Reader, Writer
from quantkit.formats.containers.directory import CONFIG, DirectoryWriter, SafetensorsDirectory
from quantkit.formats.onnx.graph import genai_config, graph_of
from quantkit.system.files import read_json, write_atomic, write_json

STEM, GRAPH, GENAI = "onnx", "model.onnx", "genai_config.json"
_FILES = SafetensorsDirectory(STEM)


class OnnxDirectory:
    """The container."""

    key_file: ClassVar[str] = CONFIG

    @property
    def patterns(self) -> tuple[str, ...]:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return (*_FILES.patterns, GRAPH, GENAI)

    def writer(self, path: Path, parts: Sequence[Layout]) -> Writer:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return OnnxWriter(path, STEM, parts)

    def config(self, path: Path) -> dict[str, Any] | None:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return _FILES.config(path) if (path / GRAPH).is_file() else None

    def reader(self, path: Path) -> Reader:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return _FILES.reader(path)


class OnnxWriter(DirectoryWriter):
    """Writes tensors as they come, and the graph at the end."""

    def finish(self, config: Mapping[str, Any]) -> None:
        """See :class:`quantkit.formats.containers.base.Writer`."""
        write_atomic(self.path / GRAPH, graph_of(config, self.places()))
        beside = self.path / "generation_config.json"
        write_json(self.path / GENAI, genai_config(config, read_json(beside) if beside.is_file() else {}, GRAPH))
        super().finish(config)
