"""The requests of OpenAI's API, as far as BLIP has something to say.

What would change an answer and is not understood is refused, and never ignored.
"""

from typing import Annotated, Any, Literal

import pydantic

# A chat is one message; these are its parts.
MAX_PARTS = 8
# In characters; models read some 35 tokens.
MAX_TEXT = 10_000
# As for `jax.random.key`.
MAX_SEED = 2**31 - 1
# Values that ask for nothing.
_NEUTRAL = (None, 0, False, [], {}, {"type": "text"}, "none", "auto")


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, frozen=True
  )


class ImageUrl(_Strict):
  """Where an image is: a data URL, or http(s) if the service permits it."""

  url: str
  detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
  """An image."""

  type: Literal["image_url"]
  image_url: ImageUrl


class TextPart(_Strict):
  """A text."""

  type: Literal["text"]
  text: Annotated[str, pydantic.Field(max_length=MAX_TEXT)]


Part = Annotated[ImagePart | TextPart, pydantic.Field(discriminator="type")]


def _as_part(given: Any) -> Any:
  """A string as a part: a text, or an image if it is a data URL."""
  if isinstance(given, dict | _Strict):
    return given
  if not isinstance(given, str):
    raise ValueError(
      "expected a text, a data URL of an image, or a part as in messages"
    )
  if given[:5].lower() == "data:":
    return {"type": "image_url", "image_url": {"url": given}}
  return {"type": "text", "text": given}


def _as_parts(given: Any) -> Any:
  listed = given if isinstance(given, list) else [given]
  return [_as_part(one) for one in listed]


class Message(_Strict):
  """What the user says and shows."""

  role: Literal["user"]
  content: Annotated[
    list[Part],
    pydantic.Field(max_length=MAX_PARTS),
    pydantic.BeforeValidator(_as_parts),
  ]
  name: str | None = None


class StreamOptions(_Strict):
  """Of an answer as a stream of events."""

  include_usage: bool = False
  include_obfuscation: bool = False


def _refused(value: Any) -> None:
  if not any(value is one or value == one for one in _NEUTRAL):
    raise ValueError("BLIP has no such thing; leave it out")


# A field that exists, and that BLIP can do nothing about.
_Refused = Annotated[Any, pydantic.BeforeValidator(_refused)]


class Chat(_Strict):
  """Body of a request to /v1/chat/completions."""

  model: str | None = None
  messages: Annotated[list[Message], pydantic.Field(min_length=1, max_length=1)]
  n: Annotated[int, pydantic.Field(ge=1)] = 1
  temperature: Annotated[float, pydantic.Field(ge=0, le=2)] | None = None
  top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
  max_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
  max_completion_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
  seed: Annotated[int, pydantic.Field(ge=0, le=MAX_SEED)] | None = None
  logprobs: bool | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  # They are for the operator of a service.
  user: str | None = None
  metadata: dict[str, str] | None = None
  store: Literal[False] | None = None
  service_tier: str | None = None

  audio: _Refused = None
  frequency_penalty: _Refused = None
  function_call: _Refused = None
  functions: _Refused = None
  logit_bias: _Refused = None
  modalities: Annotated[list[Literal["text"]], pydantic.Field()] | None = None
  parallel_tool_calls: bool | None = None  # of tools, which are refused
  prediction: _Refused = None
  presence_penalty: _Refused = None
  reasoning_effort: _Refused = None
  response_format: _Refused = None
  stop: _Refused = None
  tool_choice: _Refused = None
  tools: _Refused = None
  top_logprobs: _Refused = None
  web_search_options: _Refused = None

  @property
  def most_tokens(self) -> int | None:
    """To generate, by its new or its old name."""
    return self.max_completion_tokens or self.max_tokens

  @pydantic.model_validator(mode="after")
  def _one_limit(self) -> "Chat":
    if self.max_tokens and self.max_completion_tokens:
      raise ValueError("max_tokens, max_completion_tokens: give one of them")
    return self


class Embeddings(_Strict):
  """Body of a request to /v1/embeddings.

  Attributes:
    input: texts and images. A string is a text, or an image if it is a data
      URL.
  """

  model: str | None = None
  input: Annotated[
    list[Part],
    pydantic.Field(min_length=1),
    pydantic.BeforeValidator(_as_parts),
  ]
  encoding_format: Literal["float", "base64"] = "float"
  dimensions: Annotated[int, pydantic.Field(ge=1)] | None = None
  user: str | None = None
