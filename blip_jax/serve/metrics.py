"""Counts and times of the service, as Prometheus reads them."""

from collections.abc import Callable

import prometheus_client as prometheus

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST


class Metrics:
  """Of one service: a registry of its own.

  Args:
    rows: returns the rows that wait or are under computation.
  """

  def __init__(self, rows: Callable[[], int]):
    self._registry = prometheus.CollectorRegistry()
    prometheus.ProcessCollector(registry=self._registry)
    self.requests = prometheus.Counter(
      "blip_requests",
      "Requests that were answered, by status of HTTP; 499: the client left.",
      ["endpoint", "status"],
      registry=self._registry,
    )
    self.seconds = prometheus.Histogram(
      "blip_request_seconds",
      "From the head of a request to its answer.",
      ["endpoint"],
      registry=self._registry,
    )
    self.batch_rows = prometheus.Histogram(
      "blip_batch_rows",
      "Rows of a batch, without padding.",
      ["program"],
      buckets=[1, 2, 4, 8, 16, 32, 64, 128, 256],
      registry=self._registry,
    )
    self.batch_seconds = prometheus.Histogram(
      "blip_batch_seconds",
      "Time that a batch takes.",
      ["program"],
      registry=self._registry,
    )
    prometheus.Gauge(
      "blip_rows",
      "Rows that wait or are under computation.",
      registry=self._registry,
    ).set_function(rows)

  def batch(self, program: str, rows: int, seconds: float) -> None:
    """Counts a batch."""
    self.batch_rows.labels(program).observe(rows)
    self.batch_seconds.labels(program).observe(seconds)

  def text(self) -> bytes:
    """All of them."""
    return prometheus.generate_latest(self._registry)
