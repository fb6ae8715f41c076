"""A run that several processes carry out: what all must agree on, and what those do that do not write.

Every worker has the whole model mapped and a share of the calibration windows, whose activations stay with it. Block by block,
the inputs' second moments are summed over all workers (:mod:`quantkit.calibrate.together`), the rows of every weight, or the
experts of a stack, are divided among them (:mod:`quantkit.quantizers.divide`), and each gets all codes, for its windows to run
through. The first worker does everything else: it holds the checkpoint's directory, writes, reads back, compares. The codes do
not depend on the number of workers.

The directory must be one that all of them see: each writes there what a finished block hands on of its windows, so that a run
can be continued, by any number of workers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.calibrate.collectors import COLLECTORS
from quantkit.calibrate.walk import block_sites
from quantkit.checkpoint import handed
from quantkit.checkpoint.handed import Share
from quantkit.errors import WorkerError
from quantkit.pipeline.blocks import BlockRun, placed, quantize_block, reporter
from quantkit.quantizers.base import Quantizer, quantizer_name
from quantkit.system.memory import drop_pages, mapped_pages, return_freed_memory
from quantkit.system.workers import Workers
from quantkit.transforms.base import Step, step_name
from quantkit.transforms.scaling_groups import shared_global_scales


def refuse_together(workers: Workers, method: Quantizer, steps: Sequence[Step], *, written: bool) -> None:
    """Refuse what several processes cannot do together, by name, before any work.

    Raises:
        WorkerError: see there.
    """
    if not workers.shares:
        return
    way_out = "run it as one process, without a launcher"
    if not written:
        raise WorkerError(f"workers leave their result in a checkpoint, and none is asked for; give out=, or {way_out}")
    if steps:
        raise WorkerError(f"step {step_name(steps[0])}: workers calibrate and quantize, and carry out no steps; {way_out}")
    if method.refines_blocks or not (method.by_rows or method.divisible):
        raise WorkerError(f"method {quantizer_name(method)}: its work cannot be divided among workers; use gptq, or {way_out}")
    if alone := next((name for name in method.needs if COLLECTORS.get(name).joined is None), None):
        raise WorkerError(f"method {method!r}: several workers cannot collect {alone}; leave guided=True out, or {way_out}")


def check_windows(workers: Workers, batches: Sequence[Tensor]) -> None:
    """Make sure that every worker has something to do.

    Raises:
        WorkerError: there are fewer batches than workers.
    """
    if batches and len(batches) < workers.size:
        raise WorkerError(
            f"{workers.size} workers share {len(batches)} batches of calibration windows, want at least one each; use fewer "
            "workers, more samples, or a smaller batch_size"
        )


def check_agreement(workers: Workers, model: nn.Module, facts: Mapping[str, str]) -> None:
    """Make sure that all workers are about to do the same; weights are not compared, which would mean reading all of them.

    Args:
        workers: all call this together.
        model: the float model.
        facts: topic to what decides it, as digests or words.

    Raises:
        WorkerError: they differ: other files, settings or versions on one of the machines.
    """
    shapes = {name: f"{tuple(one.shape)} {one.dtype}" for name, one in model.named_parameters()}
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    said = [json.loads(text) for text in workers.texts(json.dumps({**facts, "model": digest}))]
    for rank, other in enumerate(said):
        if odd := sorted(name for name in {*said[0], *other} if said[0].get(name) != other.get(name)):
            raise WorkerError(
                f"worker {rank} has other {', '.join(odd)} than worker 0; give all the same recipe, model, text and software"
            )


def assist(run: BlockRun, out: Path | None, share: Share) -> None:
    """Do this worker's part of all blocks; the counterpart of :func:`quantkit.pipeline.blocks.quantize_blocks`.

    Args:
        run: what is the same for all blocks; without a store.
        out: directory of the checkpoint that the first worker writes; None if it writes nothing.
        share: which part of the hidden states is this worker's.
    """
    model, workers, blocks = run.model, run.workers, run.structure.blocks
    finished = workers.least(len(blocks))
    if finished and (chain := run.chain_at(finished)) is not None and chain.state:
        chain.state = handed.read(Path(str(out)), finished - 1, [], len(chain.state), share)
    global_scales = shared_global_scales(model, run.structure, run.plan)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    done = sum(len(block_sites(block, run.plan)) for block in blocks[:finished])
    drop_pages(mapped_pages(model.parameters()))
    for index, block in enumerate(blocks[finished:], start=finished):
        sites = block_sites(block, run.plan)
        mapped = mapped_pages(model.get_submodule(block.name).parameters())
        with torch.no_grad(), placed(run, index):
            done += len(quantize_block(run, index, sites, global_scales, reporter(run, done)))
        if out is not None:
            chain = run.chain_at(index + 1)
            handed.write(out, index, chain.state if chain else [], share)
        for site in sites:  # its codes are with the first worker, and nobody here wants the layer again
            module = model.get_submodule(site.module)
            parameter = getattr(module, site.parameter)
            if owners[id(parameter)] == 1:
                parameter.data = parameter.data.new_empty(0)
        drop_pages(mapped)
        return_freed_memory()
