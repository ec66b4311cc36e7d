"""Prometheus metrics of the server and its engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmc.runtime.outputs import EngineStats

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServerMetrics:
    """Histograms fed by the engine's thread; the engine's own counts are read at a scrape."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self.time_to_first_token = self._histogram(
            "llmc_time_to_first_token_seconds", "From submission to a request's first token."
        )
        self.inter_token_latency = self._histogram(
            "llmc_inter_token_latency_seconds", "Between two tokens of one choice."
        )
        self.e2e_latency = self._histogram(
            "llmc_e2e_request_latency_seconds", "From submission to a request's last token."
        )

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(name, help, buckets=_LATENCY_BUCKETS_S, registry=self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        stats = self._stats()
        yield GaugeMetricFamily(
            "llmc_num_requests_running", "Sequences in the batch.", value=stats.num_running
        )
        yield GaugeMetricFamily(
            "llmc_num_requests_waiting", "Sequences in the queue.", value=stats.num_waiting
        )
        yield GaugeMetricFamily(
            "llmc_kv_cache_usage_ratio",
            "Share of KV pages in use, 0 to 1.",
            value=stats.kv_cache_usage_ratio,
        )
        yield CounterMetricFamily(
            "llmc_num_preemptions",
            "Sequences that gave up their pages.",
            value=stats.num_preemptions_total,
        )
        yield CounterMetricFamily(
            "llmc_prompt_tokens", "Prompt tokens computed.", value=stats.prompt_tokens_total
        )
        yield CounterMetricFamily(
            "llmc_generation_tokens", "Tokens generated.", value=stats.generation_tokens_total
        )
