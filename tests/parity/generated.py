"""Cases of texts that a decoder wrote."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.models import decoding, generation
from tests.parity import replay
from tests.parity.goldens import Golden

# Of the original's `generate`, where a case does not say otherwise.
DEFAULTS = dict(
  num_beams=3, max_length=30, min_length=10, repetition_penalty=1.0
)
# What it fixes, whatever it is asked for, when it draws.
SAMPLING = dict(num_beams=1, repetition_penalty=1.1, top_k=50, sample=True)
# Of Hugging Face's, where the lengths are those of the new text.
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
  """What the words about an array say that it was made with."""
  text = re.sub(r"\[defaults:.*?\]", "", golden.meaning(name))
  number = lambda x: float(x) if "." in x.rstrip(".") else int(x.rstrip("."))
  said = {key: number(value) for key, value in _SETTING.findall(text)}
  # Of sampling, the words tell the fixed penalty too.
  return decoding.Decoding(**{**defaults, **said})


def compare_written(
  golden: Golden,
  opened: replay.Opened,
  states: Callable[[np.ndarray], jax.Array],
  pictures: np.ndarray,
  prompts: dict[str, str],
) -> dict[str, np.ndarray]:
  """Compares every `<name>.sequences` of a case, and what goes with it;
  returns our ids by those names.

  Args:
    states: what the decoder looks at, of pictures.
    pictures: of which a case takes the first few.
    prompts: by the beginning of a case's name; the longest that fits counts.
  """
  written = {}
  for match in golden.matches(r"(.+)\.sequences"):
    name = match[1]
    prompt = prompts[max(filter(name.startswith, prompts), key=len)]
    ids = opened.checkpoint.tokenizer.prompt_ids(prompt)
    sampled = f"{name}.drawn" in golden
    settings = settings_of(golden, match[0], SAMPLING if sampled else DEFAULTS)
    theirs = golden.input(match[0])
    if f"{name}.beams" in golden:
      # All of which the best was returned.
      settings = settings.replace(num_return_sequences=settings.num_beams)
    drawn = golden.input(f"{name}.drawn") if sampled else None
    seen = states(pictures[: len(theirs)])
    found = write(opened, seen, ids, settings, drawn)
    written[name] = like(found.ids[:, 0], theirs)
    golden.compare({match[0]: written[name]}, replay.EXACT)
    texts = opened.checkpoint.tokenizer.decode(written[name], prompt)
    golden.compare_fact(name, texts)
    if f"{name}.beams" in golden:
      _compare_beams(golden, name, found)
    _compare_scores(golden, opened, name, seen, theirs, len(ids), settings)
  return written


def _compare_beams(golden, name, found: generation.Generated) -> None:
  beams, scores = f"{name}.beams", f"{name}.beam_scores"
  flat = found.ids.reshape(-1, found.ids.shape[-1])
  golden.compare({beams: like(flat, golden.input(beams))}, replay.EXACT)
  golden.compare({scores: np.ravel(found.scores)}, replay.MODEL)


def _compare_scores(
  golden, opened, name, states, ids, prompt_length, settings
) -> None:
  """Scores behind each token of theirs, for which they are all looked at at
  once."""
  kinds = {"step_scores": _forbid, "probs": _probabilities}
  for kind, function in kinds.items():
    if (array := f"{name}.{kind}") not in golden:
      continue
    theirs = golden.input(array)
    positions = prompt_length + np.arange(theirs.shape[1])
    found = _processed(
      opened.model, opened.params, states, ids, positions, settings
    )
    ours = np.stack([function(x, settings) for x in found], axis=1)
    # Of texts that had ended before, nobody reads the scores.
    ended = ids[:, positions - 1] == opened.model.config.med.tokens.sep
    running = ~np.maximum.accumulate(ended, axis=1)
    ours = np.where(running[..., None], ours, theirs)
    largest = np.abs(theirs[theirs > _FORBIDDEN / 2]).max()
    golden.compare({array: ours}, replay.MODEL, scale=float(largest))


@replay.jit_of_model
def _processed(model, params, states, ids, positions, settings):
  """Scores of the tokens at some positions, as they are picked by."""
  call = replay.bound(model, params)
  kv = call("decoder_kv", states)
  logits = call("decode", ids, jnp.ones_like(ids), kv)
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


def write(
  opened: replay.Opened,
  states: jax.Array,
  prompt: Sequence[int],
  settings: decoding.Decoding,
  drawn: np.ndarray | None = None,
) -> generation.Generated:
  """Texts; `drawn` are the tokens of each step, for texts that are sampled."""
  room = decoding.num_positions_for(
    settings.max_length, opened.model.config.med.max_positions
  )
  return _write(
    (opened.model, room),
    opened.params,
    states,
    np.array(prompt),
    settings,
    drawn,
  )


@replay.jit_of_model
def _write(model_and_room, params, states, prompt, settings, drawn):
  model, room = model_and_room
  pick = None
  if drawn is not None:
    pick = lambda _, position: drawn[:, position - len(prompt)]
  return generation.generate(
    model, params, states, prompt, settings, room, pick=pick
  )


def like(ours: jax.Array, theirs: np.ndarray) -> np.ndarray:
  """Ours, as wide as theirs, which end with the longest text."""
  ours = np.asarray(ours)
  ours, behind = np.split(ours, [theirs.shape[1]], axis=1)
  if behind.any():
    raise ValueError(f"texts of more than {theirs.shape[1]} tokens")
  return ours
