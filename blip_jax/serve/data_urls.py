"""Images that are sent as data URLs."""

import base64
import binascii

SCHEME = "data:"


def decode(url: str) -> bytes:
  """The encoded image of a data URL, data:image/...;base64,...

  Raises:
    ValueError: it is none.
  """
  kind, comma, data = url[len(SCHEME) :].partition(",")
  media, *parameters = kind.lower().split(";")
  is_image = media.startswith("image/") and "base64" in parameters
  if not is_data(url) or not comma or not is_image:
    raise ValueError(
      "expected a data URL, data:image/...;base64,..., found one that begins "
      f"with {url[:40]!r}"
    )
  try:
    return base64.b64decode(data, validate=True)
  except (binascii.Error, ValueError) as error:
    raise ValueError(f"the data URL is no base64: {error}") from error


def is_data(url: str) -> bool:
  return url[: len(SCHEME)].lower() == SCHEME
