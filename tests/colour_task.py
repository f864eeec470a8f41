"""A task that knows colours: evaluators are tested on what it should score."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.data import examples, rejects, scenes, transforms
from blip_jax.evaluators import base
from blip_jax.models import config, generation
from blip_jax.runtime import sharding, train_state
from tests import helpers

COLOURS = ("red", "green", "blue", "yellow", "black", "pink", "cyan")


class ColourImages(list):
  """Records of images of one colour each, whose caption is the colour."""

  def __init__(self, number=7, bad=(), captions=1):
    for i in range(number):
      pixels = np.full((8, 8, 3), scenes.COLOURS[COLOURS[i]], np.uint8)
      caption = [COLOURS[i], f"a {COLOURS[i]} square"][:captions]
      self.append(
        {
          "image": b"" if i in bad else pixels,
          "caption": caption,
          "id": f"images:{i}",
        }
      )


def colour_split(source, batch_size=4):
  """A split for evaluators, on a mesh of eight devices."""
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
  example = examples.PairExample(
    helpers.scenes_tokenizer(),
    transforms.EvalImage(8),
    max_words=5,
    max_length=6,
  )
  bad = rejects.BadSamples(max_fraction=0.5)
  return base.Split(source, example, batch_size, mesh, bad)


def _palette():
  return jnp.array([scenes.COLOURS[c] for c in COLOURS], jnp.float32)


def _colour_ids():
  ids, _ = helpers.scenes_tokenizer().encode(list(COLOURS), 3)
  return jnp.asarray(ids[:, 1])


def colour_of_image(image):
  """One-hot of the colour of an image."""
  distance = jnp.abs(image[:, :1, 0].astype(jnp.float32) - _palette()[None])
  return jax.nn.one_hot(distance.sum(-1).argmin(-1), len(COLOURS))


def colour_of_text(ids, mask):
  """One-hot of the colour that a text names, where the mask lets one see it."""
  named = (ids[:, :, None] == _colour_ids()[None, None]) & (mask[..., None] > 0)
  return named.any(1).astype(jnp.float32)


def _match_colours(params, ids, mask, image_kv, legacy_cls=False):
  images = jnp.repeat(image_kv, len(ids) // len(image_kv), 0)
  score = (images * colour_of_text(ids, mask)).sum(-1)
  return jnp.stack([0.5 * jnp.ones(len(ids)), score], axis=-1)


def _caption_colours(params, image, prompt, settings, num_positions):
  ids = _colour_ids()[colour_of_image(image).argmax(-1)]
  texts = jnp.zeros((len(ids), 1, num_positions), jnp.int32)
  texts = texts.at[:, 0, : len(prompt)].set(prompt[None])
  texts = texts.at[:, 0, len(prompt)].set(ids)
  return generation.Generated(texts, jnp.zeros(texts.shape), jnp.zeros(1))


class ColourTask(helpers.StubTask):
  """Gives the right answer about every image of `ColourImages`."""

  # The part of a model that evaluators read.
  model = types.SimpleNamespace(
    config=config.variant(
      "tiny",
      image_size=8,
      vocab_size=helpers.scenes_tokenizer().vocab_size,
      tokens=config.SpecialTokens(**helpers.scenes_tokenizer().special_ids),
    )
  )

  predict_fns = types.MappingProxyType(
    {
      "image_features": lambda params, image: (
        colour_of_image(image),
        colour_of_image(image),
      ),
      "text_feat": lambda params, ids, mask: colour_of_text(ids, mask),
      "image_kv": lambda params, image_embeds: image_embeds,
      "match": _match_colours,
      "caption": _caption_colours,
    }
  )

  def __init__(self, **predict_fns):
    """Replaces some of the functions."""
    self.predict_fns = {**type(self).predict_fns, **predict_fns}

  def loss(self, params, momentum, batch, *, rng, step, train=True):
    assert not train
    loss = batch["image"].astype(jnp.float32).mean()
    return loss, (momentum, {"loss": loss, "temp": loss})


def evaluate(evaluator, params=None):
  """The metrics of an evaluator, for a state at step 5."""
  state = train_state.TrainState(
    step=np.int32(5), params=params or {}, opt_state=None, momentum=None
  )
  return dict(evaluator.run(state))
