"""Find the plan that loses least within a budget: scores for every choice of every group of layers, then an exact allocation.

1. the menu: which groups of layers can have which of the choices, and what each takes (:mod:`quantkit.mixed.groups`);
2. the scores: what each is expected to cost, from one forward and backward pass over a few windows of calibration text
   (:mod:`quantkit.calibrate.backward`, :mod:`quantkit.mixed.scores`);
3. the allocation: the best choices for every budget at once (:mod:`quantkit.mixed.allocate`).

A budget in milliseconds is measured before and after, one in KL after; see :mod:`quantkit.mixed.measured`.
"""

import logging
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.calibrate.backward import Backward
from quantkit.calibrate.collectors import COLLECTORS
from quantkit.calibrate.data import Batch, Calibration, check_fit, unpadded
from quantkit.checkpoint.extras import write_extras
from quantkit.errors import SpecError
from quantkit.hf.load import PreTrainedModel
from quantkit.hf.structure import describe
from quantkit.mixed.budget import Budget
from quantkit.mixed.groups import Menu, make_menu
from quantkit.mixed.measured import Decoding, choice_times, divergence, milliseconds, one_at_a_time, plan_shares
from quantkit.mixed.result import Scores, SearchResult
from quantkit.mixed.scores import Sensitivity, score
from quantkit.mixed.watch import Watch
from quantkit.nn.block_calls import stack_by_length
from quantkit.nn.sites import Site, Structure, read_weight, sharing_copy
from quantkit.pipeline.checks import check_model, check_settings, prepare_blocks
from quantkit.pipeline.quantize import DEFAULT_CALIBRATION, DEFAULT_OUTPUT, DEFAULT_RUN, collect, open_float, quantize
from quantkit.pipeline.rules import Rule, SchemeChoice
from quantkit.pipeline.settings import Output, Run
from quantkit.quantizers.base import QUANTIZERS, Quantizer
from quantkit.spec import ActivationSpec, Scheme
from quantkit.system.compute import Compute
from quantkit.system.settings import AtLeastTwo, NotNegative, Positive, settings

log = logging.getLogger(__name__)

CHOICES: tuple[str, ...] = (
    "w2a16-asym-g32",
    "w2a16-asym-g64",
    "w3a16-asym-g64",
    "w4a16-asym-g64",
    "w5a16-asym-g64",
    "w6a16-asym-g64",
    "w8a16-g64",
)
"""What is chosen from when nobody says: integers of two to eight bits."""

HEADER_BYTES = 2000
"""Bytes that a matrix takes beside its numbers: up to four tensors in headers and checksums, its place in config.json, what the
run found out about it, and its row in the record of the search."""


_TRUST, _MOST = 0.7, 10.0
"""Shares change what a layer is expected to cost by at most this factor, and by this power of it: they hold where they were
measured, and less so for other choices."""


@settings(SpecError)
class Scoring:
    """How the search finds out what choices cost.

    Args:
        kind: ``"gradient"`` expects it, from one backward pass; ``"measured"`` quantizes one group at a time and measures: a
            pass over the text for every choice of every group.
        windows: pieces of calibration text that are used, spread evenly over all of it. More of them see more, in
            proportion to time.
        length: tokens of such a piece.
        rounds: how often the plan is carried out with the real quantizer, what every layer's errors cost in the quantized model
            is measured, and a better plan is found with that: errors interact. Each takes as long as quantizing the model.
        seed: of the tokens that are drawn from the model's predictions.
        decoding: how a token is timed, for a budget in time.
    """

    kind: Literal["gradient", "measured"] = "gradient"
    windows: Positive = 32
    length: AtLeastTwo = 128
    rounds: NotNegative = 0
    seed: int = 0
    decoding: Decoding = Decoding()


DEFAULT_SCORING = Scoring()


