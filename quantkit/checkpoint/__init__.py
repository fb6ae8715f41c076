"""Checkpoints: write a quantized model, verify the files, load them again.

A checkpoint is a directory of the files of one format (:mod:`quantkit.formats`) and whatever the model carries along
(tokenizer, generation settings). It is built block by block in ``<path>/incomplete`` and moved into place when it is whole, the
config last, so a run that dies leaves either the previous checkpoint or one that no reader can mistake for a model; a marker
file :data:`INCOMPLETE` says why. Every file is a function of the model, the plan and the metadata alone: the same run writes
the same bytes, in one go or continued (:mod:`quantkit.checkpoint.staging`).
"""

from quantkit.checkpoint.check import check_output, rejections
from quantkit.checkpoint.loading import load
from quantkit.checkpoint.on_disk import load_on_disk
from quantkit.checkpoint.publish import INCOMPLETE
from quantkit.checkpoint.read import inspect
from quantkit.checkpoint.record import Record, read_record
from quantkit.checkpoint.save import save
from quantkit.checkpoint.staging import claim
from quantkit.checkpoint.state import Key
from quantkit.checkpoint.verify import verify
from quantkit.checkpoint.write import CheckpointWriter

__all__ = [
    "INCOMPLETE",
    "CheckpointWriter",
    "Key",
    "Record",
    "check_output",
    "claim",
    "inspect",
    "load",
    "load_on_disk",
    "read_record",
    "rejections",
    "save",
    "verify",
]
