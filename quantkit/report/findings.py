"""The results of a comparison in sentences, derived from the reports."""

import itertools
from collections.abc import Sequence

from quantkit.evaluation.record import EvalReport
from quantkit.report.cells import megabytes, plus_minus, ppl_increase, significant


def headline(reports: Sequence[EvalReport]) -> str:
    """Return a sentence with size, speed and quality of the smallest model, compared with the first unquantized one."""
    quantized = [report for report in reports if report.footprint.quantized_share > 0]
    plain = next((report for report in reports if report.footprint.quantized_share == 0), None)
    if not quantized:
        best = min(reports, key=lambda r: r.quality.nll)
        return f"{best.label} has perplexity {_perplexity(best)} and takes {megabytes(best.footprint.stored_bytes)} MB."
    small = min(report.footprint.stored_bytes for report in quantized)
    hero = min((r for r in quantized if r.footprint.stored_bytes <= 1.05 * small), key=_loss)
    sentence = f"{hero.label} takes {megabytes(hero.footprint.stored_bytes)} MB"
    if plain is not None:
        ratio = plain.footprint.stored_bytes / hero.footprint.stored_bytes
        sentence += f", {ratio:.1f} times less than {plain.label}"
        speedup = hero.latency.speedup if hero.latency else None
        if speedup and speedup.baseline == plain.label:
            sentence += f", and decodes {speedup.decode.median:.2f} times as fast"
    divergence = hero.quality.divergence
    if divergence is None:
        return f"{sentence}; its perplexity is {_perplexity(hero)}."
    base, same = hero.base or "the base", 100 * divergence.same_top1
    return (
        f"{sentence}; it ranks the same token first as {base} for {same:.1f} % of tokens (KL {significant(divergence.mean)} "
        f"nats), and perplexity goes from {significant(divergence.base_perplexity, 4)} to {_perplexity_on_base(hero)}."
    )


def findings(reports: Sequence[EvalReport]) -> list[str]:
    """Return a sentence per model that was compared with a base, and one per pair of neighbouring rows of similar bits."""
    lines = []
    for report in reports:
        found = ppl_increase(report)
        if found is None:
            continue
        increase, error = found
        change = f"{'+' if increase > 0 else ''}{plus_minus(increase, error, 1)} %"
        text = f"{report.label}: perplexity {change} against {report.base or 'the base'}"
        if error is not None:
            text += ", within noise" if abs(increase) <= 2 * error else ", beyond noise"
        lines.append(text + ".")
    return lines + _rivals(reports)


def _rivals(reports: Sequence[EvalReport]) -> list[str]:
    """Return a sentence for each pair of neighbouring rows whose bits per quantized weight differ by less than 5 %.

    Sizes of whole models are no measure: an embedding in float makes 8 bits and 4 nearly equal.
    """
    rows = [r for r in reports if r.footprint.quantized_share > 0 and r.quality.divergence is not None]
    lines = []
    for one, other in itertools.pairwise(rows):
        a, b = sorted((one, other), key=_loss)
        kl_a, kl_b = _loss(a), _loss(b)
        bits = a.footprint.bits_per_weight / b.footprint.bits_per_weight
        if 0.95 < bits < 1.05 and 0 < kl_a < kl_b and a.protocol.fingerprint == b.protocol.fingerprint:
            lines.append(f"{a.label} has {100 * (1 - kl_a / kl_b):.0f} % less KL than {b.label} at the same bits per weight.")
    return lines


def _loss(report: EvalReport) -> float:
    return report.quality.divergence.mean if report.quality.divergence else report.quality.nll


def _perplexity(report: EvalReport) -> str:
    return plus_minus(report.quality.perplexity, report.quality.perplexity_se, 2)


def _perplexity_on_base(report: EvalReport) -> str:
    found = ppl_increase(report)
    divergence = report.quality.divergence
    if divergence is None or found is None:
        return significant(report.quality.perplexity, 4)
    return significant(divergence.base_perplexity * (1 + found[0] / 100), 4)
