"""What happens, counted, in Prometheus' text format. Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_LATENCIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Load(NamedTuple):
    """How busy the engine is now."""

    running: int
    waiting: int
    blocks_used: int
    cache_used_bytes: int
    cache_max_bytes: int


_GAUGES = {
    "ossia_requests_running": ("Sequences in the batch.", "running"),
    "ossia_requests_waiting": ("Sequences that wait for a place in the batch.", "waiting"),
    "ossia_cache_blocks_used": ("Blocks of keys and values that are held.", "blocks_used"),
    "ossia_cache_used_bytes": ("Bytes of those blocks.", "cache_used_bytes"),
    "ossia_cache_max_bytes": ("Bytes that the cache may grow to.", "cache_max_bytes"),
}


class Metrics:
    """Counters and histograms; `load` is asked for at every reading."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_LoadCollector(load))
        self._requests = Counter(
            "ossia_http_requests", "HTTP requests by route and status.", ("route", "status"), registry=self._registry
        )
        self._duration = Histogram(
            "ossia_http_request_seconds",
            "Time to the last byte, by route.",
            ("route",),
            buckets=_LATENCIES,
            registry=self._registry,
        )
        self._prompt = Counter("ossia_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self._sampled = Counter("ossia_completion_tokens", "Tokens sampled.", registry=self._registry)
        self._first = Histogram(
            "ossia_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_LATENCIES,
            registry=self._registry,
        )
        self._between = Histogram(
            "ossia_inter_token_seconds", "Between tokens of an answer.", buckets=_LATENCIES, registry=self._registry
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """An HTTP request is over."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def prompt(self, num_tokens: int) -> None:
        """A prompt was accepted."""
        self._prompt.inc(num_tokens)

    def tokens(self, num: int, first_s: Iterable[float], between_s: Iterable[float]) -> None:
        """A step sampled `num` tokens; how long the first ones and the others among them took."""
        self._sampled.inc(num)
        for seconds in first_s:
            self._first.observe(seconds)
        for seconds in between_s:
            self._between.observe(seconds)

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self._registry)


class _LoadCollector(Collector):
    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterator[Metric]:
        now = self._load()._asdict()
        for name, (about, key) in _GAUGES.items():
            yield GaugeMetricFamily(name, about, value=now[key])
