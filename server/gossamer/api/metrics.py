"""What `/metrics` tells: our own `gossamer_*`, and under vLLM's names the four gateways route by.

The number of series is fixed by the code: no label holds a name, a path or a key of a client's
making. The adapters in `vllm:lora_requests_info` are digests of what runs and waits at the moment,
in one series.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gossamer.api.admission import Admission
from gossamer.jobs.views import Status

if TYPE_CHECKING:
    from gossamer.engine.client import Engine

#: states of a job: those that come to an end, and the ends
UNFINISHED: tuple[Status, ...] = ("queued", "running", "paused")
FINISHED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset({"GET", "POST", "DELETE"})
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_TOKENS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

#: name, help, attribute of the engine's stats
_GAUGES = (
    ("gossamer_kv_bytes", "Bytes of KV pages in use", "kv_bytes"),
    ("gossamer_adapter_bytes", "Bytes of resident adapters", "adapter_bytes"),
)
_COUNTERS = (
    ("gossamer_prompt_tokens", "Prompt tokens processed", "prompt_tokens"),
    ("gossamer_completion_tokens", "Tokens generated", "completion_tokens"),
    ("gossamer_cached_tokens", "Prompt tokens found in the prefix cache", "cached_tokens"),
    ("gossamer_steps", "Steps of the engine", "steps"),
    ("gossamer_fused_steps", "Steps with a mix fused into the weights", "fused_steps"),
    ("gossamer_fused_windows", "Times that a mix was fused into the weights", "fused_windows"),
    (
        "gossamer_held_row_steps",
        "Rows that a step held back for the sake of a fused mix, summed over steps",
        "held_row_steps",
    ),
    ("gossamer_adapter_loads", "Adapters loaded", "loads"),
    ("gossamer_adapter_load_failures", "Adapters that could not be loaded", "load_failures"),
    ("gossamer_adapter_evictions", "Adapters evicted from memory", "evictions"),
)


class Metrics:
    """The server's metrics, in a registry of their own (several applications fit in a process)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.jobs = JobMetrics()
        self.registry.register(self.jobs)
        self._requests = Counter(
            "gossamer_http_requests",
            "HTTP requests answered",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "gossamer_http_request_seconds",
            "From the request's headers to the last byte of its answer",
            ("route",),
            buckets=_WHOLE,
            registry=self.registry,
        )
        first = Histogram(
            "gossamer_time_to_first_token_seconds",
            "From a request's headers to its first token",
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        between = Histogram(
            "gossamer_inter_token_seconds",
            "Between the tokens of a stream",
            buckets=_BETWEEN_TOKENS,
            registry=self.registry,
        )
        self.first_token = first.observe
        self.between_tokens = between.observe
        self.streams = Gauge(
            "gossamer_streams", "Streams open at the moment", registry=self.registry
        )
        self.cancelled = Counter(
            "gossamer_cancelled_requests",
            "Requests whose client went away before the end",
            registry=self.registry,
        )

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an answered request; `route` is the template of a route of ours, or `other`."""
        method = method if method in _METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class JobMetrics(Collector):
    """How many jobs there are in each state, as last told. Without series until then: the registry
    is asked by whoever scrapes, in a thread, and may not answer.
    """

    def __init__(self) -> None:
        self._counts: Mapping[str, int] | None = None

    def tell(self, counts: Mapping[str, int] | None) -> None:
        """Take in the counts by state; None: they are not known."""
        self._counts = counts

    def describe(self) -> list[Metric]:
        """Nothing: the names are told at the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics as last told."""
        if self._counts is None:
            return
        waiting = GaugeMetricFamily(
            "gossamer_jobs", "Training jobs that are not finished", labels=("status",)
        )
        for status in UNFINISHED:
            waiting.add_metric((status,), self._counts.get(status, 0))
        yield waiting
        finished = CounterMetricFamily(
            "gossamer_jobs_finished", "Training jobs that came to their end", labels=("status",)
        )
        for status in FINISHED:
            finished.add_metric((status,), self._counts.get(status, 0))
        yield finished


class EngineMetrics(Collector):
    """The engine's statistics, read when they are asked for."""

    def __init__(self, engine: Engine, admission: Admission, base: str, max_rows: int) -> None:
        self._engine = engine
        self._admission = admission
        self._base = base
        self._max_rows = str(max_rows)

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not ask the engine for its names at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics as of now."""
        stats = self._engine.stats()
        for name, text, attribute in _GAUGES:
            yield GaugeMetricFamily(name, text, getattr(stats, attribute))
        for name, text, attribute in _COUNTERS:
            yield CounterMetricFamily(name, text, getattr(stats, attribute))
        ready = GaugeMetricFamily("gossamer_ready", "1 while requests are served")
        ready.add_metric((), float(self._engine.health().ready))
        yield ready
        yield GaugeMetricFamily(
            "gossamer_queued_sequences", "Sequences not begun yet", self._admission.waiting
        )
        for name, text, value in (
            ("vllm:num_requests_running", "Requests that run", stats.running),
            ("vllm:num_requests_waiting", "Requests that wait", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1", stats.kv_usage),
        ):
            family = GaugeMetricFamily(name, text, labels=("model_name",))
            family.add_metric((self._base,), value)
            yield family
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Digests of the mixes that run and wait; the value is the time",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        running, waiting = (
            ",".join(sorted(set(mixes))) for mixes in (stats.running_mixes, stats.waiting_mixes)
        )
        info.add_metric((self._max_rows, running, waiting), time.time())
        yield info
