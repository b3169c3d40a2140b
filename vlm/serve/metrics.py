"""Numbers for Prometheus. Labels are route templates, statuses and fixed words: nothing a user wrote."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        registry = self.registry
        self.requests = Counter(
            "vlm_http_requests",
            "Requests by route and status",
            ["method", "route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "vlm_http_request_seconds",
            "Seconds from a request's head to the end of its answer",
            ["route"],
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
            registry=registry,
        )
        self.open = Gauge("vlm_http_requests_open", "Requests being answered", registry=registry)
        self.tokens = Counter("vlm_tokens", "Tokens read and written", ["kind"], registry=registry)
        self.answers = Counter("vlm_answers", "Answers by how they ended", ["reason"], registry=registry)
        self.first_token = Histogram(
            "vlm_first_token_seconds",
            "Seconds from a request's admission to its first token",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )
        self.pictures = Counter(
            "vlm_pictures", "Pictures by where their features came from", ["source"], registry=registry
        )
        self.latents = Counter(
            "vlm_latents", "Pictures by where their latents came from", ["source"], registry=registry
        )

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that reads its value when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
