"""Simulate serving: run requests that arrive over time, and measure latency and throughput.

A trace is a list of arrivals, each with a time, a prompt and a number of tokens. Times between arrivals of independent users
have an exponential distribution (a Poisson process). Users notice the time to the first token (TTFT: waiting and prefill) and
the time between tokens (ITL); the cost per token depends on throughput.

The same trace can be run with three kinds of batching, to measure the benefit of continuous batching:

* padded: a batch of waiting requests runs until the longest answer is finished, and every row is computed to the end, as in
  transformers' ``generate`` with a padded batch;
* static: finished rows are dropped, but new requests join only when all rows are finished (``Limits(batching="static")``);
* continuous: a waiting request joins at the next step with a free slot.

By default the logarithms of prompt and answer lengths are distributed uniformly: most are short, a few are long.
"""

import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Request
from quantkit.errors import QuantkitError
from quantkit.evaluation.latency import Spread
from quantkit.system.energy import Meter
from quantkit.system.progress import Progress, ProgressCallback, ignore


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
        at_s: arrival in seconds after the start.
        prompt: token ids.
        new_tokens: length of the answer; stop tokens are ignored.
    """

    at_s: float
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Served:
    """Measurements of a trace.

    Attributes:
        requests, prompt_tokens, new_tokens: numbers of requests and tokens.
        seconds: time from the start to the last token.
        tokens_per_s: ``new_tokens / seconds``.
        first_token_ms: time to the first token, over requests.
        token_ms: time between tokens, over all tokens.
        answer_s: time from arrival to the last token, over requests.
        steps: steps of the model.
        preemptions: number of preemptions.
        joules: energy of the processor or the GPU meanwhile; None if the machine does not tell it.
        energy_source: who told it, or why nobody did.
    """

    requests: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_s: float
    first_token_ms: Spread
    token_ms: Spread
    answer_s: Spread
    steps: int
    preemptions: int
    joules: float | None = None
    energy_source: str = ""

    def cost_per_million_tokens(self, price_per_hour: float) -> float:
        """Return the cost of a million new tokens at the throughput of this trace, for a machine at ``price_per_hour``."""
        return price_per_hour / 3600 / self.tokens_per_s * 1e6

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return asdict(self)


def poisson_trace(
    requests: int,
    *,
    rate_per_s: float = math.inf,
    prompt_tokens: tuple[int, int] = (16, 128),
    new_tokens: tuple[int, int] = (20, 300),
    lengths: Sequence[tuple[int, int]] | None = None,
    vocabulary: int,
    even: bool = False,
    seed: int = 0,
) -> list[Arrival]:
    """Return a trace with random prompts.

    Args:
        requests: number of requests.
        rate_per_s: mean arrivals per second; infinite for all at the start.
        prompt_tokens, new_tokens: smallest and largest length, log-uniform.
        lengths: pairs of prompt and answer length to repeat instead (see :func:`read_lengths`).
        vocabulary: number of token ids.
        even: draw lengths uniformly instead.
        seed: equal seeds give equal traces.

    Raises:
        QuantkitError: a length or the rate is not positive, or a range is empty.
    """
    pairs = list(lengths or ())
    smallest = min([requests, *prompt_tokens[:1], *new_tokens[:1], *(min(pair) for pair in pairs)])
    if smallest < 1 or not rate_per_s > 0 or prompt_tokens[0] > prompt_tokens[1] or new_tokens[0] > new_tokens[1]:
        raise QuantkitError(
            f"a trace of {requests} requests at {rate_per_s}/s, prompts of {prompt_tokens}, answers of {new_tokens} tokens: "
            "want positive numbers, ranges from low to high"
        )
    generator = random.Random(seed)

    def draw(low: int, high: int) -> int:
        return generator.randint(low, high) if even else round(math.exp(generator.uniform(math.log(low), math.log(high))))

    now, arrivals = 0.0, []
    for i in range(requests):
        prompt, new = pairs[i % len(pairs)] if pairs else (draw(*prompt_tokens), draw(*new_tokens))
        arrivals.append(Arrival(now, [generator.randrange(vocabulary) for _ in range(prompt)], new))
        now += generator.expovariate(rate_per_s) if math.isfinite(rate_per_s) else 0.0
    return arrivals


def read_lengths(path: str | Path) -> list[tuple[int, int]]:
    """Read pairs of prompt and answer length from a text file with lines ``prompt tokens, new tokens``.

    Empty lines and comments after # are ignored.

    Raises:
        QuantkitError: the file cannot be read, has no lengths, or has another line; the message has its number.
    """
    pairs = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise QuantkitError(f"{path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        fields = line.split("#")[0].replace(",", " ").split()
        if not fields:
            continue
        if len(fields) != 2 or not all(field.isdecimal() and int(field) > 0 for field in fields):
            raise QuantkitError(f"{path}, line {number}: {line!r}; want two positive numbers: prompt tokens, new tokens")
        pairs.append((int(fields[0]), int(fields[1])))
    if not pairs:
        raise QuantkitError(f"{path}: no lengths; want lines with two numbers: prompt tokens, new tokens")
    return pairs


def serve_trace(
    engine: TokenEngine,
    trace: Sequence[Arrival],
    *,
    padded: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    progress: ProgressCallback = ignore,
) -> Served:
    """Submit every request at its arrival, step until all are finished, and measure.

    Args:
        engine: an idle engine whose limits allow every request.
        trace: arrivals in order.
        padded: run batches in which every row is computed until the longest answer is finished; surplus tokens are not counted.
        clock: returns the time in seconds.
        sleep: waits for a number of seconds.
        progress: receives the stage ``"trace"`` for every finished request.

    Raises:
        QuantkitError: a request fails.
    """
    steps, preemptions = engine.stats["steps"], engine.scheduler.preemptions
    start, coming, waiting, done = clock(), deque(trace), deque[Arrival](), 0
    submitted: dict[Request, Arrival] = {}
    tokens: dict[Request, list[float]] = {}
    meter = Meter(str(engine.backend.device))
    meter.start()
    while coming or waiting or engine.busy:
        while coming and coming[0].at_s <= clock() - start:
            waiting.append(coming.popleft())
        if waiting and not (padded and engine.busy):
            batch = [waiting.popleft() for _ in range(min(engine.limits.running, len(waiting)) if padded else len(waiting))]
            longest = max(arrival.new_tokens for arrival in batch)
            for arrival in batch:
                request = engine.submit(arrival.prompt, max_new_tokens=longest if padded else arrival.new_tokens)
                submitted[request], tokens[request] = arrival, []
        if not engine.busy:
            sleep(max(coming[0].at_s - (clock() - start), 0))
            continue
        events = engine.step()
        now = clock()
        for event in events:
            if event.request.error is not None:
                raise event.request.error
            times = tokens[event.request]
            if len(times) < submitted[event.request].new_tokens:
                times.append(now)
                done += len(times) == submitted[event.request].new_tokens
        progress(Progress("trace", done, len(trace)))
    meter.stop()
    waits = {request: start + arrival.at_s for request, arrival in submitted.items()}
    gaps = [(after - before) * 1e3 for times in tokens.values() for before, after in itertools.pairwise(times)]
    last = max(times[-1] for times in tokens.values())
    count = sum(len(times) for times in tokens.values())
    return Served(
        requests=len(trace),
        prompt_tokens=sum(len(arrival.prompt) for arrival in trace),
        new_tokens=count,
        seconds=last - start,
        tokens_per_s=count / (last - start),
        first_token_ms=Spread.of([(times[0] - waits[request]) * 1e3 for request, times in tokens.items()]),
        token_ms=Spread.of(gaps or [0.0]),
        answer_s=Spread.of([times[-1] - waits[request] for request, times in tokens.items()]),
        steps=engine.stats["steps"] - steps,
        preemptions=engine.scheduler.preemptions - preemptions,
        joules=meter.energy.joules,
        energy_source=meter.energy.source,
    )
