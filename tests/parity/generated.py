"""Comparison of generated texts, token for token."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.models import decoding, generation
from tests.parity import replay
from tests.parity.goldens import Golden

# Defaults of the original's `generate`.
DEFAULTS = dict(
  num_beams=3, max_length=30, min_length=10, repetition_penalty=1.0
)
# What the original fixes for nucleus sampling.
SAMPLING = dict(num_beams=1, repetition_penalty=1.1, top_k=50, sample=True)
# Defaults of Hugging Face, whose lengths do not count the prompt.
HF_DEFAULTS = dict(
  num_beams=1, max_length=20, min_length=0, length_norm="generated"
)

_SETTING = re.compile(
  r"\b(num_beams|max_length|min_length|repetition_penalty|top_p)'?[=:]"
  r" ?([\d.]+)"
)
_FORBIDDEN = -1e9  # stands in the goldens for -inf


def settings_of(
  golden: Golden, name: str, defaults: dict[str, Any]
) -> decoding.Decoding:
  """Parses the generation settings in the description of an array."""
  text = re.sub(r"\[defaults:.*?\]", "", golden.meaning(name))
  number = lambda x: float(x) if "." in x.rstrip(".") else int(x.rstrip("."))
  described = {key: number(value) for key, value in _SETTING.findall(text)}
  # Descriptions of samples repeat the fixed penalty.
  return decoding.Decoding(**{**defaults, **described})


def compare_generated(
  golden: Golden,
  opened: replay.Opened,
  states: Callable[[np.ndarray], jax.Array],
  images: np.ndarray,
  prompts: dict[str, str],
) -> dict[str, np.ndarray]:
  """Compares every `<name>.sequences` of a case, with its beams and scores.

  Args:
    golden: the case.
    opened: the model.
    states: a function of images that returns the encoder states.
    images: [B, H, W, 3]; a sequence array of n rows belongs to the first n.
    prompts: prefix of a name -> prompt; the longest matching prefix is used.

  Returns:
    name -> generated ids.
  """
  generated = {}
  for match in golden.matches(r"(.+)\.sequences"):
    name = match[1]
    prompt = prompts[max(filter(name.startswith, prompts), key=len)]
    ids = opened.checkpoint.tokenizer.prompt_ids(prompt)
    is_sampled = f"{name}.drawn" in golden
    settings = settings_of(
      golden, match[0], SAMPLING if is_sampled else DEFAULTS
    )
    expected = golden.input(match[0])
    if f"{name}.beams" in golden:
      # The original returned the best one of these.
      settings = settings.replace(num_return_sequences=settings.num_beams)
    sampled = golden.input(f"{name}.drawn") if is_sampled else None
    states_of_images = states(images[: len(expected)])
    result = generate(opened, states_of_images, ids, settings, sampled)
    best = np.asarray(result.ids)[:, 0]
    generated[name] = match_width(best, expected)
    golden.compare({match[0]: generated[name]}, replay.EXACT)
    texts = opened.checkpoint.tokenizer.decode(generated[name], prompt)
    golden.compare_fact(name, texts)
    if f"{name}.beams" in golden:
      _compare_beams(golden, name, result)
    _compare_scores(
      golden, opened, name, states_of_images, expected, len(ids), settings
    )
  return generated


def _compare_beams(golden, name, result: generation.Generated) -> None:
  beams, scores = f"{name}.beams", f"{name}.beam_scores"
  flat = np.asarray(result.ids).reshape(-1, result.ids.shape[-1])
  golden.compare({beams: match_width(flat, golden.input(beams))}, replay.EXACT)
  golden.compare({scores: np.asarray(result.scores).ravel()}, replay.MODEL)


def _compare_scores(
  golden, opened, name, states, ids, prompt_length, settings
) -> None:
  """Compares the scores before each token of the golden sequences, which are
  decoded in one pass."""
  kinds = {"step_scores": _forbid, "probs": _probabilities}
  for kind, function in kinds.items():
    if (array := f"{name}.{kind}") not in golden:
      continue
    expected = golden.input(array)
    positions = prompt_length + np.arange(expected.shape[1])
    scores = _processed(
      opened.model, opened.params, states, ids, positions, settings
    )
    actual = np.stack([function(x, settings) for x in scores], axis=1)
    # The scores of a text that has ended are not used.
    ended = ids[:, positions - 1] == opened.model.config.med.tokens.sep
    running = ~np.maximum.accumulate(ended, axis=1)
    actual = np.where(running[..., None], actual, expected)
    largest = np.abs(expected[expected > _FORBIDDEN / 2]).max()
    golden.compare({array: actual}, replay.MODEL, scale=float(largest))


@replay.jit_of_model
def _processed(model, params, states, ids, positions, settings):
  """Scores of the tokens at these positions, after all penalties."""
  call = replay.bound(model, params)
  kv = call("decoder_kv", states)
  logits = call("decode", ids, jnp.ones_like(ids), kv).logits()
  sep = model.config.med.tokens.sep
  return jax.vmap(
    lambda position: decoding.process(
      logits[:, position - 1], ids, position, settings, sep
    )
  )(positions)


def _forbid(scores, settings):
  return np.where(np.isneginf(scores), _FORBIDDEN, scores)


@replay.jit
def _probabilities(scores, settings):
  kept, tokens = decoding.nucleus(scores, settings)
  rows = jnp.arange(len(tokens))[:, None]
  return jnp.zeros_like(scores).at[rows, tokens].set(jax.nn.softmax(kept))


def generate(
  opened: replay.Opened,
  states: jax.Array,
  prompt: Sequence[int],
  settings: decoding.Decoding,
  sampled: np.ndarray | None = None,
) -> generation.Generated:
  """Generates texts; `sampled` [B, L] replaces the tokens that are sampled."""
  num_positions = decoding.num_positions_for(
    settings.max_length, opened.model.config.med.max_positions
  )
  return _generate(
    (opened.model, num_positions),
    opened.params,
    states,
    np.array(prompt),
    settings,
    sampled,
  )


@replay.jit_of_model
def _generate(model_and_length, params, states, prompt, settings, sampled):
  model, num_positions = model_and_length
  pick = None
  if sampled is not None:
    pick = lambda _, position: sampled[:, position - len(prompt)]
  return generation.generate(
    model, params, states, prompt, settings, num_positions, pick=pick
  )


def match_width(ids: np.ndarray, expected: np.ndarray) -> np.ndarray:
  """Trims ids to the width of the goldens, that of their longest text.

  Raises:
    ValueError: a text is longer.
  """
  trimmed, rest = np.split(ids, [expected.shape[1]], axis=1)
  if rest.any():
    raise ValueError(f"a text has more than {expected.shape[1]} tokens")
  return trimmed
