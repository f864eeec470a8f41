"""The service as an ASGI application, which any server of Python can run."""

import asyncio
import concurrent.futures
import contextlib
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip_jax.serve import chat, embeddings, inputs, schemas
from blip_jax.serve.api_error import ApiError, busy
from blip_jax.serve.batcher import Batcher, Full
from blip_jax.serve.bodies import Bodies
from blip_jax.serve.metrics import CONTENT_TYPE, Metrics
from blip_jax.serve.programs import Host

log = logging.getLogger(__name__)

# What the log and metrics have for a client that did not wait.
_CLIENT_LEFT = 499


class Bounds(NamedTuple):
  """Of the whole service.

  Attributes:
    queue: rows that wait or are under computation.
    patience: seconds that a row waits for others to share its batch.
    deadline: seconds from a body to its answer.
    max_body: bytes.
    body_seconds: that a body may take to arrive.
  """

  queue: int
  patience: float
  deadline: float
  max_body: int
  body_seconds: float


def build(hosts: Sequence[Host], bounds: Bounds, token: str = "") -> ASGIApp:
  """Returns the application.

  Args:
    hosts: models; the first one that can answers requests that name none.
    bounds: of the service.
    token: that clients must show; "": anybody is served.
  """
  return _Service(hosts, bounds).app(token)


