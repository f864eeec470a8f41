"""`pipeline`, as transformers 4 had it: the same inputs, results of the same
shape.

Its version 5 has neither "image-to-text" nor "visual-question-answering". One
input gives one result, and a list of inputs a list of results.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from blip_jax.inference import loading
from blip_jax.inference.images import Image
from blip_jax.inference.model import Model

Result = list[dict[str, Any]]
# Arguments of transformers' that choose what `load` chooses by other names.
_ELSEWHERE = {
  "device": "mesh=",
  "device_map": "mesh=",
  "framework": "nothing: there is only JAX",
  "torch_dtype": "dtype=",
}


def pipeline(
  task: str, model: str | Model | None = None, **options: Any
) -> Callable[..., Any]:
  """Returns a function of images, or of images and texts.

    image-to-text              (images, prompt=, max_new_tokens=,
                               generate_kwargs=)
                               -> [{"generated_text"}]
    visual-question-answering  (image, question, top_k=, answers=), or
                               ({"image", "question"})
                               -> [{"score", "answer"}], the best first
    image-text-matching        (image, texts), or ({"image", "text"})
                               -> [{"score", "label"}], the best first; a score
                               is the probability that the text matches
    image-feature-extraction   (images, pool=, return_tensors=)
                               -> numbers [1, tokens, width], nested lists or an
                               array; [1, width] of the first token with pool

  For a list of inputs the result is a list of these. Further arguments are
  those of `Model.caption`, `answer`, `match` and `features`, such as batch_size
  and urls, without which no URL is downloaded.

  Args:
    task: one of these; "vqa" is the second.
    model: a name or path, as for `blip_jax.load`, or a model; by default BLIP's
      base model for the task.
    options: of `blip_jax.load`.

  Raises:
    ValueError: there is no such task, an option is of transformers only, or as
      `blip_jax.load`.
  """
  task = {"vqa": "visual-question-answering"}.get(task, task)
  if task not in _TASKS:
    raise ValueError(f"task: expected one of {[*_TASKS]}, found {task!r}")
  for name in options.keys() & _ELSEWHERE:
    raise ValueError(f"{name}=: use {_ELSEWHERE[name]}; see blip_jax.load")
  run, default = _TASKS[task]
  if isinstance(model, Model):
    if options:
      raise ValueError(f"{[*options]}: options of a model that is loaded here")
    return functools.partial(run, model)
  return functools.partial(run, loading.load(model or default, **options))


def _caption(
  model: Model,
  inputs: Any = None,
  *,
  images: Any = None,
  prompt: str | None = None,
  generate_kwargs: dict[str, Any] | None = None,
  **options: Any,
) -> Any:
  if (inputs is None) == (images is None):
    found = "none" if inputs is None else "them twice, the second as images="
    raise ValueError(
      f"image-to-text: expected an image or several, found {found}"
    )
  inputs = images if inputs is None else inputs
  given = generate_kwargs or {}
  if repeated := sorted(options.keys() & given.keys()):
    raise ValueError(f"{repeated}: given twice, the second in generate_kwargs")
  start = model.card.prompt if prompt is None else prompt
  captions = model.caption(inputs, prompt=prompt, **options, **given)
  # What transformers generates includes the prompt.
  found = [
    caption
    and [
      {"generated_text": f"{start.strip()} {each.text}".strip()}
      for each in (caption, *caption.others)
    ]
    for caption in captions
  ]
  return found if _are_several(inputs) else found[0]


def _answer(
  model: Model,
  image: Any,
  question: str | Sequence[str] | None = None,
  *,
  top_k: int = 1,
  **options: Any,
) -> Any:
  are_several = _are_several(image) or not isinstance(question, str | None)
  if question is None:
    image, question = _columns(image, "question")
  answers = model.answer(image, question, num_answers=top_k, **options)
  found = [
    answer
    and [
      {"score": each.prob, "answer": each.text}
      for each in (answer, *answer.others)
    ]
    for answer in answers
  ]
  return found if are_several else found[0]


def _match(
  model: Model,
  image: Any,
  text: str | Sequence[str] | None = None,
  **options: Any,
) -> Any:
  if "on_error" in options:
    raise ValueError("image-text-matching: on_error= is of Model.match only")
  are_several = _are_several(image)
  if text is None:
    images, texts = _columns(image, "text")
    found = model.match(images, texts, pairwise=True, **options)
    labels = [[one] for one in texts]
  else:
    texts = [text] if isinstance(text, str) else [*text]
    found = model.match(image, texts, **options)
    labels = [texts] * len(found.itm_prob)
  probs = np.reshape(found.itm_prob, (len(labels), -1)).tolist()
  results = [
    sorted(
      (
        {"score": score, "label": label}
        for score, label in zip(*row, strict=True)
      ),
      key=lambda one: -one["score"],
    )
    for row in zip(probs, labels, strict=True)
  ]
  return results if are_several else results[0]


def _features(
  model: Model,
  images: Any,
  *,
  pool: bool = False,
  return_tensors: bool = False,
  **options: Any,
) -> Any:
  states = model.features(images, **options).states
  rows = [row[None, 0] if pool else row[None] for row in states]
  found = rows if return_tensors else [row.tolist() for row in rows]
  return found if _are_several(images) else found[0]


def _are_several(inputs: Any) -> bool:
  """Whether the result is a list of results: not for a path or an array."""
  if isinstance(inputs, np.ndarray):
    return inputs.ndim == 4
  return not isinstance(inputs, Image | dict)


def _columns(rows: Any, name: str) -> tuple[list[Any], list[str]]:
  """Images and texts of a row {"image", name}, or of several."""
  if isinstance(rows, dict | Image) or not isinstance(rows, Iterable):
    rows = [rows]
  for row in (rows := [*rows]):
    if not isinstance(row, dict) or row.keys() != {"image", name}:
      found = f"the keys {[*row]}" if isinstance(row, dict) else f"{row!r:.100}"
      raise ValueError(
        f"expected an image and a {name}, or a dict with the keys 'image' and "
        f"{name!r}, or several; found {found}"
      )
    if not isinstance(row[name], str):
      raise ValueError(f"{name}: expected a text, found {row[name]!r:.100}")
  return [row["image"] for row in rows], [row[name] for row in rows]


_TASKS: dict[str, tuple[Callable[..., Any], str]] = {
  "image-to-text": (_caption, "Salesforce/blip-image-captioning-base"),
  "visual-question-answering": (_answer, "Salesforce/blip-vqa-base"),
  "image-text-matching": (_match, "Salesforce/blip-itm-base-coco"),
  "image-feature-extraction": (_features, "Salesforce/blip-itm-base-coco"),
}
