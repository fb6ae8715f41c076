"""Checkpoints: write a quantized model, prove the files, load them again.

A checkpoint is a directory of safetensors shards, ``config.json`` and whatever the model carries along (tokenizer,
generation settings). It is assembled in ``<path>/incomplete`` and moved into place when it is whole, ``config.json`` last, so
a run that dies leaves either the previous checkpoint or one that no reader can mistake for a model; a marker file
:data:`INCOMPLETE` says why. Every file is a function of the model, the plan and the metadata alone: the same run writes
the same bytes.
"""

from quantkit.checkpoint.check import check_output, rejections
from quantkit.checkpoint.files import INCOMPLETE
from quantkit.checkpoint.loading import load
from quantkit.checkpoint.read import inspect
from quantkit.checkpoint.verify import kl_to, verify
from quantkit.checkpoint.write import CheckpointWriter, save

__all__ = ["INCOMPLETE", "CheckpointWriter", "check_output", "inspect", "kl_to", "load", "rejections", "save", "verify"]
