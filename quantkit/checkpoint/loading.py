"""Loading: a checkpoint becomes a model that runs; each quantized weight is held once, in its kernel's layout."""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint import prepacked
from quantkit.checkpoint.activations import Chosen, ComputeChoice, check_choice, choose
from quantkit.checkpoint.contents import read_floats
from quantkit.checkpoint.read import RECORD, Opened, open_checkpoint
from quantkit.checkpoint.record import check_sums
from quantkit.dtypes import float_dtype
from quantkit.errors import FormatError, KernelError
from quantkit.formats.base import FORMATS
from quantkit.hf.building import building
from quantkit.hf.experts import enable_experts
from quantkit.hf.ledger import Ledger, keep_ledger
from quantkit.hf.load import PreTrainedModel, load_float, read_generation_config
from quantkit.kernels.cpu import layout
from quantkit.kernels.cpu.huge_pages import Arena
from quantkit.kernels.cpu.layout import Prepacked
from quantkit.kernels.cpu.matmul import CpuKernel, State
from quantkit.kernels.select import Problem, select
from quantkit.nn.embedding import QuantEmbedding
from quantkit.nn.install import install, set_compute
from quantkit.nn.linear import QuantModule, QuantWeight
from quantkit.nn.parameter import QuantParameter
from quantkit.nn.sites import Site
from quantkit.qtensor import empty_qtensor
from quantkit.system.compute import known_device
from quantkit.system.files import named_path
from quantkit.system.memory import HeapWatch

log = logging.getLogger(__name__)

_HEAP_BYTES = 16 << 20
"""Freed memory that may gather in the heap while weights are laid out."""


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    ignore_activations: bool = False,
    compute: ComputeChoice = "auto",
    cache: bool = True,
    verify: bool = False,
) -> PreTrainedModel:
    """Load a quantized checkpoint, ready to run, in evaluation mode.

    Codes and scales come back bit for bit; the files may be deleted afterwards. Each quantized layer is held once, in the
    layout of the kernel that runs it. On a CPU that layout is kept in the user's cache
    (:mod:`quantkit.checkpoint.prepacked`), so that the next load of the same files need not make it again.

    Args:
        path: directory written by quantkit or by another writer of a format that is read; or one GGUF file of anybody's, whose
            weights become floats.
        dtype: dtype of the unquantized tensors, or its name (``"bfloat16"``); None keeps what the files hold.
        device: where the model goes.
        ignore_activations: run a checkpoint that asks for quantized activations (W8A8) with float ones.
        compute: what quantized layers make of their inputs on a CPU: ``"exact"``, nothing; ``"int8"``, rounded block by
            block, which is about twice as fast and has an error of its own (:mod:`quantkit.kernels.cpu.matmul`); ``"auto"``,
            int8 where the checkpoint records that this adds less than 5 % to its KL, else exact
            (:mod:`quantkit.checkpoint.activations`). The log says which and why, and so does :func:`inspect`.
        cache: keep the kernels' layout of this checkpoint on the disk, and use what is kept; False does neither.
        verify: first read every tensor and compare it with the checksum that was noted when the checkpoint was written.

    Raises:
        KernelError: ``compute`` is none of these, or int8 on another device than a CPU, or where no layer has such a kernel.
        SpecError: ``dtype`` is no float dtype, or ``device`` is none of this machine.
        FormatError: the checkpoint is unfinished, damaged, contradicts itself, or cannot be represented exactly; with
            ``verify`` also, a tensor differs from its checksum, or there are none.
    """
    check_choice(compute)
    dtype, device = float_dtype(dtype), known_device(device)
    if (file := named_path(path)).suffix == ".gguf" and file.is_file():
        return _load_gguf(file, dtype, device, verify)
    on_cpu = device.type == "cpu"
    with open_checkpoint(path) as opened:
        contents = opened.contents
        chosen = choose(opened.config.get(RECORD, {}), compute, on_cpu=on_cpu)
        if verify:
            check_sums(opened.path, opened.reader)
        model: Any = contents.model  # Any: transformers types neither eval nor to
        quantized = {name: contents.sites[name] for name in opened.schemes}
        kernels = _kernels(opened, quantized) if on_cpu else {}
        found = _from_cache(opened, kernels, dtype) if cache and kernels and prepacked.enabled() else None
        for name, tensor in found.floats.items() if found else _floats(opened, dtype):
            put(model, name, tensor)
        arena, heap = Arena(), HeapWatch(_HEAP_BYTES)
        for name, site in quantized.items():
            scheme = opened.schemes[name]
            activation = None if ignore_activations else scheme.activation
            if name not in kernels:
                qtensor = opened.qtensor(site)
                install(model, site, qtensor.with_parts({"input_scale": None}) if ignore_activations else qtensor, activation)
                continue
            parts = found.sites[name] if found else [part.moved(arena.copy) for part in _prepack(opened, site, heap)]
            install(model, site, empty_qtensor(scheme.weight, site.shape), activation)
            states = [State(part, part.struct()) for part in parts]
            for module in _holders(model, name):
                module.adopt(kernels[name], states)
        finish_model(model, opened)
    loaded: PreTrainedModel = model.requires_grad_(False).eval()
    if not on_cpu:
        loaded = model.to(device)
    for part in loaded.modules():
        if isinstance(part, QuantEmbedding | QuantParameter) and dtype is not None:
            part.like = part.like.to(dtype)  # of what a look-up returns, or a reader sees
    _set_compute(loaded, chosen, compute, path)
    return loaded