def search(
    model: nn.Module | str | Path,
    budget: str | Budget,
    choices: Sequence[str | Scheme | SchemeChoice] = CHOICES,
    *,
    method: str | Quantizer = "gptq",
    rules: Sequence[Rule] = (),
    include: Sequence[str] = (),
    calibration: Calibration = DEFAULT_CALIBRATION,
    scoring: Scoring = DEFAULT_SCORING,
    output: Output = DEFAULT_OUTPUT,
    run: Run = DEFAULT_RUN,
    tokenizer: Any = None,
) -> SearchResult:
    """Find the plan that loses least within a budget. The model is not changed.

    Args:
        model: a transformers model, or a hub id, directory or GGUF file (``"demo"`` is the embedded default).
        budget: such as ``"4.25 bpw"``, ``"300 MB"``, ``"20 ms"``, ``"50 tok/s"`` or ``"0.05 kl"``; see
            :mod:`quantkit.mixed.budget`.
        choices: preset names, schemes, and ``"float"`` for layers that may stay as they are.
        method: the quantizer that will carry the plan out.
        rules: layers that are decided already, or left in float.
        include: ``"embedding"``, ``"head"``: searched too; they stay in float otherwise.
        calibration: text for the scores, and for the quantizer where it is tried.
        scoring: how it is found out what choices cost.
        output: format of the checkpoint, which decides sizes and what can be stored.
        run: device and progress.
        tokenizer: needed for text; found by itself when ``model`` is a path.

    Returns:
        The plan, which :func:`quantkit.quantize` takes as its scheme, and the best plans for all other budgets.

    Raises:
        SpecError: a budget that cannot be met, with the nearest that can; choices that no layer can have.
        CalibrationError: too little text, or a model whose gradients are not finite.
    """
    check_settings(calibration, output, run)
    begin, wanted = time.perf_counter(), Budget.parse(budget)
    quantizer = QUANTIZERS.get(method)() if isinstance(method, str) else method
    opened, tokenizer = open_float(model, tokenizer)
    structure = describe(opened)
    files = beside_tensors(opened, tokenizer)
    menu = make_menu(opened, structure, choices, rules, quantizer, include=include, output=output, files_bytes=files)
    refuse_unreachable(menu, wanted)
    if scoring.rounds:
        refuse_rounded_inputs(menu)
    batches = calibration.batches(tokenizer)
    check_fit(batches, opened)
    check_model(opened)
    structure, compute = prepare_blocks(opened, structure, run.compute or Compute.default(opened, run.device))
    found = _Search(
        opened, replace(menu, structure=structure), quantizer, calibration, scoring, replace(run, compute=compute), tokenizer
    )
    windows = chosen_windows(batches, scoring, windows_together(structure))
    scores = found.scores(windows, wanted)
    for number in range(scoring.rounds):
        scores = found.learned(scores, wanted, windows, number + 1)
    return found.within(scores, wanted, begin)


def refuse_unreachable(menu: Menu, budget: Budget) -> None:
    """Refuse a budget of size that no choices can meet, before any text is read.

    Raises:
        SpecError: with the range that can be met.
    """
    if budget.kind in ("bits", "bytes"):
        no_losses(menu).solve(budget)


def no_losses(menu: Menu, times: tuple[tuple[int, ...], ...] | None = None) -> Scores:
    """Return scores that know sizes, or times, and nothing of losses."""
    return Scores(menu, tuple((0.0,) * len(group.candidates) for group in menu.groups), times)


def refuse_rounded_inputs(menu: Menu) -> None:
    """Refuse choices whose errors are not those of weights alone."""
    for candidate in (one for group in menu.groups for one in group.candidates):
        if any(scheme.activation is not None for scheme in candidate.schemes.values()):
            raise SpecError(f"rounds: {candidate.choice!r} rounds inputs, and only errors of weights have shares; use rounds=0")


def windows_together(structure: Structure) -> int:
    """Return how many windows may run at a time: one, where a layer does not get them apart."""
    return 1 if any(site.read or len(site.shape) == 3 for site in structure.sites) else 8


def chosen_windows(batches: Sequence[Batch], scoring: Scoring, together: int) -> list[Tensor]:
    """Return pieces of calibration text, int64 (B, T), spread evenly over all rows, and over the places in them.

    Args:
        batches: the text.
        scoring: how many pieces, and how long.
        together: the largest B.
    """
    rows = [row for ids in unpadded(batches) for row in ids]
    places = [i * len(rows) / scoring.windows for i in range(scoring.windows)]
    found: dict[tuple[int, int], Tensor] = {}
    for place in places:
        number = int(place)
        start = int((place * 0.618 % 1) * max(0, len(rows[number]) - scoring.length))
        found.setdefault((number, start), rows[number][start : start + scoring.length])
    pieces = list(found.values())
    return [stack for i in range(0, len(pieces), together) for stack in stack_by_length(pieces[i : i + together])]


