"""What a record of a trial means: passed, passed in one format only for a stated reason, or failed; and the page of all."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tests.sweep.models import LANGUAGE_MODELS_NOT

SHARE = 0.95
"""Least share of linear layers and experts that must be quantized."""

_NEEDED = ("load", "generate", "plan", "gptq", "gptq_load")
Record = Mapping[str, Any]


class Verdict(NamedTuple):
    """``passed`` is None where transformers itself cannot build or run the model; ``why`` is empty where all is well."""

    passed: bool | None
    why: str


def status(record: Record, step: str) -> str | None:
    """Return what came of a step: ok, refused, wrong, crash; None if it was not tried."""
    return record.get(step, {}).get("status")


def quantized(record: Record) -> Mapping[str, Any]:
    """Return what was found when the model was quantized, in whatever format that worked first."""
    return record["quantize"] if status(record, "quantize") == "ok" else record.get("native", {})


def share(record: Record) -> float | None:
    """Return the share of linear layers and experts that were quantized."""
    return quantized(record).get("share")


def verdict(record: Record) -> Verdict:
    """Judge one record."""
    if status(record, "build") != "ok":
        return Verdict(None, record.get("build", {}).get("why") or record.get("died", "not built"))
    if "died" in record:
        return Verdict(False, record["died"])
    first = record.get("quantize", {})
    refused = first.get("status") == "refused" and "format compressed-tensors:" in first["why"]
    if first.get("status") != "ok" and not (refused and status(record, "native") == "ok"):
        step = "native" if refused else "quantize"
        return Verdict(False, f"{step}: {record.get(step, first).get('why', '')}")
    own_fault = status(record, "float_round_trip") in (
        "wrong",
        "crash",
    )  # transformers does not read its own float files either
    for step in (*_NEEDED, *(() if refused or own_fault else ("transformers",))):
        if status(record, step) != "ok":
            return Verdict(False, f"{step}: {record.get(step, {}).get('why', 'not reached')}")
    if (found := share(record) or 0.0) < SHARE:
        kept = "; ".join(f"{reason} ({count})" for reason, count in quantized(record)["kept"].items())
        return Verdict(False, f"{found:.0%} of its linear layers and experts quantized: {kept}")
    if own_fault:
        return Verdict(True, "transformers does not read what itself writes of the float model")
    return Verdict(True, f"native only: {first['why'].partition('compressed-tensors: ')[2]}" if refused else "")


def is_language_model(record: Record) -> bool:
    """Return whether a record counts: built, decoder-only, and not a part of something else."""
    known = record["name"] not in LANGUAGE_MODELS_NOT
    return known and status(record, "build") == "ok" and not record["build"]["encoder_decoder"]


def summary(records: Iterable[Record]) -> str:
    """Return how many language models pass."""
    counted = [verdict(one) for one in records if is_language_model(one)]
    passed = [one for one in counted if one.passed]
    native = sum(one.why.startswith("native") for one in passed)
    rate = len(passed) / max(len(counted), 1)
    return (
        f"{len(passed)} of {len(counted)} language models pass ({rate:.0%}); "
        f"{native} of them in format native only, for a reason that is said"
    )


def page(records: Iterable[Record], made: str) -> str:
    """Return the Markdown page of all records.

    Args:
        records: one per architecture.
        made: when and with what the records were made.
    """
    rows = sorted((one for one in records if is_language_model(one)), key=lambda one: one["name"])
    lines = [
        "# Architectures",
        "",
        "<!-- written by python -m tests.sweep; do not edit -->",
        "",
        "Every causal language model type that transformers registers and can build, as a tiny random model: quantized to 4",
        "bits, written, loaded again, read by transformers, made to generate, predicted by `quantkit plan` to the byte, and",
        "calibrated with GPTQ. `python -m tests.sweep` makes this page.",
        "",
        f"{summary(rows)}. {made}",
        "",
        "| Type | Verdict | Quantized | Remark |",
        "| --- | --- | --- | --- |",
    ]
    for one in rows:
        found = verdict(one)
        word = "passes" if found.passed and not found.why else "native" if found.passed else "fails"
        portion = share(one)
        lines.append(f"| `{one['name']}` | {word} | {'' if portion is None else f'{portion:.1%}'} | {_cell(found.why)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str, longest: int = 220) -> str:
    line = " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
