r"""What a step is: something done to a model beside choosing codes, before, while or after its layers are quantized.

``quantize(steps=...)`` takes them in this order:

- *before*, a :class:`Transform` rewrites the float model so that it computes the same and quantizes better;
- *during*, a :class:`Correction` changes the result of each layer as soon as it is quantized;
- *after*, a :class:`Learner` goes on learning the quantized model from what it recorded of the float one.

A member is a frozen dataclass whose fields are its options, registered by name; it derives from one of the three, whose
defaults answer what it does not care about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from quantkit.errors import CalibrationError, SpecError
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import SiteStatistics, Structure
from quantkit.nn.sizes import RunSize
from quantkit.registry import Registry
from quantkit.spec import Plan, Scheme
from quantkit.system.compute import Compute
from quantkit.system.progress import ProgressCallback

Stage = Literal["before", "during", "after"]
STAGES: tuple[Stage, ...] = ("before", "during", "after")


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run was asked to do, for a step that looks whether it fits in.

    Attributes:
        plan: layer name to scheme.
        structure: the model's blocks and layers.
        steps: all steps of the run, in order.
        learns_blocks: the quantizer learns the codes of a block as a whole.
        given_statistics: calibration statistics were given, and layers are quantized without text.
    """

    plan: Plan
    structure: Structure
    steps: "tuple[Step, ...]"
    learns_blocks: bool = False
    given_statistics: bool = False


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step costs.

    Attributes:
        first: passes through the float model, before any layer is quantized.
        last: passes through the quantized model, afterwards.
        nbytes: memory that lives only while the step is at work.
    """

    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    nbytes: int = 0


class Step(Protocol):
    """What every step answers; :attr:`stage` says which of the three kinds it is."""

    stage: ClassVar[Stage]

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the collectors it wants: over the float model's inputs for a transform, in the walk for a correction."""
        return ()

    def rejects(self, scheme: Scheme) -> str | None:
        """Say why layers of a scheme cannot go through this step; None if they can."""
        return None

    def check(self, setup: Setup) -> None:
        """Refuse, before any work, what this step does not go together with.

        Raises:
            SpecError: something in the plan.
            CalibrationError: another step, the quantizer, or statistics that were given.
        """

    def cost(self, size: RunSize) -> StepCost:
        """Return an estimate of what it costs beside the calibration itself."""
        return StepCost()


class Transform(Step, Protocol):
    """A rewrite of the float model that changes nothing it computes."""

    stage: ClassVar[Stage] = "before"

    def apply(self, model: nn.Module, structure: Structure, plan: Plan, statistics: Mapping[str, SiteStatistics]) -> None:
        """Rewrite ``model`` in place. Its structure may be another one afterwards: a tied head may stand alone.

        Args:
            model: the float model.
            structure: its blocks and layers.
            plan: layer name to scheme.
            statistics: layer name to what :attr:`needs` found for this very model; empty if it needs nothing.

        Raises:
            CalibrationError: the model cannot be rewritten so.
        """

    def check(self, setup: Setup) -> None:
        """Refuse statistics that were collected before the rewrite."""
        if setup.given_statistics:
            raise CalibrationError(
                f"statistics= are of inputs before {type(self).__name__}, which changes them; pass data= instead"
            )


class Correction(Step, Protocol):
    """A change to the result of each layer, once its codes are chosen."""

    stage: ClassVar[Stage] = "during"

    def layers(self, model: nn.Module, structure: Structure, plan: Plan) -> list[str]:
        """Return the names of the layers it corrects, in model order.

        Raises:
            CalibrationError: if there are none.
        """

    def correct(self, module: nn.Module, weight: Tensor, quantized: Quantized, statistics: SiteStatistics | None) -> Quantized:
        """Return the corrected result of one layer.

        Args:
            module: the layer as it is in the model.
            weight: its float weight (out, in), as it will be stored.
            quantized: what the quantizer made of it, on the CPU.
            statistics: what :attr:`needs` found for the layer's inputs, or None if no input was seen.
        """


class Recording(Protocol):
    """What a :class:`Learner` remembers of the float model."""

    def finish(
        self, model: nn.Module, structure: Structure, results: Mapping[str, Quantized]
    ) -> tuple[dict[str, Quantized], dict[str, Any]]:
        """Learn the quantized layers of ``model``, and put them into it.

        Args:
            model: the quantized model; changed in place.
            structure: its blocks and layers.
            results: layer name to what was quantized.

        Returns:
            ``results`` with what was learned, and JSON-ready facts about the learning.
        """


class Learner(Step, Protocol):
    """Learning of the whole quantized model, from what the float model does."""

    stage: ClassVar[Stage] = "after"

    def record(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Tensor],
        *,
        compute: Compute,
        progress: ProgressCallback,
    ) -> Recording:
        """Run the float model and keep what learning will want of it; called before anything is quantized.

        Args:
            model: the float model; not changed.
            structure: its blocks.
            batches: int64 token ids (B, T), without padding.
            compute: the device.
            progress: gets the events of recording, and later of learning.
        """


STEPS: Registry[type[Step]] = Registry("step", package="quantkit.transforms", error=SpecError)


def step_name(step: Step) -> str:
    """Return the name that a step is registered under, or its class's if it is not."""
    return next((name for name, kind in STEPS if kind is type(step)), type(step).__name__)
