"""What requests hold: JSON of a schema, and images."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import pydantic

from blip_jax.data.rejects import BadSample
from blip_jax.inference import urls
from blip_jax.serve import data_urls
from blip_jax.serve.api_error import ApiError
from blip_jax.serve.programs import Host, Pixels

_MAX_NAME = 100
_MAX_COMMAS = 4000
_MAX_SHOWN = 40
# Types of parts, which pydantic puts into the path of a field.
_PARTS = ("text", "image_url")
# Kinds of errors whose messages have what was found, or where nothing was.
_COMPLETE = (
  *("json_invalid", "missing", "extra_forbidden", "value_error"),
  *("too_long", "too_short", "union_tag_invalid", "union_tag_not_found"),
)

_Request = TypeVar("_Request", bound=pydantic.BaseModel)


def parse(schema: type[_Request], body: bytes) -> _Request:
  """Reads a request; raises `ApiError` 400 that names the field."""
  if body.count(b",") > _MAX_COMMAS:
    # Each of a million unknown keys would be an error with its own place.
    raise ApiError(413, f"the body has more than {_MAX_COMMAS} commas")
  try:
    return schema.model_validate_json(body)
  except pydantic.ValidationError as error:
    found = error.errors(include_url=False, include_context=False)
  # Of a value that may have several types, what fits best is named longest.
  worst = max(found[:100], key=lambda one: len(one["loc"]))
  where = _where(worst["loc"])[:_MAX_NAME] or None
  what = _what(worst)
  raise ApiError(400, f"{where}: {what}" if where else what, where)


def _where(names: Sequence[str | int]) -> str:
  """The path of a field, without the types of parts that are in it."""
  pairs = zip((None, *names), names, strict=False)
  return ".".join(
    str(name)
    for before, name in pairs
    if not (isinstance(before, int) and name in _PARTS)
  )


def _what(error: Any) -> str:
  """What is expected, and what was found."""
  expected = error["msg"].removeprefix("Value error, ")
  if error["type"] in _COMPLETE:
    return expected
  return f"{expected}, found {shown(error['input'])}"


def shown(value: Any) -> str:
  """A value as in JSON, unless it is long."""
  if isinstance(value, dict | list):
    return "an object" if isinstance(value, dict) else "a list"
  if isinstance(value, int) and value.bit_length() > 64:
    return "a longer number"  # which may have more digits than Python writes
  return json.dumps(value[:_MAX_SHOWN] if isinstance(value, str) else value)


def image(url: str, host: Host, param: str) -> Pixels:
  """Reads an image in the size of a model.

  Raises:
    ApiError: it cannot be read, is too large, or is a URL, which the service
      does not fetch.
  """
  try:
    return host.pixels(_content(url, host))
  except BadSample as error:
    status = 413 if error.reason == "too_large" else 400
    raise ApiError(status, f"{param}: {error}", param, error.reason) from error
  except ValueError as error:
    raise ApiError(400, f"{param}: {error}", param) from error


def _content(url: str, host: Host) -> bytes:
  """The encoded image."""
  if not data_urls.is_data(url):
    if not host.limits.urls or not url.lower().startswith(urls.SCHEMES):
      raise ValueError(
        "expected a data URL, data:image/...;base64,..."
        + (" or http(s)" if host.limits.urls else "; no URL is fetched")
        + f", found {url[:40]!r}"
      )
    try:
      return urls.fetch(url)
    except BadSample as error:
      # Its details tell of the network of the service.
      raise ValueError(f"the URL is not fetched: {error.reason}") from error
  return data_urls.decode(url)
