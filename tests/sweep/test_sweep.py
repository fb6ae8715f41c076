"""Every architecture that transformers registers, and every config.json in the folder that QUANTKIT_CONFIGS names.

Left out unless asked for: ``pytest -m sweep`` takes most of an hour on one core. The few that run always keep the sweep itself
in order.
"""

import os
from pathlib import Path

import pytest

from tests.sweep import engines
from tests.sweep.engines import Engine
from tests.sweep.models import TYPES
from tests.sweep.run import records
from tests.sweep.verdict import is_language_model, page, share, verdict
from tests.tiny import FAMILIES

FOLDER = os.environ.get("QUANTKIT_CONFIGS")
CONFIGS = sorted(str(path) for path in Path(FOLDER).glob("*.json")) if FOLDER else []


def try_one(name: str) -> None:
    record = next(records([name]))
    passed, why = verdict(record)
    if passed is None or not (is_language_model(record) or name.endswith(".json")):
        pytest.skip(why or "no decoder-only language model")
    assert passed, why


@pytest.mark.sweep
@pytest.mark.parametrize("name", TYPES)
def test_registered(name: str) -> None:
    try_one(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", CONFIGS, ids=[Path(one).stem for one in CONFIGS])
def test_published(name: str) -> None:
    try_one(name)


def test_a_page_counts_what_passes_and_says_why_the_rest_does_not() -> None:
    ok = {"status": "ok"}
    good = {key: ok for key in ("load", "transformers", "generate", "plan", "gptq", "gptq_load")}
    build = {"status": "ok", "encoder_decoder": False}
    found = [
        {"name": "one", "build": build, "quantize": {"status": "ok", "share": 1.0, "kept": {}}, **good},
        {"name": "two", "build": build, "quantize": {"status": "ok", "share": 0.2, "kept": {"experts: odd": 9}}, **good},
        {"name": "three", "build": build, "quantize": {"status": "crash", "why": "ValueError: x"}},
        {"name": "bert", "build": build},
    ]
    assert [verdict(one).passed for one in found[:3]] == [True, False, False]
    assert share(found[1]) == 0.2
    text = page(found, "Made today.")
    assert "1 of 3 language models pass (33%)" in text
    assert "| `two` | fails | 20.0% | 20% of its linear layers and experts quantized: experts: odd (9) |" in text
    assert "bert" not in text


def test_a_page_of_engines_counts_them_and_ranks_the_reasons() -> None:
    found = {
        "one": Engine("native", "layers"),
        "two": Engine("native", "tape"),
        "three": Engine("batched", "layer 3: odd"),
        "four": Engine("alone", "layer 1: odd", "a | b"),
    }
    counts = "Of 4 types, 2 (50%) run natively (1 as layers, 1 as tapes), 3 (75%) in batches"
    assert engines.summary(found) == counts
    assert "   2  layer #: odd: three four" in engines.ranked(found)
    text = engines.page(found, "Made today.")
    assert f"{counts}. Made today." in text
    assert "| `four` | alone | layer 1: odd · alone because a \\| b |" in text


def test_a_standard_model_is_layers_and_another_a_tape() -> None:
    assert [engines.engine_of(FAMILIES[name]()) for name in ("llama", "gpt2")] == [
        Engine("native", "layers"),
        Engine("native", "tape"),
    ]