def _set_compute(model: nn.Module, chosen: Chosen, compute: ComputeChoice, path: str | Path) -> None:
    """Let layers multiply as chosen; where this machine cannot and nobody insists, exactly."""
    try:
        rounding = set_compute(model, chosen.compute)
    except KernelError as error:
        if compute != "auto":
            raise
        chosen, rounding = Chosen("float", f"int8 activations would do ({chosen.reason}), but {error}"), 0
    log.info("%s: %s%s", path, chosen, f", in {rounding} layers" if rounding else "")


def _load_gguf(path: Path, dtype: torch.dtype | None, device: torch.device, verify: bool) -> PreTrainedModel:
    """Return a model with the floats that a GGUF file stands for."""
    if verify:
        raise FormatError(f"{path} has no checksums; give its directory, if quantkit wrote it, or load it without verify")
    model: Any = load_float(path, dtype)[0]
    loaded: PreTrainedModel = model.requires_grad_(False).eval().to(device)
    return loaded


def _holders(model: Any, name: str) -> list[Any]:
    """Return the modules that run a weight: the one of this name, and others that share it and have a bias of their own."""
    tied = [part for part in model.modules() if isinstance(part, QuantModule) and part.tied_to == name]
    return [model.get_submodule(name), *tied]


def finish_model(model: Any, opened: Opened) -> None:
    """Tie, check that nothing is missing, set what the files say beside the weights, and remember what else they hold."""
    path = opened.path
    quantized = {name: part for name, part in model.named_modules() if isinstance(part, QuantModule)}
    with building:  # which, in another thread, is without ties for a while
        model.tie_weights(recompute_mapping=False)  # what is quantized is not on its list any more
    tensors = [*model.named_parameters(), *model.named_buffers(), *quantized.items()]
    left = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if left:
        raise FormatError(f"{path}: nothing was loaded into {', '.join(left[:5])}")
    if any(isinstance(module, QuantWeight) for module in model.modules()):
        enable_experts(model)
    model.config.dtype = model.dtype
    if (path / "generation_config.json").exists() and hasattr(model, "generation_config"):
        model.generation_config = read_generation_config(path)
    reopen = functools.partial(FORMATS.get(opened.format_name).container.reader, opened.path)
    keep_ledger(model, Ledger(opened.path, opened.reader.headers, {}, opened.carried, reopen, is_source=False))


def _kernels(opened: Opened, sites: dict[str, Site]) -> dict[str, CpuKernel]:
    """Return the compiled kernel of every site that one runs; the rest keeps its codes as they are.

    So does a site with a static grid for its inputs: kernels' layouts have no place for an input scale. And an embedding, whose
    rows are looked up, or a parameter that is read.
    """
    found = {}
    for name, site in sites.items():
        activation = opened.schemes[name].activation
        if site.read or (activation is not None and activation.static) or site == opened.contents.structure.embedding:
            continue
        kernel = select(Problem(opened.schemes[name].weight, (site.shape[-2], site.shape[-1]), "cpu", torch.float32))
        if isinstance(kernel, CpuKernel):
            found[name] = kernel
    return found


def _from_cache(opened: Opened, kernels: dict[str, CpuKernel], dtype: torch.dtype | None) -> prepacked.Weights | None:
    """Return what the cache holds for this checkpoint, made if need be; None where it cannot be, or is not worth a file."""
    files = [opened.path / name for name in sorted({header.file for header in opened.reader.headers.values()})]
    specs = [(opened.schemes[name].weight, opened.contents.sites[name].numel) for name in kernels]
    wider = sum((layout.stored_bits(spec) - spec.bits) * numel // 8 for spec, numel in specs)
    size = sum(file.stat().st_size for file in files)
    if size < prepacked.WORTH_BYTES or size + wider > prepacked.LIMIT_BYTES:
        return None
    key = prepacked.key_of(files, opened.config, dtype)
    found = prepacked.find(key)
    if found is not None and found.sites.keys() == kernels.keys():
        return found
    heap = HeapWatch(_HEAP_BYTES)
    sites = ((name, list(_prepack(opened, opened.contents.sites[name], heap))) for name in kernels)
    try:
        return prepacked.write(key, sites, _floats(opened, dtype))
    except OSError as error:
        log.warning("cannot keep the prepacked weights of %s in %s: %s", opened.path, prepacked.directory(), error)
        return None


def _prepack(opened: Opened, site: Site, heap: HeapWatch) -> Iterator[Prepacked]:
    """Yield the matrices of a site in the kernel's layout, and let go of the pages of the files that were read for it."""
    qtensor = opened.qtensor(site, copy=False)
    for part in [qtensor] if len(site.shape) == 2 else (qtensor[expert] for expert in range(site.shape[0])):
        yield layout.prepack(part)
        heap.check()
    opened.reader.release()


def _floats(opened: Opened, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yield every unquantized parameter and buffer, by its name in the model."""
    entries = [entry for entry in opened.contents.entries if entry.name not in opened.stored]
    for name, value in read_floats(opened.contents, entries, lambda name: opened.reader.read(name, copy=False)):
        opened.reader.release()
        yield name, value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _own(model: nn.Module, name: str) -> tuple[nn.Module, Tensor]:
    """Return the module that holds a parameter or buffer, and the tensor itself."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    return module, getattr(module, attribute)


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer of an empty model its value."""
    module, own = _own(model, name)
    setattr(
        module, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False) if isinstance(own, nn.Parameter) else value
    )
