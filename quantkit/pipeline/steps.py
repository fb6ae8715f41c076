"""Carry out the steps of a run: put in order, checked against each other, and done around the quantizing of the blocks."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from quantkit.calibrate.backward import Counted
from quantkit.calibrate.chain import collect_statistics
from quantkit.errors import SpecError
from quantkit.hf.structure import describe
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import Structure
from quantkit.pipeline.resume import ResumeStore
from quantkit.spec import Plan
from quantkit.system.compute import Compute
from quantkit.system.progress import ProgressCallback
from quantkit.transforms.base import STAGES, STEPS, Correction, Learner, Recording, Step, Transform, step_name


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a run by stage, each in the order it was given."""

    before: tuple[Transform, ...] = ()
    during: tuple[Correction, ...] = ()
    after: tuple[Learner, ...] = ()

    @property
    def all(self) -> tuple[Step, ...]:
        """Every step, in order."""
        return (*self.before, *self.during, *self.after)

    def metadata(self, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return what a checkpoint records of the steps; ``facts`` are those of :meth:`Learning.finish`."""
        transforms = [repr(step) for step in (*self.before, *self.during)]
        learned = {step_name(step): {"settings": repr(step), **facts[step_name(step)]} for step in self.after}
        return ({"transforms": transforms} if transforms else {}) | learned


def make_steps(steps: Sequence[str | Step]) -> Steps:
    """Return steps, given by name or as they are, by stage.

    Raises:
        SpecError: an unknown name; a step that comes after one of a later stage; a step that is given twice, where the second
            would undo the first.
    """
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise SpecError(f"steps={steps!r}: want a list of names or steps, such as ['awq']")
    made = [STEPS.get(one)() if isinstance(one, str) else one for one in steps]
    if odd := [one for one in made if isinstance(one, type) or getattr(one, "stage", None) not in STAGES]:
        raise SpecError(f"steps: {odd[0]!r} is no step; want names, or instances such as quantkit.AWQ()")
    for earlier, later in itertools.pairwise(made):
        if STAGES.index(later.stage) < STAGES.index(earlier.stage):
            raise SpecError(
                f"steps: {step_name(later)} comes after {step_name(earlier)}; first what rewrites the float model, then what "
                "corrects layers while they are quantized, last what learns afterwards"
            )
    once = [step_name(one) for one in made if one.stage != "before"]
    if twice := next((name for name in once if once.count(name) > 1), None):
        raise SpecError(f"steps: {twice} is given twice; give it once")
    return Steps(
        tuple(cast(Transform, one) for one in made if one.stage == "before"),
        tuple(cast(Correction, one) for one in made if one.stage == "during"),
        tuple(cast(Learner, one) for one in made if one.stage == "after"),
    )


def apply_transforms(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    transforms: Sequence[Transform],
    batches: Sequence[Tensor],
    *,
    counted: Counted = (),
    compute: Compute,
    progress: ProgressCallback,
) -> Structure:
    """Rewrite the float model, one transform after the other, each with statistics of the model as it is by then.

    Returns:
        The structure of the rewritten model.
    """
    for one in transforms:
        found = (
            collect_statistics(model, structure, batches, one.needs, counted=counted, compute=compute, progress=progress)
            if one.needs
            else {}
        )
        one.apply(model, structure, plan, found)
        structure = replace(describe(model), entangled=structure.entangled)  # a tied head may stand alone now
    return structure


def corrections_of(
    model: nn.Module, structure: Structure, plan: Plan, corrections: Sequence[Correction]
) -> dict[str, tuple[Correction, ...]]:
    """Return layer name to the corrections that it goes through, in order.

    Raises:
        CalibrationError: a correction that has no layer.
    """
    found: dict[str, tuple[Correction, ...]] = {}
    for one in corrections:
        for name in one.layers(model, structure, plan):
            found[name] = (*found.get(name, ()), one)
    return found


@dataclass(frozen=True, slots=True)
class Learning:
    """The learners of a run, with what each remembers of the float model.

    Attributes:
        recordings: step name to what it recorded; a step that an interrupted run had finished is not among them.
        facts: step name to what such a step left behind.
        store: where finished blocks are kept, and what learners make of them; None keeps nothing.
    """

    recordings: Mapping[str, Recording]
    facts: Mapping[str, dict[str, Any]]
    store: ResumeStore | None

    @classmethod
    def record(
        cls,
        learners: Sequence[Learner],
        store: ResumeStore | None,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Tensor],
        *,
        compute: Compute,
        progress: ProgressCallback,
    ) -> "Learning":
        """Let every learner run the float model, unless an interrupted run had learned already."""
        known = {step_name(one): store.changed(step_name(one)) for one in learners} if store else {}
        done = {name: facts for name, facts in known.items() if facts is not None}
        recordings = {
            step_name(one): one.record(model, structure, batches, compute=compute, progress=progress)
            for one in learners
            if step_name(one) not in done
        }
        return cls(recordings, done, store)

    def finish(
        self, model: nn.Module, structure: Structure, results: dict[str, Quantized]
    ) -> tuple[dict[str, Quantized], dict[str, dict[str, Any]]]:
        """Let every learner go on with the quantized model; return the new results, and step name to its facts."""
        facts = dict(self.facts)
        for name, recording in self.recordings.items():
            results, facts[name] = recording.finish(model, structure, results)
            if self.store is not None:
                self.store.change(name, results, facts[name])
        return results, facts
