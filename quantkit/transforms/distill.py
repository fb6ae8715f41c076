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
activations of ``windows`` windows through all blocks, the logits of one window, and the teacher's last hidden states. Of a
model whose blocks cannot run one by one the float model itself is kept, in its own dtype, and runs beside the quantized one.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError
from quantkit.kernels.functions.learning import divergence_gradient
from quantkit.nn.block_calls import call_block, cast_call, finish, record_block_calls, stack_by_length
from quantkit.nn.learned import TunedWeight, substituted
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import Site, Structure, sharing_copy
from quantkit.nn.sizes import RunSize
from quantkit.nn.training import Schedule, train
from quantkit.qtensor import as_grid
from quantkit.spec import Scheme
from quantkit.system.compute import Compute, on_device
from quantkit.system.progress import Progress, ProgressCallback
from quantkit.transforms.base import STEPS, Learner, StepCost

log = logging.getLogger(__name__)


@STEPS.register("distill")
@dataclass(frozen=True)
class Distill(Learner):
    """How scales are learned.

    Args:
        steps: updates of the scales.
        windows: calibration windows per update; more text than there is means that windows come again.
        rate: highest learning rate, as a relative change of a scale per step.
        code_rate: the same for codes, in steps of the grid; 0 leaves the codes alone. See :mod:`quantkit.nn.learned`.
        dtype: dtype of forward and backward; ``"auto"`` is bfloat16 where the processor multiplies it natively.
        seed: decides the order of the windows.

    Raises:
        CalibrationError: for a number out of range.
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

    def rejects(self, scheme: Scheme) -> str | None:
        """Say why layers of a scheme cannot be learned: only integer grids, and no static scales of inputs."""
        if not scheme.weight.is_integer or scheme.weight.blocks is not None:
            return f"distillation learns integer grids, not {scheme.weight.describe()}; leave it out"
        if scheme.static:
            return "distillation does not keep static input scales; leave it out, or use a dynamic scheme"
        return None

    def record(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Tensor],
        *,
        compute: Compute,
        progress: ProgressCallback,
    ) -> "Distillation":
        """Run the float model over as many windows as will be learned from, and keep its last hidden states and its head.

        Of a model that can only run as a whole, keep the float model.
        """
        rows = [row for batch in batches for row in batch]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        chosen = [rows[i] for i in order[: self.steps * self.windows]]
        by_step = [stack_by_length(chosen[i : i + self.windows]) for i in range(0, len(chosen), self.windows)]
        if structure.entangled is not None:
            windows = tuple(tuple(TeacherOutput(ids, None) for ids in step) for step in by_step)
            return Distillation(self, windows, None, compute, progress, sharing_copy(model))
        compute = Compute(compute.device, self._compute_dtype(compute.device))
        hidden = iter(_run_blocks(model, structure, [ids for step in by_step for ids in step], compute, progress))
        outputs = tuple(tuple(TeacherOutput(ids, next(hidden)) for ids in step) for step in by_step)
        head = model.get_submodule(structure.head) if structure.head else None
        return Distillation(self, outputs, head, compute, progress)

    def cost(self, size: RunSize) -> StepCost:
        """Return the passes, and the memory while scales are learned, products running in two bytes per number."""
        windows = self.windows * size.length
        kept = windows * size.blocks * (12 * size.hidden + 6 * size.widest)
        outputs = self.steps * windows * size.hidden
        head = 4 * size.length * size.vocabulary + size.vocabulary * size.hidden
        per_weight = 3 if self.code_rate == 0 else 5  # codes as bytes, bfloat16 weights, float16 drifts
        return StepCost(
            first=(f"the float model: one forward of up to {self.steps * windows:,} tokens",),
            last=(f"the quantized model: {self.steps} forwards and backwards of {self.windows} windows",),
            nbytes=per_weight * size.weights + 2 * (kept + outputs + head),
        )

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        if self.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
        fast = torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """Windows of one forward and backward: token ids (B, T) and, if kept, the float model's last block's output (B, T, H)."""

    ids: Tensor
    hidden: Tensor | None


@dataclass(frozen=True, slots=True)
class Distillation:
    """What the float model said, and how the quantized model learns to say it.

    Attributes:
        settings: steps and rates.
        outputs: of one round through the text, one tuple per step (rows of equal length share a tensor).
        head: the float model's output head, which stays the teacher's if the model's own is quantized.
        compute: device and dtype of forward and backward.
        progress: gets one event per step, with the KL of that step's windows as its loss.
        teacher: the float model, if its last hidden states are not enough to know its predictions.
    """

    settings: Distill
    outputs: tuple[tuple[TeacherOutput, ...], ...]
    head: nn.Module | None
    compute: Compute
    progress: ProgressCallback
    teacher: nn.Module | None = None

    def finish(
        self, model: nn.Module, structure: Structure, results: Mapping[str, Quantized]
    ) -> tuple[dict[str, Quantized], dict[str, Any]]:
        """Learn the scales of every quantized layer in the blocks and put them into ``model``.

        Returns:
            ``results`` with the learned scales, and ``{"kl": ...}``: the mean KL in nats per token before each step.

        Raises:
            CalibrationError: if the KL is not finite.
        """
        settings, compute = self.settings, self.compute
        tuned = {
            site: TunedWeight(
                as_grid(results[site.name].qtensor).to(compute.device),
                compute.dtype,
                code_rate=settings.code_rate,
                activation=_quantized_module(model, site).activation,
            )
            for site in structure.sites
            if site.name in results and not site.read
        }
        schedule = Schedule(settings.steps, settings.rate, "distill: the KL is not finite; use a lower rate, or dtype float32")
        with self._placed(model), substituted(model, tuned):
            losses = train(
                model,
                tuned.values(),
                lambda step: self._divergence(model, structure, self.outputs[step % len(self.outputs)]),
                schedule,
                lambda done, loss: self.progress(Progress("distill", done, settings.steps, "", loss)),
            )
        done = dict(results)
        for site, weight in tuned.items():
            qtensor = weight.result().to("cpu")
            done[site.name] = replace(done[site.name], qtensor=qtensor)
            module = _quantized_module(model, site)
            module.qtensor = qtensor.to(module.device)
        log.info("distillation: KL %.4f in the first step, %.4f in the last", losses[0], losses[-1])
        return done, {"kl": losses}

    @contextlib.contextmanager
    def _placed(self, model: nn.Module) -> Iterator[None]:
        """Put models where they learn; one that runs as a whole stays where and what it is."""
        if self.teacher is not None:
            yield
            return
        with on_device(model, self.compute), on_device(self.head or nn.Module(), self.compute):
            yield

    def _whole_divergence(self, model: nn.Module, teacher: nn.Module, outputs: Sequence[TeacherOutput]) -> float:
        """Do what :meth:`_divergence` does by running both models as a whole, window by window."""
        total, tokens = 0.0, sum(target.ids.numel() for target in outputs)
        for window in (row.unsqueeze(0).to(self.compute.device) for target in outputs for row in target.ids):
            logits = model(input_ids=window, use_cache=False).logits
            with torch.no_grad():
                wanted = teacher(input_ids=window, use_cache=False).logits
            divergence, by_logits = divergence_gradient(logits.detach().flatten(0, 1), wanted.flatten(0, 1))
            logits.backward(by_logits.view_as(logits) / tokens)
            total += divergence
        return total / tokens

    def _divergence(self, model: nn.Module, structure: Structure, outputs: Sequence[TeacherOutput]) -> float:
        """Add the gradient of the mean KL over one step's windows to the scales; return that mean."""
        if self.teacher is not None:
            return self._whole_divergence(model, self.teacher, outputs)
        compute = self.compute
        total, tokens = 0.0, sum(target.ids.numel() for target in outputs)
        for target in outputs:
            assert target.hidden is not None
            recorded = record_block_calls(model, structure, target.ids.to(compute.device))
            first = recorded.hidden.to(compute.dtype).requires_grad_()  # makes torch build a graph through the blocks
            hidden = first
            for block, call in zip(structure.blocks, recorded.calls, strict=True):
                hidden = call_block(model.get_submodule(block.name), hidden, *cast_call(*call, compute.dtype, compute.device))
            slope = torch.empty_like(hidden)
            for row in range(len(hidden)):
                last = hidden[row : row + 1].detach().requires_grad_()
                logits = finish(model, structure, last, compute.dtype)
                with torch.no_grad():
                    with _having(model, structure, self.head):
                        wanted = finish(model, structure, target.hidden[row : row + 1].to(last), compute.dtype)
                    divergence, by_logits = divergence_gradient(logits.detach().flatten(0, 1), wanted.flatten(0, 1))
                logits.backward(by_logits.view_as(logits))
                assert last.grad is not None
                slope[row] = last.grad[0] / tokens
                total += divergence
            hidden.backward(slope)
        return total / tokens


