"""NLVR2: two images for each statement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.models import blip, nlvr
from blip_jax.tasks import nlvr as nlvr_task
from tests import helpers

MODEL = blip.Blip(helpers.BLIP)
RNG = jax.random.key(0)


def test_equal_images_and_copied_attention_equal_one_image():
  """Two copies of a cross-attention, each applied to the same image, give the
  output of a single one: how NLVR fine-tuning starts."""
  single = helpers.init("feature", helpers.BLIP, RNG)
  pair = helpers.init("nlvr", helpers.BLIP, RNG)
  layers = dict(single["text_encoder"]["layers"])
  cross = dict(layers["crossattention"])
  ln = cross.pop("ln")
  layers["crossattention"] = {"image_0": cross, "image_1": cross, "ln": ln}
  pair["text_encoder"]["layers"] = layers
  for name in ("word_embeddings", "position_embeddings", "ln_embed"):
    pair["text_encoder"][name] = single["text_encoder"][name]
  pair["visual_encoder"] = single["visual_encoder"]
  batch = helpers.pair_batch()

  @jax.jit
  def logits(params, image, *text):
    images = jnp.concatenate([image, image])
    return nlvr.Nlvr(helpers.BLIP).apply({"params": params}, images, *text)

  @jax.jit
  def expected(params, head, image, *text):
    apply = functools.partial(MODEL.apply, {"params": params})
    kv = apply(apply(image, method="encode_image"), method="image_kv")
    fused = apply(*text, kv, method="fuse")
    return nlvr.ClsHead(helpers.MED.width).apply({"params": head}, fused[:, 0])

  inputs = batch["image"], batch["input_ids"], batch["attention_mask"]
  np.testing.assert_allclose(
    logits(pair, *inputs),
    expected(single, pair["cls_head"], *inputs),
    atol=1e-5,
  )


def test_the_loss_of_statements_about_two_images():
  task = nlvr_task.Nlvr(nlvr.Nlvr(helpers.BLIP))
  batch = helpers.pair_batch(label=jnp.array([1, 0, 1, 1]))
  batch["image_0"] = batch["image_1"] = batch.pop("image")
  compute = functools.partial(
    task.loss, rng=RNG, step=jnp.int32(0), train=False
  )
  params = helpers.init("nlvr", helpers.BLIP, RNG)
  loss, (momentum, metrics) = jax.jit(compute)(params, None, batch)
  assert momentum is None and 0 <= metrics["accuracy"] <= 1
  np.testing.assert_allclose(loss, np.log(2), atol=0.3)
