"""Upload a folder to the Hugging Face hub, through ``huggingface_hub``, with errors that say the way out."""

from collections.abc import Sequence
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from quantkit.errors import QuantkitError

_WAYS_OUT = {401: "log in with hf auth login, or set HF_TOKEN", 403: "take a token that may write, and a name of your own"}


def upload(
    folder: Path,
    name: str,
    *,
    private: bool,
    revision: str | None,
    message: str,
    token: str | None,
    left_out: Sequence[str],
) -> str:
    """Upload the files of a folder in one commit; the repository is made if there is none.

    Args:
        folder: the folder.
        name: ``owner/name``.
        private: make a new repository one that only its owner sees.
        revision: branch; the main one if None.
        message: of the commit.
        token: of the account; None takes the stored one.
        left_out: patterns of files that stay here.

    Returns:
        The address of the commit.

    Raises:
        QuantkitError: no account, no network, or the hub refuses.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message=message, ignore_patterns=list(left_out)
        )
    except LocalTokenNotFoundError as error:
        raise QuantkitError("no account of the hub: run hf auth login, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason, way_out = str(error).strip().splitlines()[-1], _WAYS_OUT.get(status, "try again later")
        raise QuantkitError(f"{name}: the hub answers {status}: {reason}; {way_out}") from error
    except HFValidationError as error:
        raise QuantkitError(f"{name}: {error}") from error
    except (httpx.HTTPError, OSError) as error:
        raise QuantkitError(f"{name}: the hub cannot be reached: {error}; look at the network, and try again") from error
    return str(done.commit_url)
