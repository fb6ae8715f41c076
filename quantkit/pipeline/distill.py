r"""Learn the scales, and if wanted the codes, of a quantized model end to end, from the predictions of the float model.

Quantizers choose codes layer by layer and see only their own layer's error. What counts is what the whole model predicts, so
here the scales :math:`s` of all layers are changed together to lower

.. math:: KL(P \| Q_s) \quad\text{averaged over calibration tokens,}

P being the float model's next-token distribution and Q the quantized model's. Zero points stay, and unless ``code_rate`` is
given, codes; bits and formats do not change. (Chen, Shao, Xu, Wang, Gao, Zhang, Qiao, Luo 2024, EfficientQAT, arXiv
2407.11062, section 3.3, learn scales end to end with the text's own tokens as targets; the targets here are soft, so that a
few tens of steps on the calibration text suffice and there is nothing to memorise.)

Adam over relative changes of the scales, a learning rate that rises for a few steps and then falls linearly to zero.

Cost: the float model forward and three forwards' worth of products for each token of ``steps x windows`` windows, half of it
where bfloat16 is fast. Memory: the model, one byte per weight for codes, one copy of the weights in the compute dtype, the
activations of ``windows`` windows through all blocks, the logits of one window, and the teacher's last hidden states.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.calibrate.chain import Chain
from quantkit.errors import CalibrationError
from quantkit.kernels.functions.learning import divergence_gradient
from quantkit.nn.block_calls import call_block, cast_call, finish, record_block_calls
from quantkit.nn.learned import TunedWeight, rise_and_fall, substituted
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.nn.sites import Site, Structure
from quantkit.quantizers.base import Quantized
from quantkit.system.compute import Compute
from quantkit.system.progress import Progress, ProgressCallback
from quantkit.transforms.base import TRANSFORMS

log = logging.getLogger(__name__)


@TRANSFORMS.register("distill")  # type: ignore[arg-type]
@dataclass(frozen=True)
class Distill:
    """How scales are learned.

    Args:
        steps: updates of the scales.
        windows: calibration windows per update; more text than there is means that windows come again.
        rate: highest learning rate, as a relative change of a scale per step.
        code_rate: the same for codes, in steps of the grid; 0 leaves the codes alone. See :mod:`quantkit.nn.learned`.
        dtype: dtype of forward and backward; ``"auto"`` is bfloat16 where the processor multiplies it natively.
        seed: decides the order of the windows.
    """

    steps: int = 24
    windows: int = 4
    rate: float = 0.002
    code_rate: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.windows < 1 or not 0 < self.rate < 1 or not 0 <= self.code_rate < 1:
            raise CalibrationError(
                f"distill: steps={self.steps}, windows={self.windows}, rate={self.rate}, code_rate={self.code_rate}; want at "
                "least 1, at least 1, and rates between 0 and 1"
            )


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """One forward and backward: token ids (B, T) and the teacher's output of the last block (B, T, H)."""

    ids: Tensor
    hidden: Tensor


def record_teacher(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    settings: Distill,
    compute: Compute,
    progress: ProgressCallback,
) -> list[list[TeacherOutput]]:
    """Run the float model and keep what it knows; call it before the model is quantized.

    Args:
        model: the float model; not changed.
        structure: its blocks.
        batches: int64 token ids (B, T), without padding.
        settings: how many windows, and in which order.
        compute: the device.
        progress: gets one event per block.

    Returns:
        The teacher_outputs of one round through the text, one list per step (rows of equal length share a target).
    """
    compute = Compute(compute.device, _dtype(settings, compute.device))
    rows = [row for batch in batches for row in batch]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    chosen = [rows[i] for i in order[: settings.steps * settings.windows]]
    by_step = [_stacked(chosen[i : i + settings.windows]) for i in range(0, len(chosen), settings.windows)]
    chain = Chain(model, structure, [ids for step in by_step for ids in step], compute)
    for index, block in enumerate(structure.blocks):
        with torch.no_grad(), borrowed(model.get_submodule(block.name), compute):
            chain.advance(index, (), lambda _site, _statistics: None)
        progress(Progress("teacher", index + 1, len(structure.blocks), block.name))
    hidden = iter(chain.hidden)
    return [[TeacherOutput(ids, next(hidden)) for ids in step] for step in by_step]


