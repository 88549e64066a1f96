"""Owns what the service counts, for Prometheus."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .jobs import Load

__all__ = ["Metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The numbers of one service, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.runs = Counter(
            "sd_progress_runs",
            "Runs that were asked for here, by how they ended: completed, failed, cancelled, "
            "refused (too many were waiting) or lost (nobody knows).",
            ["outcome"],
            registry=self._registry,
        )
        self.previews = self._counter("previews", "Frames of runs that were asked for here.")
        self.sent = self._counter("events_sent", "Events sent to viewers.")
        self.first_preview = self._histogram(
            "seconds_to_first_preview", "From asking to the first frame, waiting included."
        )
        self.run_seconds = self._histogram(
            "run_seconds", "From asking to the finished picture, waiting included."
        )
        self.viewers = self._gauge("viewers", "Connections that events are sent to.")
        self._waiting = self._gauge("waiting", "Runs that nobody paints yet.")
        self._running = self._gauge("running", "Runs that are being painted.")
        self._workers = self._gauge("workers", "Painters that are alive; NaN if nobody counts.")

    def text(self, load: Load) -> bytes:
        """Everything, as Prometheus reads it."""
        self._waiting.set(load.waiting)
        self._running.set(load.running)
        self._workers.set(float("nan") if load.workers is None else load.workers)
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"sd_progress_{name}", text, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"sd_progress_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        name = f"sd_progress_{name}"
        return Histogram(name, text, buckets=_SECONDS, registry=self._registry)