def _run_blocks(
    model: nn.Module, structure: Structure, batches: Sequence[Tensor], compute: Compute, progress: ProgressCallback
) -> list[Tensor]:
    """Return the output of the float model's last block, one (B, T, H) in the compute dtype on the CPU for each batch."""
    recorded = [record_block_calls(model, structure, ids) for ids in batches]
    hidden, calls = [one.hidden.to(compute.dtype) for one in recorded], [one.calls for one in recorded]
    del recorded
    for index, block in enumerate(structure.blocks):
        module = model.get_submodule(block.name)
        with torch.no_grad(), on_device(module, compute):
            for batch in range(len(batches)):
                call = cast_call(*calls[batch][index], compute.dtype, compute.device)
                hidden[batch] = call_block(module, hidden[batch].to(compute.device), *call).to("cpu", compute.dtype)
                if not bool(torch.isfinite(hidden[batch].sum())):
                    raise CalibrationError(f"{block.name}: its output holds NaN or infinity; check the model and its dtype")
        progress(Progress("record", index + 1, len(structure.blocks), block.name))
    return hidden


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


def _quantized_module(model: nn.Module, site: Site) -> QuantLinear | QuantWeight:
    """Return the QuantLinear or QuantWeight of an installed layer."""
    module: nn.Module = model.get_submodule(site.module)
    if isinstance(module, QuantLinear):
        return module
    stack = getattr(module, site.parameter)
    assert isinstance(stack, QuantWeight)
    return stack