def learn_scales(
    model: nn.Module,
    structure: Structure,
    results: Mapping[str, Quantized],
    teacher_outputs: Sequence[Sequence[TeacherOutput]],
    settings: Distill,
    compute: Compute,
    progress: ProgressCallback,
    head: nn.Module | None = None,
) -> tuple[dict[str, Quantized], tuple[float, ...]]:
    """Learn the scales of every quantized site in the blocks and put them into ``model``.

    Args:
        model: the quantized model; its scales are replaced.
        structure: its blocks and sites.
        results: the quantized sites.
        teacher_outputs: from :func:`record_teacher`.
        settings: steps and rates.
        compute: the device.
        progress: gets one event per step, with the KL of that step's windows as its loss.
        head: the float model's output head, which the teacher goes on having if the model's own was quantized.

    Returns:
        ``results`` with the learned scales, and the mean KL in nats per token before each step.

    Raises:
        CalibrationError: if the KL is not finite.
    """
    compute = Compute(compute.device, _dtype(settings, compute.device))
    sites = [site for site in structure.sites if site.name in results]
    done, losses = dict(results), []
    tuned = {
        site: TunedWeight(
            results[site.name].qtensor.to(compute.device),
            compute.dtype,
            codes=settings.code_rate > 0,
            activation=_quantized_module(model, site).activation,
        )
        for site in sites
    }
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with borrowed(model, compute), borrowed(head or nn.Module(), compute), substituted(model, tuned):
            changes = [weight.change for weight in tuned.values()]
            optimizer = torch.optim.Adam(changes, lr=settings.rate, betas=(0.9, 0.95), eps=1e-12)
            for step in range(settings.steps):
                factor = rise_and_fall(step, settings.steps)
                for weight in tuned.values():
                    weight.code_rate = settings.code_rate * factor
                losses.append(_step(model, structure, teacher_outputs[step % len(teacher_outputs)], compute, head))
                for group in optimizer.param_groups:
                    group["lr"] = settings.rate * factor
                optimizer.step()
                optimizer.zero_grad()
                for weight in tuned.values():
                    weight.refresh()
                progress(Progress("distill", step + 1, settings.steps, "", losses[-1]))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    for site in sites:
        qtensor = tuned[site].result().to("cpu")
        done[site.name] = replace(done[site.name], qtensor=qtensor)
        module = _quantized_module(model, site)
        module.packed, module.scale = qtensor.packed.to(module.packed.device), qtensor.scale.to(module.scale.device)
    log.info("distillation: KL %.4f in the first step, %.4f in the last", losses[0], losses[-1])
    return done, tuple(losses)


def _step(
    model: nn.Module, structure: Structure, teacher_outputs: Sequence[TeacherOutput], compute: Compute, head: nn.Module | None
) -> float:
    """Add the gradient of the mean KL over one step's windows to the scales; return that mean."""
    total, tokens = 0.0, sum(target.ids.numel() for target in teacher_outputs)
    for target in teacher_outputs:
        recorded = record_block_calls(model, structure, target.ids.to(compute.device))
        first = recorded.hidden.to(compute.dtype).requires_grad_()  # makes torch build a graph through the blocks
        hidden = first
        for block, call in zip(structure.blocks, recorded.calls, strict=True):
            hidden = call_block(model.get_submodule(block.name), hidden, *cast_call(*call, compute.dtype, compute.device))
        slope = torch.empty_like(hidden)
        for row in range(len(hidden)):
            last = hidden[row : row + 1].detach().requires_grad_()
            logits = finish(model, structure, last)
            with torch.no_grad():
                with _having(model, structure, head):
                    wanted = finish(model, structure, target.hidden[row : row + 1].to(last))
                divergence, by_logits = divergence_gradient(logits.detach().flatten(0, 1), wanted.flatten(0, 1))
            logits.backward(by_logits.view_as(logits))
            slope[row] = last.grad[0] / tokens  # type: ignore[index]
            total += divergence
        if not torch.isfinite(torch.tensor(total)):
            raise CalibrationError("distill: the KL is not finite; use a lower rate, or dtype float32")
        hidden.backward(slope)
    return total / tokens


@contextlib.contextmanager
def _having(model: nn.Module, structure: Structure, head: nn.Module | None) -> Iterator[None]:
    """Let ``model`` have another output head for a while, if one is given."""
    if head is None or structure.head is None:
        yield
        return
    parent, _, name = structure.head.rpartition(".")
    own = model.get_submodule(structure.head)
    setattr(model.get_submodule(parent), name, head)
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), name, own)


def _stacked(rows: Sequence[Tensor]) -> list[Tensor]:
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [torch.stack(same) for same in by_length.values()]


def _dtype(settings: Distill, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    fast = torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def borrowed(module: nn.Module, compute: Compute) -> Iterator[None]:
    """Give ``module`` copies of its parameters in the compute dtype, and everything on its device; undo it afterwards.

    The parameters get their own memory back, so nothing is rounded. Buffers move but keep their dtype: positions and
    frequencies do not survive a cast.
    """
    home = [(parameter, parameter.data) for parameter in module.parameters()]
    buffers = [(owner, name, b) for owner in module.modules() for name, b in owner._buffers.items() if b is not None]
    for parameter, value in home:
        parameter.data = value.to(compute.device, compute.dtype)
    for owner, name, buffer in buffers:
        owner._buffers[name] = buffer.to(compute.device)
    try:
        yield
    finally:
        for parameter, value in home:
            parameter.data = value
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer


def _quantized_module(model: nn.Module, site: Site) -> Any:
    """Return the QuantLinear or QuantWeight of an installed site."""
    module: nn.Module = model.get_submodule(site.module)
    return module if isinstance(module, QuantLinear) else _stack_of(module, site)


def _stack_of(module: nn.Module, site: Site) -> QuantWeight:
    stack = getattr(module, site.parameter)
    assert isinstance(stack, QuantWeight)
    return stack
