"""Bodies of requests, within bounds of bytes and time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from blip_jax.serve.api_error import ApiError, busy

# A body that is too large is read on for so many times its limit, and thrown
# away: many clients look for an answer only after they have sent all of it.
_DISCARDED = 4
_CLOSE = {"Connection": "close"}


class Bodies:
  """Reads bodies.

  Args:
    max_bytes: of a body.
    seconds: that a body may take to arrive.
    max_held: bytes of all bodies together, until they have been understood.
  """

  def __init__(self, max_bytes: int, seconds: float, max_held: int):
    self._max_bytes, self._seconds = max_bytes, seconds
    self._max_held, self._held = max_held, 0

  @contextlib.asynccontextmanager
  async def read(self, request: Request) -> AsyncIterator[bytes]:
    """Yields a body, which counts until the end of the block.

    Raises:
      ApiError: it is no JSON by its head (415), too large (413), too slow
        (408), or there is no memory for it (429).
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
      # Which is more than politeness: a browser sends this type for a page of
      # somebody else's only after it has asked, and is told no.
      what = f"Content-Type: expected application/json, found {kind[:100]!r}"
      raise ApiError(415, what)
    packed = request.headers.get("content-encoding", "identity")
    if packed.lower() != "identity":
      what = f"Content-Encoding: expected identity, found {packed[:100]!r}"
      raise ApiError(415, what)
    length = request.headers.get("content-length", "")
    # Of more digits than these, Python makes no number.
    if length.isdecimal() and int(length[:20]) > _DISCARDED * self._max_bytes:
      raise self._too_large()
    body = bytearray()
    try:
      try:
        async with asyncio.timeout(self._seconds):
          await self._fill(body, request)
      except TimeoutError as error:
        why = f"the body takes more than {self._seconds:g} s"
        raise ApiError(408, why, headers=_CLOSE) from error
      yield bytes(body)
    finally:
      self._held -= len(body)

  async def _fill(self, body: bytearray, request: Request) -> None:
    total = 0
    async for piece in request.stream():
      total += len(piece)
      if total > _DISCARDED * self._max_bytes:
        break
      if total > self._max_bytes:
        continue
      if self._held + len(piece) > self._max_held:
        raise busy(429, "too many bodies at the same time; try again")
      body += piece
      self._held += len(piece)
    if total > self._max_bytes:
      raise self._too_large()

  def _too_large(self) -> ApiError:
    most = f"{self._max_bytes / 2**20:.1f} MiB"
    why = f"the body is too large: expected at most {most}"
    return ApiError(413, why, headers=_CLOSE)
