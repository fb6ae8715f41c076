"""The command that compiles ahead of time: build-kernels."""

from typing import Annotated

import typer

from quantkit.cli import app
from quantkit.cli.console import facts


@app.command("build-kernels")
def build_kernels(
    arch: Annotated[
        list[str] | None,
        typer.Option(help="GPU architecture, e.g. 90a or 80-ptx; may be repeated. release: all supported ones."),
    ] = None,
) -> None:
    """Compile the kernels now and not on first use: the CPU's, and CUDA's for this GPU or the given architectures."""
    import torch

    from quantkit.kernels import build
    from quantkit.kernels.cuda import nvcc

    made = {"cpu": str(build.library()._name)} if not arch else {}
    if arch:
        names = [part for name in arch for part in (nvcc.RELEASE if name == "release" else (nvcc.check_arch(name),))]
        made["cuda"] = str(nvcc.make(tuple(dict.fromkeys(names))))
    elif torch.cuda.is_available():
        made["cuda"] = str(nvcc.make((nvcc.device_arch(),)))
    else:
        made["cuda"] = "no device is visible: name an architecture, e.g. --arch 90a or --arch release"
    facts(made)
