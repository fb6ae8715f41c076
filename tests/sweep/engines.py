"""How every architecture runs: ``python -m tests.sweep.engines [--results FILE] [--page FILE] [NAME ...]``.

A tiny random model of each registered type is given to the native CPU engine and, where that refuses, to paged modules. Printed
are the reasons, those of most types first. About a minute of processor time.
"""

import argparse
import contextlib
import datetime
import json
import logging
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from quantkit.hf.native import native_decoder
from quantkit.hf.paged import describe_layers
from quantkit.kernels.program.tape import Tape
from tests.sweep import models

TOO_LARGE = ("blt",)
"""Types whose tables no config makes small; how they run is known from reading them."""


class Engine(NamedTuple):
    """How a model runs: native, batched (paged modules) or alone; ``how`` is layers or tape, or why it is not native."""

    kind: str
    how: str
    why_alone: str = ""


def engine_of(model: PreTrainedModel) -> Engine:
    """Try the engines in the order in which quantkit does."""
    decoder = native_decoder(model)
    if not isinstance(decoder, str):
        return Engine("native", "tape" if isinstance(decoder.program, Tape) else "layers")
    with contextlib.suppress(Exception):
        pages = describe_layers(model)
        return Engine("alone", decoder, pages) if isinstance(pages, str) else Engine("batched", decoder)
    return Engine("alone", decoder, "it cannot be run on token ids alone")


def try_all(names: Iterable[str]) -> dict[str, Engine]:
    """Return how each type runs; those that transformers cannot build, and encoder-decoders, are left out."""
    found = {}
    for name in names:
        start = time.process_time()
        if name in TOO_LARGE:
            found[name] = Engine("alone", "it predicts bytes from patches of bytes", "its layers read patches, not tokens")
            continue
        try:
            model = models.build(models.config_of(name))
        except Exception as error:  # whatever transformers raises for a type that it cannot build
            print(f"{name}: not built ({type(error).__name__})", flush=True)
            continue
        if getattr(model.config, "is_encoder_decoder", False):
            continue
        found[name] = engine_of(model)
        print(f"{name} ({time.process_time() - start:.1f} s): {' · '.join(filter(None, found[name]))[:200]}", flush=True)
    return found


def summary(found: dict[str, Engine]) -> str:
    """Return the counts in one sentence."""
    kinds = [engine.kind for engine in found.values()]
    native, batched = kinds.count("native"), kinds.count("native") + kinds.count("batched")
    tapes = sum(engine.how == "tape" for engine in found.values())
    return (
        f"Of {len(kinds)} types, {native} ({native / len(kinds):.0%}) run natively ({native - tapes} as layers, {tapes} as "
        f"tapes), {batched} ({batched / len(kinds):.0%}) in batches"
    )


def ranked(found: dict[str, Engine]) -> str:
    """Return the reasons for not running natively, and for running alone, those of most types first."""
    lines = []
    for title, field in (("not native", "how"), ("alone", "why_alone")):
        reasons = defaultdict(list)
        for name, engine in found.items():
            if engine.kind != "native" and getattr(engine, field):
                reasons[re.sub(r"\d[\d.e+-]*", "#", getattr(engine, field))[:160]].append(name)
        lines.append(f"-- {title}")
        for reason, names in sorted(reasons.items(), key=lambda pair: -len(pair[1])):
            lines.append(f"{len(names):4d}  {reason}: {' '.join(names)}")
    return "\n".join(lines)


def page(found: dict[str, Engine], made: str) -> str:
    """Return the Markdown page."""
    lines = [
        "# Engines by architecture",
        "",
        "<!-- written by python -m tests.sweep.engines; do not edit -->",
        "",
        "How a tiny random model of every causal language model type that transformers registers runs on a CPU: *native* (one",
        "call of compiled code per step, any mixture of sequences; `layers` for models of standard layers, `tape` for a",
        "recorded computation), *batched* (its own modules on paged keys and values) or *alone* (its own modules, one sequence",
        "after another). CUDA kernels run `layers` only; a tape's model runs there through its modules.",
        "",
        f"{summary(found)}. {made}",
        "",
        "| Type | Runs | How, or why not natively |",
        "| --- | --- | --- |",
    ]
    for name, engine in sorted(found.items()):
        how = " · alone because ".join(filter(None, (engine.how, engine.why_alone)))
        text = " ".join(how.replace("|", "\\|").replace("<", "&lt;").split())
        lines.append(f"| `{name}` | {engine.kind} | {text[:240]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try types and print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--results", type=Path, help="JSON of all types, updated")
    parser.add_argument("--page", type=Path, help="write the page of the results here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = options.names or [name for name in models.TYPES if name not in models.LANGUAGE_MODELS_NOT]
    found: dict[str, Engine] = {}
    if options.results and options.results.exists():
        found = {name: Engine(*parts) for name, parts in json.loads(options.results.read_text(encoding="utf-8")).items()}
    found |= try_all(names)
    if options.results:
        options.results.write_text(json.dumps(found), encoding="utf-8")
    print(ranked(found))
    print(summary(found))
    if options.page:
        today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        made = f"Made {today} with torch {torch.__version__} and transformers {transformers.__version__}."
        options.page.write_text(page(found, made), encoding="utf-8")


if __name__ == "__main__":
    main()
