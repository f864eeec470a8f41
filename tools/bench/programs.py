"""The programs of models that are measured, with random weights.

They are what users run: the functions of `models`, `inference.scoring` and
`train`. Neither a vocabulary nor images are needed. Except for pre-training,
which goes through `blip_jax.build`, nothing is imported beyond models and
scoring, so that a bare machine is enough.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.inference import scoring
from blip_jax.models import config as model_config
from blip_jax.models import (
  decoding,
  families,
  float8,
  generation,
  med,
  placement,
  stepwise,
)
from blip_jax.runtime import sharding
from blip_jax.tasks import answers

from . import measure

# "[DEC] a picture of"; sixteen tokens are generated after it.
PROMPT = (30522, 1037, 3861, 1997)
LENGTH = 20
NUM_BEAMS = 3
NUM_SAMPLES = 10
# Texts that are matched: of the most tokens that a text may have.
TEXT_LENGTH = 35
TEXTS_PER_IMAGE = 2
CANDIDATES = 128
# "[ENC]" and a question; answers are as short as those of VQA v2: a word or two
# of a token each, [CLS] and [SEP] not counted.
QUESTION_LENGTH = 10
ANSWER_LENGTH = 10
NUM_ANSWERS, SHORT_LIST = 3000, 128
# Captions of pre-training.
CAPTION_LENGTH = 30
QUEUE_SIZE = 57600
BERT = model_config.SpecialTokens()
VOCAB_SIZE = 30524


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a row is about.

  Attributes:
    size: of the model, one of `model_config.VARIANTS`.
    image_size: side of the images in pixels.
    dtype: as `blip_jax.load` takes it.
  """

  size: str
  image_size: int
  dtype: str

  @functools.cached_property
  def config(self) -> model_config.BlipConfig:
    sizes = model_config.variant(
      self.size,
      image_size=self.image_size,
      vocab_size=VOCAB_SIZE,
      tokens=BERT,
      dtype=float8.activations(self.dtype),
    )
    vit = placement.place(sizes.vit, jax.devices()[:1])
    return dataclasses.replace(sizes, vit=vit)

  @property
  def exact(self) -> "Setup":
    """The same in float32, in which outputs are compared."""
    return dataclasses.replace(self, dtype="float32")


def params(family: str, setup: Setup) -> med.Params:
  """Random weights; the same ones for every dtype, if they are not rounded."""
  weights = _params(family, setup.exact)
  if setup.dtype == float8.NAME:
    return float8.round_weights(weights)
  return weights


@functools.lru_cache(1)
def _params(family: str, setup: Setup) -> med.Params:
  init = lambda key: families.init(family, setup.config, key)
  weights = jax.jit(init)(jax.random.key(0))
  if "text_decoder" in weights and family != "pretrain":
    # Larger, so that no two tokens have almost the same probability.
    weights["text_decoder"] = jax.tree.map_with_path(
      lambda path, x: 3 * x if path[-1].key in _MATRICES else x,
      weights["text_decoder"],
    )
  return weights


_MATRICES = ("kernel", "word_embeddings", "position_embeddings")


def images(setup: Setup, number: int) -> np.ndarray:
  """Normalised pixels; fewer images are the first of more."""
  shape = (number, setup.image_size, setup.image_size, 3)
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def token_ids(number: int, length: int) -> np.ndarray:
  rng = np.random.default_rng(1)
  return rng.integers(1000, 30000, (number, length)).astype(np.int32)


def texts(number: int) -> scoring.Texts:
  ids = token_ids(number, TEXT_LENGTH)
  return scoring.Texts(ids, np.ones_like(ids))


def encode(setup: Setup, batch_size: int) -> measure.Program:
  """Image tokens of images."""
  model = families.build("caption", setup.config)
  weights = {"visual_encoder": params("caption", setup)["visual_encoder"]}
  function = lambda weights, pixels: model.apply(
    {"params": weights}, pixels, method="encode_image"
  )
  pixels = jnp.asarray(images(setup, batch_size))
  return measure.of_function(batch_size, function, weights, pixels)


def caption(setup: Setup, batch_size: int) -> measure.Program:
  """Captions by beam search, all of the maximal length."""
  model = families.build("caption", setup.config)
  return captioning(model, setup, batch_size, beam_search())


def beam_search(length: int = LENGTH) -> decoding.Decoding:
  return decoding.Decoding(
    length, length, num_beams=NUM_BEAMS, length_norm="generated"
  )


