"""How fast a model reads and writes: prefill tokens per second, decode milliseconds per token.

Prefill reads a prompt in one pass and is limited by arithmetic; decode reads every weight once per token and is limited by
memory. They are timed apart, through the same step the engine runs, at a stated context and with batch 1.

A machine is never quiet. Each model is warmed up (which also packs its kernels' weights), then several rounds are timed;
with several models every round times each of them once, in turn (A B C A B C ...), so that a slow minute hits all alike,
and the speed-up is the median over rounds of the ratio within a round.
"""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.engine.backend import OneSequence
from quantkit.errors import CalibrationError
from quantkit.evaluation.footprint import peak_memory_bytes, reset_peak_memory
from quantkit.nn.embedding import input_table
from quantkit.system.compute import evaluation_mode
from quantkit.system.progress import Progress, ProgressCallback, ignore


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and percentiles of repeated timings."""

    median: float
    p10: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Summarise ``values`` (linear interpolation between them)."""
        return cls(*(float(q) for q in np.quantile(values, (0.5, 0.1, 0.9, 0.99))))


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster than the baseline of the same run: median over rounds, and the 10th and 90th percentile."""

    baseline: str
    prefill: Spread
    decode: Spread


@dataclass(frozen=True, slots=True)
class Latency:
    """Timings of one model at batch 1.

    Attributes:
        context_tokens: length of the prompt.
        new_tokens: tokens decoded after it in each round.
        rounds: timed rounds.
        threads: torch's threads.
        device: e.g. ``"cpu"``.
        prefill_tokens_per_s: over rounds.
        decode_ms: milliseconds per token, over all tokens of all rounds.
        peak_bytes: peak memory of the process (or the GPU) while this model was timed, other resident models included.
        speedup: against the first model of the same run; None for it, and for a model timed alone.
        engine: what ran the steps: ``"native"`` or ``"modules"``, and how activations were rounded, if they were.
    """

    context_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    device: str
    prefill_tokens_per_s: Spread
    decode_ms: Spread
    peak_bytes: int
    speedup: Speedup | None = None
    engine: str = "modules"


def measure_latency(
    model: nn.Module,
    *,
    prompt: Tensor | None = None,
    context: int = 256,
    new_tokens: int = 32,
    rounds: int = 3,
    engine: str = "auto",
    compute: str = "float",
    progress: ProgressCallback = ignore,
) -> Latency:
    """Time one model; arguments as in :func:`compare_latency`."""
    return compare_latency(
        {"model": model},
        prompt=prompt,
        context=context,
        new_tokens=new_tokens,
        rounds=rounds,
        engine=engine,
        compute=compute,
        progress=progress,
    )["model"]


def compare_latency(
    models: Mapping[str, nn.Module],
    *,
    prompt: Tensor | None = None,
    context: int = 256,
    new_tokens: int = 32,
    rounds: int = 3,
    engine: str = "auto",
    compute: str = "float",
    progress: ProgressCallback = ignore,
) -> dict[str, Latency]:
    """Time several models in turn, in one run.

    Args:
        models: name to model; the first is the baseline of the speed-ups. All stay in memory throughout.
        prompt: int64 (T,) tokens to read, repeated or cut to ``context``; None counts up from 0 through the vocabulary.
        context: tokens of the prompt.
        new_tokens: tokens decoded after it. The next token is the most likely one, so models may read different text;
            the work is the same.
        rounds: timed rounds after one warm-up; percentiles are over ``rounds`` prefills and ``rounds * new_tokens`` steps.
        engine: what runs the steps, see :func:`quantkit.hf.backend.make_backend`; "auto" may run models differently, and the
            result names what ran each.
        compute: see there, too.
        progress: receives stage ``"latency"`` after every model and round.

    Raises:
        CalibrationError: for sizes below 1 or beyond the models' positions.
    """
    if not models or min(context, new_tokens, rounds) < 1:
        raise CalibrationError(
            f"{len(models)} models, context={context}, new_tokens={new_tokens}, rounds={rounds}: want at least 1 of each"
        )
    for name, model in models.items():
        limit = max_positions(model)
        if limit is not None and context + new_tokens > limit:
            raise CalibrationError(
                f"{name}: context={context} and new_tokens={new_tokens} need more than its {limit} positions; lower either"
            )
    from quantkit.hf.backend import make_backend  # transformers is slow to import, and quality needs none of it

    samples: dict[str, list[_Round]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    with evaluation_mode(*models.values()):
        backends = {
            name: make_backend(model, engine=engine, compute=compute)  # type: ignore[arg-type]
            for name, model in models.items()
        }
        steps = {name: OneSequence(backend, context + new_tokens) for name, backend in backends.items()}
        prompts = {name: _prompt(model, prompt, context) for name, model in models.items()}
        for turn in range(rounds + 1):
            for i, name in enumerate(models):
                device = prompts[name].device
                reset_peak_memory(device)
                timed = _time_round(steps[name], prompts[name], new_tokens if turn else min(new_tokens, 4))
                peaks[name] = max(peaks[name], peak_memory_bytes(device))
                if turn:  # round 0 warms up
                    samples[name].append(timed)
                progress(Progress("latency", turn * len(models) + i + 1, (rounds + 1) * len(models), name))
    first = next(iter(models))
    return {
        name: Latency(
            context_tokens=context,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=torch.get_num_threads(),
            device=str(prompts[name].device),
            prefill_tokens_per_s=Spread.of([context / r.prefill_s for r in timings]),
            decode_ms=Spread.of([s * 1e3 for r in timings for s in r.decode_s]),
            peak_bytes=peaks[name],
            speedup=None if name == first else _speedup(first, samples[first], timings),
            engine=steps[name].engine,
        )
        for name, timings in samples.items()
    }


@dataclass(frozen=True, slots=True)
class _Round:
    prefill_s: float
    decode_s: list[float]


def _time_round(step: OneSequence, prompt: Tensor, new_tokens: int) -> _Round:
    """Read the prompt, then ``new_tokens`` greedy tokens one by one."""
    ids = prompt.tolist()
    start = _now(prompt.device)
    token = int(step(ids, 0).argmax(-1))
    times = [_now(prompt.device)]
    for i in range(new_tokens):
        token = int(step([token], len(ids) + i).argmax(-1))
        times.append(_now(prompt.device))
    return _Round(times[0] - start, [after - before for before, after in itertools.pairwise(times)])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _speedup(baseline: str, theirs: list[_Round], ours: list[_Round]) -> Speedup:
    pairs = list(zip(theirs, ours, strict=True))
    return Speedup(
        baseline,
        prefill=Spread.of([a.prefill_s / b.prefill_s for a, b in pairs]),
        decode=Spread.of([float(np.median(a.decode_s) / np.median(b.decode_s)) for a, b in pairs]),
    )


def _prompt(model: nn.Module, prompt: Tensor | None, context: int) -> Tensor:
    words, device = input_table(model)
    ids = torch.arange(context) if prompt is None else prompt.flatten().repeat(-(-context // prompt.numel()))
    return (ids[:context].long() % words).to(device)


def max_positions(model: object) -> int | None:
    """Return how many tokens the model can read at once, or None if its config does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
