"""How an engine serves a day in miniature: requests that arrive on their own time, and what each of them feels.

A trace is a list of arrivals: when, which prompt, how many tokens. Waiting times between arrivals of independent users are
exponential (a Poisson process). What users feel is the time to the first token (TTFT: waiting, then the prompt) and the time
from token to token (ITL); what the owner pays for is throughput.

The same trace under three ways of batching shows what continuous batching is worth:

* padded: a batch takes what waits, and every row is computed until the longest answer is done, as ``generate`` of transformers
  does with a padded batch;
* static: rows whose answer is done are dropped, but nobody joins until all are (``Limits(batching="static")``);
* continuous: whoever waits takes a free place at the next step.

Lengths of answers are spread evenly on a logarithmic scale by default: most are short, a few are long.
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
from quantkit.system.progress import Progress, ProgressCallback, ignore


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
        at_s: seconds after the start.
        prompt: token ids.
        new_tokens: tokens it gets, exactly: stop tokens do not count.
    """

    at_s: float
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Served:
    """How a trace went.

    Attributes:
        requests, prompt_tokens, new_tokens: what was done.
        seconds: from the first arrival to the last token.
        tokens_per_s: new tokens over ``seconds``.
        first_token_ms: TTFT over requests.
        token_ms: ITL over all later tokens.
        answer_s: from arrival to the last token, over requests.
        steps: steps of the model.
        preemptions: requests that had to wait again.
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

    def cost_per_million_tokens(self, price_per_hour: float) -> float:
        """Return what a million new tokens cost on a machine at ``price_per_hour``, busy as in this trace."""
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
    """Make a trace of random prompts.

    Args:
        requests: how many.
        rate_per_s: mean arrivals per second; infinite: all at once.
        prompt_tokens, new_tokens: lengths are between these, both included, log-uniform.
        lengths: (prompt, new) pairs to go through in turn, instead (see :func:`read_lengths`).
        vocabulary: ids are below this.
        even: lengths are uniform instead.
        seed: the same seed makes the same trace.

    Raises:
        QuantkitError: lengths or a rate that are not positive.
    """
    pairs = list(lengths or ())
    smallest = min([requests, *prompt_tokens[:1], *new_tokens[:1], *(min(pair) for pair in pairs)])
    if smallest < 1 or not rate_per_s > 0 or prompt_tokens[0] > prompt_tokens[1] or new_tokens[0] > new_tokens[1]:
        raise QuantkitError(
            f"a trace of {requests} requests at {rate_per_s}/s, prompts of {prompt_tokens}, answers of {new_tokens} tokens: "
            "want positive numbers, ranges from low to high"
        )
    chance = random.Random(seed)

    def draw(low: int, high: int) -> int:
        return chance.randint(low, high) if even else round(math.exp(chance.uniform(math.log(low), math.log(high))))

    now, arrivals = 0.0, []
    for i in range(requests):
        prompt, new = pairs[i % len(pairs)] if pairs else (draw(*prompt_tokens), draw(*new_tokens))
        arrivals.append(Arrival(now, [chance.randrange(vocabulary) for _ in range(prompt)], new))
        now += chance.expovariate(rate_per_s) if math.isfinite(rate_per_s) else 0.0
    return arrivals


def read_lengths(path: str | Path) -> list[tuple[int, int]]:
    """Read lines of ``prompt tokens, new tokens`` (lines that are empty or begin with # are left out).

    Raises:
        QuantkitError: the file is not there, or a line is something else; names the line.
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
        raise QuantkitError(f"{path}: no lengths in it; want lines of prompt tokens, new tokens")
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
    """Submit every arrival at its time, step until all are answered, and measure.

    Args:
        engine: idle; its limits must allow every request.
        trace: in order of arrival.
        padded: run batches whose every row is computed until the longest is done; what a row gets too much is not counted.
        clock, sleep: seconds, and how to wait for them.
        progress: receives stage ``"trace"`` for every finished request.
    """
    steps, preemptions = engine.stats["steps"], engine.scheduler.preemptions
    start, coming, waiting, done = clock(), deque(trace), deque[Arrival](), 0
    asked: dict[Request, Arrival] = {}
    tokens: dict[Request, list[float]] = {}
    while coming or waiting or engine.busy:
        while coming and coming[0].at_s <= clock() - start:
            waiting.append(coming.popleft())
        if waiting and not (padded and engine.busy):
            batch = [waiting.popleft() for _ in range(min(engine.limits.running, len(waiting)) if padded else len(waiting))]
            longest = max(arrival.new_tokens for arrival in batch)
            for arrival in batch:
                request = engine.submit(arrival.prompt, max_new_tokens=longest if padded else arrival.new_tokens)
                asked[request], tokens[request] = arrival, []
        if not engine.busy:
            sleep(max(coming[0].at_s - (clock() - start), 0))
            continue
        events = engine.step()
        now = clock()
        for event in events:
            if event.request.error is not None:
                raise event.request.error
            times = tokens[event.request]
            if len(times) < asked[event.request].new_tokens:
                times.append(now)
                done += len(times) == asked[event.request].new_tokens
        progress(Progress("trace", done, len(trace)))
    waits = {request: start + arrival.at_s for request, arrival in asked.items()}
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
    )
