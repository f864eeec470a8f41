"""What a model can be exported as: functions of arrays, with their inputs.

Dimensions: I images with one text or question each, H and W height and width of
an image, N image tokens, D width, C joint embedding, L text length, m texts of
each image.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from blip_jax.inference import answering, matching, texts
from blip_jax.inference.model import Model
from blip_jax.models import (
  blip,
  decoding,
  families,
  float8,
  generation,
  placement,
)
from blip_jax.tasks import answers, base, vqa

# Tokens of texts and questions, padding included.
TEXT_LENGTH = 35


@dataclasses.dataclass(frozen=True)
class Program:
  """A function of a batch.

  Attributes:
    name: such as "caption".
    function: (*inputs) -> outputs. The parameters are constants of it.
    inputs: name -> shape without the batch, and dtype.
    outputs: names.
    settings: further facts for whoever prepares inputs and reads outputs.
  """

  name: str
  function: Callable[..., tuple[Array, ...]]
  inputs: Mapping[str, tuple[tuple[int, ...], str]]
  outputs: Sequence[str]
  settings: Mapping[str, Any]

  def specs(self, batch: Any) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the inputs, for a batch of this size."""
    return [
      jax.ShapeDtypeStruct((batch, *shape), dtype)
      for shape, dtype in self.inputs.values()
    ]

  def example(self, batch: int, seed: int = 0) -> list[np.ndarray]:
    """Random inputs, with texts of different lengths; pixels come first."""
    rng = np.random.default_rng([batch, seed])
    found = []
    for name, (shape, dtype) in self.inputs.items():
      if name == "attention_mask":
        lengths = rng.integers(3, shape[0] + 1, batch)
        values = np.arange(shape[0]) < lengths[:, None]
      else:
        top = 256 if dtype == "uint8" else self.settings["vocab_size"]
        values = rng.integers(0, top, (batch, *shape))
      found.append(values.astype(dtype))
    return found


def programs_of(
  model: Model, names: Sequence[str] = (), **options: Any
) -> list[Program]:
  """The programs that a model can be exported as.

  Args:
    model: one that was loaded in float32 onto one device.
    names: which of them; all by default.
    options: of generation, as for `Model.caption` and `Model.answer`.

  Raises:
    ValueError: the model has no such program, an option is unknown, no program
      generates, or the model was loaded in "float8".
  """
  if model.dtype == float8.NAME:
    raise ValueError(
      f"export: expected a model that was loaded in 'float32', found "
      f"{model.dtype!r}; formats have no products of 8-bit floats with scales"
    )
  family = model.card.family
  there = _OF_FAMILY.get(family, ())
  if not there:
    raise ValueError(f"a model of the family {family!r} has no such program")
  if unknown := [name for name in names if name not in there]:
    raise ValueError(
      f"--programs: expected some of {[*there]}, for the family {family!r}, "
      f"found {unknown}"
    )
  chosen = dict.fromkeys(names or there)  # each of them once
  if options and not chosen.keys() & _GENERATING:
    raise ValueError(
      f"{[*options]}: options of generation, and {[*chosen]} generate nothing"
    )
  model = _for_any_device(model)
  return [_MAKE[name](model, options) for name in chosen]


def _for_any_device(model: Model) -> Model:
  """The model without what suits only the device that it was loaded onto."""
  config = model.card.config
  config = dataclasses.replace(config, vit=placement.unplaced(config.vit))
  return dataclasses.replace(
    model,
    card=dataclasses.replace(model.card, config=config),
    module=families.build(model.card.family, config),
  )


def _encode(model: Model, _: Any) -> Program:
  def encode(pixels):
    return (_states(model, pixels),)

  return _program(model, "encode", encode, {}, ["image_tokens"])


