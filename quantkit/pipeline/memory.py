"""How much memory a run takes, said before it begins, and what keeps it within what it may take.

The process holds, at its widest moment, the sum of

- *runtime*: Python, torch and transformers, before any weight is read;
- *held*: what stays in memory all the time. A model that lies in safetensors files and is quantized into a checkpoint holds
  nothing: its blocks are read from the mapped files and leave memory when they are done with. Experts that transformers joins
  and weights in another dtype than the files' are held unless they are so much that they lie on the disk
  (:mod:`quantkit.hf.made`); a model that somebody else has loaded or that a step rewrites is held, and so are codes that go to
  no checkpoint, or that a step goes on with;

and the largest of five stages:

- *loading*: the largest of what transformers joins of several tensors of the files: its parts, the whole, the files' pages;
- *looking*: the model is compared with itself. Of a large model one block and the tensors outside the blocks are in memory;
  a small one is there as a whole, in float, then as codes laid out for the kernels, twice (with the checkpoint that was read);
- *rounding* a block without calibration: the widest layer, and the codes of the block three times;
- *calibrating* a block: its weights in the dtype of the computation, the widest layer four times, four matrices of its inputs
  (a second moment, a factor, what is made of them), the activations, and what the quantizer says it takes beside that;
- *steps*: what the one that takes most says it takes, beside a block in float32.

Activations are tokens x (8 hidden + 2 or 4 widest) bytes: every window waits in the middle of the block while a layer is
quantized. Where they are more than :data:`SPILL_BYTES`, or do not fit, they lie in nameless files on the disk
(:mod:`quantkit.system.scratch`), but for the residual of every token, 4 hidden.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.hf.ledger import ledger_of
from quantkit.hf.made import largest_made, lies_on_disk, made_bytes
from quantkit.nn.sites import Site, Structure
from quantkit.nn.sizes import WINDOW, RunSize
from quantkit.qtensor import empty_qtensor
from quantkit.quantizers.base import Quantizer
from quantkit.spec import Plan
from quantkit.system.memory import mapped_pages
from quantkit.system.scratch import Scratch
from quantkit.transforms.base import Step

RUNTIME_BYTES = 400 << 20
"""Resident size of a process that has imported torch and transformers."""

LARGE_BYTES = 1 << 30
"""Size of a float model from which blocks leave memory after each use."""

SPILL_BYTES = 1 << 30
"""Activations of more than this lie on the disk."""

_SEEN = 256
"""Tokens that models are compared on."""

_BATCH = 8
_MARGIN = 1.05


class Ways(NamedTuple):
    """What a run does to take less memory.

    Attributes:
        lean: blocks leave memory after each use (:mod:`quantkit.nn.lean`).
        spills: activations lie on the disk.
    """

    lean: bool = False
    spills: bool = False


PLAIN = Ways()
"""Everything in memory."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a run takes, in bytes; see the module.

    Attributes:
        runtime, held, rounding, steps, loading, calibrating: as there; ``calibrating`` without activations, 0 without
            calibration.
        looking: with the whole model in memory.
        looking_lean: with a block at a time.
        activations, spilled: what activations take in memory, if they are there, and if they are on the disk.
        on_disk: what they take on the disk then.
        usual: what is done when nobody asks.
    """

    runtime: int
    held: int
    looking: int
    looking_lean: int
    rounding: int
    steps: int = 0
    loading: int = 0
    calibrating: int = 0
    activations: int = 0
    spilled: int = 0
    on_disk: int = 0
    usual: Ways = PLAIN

    def stages(self, ways: Ways) -> dict[str, int]:
        """Return what each stage takes beside what is there all the time."""
        activations = self.spilled if ways.spills else self.activations
        return {
            "loading": self.loading,
            "comparing the models": self.looking_lean if ways.lean else self.looking,
            "rounding a block": self.rounding,
            "steps": self.steps,
            "calibrating a block": self.calibrating and self.calibrating + activations,
        }

    def peak(self, ways: Ways | None = None) -> int:
        """Return the most that is in memory at a time; None is what is done when nobody asks."""
        return self.runtime + self.held + max(self.stages(ways or self.usual).values())

    def choose(self, limit: int | None) -> Ways:
        """Return what is done to keep to ``limit`` bytes; None is no limit.

        Raises:
            QuantkitError: nothing helps; the message says what is needed, and for what.
        """
        if limit is None:
            return self.usual
        spilling = self.usual._replace(spills=self.usual.spills or bool(self.calibrating))
        tries = (self.usual, self.usual._replace(lean=True), spilling, Ways(True, spilling.spills))
        for ways in tries:
            if self.peak(ways) * _MARGIN <= limit:
                return ways
        least = min(tries, key=self.peak)
        needed = int(self.peak(least) * _MARGIN) + 1
        parts = {"Python and torch": self.runtime, "what stays in memory": self.held}
        always = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items() if size)
        stages = ", ".join(f"{name} {_mib(size)}" for name, size in self.stages(least).items() if size)
        raise QuantkitError(
            f"max_memory={_mib(limit)}: the run needs {_mib(needed)}: {always}, and the largest of {stages}; allow that much, "
            "calibrate with fewer tokens, or use method rtn, which needs no calibration"
        )


def _mib(size: int) -> str:
    return f"{-(-size // 2**20):,} MiB"


def memory_of(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    size: RunSize,
    method: Quantizer,
    steps: Sequence[Step] = (),
    *,
    written: bool = True,
) -> Memory:
    """Predict what a run takes.

    Args:
        model: the float model, or an empty one with an account of its files.
        structure: its blocks and layers.
        plan: layer name to scheme.
        size: how large the run is.
        method: the quantizer.
        steps: what else is done.
        written: whether the result goes to a checkpoint.
    """
    sites = {site.name: site for site in (*structure.sites, *structure.after) if site.name in plan}
    codes = {name: empty_qtensor(plan[name].weight, site.shape).nbytes for name, site in sites.items()}
    floats = _nbytes(model.parameters())
    blocks = [_nbytes(model.get_submodule(block.name).parameters()) for block in structure.blocks]
    block = max(blocks, default=0)
    of_block = max((sum(codes.get(site.name, 0) for site in one.sites) for one in structure.blocks), default=0)
    kept = 0 if written and not any(step.stage == "after" for step in steps) else sum(codes.values())
    rewritten = any(step.stage == "before" for step in steps)
    outside = floats - sum(blocks)
    logits = 12 * WINDOW * size.vocabulary
    widest = max((torch.Size(site.shape[-2:]).numel() for site in sites.values()), default=0)
    costs = max((step.cost(size).nbytes for step in steps), default=0)
    found = Memory(
        runtime=RUNTIME_BYTES,
        held=(floats if rewritten else held_bytes(model)) + kept,
        looking=logits + max(floats, 3 * sum(codes.values()) + 2 * outside),
        looking_lean=4 * _SEEN * size.vocabulary + outside + block,
        rounding=8 * widest + max(3 * of_block, *(codes.get(site.name, 0) + 2 * site.numel for site in structure.after), 0),
        steps=4 * size.block + costs if costs else 0,
        loading=0 if (ledger := ledger_of(model)) is None else 3 * largest_made(model, ledger),
        usual=Ways(floats >= LARGE_BYTES),
    )
    return found if not size.tokens else _calibrating(found, size, method, sites, widest)


def _calibrating(found: Memory, size: RunSize, method: Quantizer, sites: Mapping[str, Site], widest: int) -> Memory:
    """Add what calibration takes."""
    rounded = 2 if torch.cpu._is_avx512_bf16_supported() else 4
    batch = min(_BATCH * size.length, size.tokens)
    running = batch * 4 * size.widest * 4
    stacks = max((site.numel for site in sites.values() if len(site.shape) == 3), default=0)
    experts = max((site.shape[0] for site in sites.values() if len(site.shape) == 3), default=1)
    second = 4 * size.widest**2 * 4 + (min(experts * 4 * size.widest**2, 256 << 20) if experts > 1 else 0)
    second += 8 * size.widest**2 if size.shared else 0
    own = 4 * size.block + max(16 * widest, 6 * stacks) + second + running
    activations = size.tokens * (8 * size.hidden + rounded * size.widest)
    return replace(
        found,
        calibrating=own + method.cost(size).nbytes,
        activations=activations,
        spilled=size.tokens * 4 * size.hidden + (256 << 20),
        on_disk=size.tokens * (12 * size.hidden + rounded * size.widest),
        usual=found.usual._replace(spills=activations > SPILL_BYTES),
    )


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of a float model's parameters that are not parts of mapped files, or will not be once it is loaded."""
    ledger = ledger_of(model)
    parameters = dict(model.named_parameters())
    if not any(parameter.is_meta for parameter in parameters.values()):
        mapped = sum(last - first for first, last in mapped_pages(parameters.values()))
        return max(0, _nbytes(parameters.values()) - mapped)
    if ledger is None:
        return sum(parameter.nbytes for parameter in parameters.values() if parameter.ndim > 2)
    return 0 if lies_on_disk(model, ledger) else made_bytes(model, ledger)


def run_size(model: nn.Module, structure: Structure, sites: Iterable[Site], tokens: int, length: int) -> RunSize:
    """Return the sizes that costs are estimated from; ``tokens`` run through every block, in windows of ``length``."""
    vocabulary, hidden = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    blocks = [model.get_submodule(block.name) for block in structure.blocks]
    found = list(sites)
    return RunSize(
        tokens=tokens,
        length=length,
        blocks=len(blocks),
        block=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
        hidden=hidden,
        vocabulary=vocabulary,
        widest=max(site.in_features for site in found),
        weights=sum(site.numel for site in found),
    )


def scratch_in(out: str | Path | None, spills: bool) -> Scratch:
    """Return where activations lie: in memory, or on the disk of the checkpoint, else that of temporary files."""
    return Scratch(scratch_folder(out) if spills else None)


def scratch_folder(out: str | Path | None) -> Path:
    """Return the directory that exists for what goes to ``out``, or for temporary files."""
    folder = Path(out) if out is not None else Path(tempfile.gettempdir())
    return next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
