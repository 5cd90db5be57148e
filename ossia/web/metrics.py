"""What happens, counted, in Prometheus' text format. Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
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

    def __add__(self, other: object) -> Load:
        """Of two engines together."""
        assert isinstance(other, Load)
        return Load(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


IDLE = Load(0, 0, 0, 0, 0)


_GAUGES = {
    "ossia_requests_running": ("Sequences in the batch.", "running"),
    "ossia_requests_waiting": ("Sequences that wait for a place in the batch.", "waiting"),
    "ossia_cache_blocks_used": ("Blocks of keys and values that are held.", "blocks_used"),
    "ossia_cache_used_bytes": ("Bytes of those blocks.", "cache_used_bytes"),
    "ossia_cache_max_bytes": ("Bytes that the cache may grow to.", "cache_max_bytes"),
}


class Metrics:
    """Counters and histograms of a server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._loads: dict[str, Callable[[], Load]] = {}
        self._registry.register(_LoadCollector(self._loads))
        counter, histogram = partial(Counter, registry=self._registry), partial(Histogram, registry=self._registry)
        histogram = partial(histogram, buckets=_LATENCIES)
        self._requests = counter("ossia_http_requests", "HTTP requests by route and status.", ("route", "status"))
        self._duration = histogram("ossia_http_request_seconds", "Time to the last byte, by route.", ("route",))
        self._prompt = counter("ossia_prompt_tokens", "Tokens of prompts.", ("model",))
        self._sampled = counter("ossia_completion_tokens", "Tokens sampled.", ("model",))
        self._first = histogram("ossia_time_to_first_token_seconds", "From the request to its first token.", ("model",))
        self._between = histogram("ossia_inter_token_seconds", "Between tokens of an answer.", ("model",))
        self._step = Gauge(
            "ossia_adapter_step",
            "The step of the run's checkpoint that an adapter is.",
            ("adapter",),
            registry=self._registry,
        )
        self._bad = counter("ossia_adapter_bad_checkpoints", "Newer checkpoints that could not be used.", ("adapter",))

    def request(self, route: str, status: int, seconds: float) -> None:
        """An HTTP request is over."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def adapter(self, name: str, step: int) -> None:
        """An adapter is now that of this step of its run."""
        self._step.labels(name).set(step)
        self._bad.labels(name)  # there from the beginning, as 0

    def bad_checkpoint(self, name: str) -> None:
        """A newer checkpoint of this adapter's run can't be used."""
        self._bad.labels(name).inc()

    def of(self, model: str, load: Callable[[], Load]) -> ModelMetrics:
        """Those of one model's engine; `load` is asked for at every reading."""
        self._loads[model] = load
        counters = self._prompt.labels(model), self._sampled.labels(model)
        return ModelMetrics(*counters, self._first.labels(model), self._between.labels(model))

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self._registry)


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """What one engine counts."""

    _prompt: Counter
    _sampled: Counter
    _first: Histogram
    _between: Histogram

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


class _LoadCollector(Collector):
    def __init__(self, loads: Mapping[str, Callable[[], Load]]) -> None:
        self._loads = loads

    def collect(self) -> Iterator[Metric]:
        now = {model: load()._asdict() for model, load in self._loads.items()}
        for name, (about, key) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, about, labels=("model",))
            for model, load in now.items():
                gauge.add_metric((model,), load[key])
            yield gauge
