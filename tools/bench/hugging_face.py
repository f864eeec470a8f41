"""The same programs by `transformers`, with the same weights.

As it is, and, so that the comparison is fair, with PyTorch's fused attention
(`scaled_dot_product_attention`) in place of its own products and softmax, which
its BLIP has no option for.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from blip_jax.convert import opening, weights, write
from blip_jax.models import card
from blip_jax.runtime import files

from . import measure, programs
from .programs import Setup


def encode(setup: Setup, batch_size: int, fused: bool) -> measure.Program:
  vision = model("caption", setup, fused).vision_model
  pixels = images(setup, batch_size)
  run = lambda: vision(pixel_values=pixels).last_hidden_state
  return program(batch_size, run)


def caption(setup: Setup, batch_size: int, fused: bool) -> measure.Program:
  import torch

  captioner = model("caption", setup, fused)
  pixels = images(setup, batch_size)
  # It drops the last token of a prompt, which it takes for [SEP].
  prompt = [*programs.PROMPT, programs.BERT.sep]
  prompts = torch.tensor([prompt] * batch_size, device=device())

  return generation(
    captioner, programs.LENGTH, pixel_values=pixels, input_ids=prompts
  )


def answer(setup: Setup, batch_size: int, fused: bool) -> measure.Program:
  import torch

  answerer = model("vqa", setup, fused)
  pixels = images(setup, batch_size)
  ids = torch.tensor(
    programs.token_ids(batch_size, programs.QUESTION_LENGTH), device=device()
  )
  # Ours puts it there by itself.
  ids[:, 0] = programs.BERT.enc

  return generation(
    answerer, programs.ANSWER_LENGTH, pixel_values=pixels, input_ids=ids
  )


def generation(opened: Any, length: int, **inputs: Any) -> measure.Program:
  """The best text of each image by beam search, of a length."""

  def run() -> Any:
    generated = opened.generate(
      **inputs,
      num_beams=programs.NUM_BEAMS,
      max_length=length,
      min_length=length,
      do_sample=False,
    )
    return generated[:, None]

  return program(len(inputs["pixel_values"]), run)


def filter(setup: Setup, batch_size: int, fused: bool) -> measure.Program:
  """A call for each of an image's texts, as its interface wants it."""
  import torch

  matcher = model("itm", setup, fused)
  pixels = images(setup, batch_size)
  each = programs.TEXTS_PER_IMAGE
  ids, mask = (
    torch.tensor(x, device=device()).unflatten(0, (batch_size, each))
    for x in programs.texts(batch_size * each)
  )
  ids[..., 0] = programs.BERT.enc

  def run() -> Any:
    scores = [
      matcher(ids[:, i], pixels, attention_mask=mask[:, i]).itm_score
      for i in range(each)
    ]
    return torch.stack(scores, 1)

  return program(batch_size, run)


def program(items: int, run: Callable[[], Any]) -> measure.Program:
  import torch

  @torch.inference_mode()
  def waited() -> Any:
    outputs = run()
    if device() == "cuda":
      torch.cuda.synchronize()
    return outputs.float() if outputs.is_floating_point() else outputs

  return measure.Program(items, waited)


def device() -> str:
  return "cuda" if jax.default_backend() == "gpu" else "cpu"


def images(setup: Setup, number: int) -> Any:
  import torch

  pixels = programs.images(setup, number).transpose(0, 3, 1, 2).copy()
  return torch.from_numpy(pixels).to(device(), getattr(torch, setup.dtype))


CLASSES = {
  "caption": "BlipForConditionalGeneration",
  "itm": "BlipForImageTextRetrieval",
  "vqa": "BlipForQuestionAnswering",
}


@functools.lru_cache(2)
def model(family: str, setup: Setup, fused: bool) -> Any:
  """A model of `transformers` with our weights."""
  import torch
  import transformers

  flat, _ = jax.tree.flatten_with_path(programs.params(family, setup))
  leaves = {
    "/".join(("params", *(key.key for key in path))): weights.Leaf.from_array(
      np.asarray(x)
    )
    for path, x in flat
  }
  description = card.Card(family, setup.config)
  checkpoint = opening.Checkpoint(description, leaves, None, weights.Report())
  # Else the patches of a float32 model are embedded in TF32.
  torch.backends.cudnn.allow_tf32 = False
  transformers.utils.logging.disable_progress_bar()
  with files.temporary_folder() as folder:
    write.write(checkpoint, folder / "model", "hf")
    opened = getattr(transformers, CLASSES[family]).from_pretrained(
      folder / "model", dtype=getattr(torch, setup.dtype)
    )
  if fused:
    fuse(opened)
  return opened.to(device()).eval()


def fuse(opened: Any) -> None:
  """Makes all attention of a model one call of PyTorch's fused kernel."""
  from transformers.models.blip import modeling_blip, modeling_blip_text

  replaced = {
    modeling_blip.BlipAttention: _attend_to_patches,
    modeling_blip_text.BlipTextSelfAttention: _attend_to_tokens,
  }
  for module in opened.modules():
    if type(module) in replaced:
      module.forward = types.MethodType(replaced[type(module)], module)


def _attend_to_patches(self: Any, hidden_states: Any, **_: Any) -> Any:
  from torch.nn import functional

  split = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
  query, key, value = split.permute(2, 0, 3, 1, 4)
  mixed = functional.scaled_dot_product_attention(query, key, value)
  return self.projection(mixed.transpose(1, 2).flatten(2)), None


def _attend_to_tokens(
  self: Any,
  hidden_states: Any,
  attention_mask: Any = None,
  encoder_hidden_states: Any = None,
  encoder_attention_mask: Any = None,
  cache: Any = None,
  **_: Any,
) -> Any:
  from torch.nn import functional

  num_heads = self.num_attention_heads
  split = lambda x: x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
  crossed = encoder_hidden_states is not None
  states = encoder_hidden_states if crossed else hidden_states
  # All tokens of an image count; without a mask there is a quicker kernel.
  mask = None if crossed else attention_mask
  layer = self.layer_idx
  if cache is None:
    key, value = split(self.key(states)), split(self.value(states))
  elif crossed and cache.is_updated.get(layer):
    stored = cache.cross_attention_cache.layers[layer]
    key, value = stored.keys, stored.values
  else:
    own = cache.cross_attention_cache if crossed else cache.self_attention_cache
    key, value = own.update(
      split(self.key(states)), split(self.value(states)), layer
    )
    if crossed:
      cache.is_updated[layer] = True
  query = split(self.query(hidden_states))
  mixed = functional.scaled_dot_product_attention(
    query, key, value, None if mask is None else mask.to(query.dtype)
  )
  return mixed.transpose(1, 2).flatten(2), None
