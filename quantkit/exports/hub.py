"""Put a finished checkpoint on the Hugging Face hub.

What is uploaded is what was proven: the files of the directory, whose checksums are compared first. What is left out is
quantkit's own bookkeeping. The model card is the README.md beside the weights.
"""

import os
import re
from pathlib import Path
from typing import Final

from quantkit import checkpoint
from quantkit.errors import QuantkitError
from quantkit.hf.upload import upload
from quantkit.system.files import named_path, usable_path

LEFT_OUT: Final = (".*", "**/.*", "incomplete/**", checkpoint.INCOMPLETE, "*.part", "*.tmp")
"""Patterns of files that are no part of a checkpoint."""


def push_to_hub(
    path: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a checkpoint to the hub; the repository is made if there is none. Files of other names there stay.

    Args:
        path: directory of a finished checkpoint.
        name: ``owner/name`` of the repository.
        private: make a new repository one that only its owner sees.
        revision: branch to write to; the main one if None.
        message: of the commit.
        token: of the account; None takes that of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The address of the commit.

    Raises:
        FormatError: there is no finished checkpoint, or a tensor is not what was written.
        QuantkitError: a name that is none, no account, no network, or the hub refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise QuantkitError(f"{name!r} is no name of the hub: want owner/name, such as me/smollm2-w4")
    folder = usable_path(named_path(path))
    facts = checkpoint.inspect(folder, verify=True)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise QuantkitError("HF_HUB_OFFLINE is set, so nothing is sent to the hub; unset it")
    what = message or f"{facts['format']}, {facts['quantized_bits_per_weight']:.2f} bits per weight, by quantkit"
    return upload(folder, name, private=private, revision=revision, message=what, token=token, left_out=LEFT_OUT)
