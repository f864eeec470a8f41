"""The model families of the paper: their parts and their initialisation.

All families but NLVR use the module `blip.Blip`; they differ in its parts:

  family     visual_encoder  text_encoder  text_decoder  heads
  feature    yes             yes
  caption    yes                           yes
  vqa        yes             yes           yes
  itm        yes             yes                         projections, ITM
  retrieval  yes             yes                         projections, ITM, temp
  dialog     yes             yes                         ITM
  pretrain   yes             yes           yes, tied     projections, ITM, temp
  nlvr       yes             yes, two images             cls_head

Only pre-training shares parameters between its text towers.  It stores them
once, and `tying.tie` copies them into the decoder.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from blip_jax.models import blip, initial, med, nlvr, tying
from blip_jax.models import config as model_config

# Temperature of ITC, by which similarities are divided.
INITIAL_TEMP = 0.07


def _feature(model, image, *text):
  model.encode_text(*text)
  model.fuse(*text, model.image_kv(model.encode_image(image)))


def _caption(model, image, *text):
  model.decode(*text, model.decoder_kv(model.encode_image(image)))


def _vqa(model, image, *text):
  image_kv = model.image_kv(model.encode_image(image))
  question = model.fuse(*text, image_kv)
  model.decode(*text, model.decoder_kv(question))


def _itm(model, image, *text):
  image_embeds, _ = model.image_features(image)
  model.text_feat(*text)
  model.match(*text, model.image_kv(image_embeds))


def _dialog(model, image, *text):
  model.encode_text(*text)
  model.match(*text, model.image_kv(model.encode_image(image)))


def _pretrain(model, image, *text):
  _itm(model, image, *text)
  _caption(model, image, *text)


def _nlvr(model, image, *text):
  model(jnp.concatenate([image, image]), *text)


# A forward pass that uses every parameter of a family, so that `init` creates
# all of them.
_FORWARD: dict[str, Callable] = {
  "feature": _feature,
  "caption": _caption,
  "vqa": _vqa,
  "itm": _itm,
  "retrieval": _itm,
  "pretrain": _pretrain,
  "nlvr": _nlvr,
  "dialog": _dialog,
}
FAMILIES = tuple(_FORWARD)
# Families with a learned temperature, momentum encoders and queues.
WITH_MOMENTUM = ("retrieval", "pretrain")


def build(family: str, config: model_config.BlipConfig) -> nn.Module:
  """Returns the module of a family."""
  if family == "nlvr":
    return nlvr.Nlvr(config)
  return blip.Blip(config, answers=family == "vqa")


def init(
  family: str, config: model_config.BlipConfig, rng: PRNGKeyArray
) -> med.Params:
  """Returns newly initialised parameters, as they are stored.

  For shapes alone, see `abstract`.
  """
  return initial.sample(starts(family, config), rng)


def starts(family: str, config: model_config.BlipConfig) -> med.Params:
  """Returns how each parameter starts, an `initial.Start`, as it is stored."""
  image = jax.ShapeDtypeStruct((1, *config.vit.image_size, 3), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  init = functools.partial(build(family, config).init, method=_FORWARD[family])
  variables = jax.eval_shape(init, jax.random.key(0), image, ids, ids)
  params = dict(variables["params"])
  if family in WITH_MOMENTUM:
    temp = jax.ShapeDtypeStruct((), jnp.float32)
    params["temp"] = initial.Start(temp, initial.CONSTANT, INITIAL_TEMP)
  return tying.drop_tied(params) if family == "pretrain" else params


@functools.lru_cache
def abstract(family: str, config: model_config.BlipConfig) -> med.Params:
  """Returns shapes and dtypes of the parameters of a family."""
  return initial.shapes(starts(family, config))
