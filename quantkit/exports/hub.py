"""Put a finished checkpoint on the Hugging Face hub, through ``huggingface_hub``.

What is uploaded is what was proven: the files of the directory, whose checksums are compared first. What is left out is
quantkit's own bookkeeping. The model card is the README.md beside the weights.
"""

import os
import re
from pathlib import Path
from typing import Final

from quantkit import checkpoint
from quantkit.errors import QuantkitError
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
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(token=token)
    what = message or f"{facts['format']}, {facts['quantized_bits_per_weight']:.2f} bits per weight, by quantkit"
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message=what, ignore_patterns=list(LEFT_OUT)
        )
    except LocalTokenNotFoundError as error:
        raise QuantkitError("no account of the hub: run hf auth login, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        way_out = {
            401: "log in with hf auth login, or set HF_TOKEN",
            403: "take a token that may write, and a name of your own",
        }
        reason = str(error).strip().splitlines()[-1]
        raise QuantkitError(f"{name}: the hub answers {status}: {reason}; {way_out.get(status, 'try again later')}") from error
    except HFValidationError as error:
        raise QuantkitError(f"{name}: {error}") from error
    except (httpx.HTTPError, OSError) as error:
        raise QuantkitError(f"{name}: the hub cannot be reached: {error}; look at the network, and try again") from error
    return str(done.commit_url)