def sample(setup: Setup, batch_size: int, number: int) -> measure.Program:
  """Some sampled captions of each image."""
  model = families.build("caption", setup.config)
  settings = decoding.Decoding(
    LENGTH,
    LENGTH,
    num_beams=1,
    num_return_sequences=number,
    sample=True,
    top_k=50,
    top_p=0.9,
  )
  return captioning(model, setup, batch_size, settings)


def captioning(
  model: Any, setup: Setup, batch_size: int, settings: decoding.Decoding
) -> measure.Program:
  """The token ids of captions, the best ones first: [I, m, LENGTH]."""
  num_positions = decoding.num_positions_for(
    LENGTH, setup.config.med.max_positions
  )

  def generate(weights, pixels, prompt, settings):
    states = model.apply({"params": weights}, pixels, method="encode_image")
    keys = jax.random.split(jax.random.key(0), len(pixels))
    generated = generation.generate(
      model, weights, states, prompt, settings, num_positions, keys
    )
    return generated.ids[..., :LENGTH]

  return measure.of_function(
    batch_size,
    generate,
    _decoding_params(setup),
    jnp.asarray(images(setup, batch_size)),
    jnp.array(PROMPT, jnp.int32),
    settings,
  )


@functools.lru_cache(1)
def _decoding_params(setup: Setup) -> med.Params:
  """As `inference.model.Model` has them: prepared once."""
  model = families.build("caption", setup.config)
  weights = params("caption", setup)
  decoder = {"text_decoder": weights["text_decoder"]}
  prepare = jax.jit(functools.partial(stepwise.prepare, model))
  return {**weights, **prepare(decoder)}


def answer(setup: Setup, batch_size: int) -> measure.Program:
  """The token ids of answers by beam search, all of the maximal length."""

  def generate(model, weights, states, mask):
    positions = setup.config.med.max_positions
    number = decoding.num_positions_for(ANSWER_LENGTH, positions)
    settings = beam_search(ANSWER_LENGTH)
    generated = answers.generate(model, weights, states, mask, settings, number)
    return generated.ids[:, :1, :ANSWER_LENGTH]

  return answering(setup, batch_size, generate)


def rank(setup: Setup, batch_size: int) -> measure.Program:
  """Negative log-probabilities of the answers on the short lists."""

  def score(model, weights, states, mask):
    ids, lengths = map(jnp.asarray, answer_list())
    ranked = answers.rank(
      model, weights, states, mask, ids, lengths, SHORT_LIST
    )
    return ranked.nll

  return answering(setup, batch_size, score)


def answering(
  setup: Setup, batch_size: int, find: Callable[..., jax.Array]
) -> measure.Program:
  """Questions, one about each image.

  Args:
    find: (model, weights, states of the questions, mask) -> outputs.
  """
  model = families.build("vqa", setup.config)
  ids = token_ids(batch_size, QUESTION_LENGTH)

  def run(weights, pixels, ids):
    apply = functools.partial(model.apply, {"params": weights})
    image_kv = apply(apply(pixels, method="encode_image"), method="image_kv")
    mask = jnp.ones_like(ids)
    states = apply(ids, mask, image_kv, method="fuse")
    return find(model, weights, states, mask)

  return measure.of_function(
    batch_size,
    run,
    params("vqa", setup),
    jnp.asarray(images(setup, batch_size)),
    jnp.asarray(ids),
  )


def answer_list() -> tuple[np.ndarray, np.ndarray]:
  """Ids and lengths: [CLS], random tokens, [SEP] and padding."""
  rng = np.random.default_rng(2)
  lengths = np.minimum(2 + rng.geometric(0.7, NUM_ANSWERS), 8).astype(np.int32)
  ids = rng.integers(1000, 30000, (NUM_ANSWERS, lengths.max())).astype(np.int32)
  place, last = np.arange(ids.shape[1]), lengths[:, None] - 1
  ids = np.where(place == last, BERT.sep, np.where(place > last, BERT.pad, ids))
  ids[:, 0] = BERT.cls
  return ids, lengths


def scorer(setup: Setup) -> scoring.Scorer:
  model = families.build("itm", setup.config)

  def apply(weights, *args, method, **kwargs):
    return model.apply({"params": weights}, *args, method=method, **kwargs)

  names = "image_features", "text_feat", "image_kv", "match"
  predict_fns = {name: functools.partial(apply, method=name) for name in names}
  return scoring.Scorer(predict_fns, sharding.one_device())


