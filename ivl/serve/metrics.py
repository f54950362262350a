"""Metrics for Prometheus: counters and gauges of the engine when they are read, times of requests when they end."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ivl.serve.guard import RequestContext
from ivl.serve.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """Collects the metrics of one service."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(service))

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"ivl_{name}_seconds", text, buckets=SECONDS, registry=self.registry)

        def tokens(name: str, text: str) -> Histogram:
            return Histogram(f"ivl_{name}_tokens", text, buckets=TOKENS, registry=self.registry)

        self.requests = Counter("ivl_requests", "Requests by route and status", ("route", "status"), registry=self.registry)
        self.first = seconds("time_to_first_token", "Arrival to first token")
        self.whole = seconds("request", "Arrival to last token")
        self.queue = seconds("queue", "Waiting for the engine")
        self.prompts = tokens("prompt", "Tokens of a prompt")
        self.replies = tokens("reply", "Tokens of the replies to a request")

    def finished(self, context: RequestContext) -> None:
        self.requests.labels(context.route, str(context.status)).inc()
        facts = context.facts
        for name, histogram in (
            ("first_token_s", self.first), ("seconds", self.whole), ("queue_s", self.queue),
            ("prompt_tokens", self.prompts), ("new_tokens", self.replies),
        ):  # fmt: skip
            if name in facts:
                histogram.observe(facts[name])

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        service, stats = self.service, self.service.engine.stats()
        for name, text, value in (
            ("ivl_ready", "1 if the server takes requests", service.ready),
            ("ivl_replies_open", "Replies accepted and not finished", service.num_open),
            ("ivl_replies_running", "Replies computed together now (the batch)", stats.running),
            ("ivl_replies_waiting", "Replies in the engine's queue", stats.waiting),
            ("ivl_cache_blocks_used", "Key/value blocks of running replies", stats.cache_blocks_used),
            ("ivl_cache_blocks", "Key/value blocks in all", stats.cache_blocks),
        ):
            yield GaugeMetricFamily(name, text, float(value))
        for name, text, value in (
            ("ivl_steps", "Steps of the engine", stats.steps),
            ("ivl_failed_steps", "Steps that failed", service.num_failed_steps),
            ("ivl_cancelled_replies", "Replies dropped before their end", service.num_cancelled),
            ("ivl_engine_prompt_tokens", "Tokens of all prompts", stats.prompt_tokens),
            ("ivl_prefix_hit_tokens", "Prompt tokens found in the cache", stats.prefix_hit_tokens),
            ("ivl_new_tokens", "Tokens generated", stats.new_tokens),
            ("ivl_vision_hits", "Tiles whose encoding was in memory", stats.vision_hits),
            ("ivl_vision_misses", "Tiles encoded", stats.vision_misses),
        ):
            yield CounterMetricFamily(name, text, float(value))
