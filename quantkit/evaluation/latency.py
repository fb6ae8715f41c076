"""Measure the speed of a model: prefill tokens per second, and decode milliseconds per token.

Prefill processes a prompt in one pass and is limited by arithmetic; decoding reads every weight once per token and is limited
by memory. They are timed separately, with the same step that the engine runs, for a given context and with batch size 1.

Timings on a shared machine vary. Each model is warmed up (which also prepacks its weights), and then several rounds are timed.
With several models, every round times each of them once (A B C A B C ...), so that a disturbance affects all of them, and the
speed-up is the median over rounds of the ratio within a round.
"""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.engine.backend import OneSequence
from quantkit.errors import CalibrationError
from quantkit.evaluation.footprint import peak_memory_bytes, reset_peak_memory
from quantkit.nn.embedding import input_table, max_positions
from quantkit.system.compute import evaluation_mode
from quantkit.system.progress import Progress, ProgressChoice, callback


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and percentiles of repeated timings."""

    median: float
    p10: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Return median and percentiles of ``values``, interpolated linearly."""
        return cls(*(float(q) for q in np.quantile(values, (0.5, 0.1, 0.9, 0.99))))


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster a model is than the baseline of the same run, over rounds.

    Attributes:
        baseline: name of the baseline.
        prefill, decode: ratios of times, baseline over model.
    """

    baseline: str
    prefill: Spread
    decode: Spread


@dataclass(frozen=True, slots=True)
class Latency:
    """Timings of one model at batch 1.

    Attributes:
        context_tokens: tokens of the prompt.
        new_tokens: tokens decoded after it in each round.
        rounds: number of timed rounds.
        threads: number of torch's threads.
        device: device, for instance ``"cpu"``.
        prefill_tokens_per_s: prompt tokens per second, over rounds.
        decode_ms: milliseconds per token, over all tokens of all rounds.
        peak_bytes: peak memory of the process (or the GPU) while this model was timed, including other loaded models.
        speedup: against the first model of the same run; None for that model, and for a model that is timed alone.
        engine: name of the backend that ran the steps.
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
    compute: str = "auto",
    progress: ProgressChoice = "auto",
) -> Latency:
    """Measure one model; arguments as in :func:`compare_latency`."""
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
    compute: str = "auto",
    progress: ProgressChoice = "auto",
) -> dict[str, Latency]:
    """Measure several models alternately, in one run.

    Args:
        models: name to model; the first one is the baseline of the speed-ups. All of them stay in memory.
        prompt: int64 (T,), tokens of the prompt, repeated or cut to ``context``; None for 0, 1, 2, ... modulo the vocabulary.
        context: number of tokens of the prompt.
        new_tokens: tokens decoded after it, greedily; models may therefore decode different text, with the same work.
        rounds: timed rounds after one warm-up round. There are ``rounds`` prefill times and ``rounds * new_tokens`` decode
            times.
        engine, compute: see :func:`quantkit.hf.backend.make_backend`. "auto" may choose different backends for the models; the
            results name them.
        progress: ``"auto"`` for bars, None for silence, or a function that receives the stage ``"latency"``.

    Returns:
        Name to timings.

    Raises:
        CalibrationError: a number below 1, or more tokens than a model has positions.
    """
    progress = callback(progress)
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
    from quantkit.hf.backend import make_backend  # imports transformers, which is slow and not needed for quality

    samples: dict[str, list[_Round]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    with evaluation_mode(*models.values()):
        backends = {
            name: make_backend(model, engine=engine, compute=compute)  # type: ignore[arg-type]
            for name, model in models.items()
        }
        steps = {name: OneSequence(backend, context + new_tokens) for name, backend in backends.items()}
        prompts = {name: _prompt(model, prompt, context) for name, model in models.items()}
        for round_ in range(rounds + 1):
            for i, name in enumerate(models):
                device = prompts[name].device
                reset_peak_memory(device)
                timed = _time_round(steps[name], prompts[name], new_tokens if round_ else min(new_tokens, 4))
                peaks[name] = max(peaks[name], peak_memory_bytes(device))
                if round_:  # round 0 is the warm-up
                    samples[name].append(timed)
                progress(Progress("latency", round_ * len(models) + i + 1, (rounds + 1) * len(models), name))
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
    """Time the prefill of a prompt, and then the decoding of each of ``new_tokens`` tokens."""
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
