"""What `/metrics` says, in the text format of Prometheus: a few series, whatever is asked."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64)
KIND = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "aegan_requests", "Answers sent.", ["address", "status"], registry=registry
        )
        self.seconds = Histogram(
            "aegan_request_seconds",
            "From a request's head to the end of its answer.",
            ["address"],
            buckets=SECONDS,
            registry=registry,
        )
        self.at_work = Gauge(
            "aegan_requests_at_work", "Requests that are read, not answered.", registry=registry
        )
        self.batch_rows = Histogram(
            "aegan_batch_rows",
            "Rows of one pass of a network.",
            ["network"],
            buckets=ROWS,
            registry=registry,
        )
        self.model = Info("aegan_model", "What is served.", registry=registry)
        self.loads = Counter("aegan_model_loads", "Models served so far.", registry=registry)
        self.stale = Gauge(
            "aegan_model_stale",
            "1 where the alias could not be followed: the log says why.",
            registry=registry,
        )

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
