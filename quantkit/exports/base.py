"""What a target is, and :func:`export`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit.errors import FormatError
from quantkit.registry import Registry
from quantkit.system.files import named_path, usable_path

Target = Callable[[Path, Path], dict[str, Any]]
"""Writes what the checkpoint at the first path is into the empty directory at the second; returns facts for the user.

It checks what it wrote against quantkit's own predictions, with the program that runs it, and raises a FormatError where they
differ.
"""

TARGETS: Registry[Target] = Registry("target", package="quantkit.exports", error=FormatError)
"""All targets by name."""

MOST_DIFFERENCE = 1e-3
"""Largest relative difference of logits, ``|theirs - ours| / |ours|``, of what is exported."""


def export(path: str | Path, to: str, out: str | Path) -> dict[str, Any]:
    """Write a quantized checkpoint as a program of another compiler, and run it once to compare its logits.

    Args:
        path: directory of a checkpoint that :func:`quantkit.load` reads.
        to: a target: ``"openvino"`` or ``"torch-export"``.
        out: a directory that is empty or not there yet.

    Returns:
        A mapping: ``path``, ``target``, ``difference`` (relative, of the logits) and what else the target says.

    Raises:
        FormatError: the target cannot hold the checkpoint, its package is missing, or its program computes something else.
    """
    source, target, write = named_path(path), usable_path(out), TARGETS.get(to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FormatError(f"{target} is not empty; give a directory that is, or is not there yet")
    target.mkdir(parents=True, exist_ok=True)
    try:
        facts = write(source, target)
    except BaseException:
        for file in target.iterdir():  # it was empty
            file.unlink()
        target.rmdir()
        raise
    return {"path": str(target), "target": to, **facts}


def compare(difference: float, where: Path, by: str) -> float:
    """Return a difference that is small enough.

    Raises:
        FormatError: it is not.
    """
    if not difference <= MOST_DIFFERENCE:
        raise FormatError(f"{where}: logits of {by} differ from quantkit's by {difference:.2g}, want <= {MOST_DIFFERENCE:g}")
    return difference
