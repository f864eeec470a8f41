"""Chats about an image: a caption, or the answer to a question."""

import functools
import json
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from blip_jax.inference.answering import Answer
from blip_jax.inference.captioning import Caption
from blip_jax.serve import inputs, programs, schemas
from blip_jax.serve.api_error import ApiError
from blip_jax.serve.batcher import Work
from blip_jax.serve.programs import Host

_NEEDS = (
  "A chat needs a captioner, such as 'model_base_caption_capfilt_large', or a "
  "model for VQA, such as 'model_base_vqa_capfilt_large'"
)


def can(host: Host) -> bool:
  """Whether a model takes part in chats."""
  return host.captions or host.answers


def prepare(
  request: schemas.Chat, host: Host
) -> tuple[list[Work], Callable[[Sequence[Any]], dict[str, Any] | str]]:
  """Returns the program that answers with its row, and what makes a response.

  The response keeps nothing of the image: a request may wait.

  Raises:
    ApiError: the model cannot do what is asked for.
  """
  if not can(host):
    raise lacks(host, "chat about images", _NEEDS)
  url, text, param = _said(request)
  if host.answers:
    work = _question(request, host, url, text, param)
  else:
    work = _caption(request, host, url, text, param)
  small = request.model_copy(update={"messages": []})
  return [work], functools.partial(_respond, small, host, text)


def lacks(host: Host, what: str, needs: str) -> ApiError:
  """The error of a model without the head that is needed."""
  family = host.model.card.family
  return ApiError(
    400,
    f"model {host.name!r} is of the family {family!r} and cannot {what}. "
    f"{needs}",
    "model",
    "model_lacks_head",
  )


def _said(request: schemas.Chat) -> tuple[str, str, str]:
  """The URL of the image, the text, and where the image is."""
  (message,) = request.messages
  images, texts = [], []
  for number, part in enumerate(message.content):
    if isinstance(part, schemas.TextPart):
      texts.append(part.text)
    else:
      images.append((part.image_url.url, number))
  if len(images) != 1:
    raise ApiError(
      400,
      "messages: expected one message with one image and at most some text, "
      f"found {len(images)} images",
      "messages",
    )
  ((url, number),) = images
  text = " ".join(text for text in texts if text.strip())
  return url, text, f"messages.0.content.{number}.image_url.url"


def _caption(
  request: schemas.Chat, host: Host, url: str, text: str, param: str
) -> Work:
  sample = bool(request.temperature) or (
    request.temperature is None and request.top_p is not None
  )
  most = host.limits.max_n if sample else host.decoding.num_beams
  if request.n > most:
    why = "samples" if sample else "beams; a temperature asks for samples"
    what = f"n: expected at most {most} {why}; found {inputs.shown(request.n)}"
    raise ApiError(400, what, "n")
  program = programs.Captions(
    host,
    text or None,
    request.most_tokens,
    request.n if sample else 0,
    (request.temperature or None) if sample else None,
    request.top_p if sample else None,
  )
  try:
    program.captioner()
  except ValueError as error:
    name, _, _ = str(error).partition(":")
    where = name if name in request.model_fields_set else "messages"
    raise ApiError(400, str(error), where) from error
  seed = request.seed
  if seed is None:
    seed = secrets.randbelow(schemas.MAX_SEED)
  return program, (inputs.image(url, host, param), seed)


def _question(
  request: schemas.Chat, host: Host, url: str, text: str, param: str
) -> Work:
  if not text:
    needs = "Ask a question, or use a captioner"
    raise lacks(host, "caption an image without a text", needs)
  if request.temperature or request.top_p not in (None, 1):
    raise ApiError(
      400,
      "temperature, top_p: answers are found by beam search, and not sampled; "
      "leave them out, or give 0 and 1",
      "temperature",
    )
  most = host.decoding.num_beams
  if request.n > most:
    what = f"n: expected at most {most} beams; found {inputs.shown(request.n)}"
    raise ApiError(400, what, "n")
  program = programs.Answers(host, request.most_tokens)
  try:
    tokens = program.tokens(text)
  except ValueError as error:
    raise ApiError(400, str(error), "messages") from error
  return program, (inputs.image(url, host, param), *tokens)


def _respond(
  request: schemas.Chat,
  host: Host,
  text: str,
  results: Sequence[Caption | Answer],
) -> dict[str, Any] | str:
  """A response in the form of OpenAI's API, or a stream of events."""
  (best,) = results
  found = [best, *best.others][: request.n]
  choices = [_choice(n, one, request, host) for n, one in enumerate(found)]
  asked = _num_tokens(host, text or host.model.card.prompt)
  said = sum(_length(host, one) for one in found)
  response = {
    "id": f"chatcmpl-{uuid.uuid4().hex}",
    "object": "chat.completion",
    "created": int(time.time()),
    "model": host.name,
    "choices": choices,
    "usage": {
      "prompt_tokens": asked,
      "completion_tokens": said,
      "total_tokens": asked + said,
    },
  }
  if not request.stream:
    return response
  options = request.stream_options
  return _events(response, bool(options and options.include_usage))


def _events(response: dict[str, Any], with_usage: bool) -> str:
  """A response as a stream of events.

  Each text is one piece: beam search knows its first word with its last.
  """
  usage, choices = response["usage"], response["choices"]
  head = {k: v for k, v in response.items() if k not in ("usage", "choices")}
  head["object"] = "chat.completion.chunk"
  chunks = [
    {
      **head,
      "choices": [
        {
          "index": choice["index"],
          "delta": choice["message"],
          "logprobs": choice["logprobs"],
          "finish_reason": choice["finish_reason"],
        }
      ],
    }
    for choice in choices
  ]
  if with_usage:
    chunks.append({**head, "choices": [], "usage": usage})
  lines = [*map(json.dumps, chunks), "[DONE]"]
  return "".join(f"data: {line}\n\n" for line in lines)


def _choice(
  number: int, found: Caption | Answer, request: schemas.Chat, host: Host
) -> dict[str, Any]:
  if isinstance(found, Caption):
    tokens = [*zip(found.tokens, found.token_log_probs, strict=True)]
    assert host.model.tokenizer is not None  # or nothing was generated
    (end,) = host.model.tokenizer.pieces([host.model.tokenizer.sep_id])
    ended = bool(tokens) and tokens[-1][0] == end
  else:  # whose words are known together only
    tokens, ended = [(found.text, found.log_prob)], True
  content = [
    {
      "token": token,
      "logprob": log_prob,
      "bytes": [*token.encode()],
      "top_logprobs": [],
    }
    for token, log_prob in tokens
  ]
  return {
    "index": number,
    "message": {"role": "assistant", "content": found.text, "refusal": None},
    "logprobs": {"content": content, "refusal": None}
    if request.logprobs
    else None,
    "finish_reason": "stop" if ended else "length",
  }


def _length(host: Host, found: Caption | Answer) -> int:
  if isinstance(found, Caption):
    return len(found.tokens)
  return _num_tokens(host, found.text)


def _num_tokens(host: Host, text: str) -> int:
  """Of a text, without special tokens."""
  assert host.model.tokenizer is not None
  return len(host.model.tokenizer.prompt_ids(text)) - 1
