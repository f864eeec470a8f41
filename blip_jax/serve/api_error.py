"""Errors of the service, in the form of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

# A message may quote what a client has sent.
_MAX_LENGTH = 1000


class ApiError(Exception):
  """A request that is not answered.

  Attributes:
    status: of HTTP.
    body: of the response.
    headers: of the response.
  """

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.headers = status, dict(headers or {})
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode(errors="replace").decode()[:_MAX_LENGTH]
    self.body: dict[str, Any] = {
      "error": dict(message=message, type=kind, param=param, code=code)
    }


def busy(status: int, why: str) -> ApiError:
  """A request that the client may send again: 429 or 503."""
  code = "rate_limit_exceeded" if status == 429 else "unavailable"
  return ApiError(status, why, code=code, headers={"Retry-After": "1"})
