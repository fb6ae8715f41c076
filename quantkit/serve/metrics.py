"""Metrics for Prometheus (prometheus.io/docs/instrumenting/exposition_formats), read from the engine when asked for."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from quantkit.serve.worker import Worker

FIRST_TOKEN_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REASONS = ("stop", "length", "cancelled", "error")


class Metrics(Collector):
    """The metrics of one worker.

    Args:
        worker: what generates the answers.
    """

    def __init__(self, worker: "Worker") -> None:
        self._worker, self._registry = worker, CollectorRegistry()
        self._registry.register(self)
        for histogram in (worker.first_token_s, worker.token_s):
            self._registry.register(histogram)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in the format that a client accepts, and its media type.

        Args:
            accept: the header of the request.
        """
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def collect(self) -> Iterable[Metric]:
        """Yield every metric but the histograms."""
        worker, engine = self._worker, self._worker.engine
        pages, stats = engine.scheduler.pages, engine.stats
        finished = CounterMetricFamily("quantkit_finished", "Finished requests by reason.", labels=["reason"])
        for reason in REASONS:
            finished.add_metric([reason], stats[reason])
        yield finished
        for name, what, value in (
            ("requests", "Accepted requests.", stats["requests"]),
            ("prompt_tokens", "Tokens of accepted prompts.", worker.prompt_tokens),
            ("cached_tokens", "Prompt tokens found in cached pages.", pages.hit_tokens),
            ("tokens", "Generated tokens.", stats["tokens"]),
            ("draft_tokens", "Verified draft tokens.", stats["drafted"]),
            ("accepted_tokens", "Draft tokens accepted.", stats["accepted"]),
            ("steps", "Steps of the model.", stats["steps"]),
            ("step_seconds", "Time spent in steps.", stats["busy_us"] / 1e6),
            ("step_failures", "Steps that raised an exception.", worker.failures),
            ("preemptions", "Preemptions of running requests.", engine.scheduler.preemptions),
        ):
            yield CounterMetricFamily(f"quantkit_{name}", what, value)
        for name, what, value in (
            ("running", "Running requests.", len(engine.scheduler.running)),
            ("waiting", "Waiting requests.", len(engine.scheduler.waiting)),
            ("pages", "Pages of the key/value memory.", pages.count),
            ("pages_used", "Pages in use.", pages.used),
            ("pages_cached", "Pages kept for later requests.", pages.cached),
            ("kv_bytes", "Bytes of the key/value memory.", engine.backend.bytes_for(engine.memory)),
        ):
            yield GaugeMetricFamily(f"quantkit_{name}", what, value)


def histogram(name: str, what: str, bounds: tuple[float, ...]) -> Histogram:
    """Return a histogram that belongs to no registry yet, so that two servers in a process do not share it."""
    return Histogram(name, what, buckets=bounds, registry=None)
