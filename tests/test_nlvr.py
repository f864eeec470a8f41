"""NLVR2: two images for each statement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.models import blip, families, nlvr
from blip_jax.tasks import nlvr as nlvr_task
from tests import helpers

MODEL = blip.Blip(helpers.BLIP)
RNG = jax.random.key(0)


def test_equal_images_and_copied_attention_equal_one_image():
  """Two copies of a cross-attention, each applied to the same image, give the
  output of a single one: how NLVR fine-tuning starts."""
  single = families.init("feature", helpers.BLIP, RNG)
  pair = families.init("nlvr", helpers.BLIP, RNG)
  layers = dict(single["text_encoder"]["layers"])
  cross = dict(layers["crossattention"])
  ln = cross.pop("ln")
  layers["crossattention"] = {"image_0": cross, "image_1": cross, "ln": ln}
  pair["text_encoder"]["layers"] = layers
  for name in ("word_embeddings", "position_embeddings", "ln_embed"):
    pair["text_encoder"][name] = single["text_encoder"][name]
  pair["visual_encoder"] = single["visual_encoder"]
  batch = helpers.pair_batch()
  text = batch["input_ids"], batch["attention_mask"]
  logits = nlvr.Nlvr(helpers.BLIP).apply(
    {"params": pair}, jnp.concatenate([batch["image"]] * 2), *text
  )
  apply = functools.partial(MODEL.apply, {"params": single})
  kv = apply(apply(batch["image"], method="encode_image"), method="image_kv")
  fused = apply(*text, kv, method="fuse")
  head = nlvr.ClsHead(helpers.MED.width)
  expected = head.apply({"params": pair["cls_head"]}, fused[:, 0])
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_the_loss_of_statements_about_two_images():
  task = nlvr_task.Nlvr(nlvr.Nlvr(helpers.BLIP))
  batch = helpers.pair_batch(label=jnp.array([1, 0, 1, 1]))
  batch["image_0"] = batch["image_1"] = batch.pop("image")
  loss, (momentum, metrics) = task.loss(
    task.init(RNG), None, batch, rng=RNG, step=jnp.int32(0), train=False
  )
  assert momentum is None and 0 <= metrics["accuracy"] <= 1
  np.testing.assert_allclose(loss, np.log(2), atol=0.3)
