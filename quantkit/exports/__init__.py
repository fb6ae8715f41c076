"""Programs of other compilers: a quantized checkpoint as what OpenVINO or torch's own compiler runs.

A file here is one target that registers itself. Formats of checkpoints, which quantkit reads again, are no targets: ``quantkit
convert`` writes them, ONNX among them.
"""

from quantkit.exports.base import TARGETS, export

__all__ = ["TARGETS", "export"]