def filter(setup: Setup, batch_size: int) -> measure.Program:
  """ITM logits of images, each with some texts of its own: [I, m, 2]."""
  score, weights = scorer(setup), params("itm", setup)
  pixels = jnp.asarray(images(setup, batch_size))
  number = batch_size * TEXTS_PER_IMAGE
  tokens = texts(number)
  rows = np.arange(number).reshape(batch_size, -1)

  def run() -> np.ndarray:
    embeds, _ = score.image_features(weights, pixels)
    return np.stack(score.itm_logits(weights, embeds, tokens, [*rows]))

  return measure.Program(
    batch_size, run, nbytes=measure.nbytes((weights, pixels))
  )


def rerank(setup: Setup, batch_size: int) -> measure.Program:
  """ITM logits of encoded images, all with the same texts: [I, m, 2]."""
  score, weights = scorer(setup), params("itm", setup)
  embeds = image_embeds(setup, batch_size)
  candidates = [np.arange(CANDIDATES)] * batch_size
  run = lambda: np.stack(
    score.itm_logits(weights, embeds, texts(CANDIDATES), candidates)
  )
  return measure.Program(
    batch_size * CANDIDATES, run, nbytes=measure.nbytes((weights, embeds))
  )


def image_embeds(setup: Setup, batch_size: int) -> jax.Array:
  pixels = jnp.asarray(images(setup, batch_size))
  embeds, _ = scorer(setup).image_features(params("itm", setup), pixels)
  return embeds


class Pretraining:
  """The pre-training task of a size, its data and its step.

  Args:
    setup: see `Setup`.
    batch_size: examples of a step.
    kind: class of the task, in place of the package's own.
  """

  def __init__(self, setup: Setup, batch_size: int, kind: Any = None):
    # Imported here because it needs ml_collections.
    from blip_jax import build
    from blip_jax.data import tokenizer
    from blip_jax.tasks import pretrain

    config = pretrain.defaults()
    config.model.variant = setup.size
    config.model.image_size = setup.image_size
    config.model.dtype = setup.dtype
    config.pretrain.queue_size = QUEUE_SIZE
    config.batch_size = batch_size
    config.optim.steps_per_epoch = config.num_steps = 1000
    self.mesh = sharding.one_device()
    self.run = build.build(config, self.mesh, tokenizer.stand_in())
    self.task = self.run.task
    if kind is not None:
      self.task = kind(**vars(self.task))
    ids = token_ids(batch_size, CAPTION_LENGTH)
    pixels = np.random.default_rng(0).integers(
      0, 256, (batch_size, setup.image_size, setup.image_size, 3), np.uint8
    )
    batch = {
      "image": pixels,
      "input_ids": ids,
      "attention_mask": np.ones_like(ids),
    }
    self.batch = sharding.put_batch(batch, self.mesh)

  def step(self) -> measure.Program:
    """`train.make_train_step`, a step after the other."""
    from blip_jax import train

    state = self.run.create_state()
    step = train.make_train_step(self.task, self.run.optimiser[0], 0)
    with sharding.activate(self.mesh):
      compiled = step.lower(state, self.batch, 0).compile()
    count = itertools.count()

    def run() -> Any:
      nonlocal state
      state, metrics = compiled(state, self.batch, next(count))
      return jax.block_until_ready(metrics)

    return measure.Program(len(self.batch["image"]), run, compiled)

  def losses(self) -> np.ndarray:
    """ITC, ITM and LM of the first step, without dropout."""
    state = self.run.create_state()
    names = "loss_itc", "loss_itm", "loss_lm"

    @jax.jit
    def loss(state, batch):
      _, (_, metrics) = self.task.loss(
        self.task.clamp(state.params),
        state.momentum,
        batch,
        rng=jax.random.key(0),
        step=state.step,
        train=False,
      )
      return jnp.stack([metrics[name] for name in names])

    with sharding.activate(self.mesh):
      return np.asarray(loss(state, self.batch))


def pretrain(setup: Setup, batch_size: int) -> measure.Program:
  """A training step of pre-training."""
  return Pretraining(setup, batch_size).step()


def pretrain_losses(setup: Setup, batch_size: int) -> measure.Program:
  """What is compared of pre-training, in place of the outputs of a step."""
  return measure.Program(batch_size, Pretraining(setup, batch_size).losses)