def beside_tensors(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return the bytes of what a checkpoint holds beside its tensors."""
    with tempfile.TemporaryDirectory() as directory:
        write_extras(Path(directory), model, tokenizer)
        written = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
    matrices = sum(len(parameter) if parameter.ndim == 3 else 1 for parameter in model.parameters())
    return written + 16_000 + HEADER_BYTES * matrices


@dataclass(frozen=True, slots=True)
class _Search:
    """A search whose menu is made."""

    model: PreTrainedModel
    menu: Menu
    method: Quantizer
    calibration: Calibration
    scoring: Scoring
    run: Run
    tokenizer: Any

    def scores(self, windows: Sequence[Tensor], budget: Budget) -> Scores:
        """Return what every candidate of every group is expected to cost, and takes if the budget is in time."""
        times = None
        if budget.kind == "ms":
            times = choice_times(self.model, self.menu, self.scoring.decoding, self.run.report)
            no_losses(self.menu, times).solve(budget)  # refuses one that no choices meet before any text runs
        if self.scoring.kind == "measured":
            needed = [name for name in self.method.needs if not COLLECTORS.get(name).paired]
            settings = {"calibration": self.calibration, "run": self.run, "tokenizer": self.tokenizer}
            statistics = collect(self.model, needed, **settings)[0] if needed else {}
            report = self.run.report
            losses = [list(row) for row in one_at_a_time(self.model, self.menu, self.method, statistics, windows, report)]
        else:
            losses = self._expected(windows)
        return Scores(self.menu, tuple(tuple(_rounded(loss) for loss in row) for row in losses), times)

    def _expected(self, windows: Sequence[Tensor]) -> list[list[float]]:
        groups = {site.name: number for number, group in enumerate(self.menu.groups) for site in group.sites}
        noises: dict[str, set[ActivationSpec]] = defaultdict(set)
        for group in self.menu.groups:
            for site in group.sites:
                schemes = [one.schemes[site.name] for one in group.candidates if one.schemes]
                noises[site.name] |= {scheme.activation for scheme in schemes if scheme.activation is not None}
        losses = [[0.0] * len(group.candidates) for group in self.menu.groups]
        unseen: list[str] = []

        def visit(site: Site, parts: list[tuple[int, Sensitivity]]) -> None:
            group = self.menu.groups[groups[site.name]]
            numbers = [index for index, one in enumerate(group.candidates) if one.schemes]
            schemes = [group.candidates[index].schemes[site.name] for index in numbers]
            weight = read_weight(self.model, site)
            if not parts:
                unseen.append(site.name)
            for part, sensitivity in parts:
                matrix = weight if weight.ndim == 2 else weight[part]
                for index, loss in zip(numbers, score(site.name, matrix, schemes, sensitivity), strict=True):
                    losses[groups[site.name]][index] += loss

        assert self.run.compute is not None
        text = {name: tuple(specs) for name, specs in noises.items()}
        compensates = not {"hessian", "guided_hessian"}.isdisjoint(self.method.needs)

        def watcher(products: torch.dtype | None) -> Watch:
            return Watch(text, compensates, products)

        backward = Backward(self.model, self.menu.structure, windows, text, watcher, self.run.compute, self.run.report)
        backward.run(visit, self.scoring.seed)
        if unseen:
            log.warning("%d layers were not reached by the text and get the smallest choice: %s ...", len(unseen), unseen[0])
        return losses

    def learned(self, scores: Scores, budget: Budget, windows: Sequence[Tensor], number: int) -> Scores:
        """Return scores that know what the errors of the best plan so far cost together."""
        chosen = scores.solve(budget)
        plan = SearchResult.make(scores, budget, chosen).plan
        settings = {"method": self.method, "calibration": self.calibration, "tokenizer": self.tokenizer}
        result = quantize(sharing_copy(self.model), plan, run=replace(self.run, compute=None), **settings)
        found, kl = plan_shares(self.model, self.menu.structure, result.model, windows, self.run.report)
        log.info("round %d: the plan has a KL of %.4f on the calibration text", number, kl)
        losses = []
        for group, own, index in zip(self.menu.groups, scores.losses, chosen, strict=True):
            share = sum(found.get(site.name, 0.0) for site in group.sites)
            factor = min(max(share / own[index], 1 / _MOST), _MOST) ** _TRUST if own[index] > 0 else 1.0
            losses.append(tuple(_rounded(loss * factor) for loss in own))
        return replace(scores, losses=tuple(losses))

    def within(self, scores: Scores, budget: Budget, begin: float) -> SearchResult:
        """Return the best plan within a budget; one in time or KL is measured, and tightened until it is met."""
        limit, measured = budget, dict[str, float]()
        for _ in range(5):
            choices = scores.solve(limit)
            found = SearchResult.make(scores, budget, choices)
            if budget.kind not in ("ms", "kl"):
                break
            value = self._measure(budget.kind, found)
            measured = {budget.kind: value}
            log.info("measured %.4g %s for a budget of %s", value, budget.kind, budget)
            if value <= budget.limit and (budget.kind == "ms" or value > 0.9 * budget.limit):
                break
            expected = found.point.kl if budget.kind == "kl" else found.point.ms
            assert expected is not None
            if budget.kind == "kl":
                scores = replace(scores, scale=scores.scale * value / expected)
            else:
                limit = replace(limit, limit=limit.limit * min(1.0, 0.995 * budget.limit / value))
        else:
            if measured[budget.kind] > budget.limit:
                raise SpecError(
                    f"budget {budget}: the best plan measures {measured[budget.kind]:.4g}; is the machine busy? try again"
                )
        return SearchResult.make(scores, budget, choices, time.perf_counter() - begin, **measured)

    def _measure(self, kind: str, found: SearchResult) -> float:
        if kind == "ms":
            return milliseconds(self.model, self.menu.structure, found.plan, self.scoring.decoding)
        return divergence(self.model, found.plan, self.method, self.calibration, self.tokenizer, self.run.report)


def _rounded(loss: float) -> float:
    """Return a loss with four digits: sums in another order, on another number of threads, must not change a plan."""
    return float(f"{loss:.3e}") if math.isfinite(loss) else loss