def _caption(model: Model, options: dict[str, Any]) -> Program:
  card = model.card
  tokenizer = texts.vocabulary(model.tokenizer, "caption images")
  prompt = tokenizer.prompt_ids(card.prompt)
  positions = card.config.med.max_positions
  settings = decoding.make(card.generation, len(prompt), positions, **options)
  _refuse_samples(settings)
  number = decoding.num_positions_for(settings.max_length, positions)

  def caption(pixels):
    generated = generation.generate(
      model.module,
      model.params,
      _states(model, pixels),
      jnp.asarray(prompt, jnp.int32),
      settings,
      number,
    )
    return tuple(generated)

  outputs = ["ids", "token_log_probs", "scores"]
  said = {
    "prompt": card.prompt,
    "prompt_ids": prompt,
    "generation": _said(settings),
  }
  return _program(model, "caption", caption, {}, outputs, said)


def _answer(model: Model, options: dict[str, Any]) -> Program:
  positions = model.card.config.med.max_positions
  settings = decoding.make(model.card.generation, 1, positions, **options)
  _refuse_samples(settings)
  number = decoding.num_positions_for(settings.max_length, positions)

  module, params = model.module, model.params
  assert isinstance(module, blip.Blip), model.card.family

  def answer(pixels, ids, mask):
    states = vqa.read(module, params, pixels, ids, mask)
    found = answers.generate(module, params, states, mask, settings, number)
    return tuple(found)

  outputs = ["ids", "token_log_probs", "scores"]
  length = min(answering.MAX_TOKENS, positions)
  said = {"generation": _said(settings)}
  inputs = _text_inputs(length)
  return _program(model, "answer", answer, inputs, outputs, said)


def _match(model: Model, _: Any) -> Program:
  def run(*args: Any, method: str) -> Any:
    return model.module.apply({"params": model.params}, *args, method=method)

  def match(pixels, ids, mask):
    embeds, image_feat = run(base.normalise(pixels), method="image_features")
    image_kv = run(embeds, method="image_kv")
    logits = run(ids, mask, image_kv, method="match")
    text_feat = run(ids, mask, method="text_feat")
    cosine = (image_feat * text_feat).sum(axis=-1)
    return jax.nn.softmax(logits)[:, 1], cosine, image_feat, text_feat

  positions = model.card.config.med.max_positions
  outputs = ["itm_prob", "itc_cosine", "image_feat", "text_feat"]
  inputs = _text_inputs(min(matching.MAX_TOKENS, positions))
  return _program(model, "match", match, inputs, outputs)


def _states(model: Model, pixels: Any) -> Any:
  apply: Callable[..., Any] = model.module.apply
  return apply(
    {"params": model.params}, base.normalise(pixels), method="encode_image"
  )


def _text_inputs(length: int) -> dict[str, tuple[tuple[int, ...], str]]:
  return {
    "input_ids": ((length,), "int32"),
    "attention_mask": ((length,), "int32"),
  }


def _program(
  model: Model,
  name: str,
  function: Callable[..., tuple[Array, ...]],
  text_inputs: Mapping[str, tuple[tuple[int, ...], str]],
  outputs: Sequence[str],
  settings: Mapping[str, Any] | None = None,
) -> Program:
  c = model.card.config
  height, width = c.vit.image_size
  inputs = {"pixels": ((height, width, 3), "uint8"), **text_inputs}
  said = {"vocab_size": c.med.vocab_size, **(settings or {})}
  return Program(name, function, inputs, outputs, said)


def _refuse_samples(settings: decoding.Decoding) -> None:
  if settings.sample:
    raise ValueError("sample: exported programs have no random numbers")


def _said(settings: decoding.Decoding) -> dict[str, Any]:
  return {
    field.name: np.asarray(getattr(settings, field.name)).tolist()
    for field in dataclasses.fields(settings)
  }


_MAKE = {
  "encode": _encode,
  "caption": _caption,
  "answer": _answer,
  "match": _match,
}
_GENERATING = {"caption", "answer"}
_OF_FAMILY = {
  "caption": ("encode", "caption"),
  "vqa": ("encode", "answer"),
  "itm": ("encode", "match"),
  "retrieval": ("encode", "match"),
  "pretrain": ("encode", "caption", "match"),
}