class _Service:
  def __init__(self, hosts: Sequence[Host], bounds: Bounds):
    self._hosts, self._bounds = {host.name: host for host in hosts}, bounds
    self._started = int(time.time())
    # All bodies that may wait, in a memory that is bounded.
    self._bodies = Bodies(
      bounds.max_body, bounds.body_seconds, 32 * bounds.max_body
    )
    self._readers = concurrent.futures.ThreadPoolExecutor(
      min(os.cpu_count() or 1, 8) + 1, "reader"
    )
    self._metrics = Metrics(lambda: self._batcher.rows)
    self._batcher = Batcher(bounds.queue, bounds.patience, self._metrics.batch)

  def app(self, token: str) -> ASGIApp:
    routes = [
      Route("/health", self._health),
      Route("/metrics", self._show_metrics),
      Route("/v1/models", self._models),
      # A name of Hugging Face has a slash in it.
      Route("/v1/models/{name:path}", self._model),
      Route("/v1/chat/completions", self._chat, methods=["POST"]),
      Route("/v1/embeddings", self._embeddings, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
      ApiError: _explain,
      HTTPException: _explain_http,
      ClientDisconnect: _left,
      Exception: _explain_bug,
    }
    app = Starlette(
      routes=routes, exception_handlers=handlers, lifespan=self._lifespan
    )
    # It would send clients where their own head says that this is.
    app.router.redirect_slashes = False
    endpoints = {route.path for route in routes}
    return _Counted(_Guarded(app, token), self._metrics, endpoints)

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    batches = asyncio.create_task(self._batcher.run())
    yield
    batches.cancel()
    self._readers.shutdown(wait=False, cancel_futures=True)

  async def _health(self, request: Request) -> Response:
    return JSONResponse({"status": "ok", "models": [*self._hosts]})

  async def _show_metrics(self, request: Request) -> Response:
    return Response(self._metrics.text(), media_type=CONTENT_TYPE)

  async def _models(self, request: Request) -> Response:
    data = [self._described(host) for host in self._hosts.values()]
    return JSONResponse({"object": "list", "data": data})

  async def _model(self, request: Request) -> Response:
    host = self._named(request.path_params["name"])
    return JSONResponse(self._described(host))

  async def _chat(self, request: Request) -> Response:
    return await self._answer(request, schemas.Chat, chat)

  async def _embeddings(self, request: Request) -> Response:
    return await self._answer(request, schemas.Embeddings, embeddings)

  async def _answer(
    self, request: Request, schema: Any, kind: ModuleType
  ) -> Response:
    loop, deadline = asyncio.get_running_loop(), self._bounds.deadline
    try:
      async with self._bodies.read(request) as body, asyncio.timeout(deadline):
        end = loop.time() + deadline
        work, respond = await loop.run_in_executor(
          self._readers, self._understand, schema, kind, body
        )
      del body  # which may be large, and has been understood
      async with asyncio.timeout_at(end):
        results = await _unless_left(request, self._batcher.submit(work))
    except Full as error:
      raise busy(429, f"the queue is full: {error}; try again") from error
    except TimeoutError as error:
      why = f"no answer within {deadline:g} s; the service is busy, try again"
      raise busy(503, why) from error
    response = respond(results)
    if isinstance(response, str):
      return Response(response, media_type="text/event-stream")
    return JSONResponse(response)

  def _understand(
    self, schema: Any, kind: ModuleType, body: bytes
  ) -> tuple[list[Any], Any]:
    """Reads a request: all work but that of the device."""
    asked = inputs.parse(schema, body)
    if asked.model is not None:
      host = self._named(asked.model)
    else:
      hosts = [*self._hosts.values()]
      host = next((one for one in hosts if kind.can(one)), hosts[0])
    return kind.prepare(asked, host)

  def _named(self, name: str) -> Host:
    if name not in self._hosts:
      raise ApiError(
        404,
        f"model: expected one of {[*self._hosts]}, found {name[:100]!r}",
        "model",
        "model_not_found",
      )
    return self._hosts[name]

  def _described(self, host: Host) -> dict[str, Any]:
    return {
      "id": host.name,
      "object": "model",
      "created": self._started,
      "owned_by": "blip_jax",
    }


async def _unless_left(
  request: Request, futures: Sequence[asyncio.Future]
) -> list[Any]:
  """Waits for results; gives them up if the client goes away or time is over.

  Raises:
    ClientDisconnect: it has gone.
  """
  left = asyncio.create_task(_until_left(request))
  results = asyncio.create_task(_all(futures))
  try:
    await asyncio.wait([results, left], return_when=asyncio.FIRST_COMPLETED)
    if not results.done():
      raise ClientDisconnect
    return results.result()
  finally:
    left.cancel()
    results.cancel()


async def _all(futures: Sequence[asyncio.Future]) -> list[Any]:
  return await asyncio.gather(*futures)


async def _until_left(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


class _Guarded:
  """Asks for a token, except at /health."""

  def __init__(self, app: ASGIApp, token: str):
    self._app, self._expected = app, f"Bearer {token}".encode()
    self._is_open = not token

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http" and not self._may_pass(scope):
      error = ApiError(
        401,
        "expected the service's token as Authorization: Bearer TOKEN",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
      )
      await _response(error)(scope, receive, send)
    else:
      await self._app(scope, receive, send)

  def _may_pass(self, scope: Scope) -> bool:
    if self._is_open or scope["path"] == "/health":
      return True
    shown = dict(scope["headers"]).get(b"authorization", b"")
    return hmac.compare_digest(shown, self._expected)


class _Counted:
  """Counts responses, and their times."""

  def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: set[str]):
    self._app, self._metrics, self._endpoints = app, metrics, endpoints

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    start, status = time.monotonic(), 500

    async def counted(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    try:
      await self._app(scope, receive, counted)
    finally:
      # Whatever else somebody asks for must not become a label of its own.
      path = scope["path"] if scope["path"] in self._endpoints else "other"
      self._metrics.requests.labels(path, str(status)).inc()
      self._metrics.seconds.labels(path).observe(time.monotonic() - start)


def _response(error: ApiError) -> Response:
  return JSONResponse(error.body, error.status, error.headers)


async def _explain(request: Request, error: Any) -> Response:
  return _response(error)


async def _explain_http(request: Request, error: Any) -> Response:
  what = f"{request.method} {request.url.path[:100]}: {error.detail}"
  return _response(ApiError(error.status_code, what, headers=error.headers))


async def _left(request: Request, error: Any) -> Response:
  return Response(status_code=_CLIENT_LEFT)


async def _explain_bug(request: Request, error: Any) -> Response:
  why = "internal error; the log of the service says more"
  return _response(ApiError(500, why))
