"""Connections of the service: uvicorn within bounds, stopped by signals."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from blip_jax.runtime import stopping

# In bytes, of the head of a request.
MAX_HEAD = 32 << 10
# Of a connection without a request.
KEEP_ALIVE_SECONDS = 5


class Protocol(H11Protocol):
  """HTTP/1.1 whose heads have to arrive in time.

  For uvicorn a connection may take for ever to say what it wants, and each of
  some thousand open files of a process would be one that says nothing.
  """

  head_seconds = 10.0

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._late: asyncio.TimerHandle | None = None

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self._wait_for_head()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    is_asking = self.cycle is not None and not self.cycle.response_complete
    if is_asking:
      self._stop_waiting()
    elif self._late is None:
      self._wait_for_head()

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_waiting()
    super().connection_lost(exc)

  def _wait_for_head(self) -> None:
    close = self.transport.close
    self._late = self.loop.call_later(self.head_seconds, close)

  def _stop_waiting(self) -> None:
    if self._late is not None:
      self._late.cancel()
      self._late = None


class Server(uvicorn.Server):
  """Ends when it is asked to, after what it has taken.

  Args:
    app: to run.
    host: address to listen at.
    port: likewise.
    connections: at the same time; of further ones, requests get a 503.
    head_seconds: that the head of a request may take to arrive.
    grace: seconds that are left for what it has taken.
    on_start: is called once it listens.
  """

  def __init__(
    self,
    app: ASGIApp,
    host: str,
    port: int,
    connections: int,
    head_seconds: float,
    grace: float,
    on_start: Callable[[], None],
  ):
    self._on_start = on_start
    protocol = type("_Protocol", (Protocol,), {"head_seconds": head_seconds})
    super().__init__(
      uvicorn.Config(
        app,
        host,
        port,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        interface="asgi3",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=connections,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(grace),
      )
    )
    # It would name every client that speaks no HTTP, or too many.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)

  def stop(self) -> None:
    """Takes no further requests, and ends once all are answered."""
    self.should_exit = True

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    # As all jobs, and not by uvicorn's own rules: Ctrl-C, SIGTERM, SIGUSR1.
    with stopping.handled_by(lambda number: self.stop()):
      yield

  async def startup(self, sockets: Any = None) -> None:
    await super().startup(sockets)
    self._on_start()
