"""Unit vectors of texts and images, in one space."""

import base64
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from blip_jax.serve import chat, inputs, programs, schemas
from blip_jax.serve.api_error import ApiError
from blip_jax.serve.batcher import Work
from blip_jax.serve.programs import Host

_NEEDS = (
  "Embeddings need a matcher, such as 'model_base_retrieval_coco' or "
  "'Salesforce/blip-itm-base-coco'"
)


def can(host: Host) -> bool:
  """Whether a model embeds images and texts."""
  return host.embeds


def prepare(
  request: schemas.Embeddings, host: Host
) -> tuple[list[Work], Callable[[Sequence[Any]], dict[str, Any]]]:
  """Returns a program and its row for each input, and what makes a response.

  Raises:
    ApiError: the model cannot do what is asked for.
  """
  if not can(host):
    raise chat.lacks(host, "embed images and texts", _NEEDS)
  given = request.input
  most, size = host.limits.max_inputs, host.model.card.config.embed_dim
  if len(given) > most:
    what = f"expected at most {most}, found {len(given)}"
    raise ApiError(400, f"input: {what}", "input")
  if request.dimensions not in (None, size):
    what = f"this model has {size}"
    raise ApiError(400, f"dimensions: {what}", "dimensions")
  work = [_row(one, host, f"input.{n}") for n, one in enumerate(given)]
  tokens = sum(
    int(row[1].sum())
    for program, row in work
    if isinstance(program, programs.TextVectors)
  )
  encode = _base64 if request.encoding_format == "base64" else _floats
  return work, functools.partial(_respond, host.name, encode, tokens)


def _row(given: schemas.Part, host: Host, param: str) -> Work:
  if isinstance(given, schemas.ImagePart):
    pixels = inputs.image(given.image_url.url, host, param)
    return programs.ImageVectors(host), pixels
  program = programs.TextVectors(host)
  try:
    return program, program.tokens(given.text)
  except ValueError as error:
    what = str(error).removeprefix("text 0: ")
    raise ApiError(400, f"{param}: {what}", param) from error


def _respond(
  name: str,
  encode: Callable[[Float[np.ndarray, " C"]], Any],
  tokens: int,
  vectors: Sequence[Float[np.ndarray, " C"]],
) -> dict[str, Any]:
  """A response in the form of OpenAI's API."""
  return {
    "object": "list",
    "model": name,
    "data": [
      {"object": "embedding", "index": number, "embedding": encode(vector)}
      for number, vector in enumerate(vectors)
    ],
    "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
  }


def _floats(vector: Float[np.ndarray, " C"]) -> list[float]:
  return np.asarray(vector, np.float32).tolist()


def _base64(vector: Float[np.ndarray, " C"]) -> str:
  return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
