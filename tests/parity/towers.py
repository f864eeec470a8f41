"""Cases of a single tower."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.convert import model_configs
from blip_jax.models import config as model_config
from blip_jax.models import med, stack, vit
from tests import helpers
from tests.parity import replay
from tests.parity.goldens import Golden


def image_tower(golden: Golden) -> None:
  leaves = golden.leaves(*golden.checkpoints, "visual_encoder.")
  params = replay.tree(leaves, "params/visual_encoder")
  sizes = golden.config["vit"]
  config = model_config.ViTConfig(
    image_size=(sizes["image_size"],) * 2,
    mlp_dim=params["blocks"]["fc_in"]["kernel"].shape[-1],
    **model_configs.read_hints(sizes).vit,
  )
  model = vit.ViT(config)
  paths = {"": "Block", "_attn": "attention", "_mlp": "fc_out"}

  def loss(params, image, cotangent):
    with replay.recorded("patch_embed", *paths.values()) as seen:
      features = model.apply({"params": stack.unstack(params)}, image)
    return jnp.mean(features * cotangent), (features, dict(seen))

  inputs = golden.image("image"), golden.input("cotangent")
  run = replay.jit(jax.value_and_grad(loss, has_aux=True))
  (value, (features, seen)), grads = run(params, *inputs)
  actual = {"patch_embed": seen["patch_embed"][0]} | {
    f"block{i}{part}": seen[path][i]
    for part, path in paths.items()
    for i in range(config.depth)
  }
  golden.compare({**actual, "features": features}, replay.MODULE)
  golden.compare({"loss": value, "loss__f64": value}, replay.LOSS)
  tower = replay.state_of("feature", {"visual_encoder": grads})
  replay.compare_gradients(
    golden, {n.removeprefix("visual_encoder."): x for n, x in tower.items()}
  )

  resize = replay.jit(vit.resize_pos_embed, static_argnums=(1, 2))
  for match in golden.matches(r"pos_embed_to_grid\d+"):
    side = math.isqrt(golden.shape(match[0])[1] - 1)
    actual = resize(params["pos_embed"], config.grid, (side, side))
    golden.compare({match[0]: actual}, replay.MODULE)
  if "image_big" in golden:
    features = replay.jit(model.apply)(
      {"params": params}, golden.image("image_big")
    )
    golden.compare({"features_big": features}, replay.MODULE)


def text_tower(golden: Golden) -> None:
  leaves = [golden.leaves(file) for file in golden.checkpoints]
  encoder, decoder = (
    next(filter(None, (replay.tree(x, f"params/{tower}") for x in leaves)))
    for tower in ("text_encoder", "text_decoder")
  )
  config = model_config.MedConfig(
    vocab_size=encoder["word_embeddings"].shape[0],
    dropout=0.0,
    **model_configs.read_hints(golden.config["text"]).med,
  )
  texts = golden.tokens("", golden.fact("captions"))
  names = "encoder_hidden_states", "encoder_attention_mask"
  inputs = *texts, *map(golden.input, names)
  width = golden.shape("encoder_hidden_states")[-1]
  model = med.Med(config, width)
  golden.compare(_encode(model, encoder, *inputs), replay.MODULE)
  model = med.Med(config, width, with_lm_head=True)
  predicted, outputs = _decode(model, decoder, *inputs)
  golden.compare(outputs, replay.MODULE)
  labels = golden.input("dec.labels")
  mean = replay.lm_loss(predicted, labels, 0.1)
  golden.compare({"dec.loss_mean": mean.smoothed}, replay.MODULE)
  by_text = helpers.lm_loss_per_text(outputs["dec.logits"], labels, 0.1)
  golden.compare({"dec.loss_none": by_text}, replay.MODULE)
  if "dec_cached.logits" in golden:
    steps = golden.shape("dec_cached.logits")[1]
    length = golden.shape("dec_cached.past_key_l0")[2]
    actual = _decode_with_cache(model, steps, length, decoder, *inputs)
    golden.compare(actual, replay.MODULE)


@replay.jit_of_model
def _encode(model, params, ids, mask, states, states_mask):
  """The encoder's modes, layer by layer."""
  depth = model.config.depth
  call = replay.bound(model, stack.unstack(params))
  kv = call("encoder_kv", states)
  outputs = {}
  for mode, cross in {"text": (), "multimodal": (kv, states_mask)}.items():
    # This dropout of an attention layer gets the probabilities.
    with replay.recorded("ln_embed", "Layer", "attention/drop") as seen:
      call(None, ids, mask, *cross)
    outputs[f"{mode}.hidden0"] = seen["ln_embed"][0]
    for i in range(depth):
      outputs[f"{mode}.hidden{i + 1}"] = seen["Layer"][i][0]
      outputs[f"{mode}.attn{i}"] = seen["attention/drop"][i]
  causal = call(None, ids, mask, kv, states_mask, causal=True)
  return {**outputs, "multimodal_causal.last": causal}


@replay.jit_of_model
def _decode(model, params, ids, mask, states, states_mask):
  call = replay.bound(model, params)
  kv = call("encoder_kv", states)
  hidden = call(None, ids, mask, kv, states_mask, causal=True)
  predicted = call("predict", hidden)
  logits = predicted.logits()
  text = call(None, ids, mask, causal=True)
  return predicted, {
    "dec.logits": logits,
    "dec.return_logits": logits[:, :-1],
    "dec_text.logits": call("predict", text).logits(),
  }


def _decode_with_cache(model, steps, length, params, ids, mask, states, seen):
  """Decodes the first tokens at once, the others one by one."""
  cache = replay.bound(model, params)("init_cache", len(ids), length)
  starts = range(length - steps + 1, length)
  logits = []
  for new in np.split(ids[:, :length], starts, axis=1):
    last, cache = _extend(model, params, new, cache, states, seen)
    logits.append(last)
  outputs = {"dec_cached.logits": jnp.stack(logits, axis=1)}
  for layer, (key, value) in enumerate(zip(*cache.kv[0], strict=True)):
    outputs[f"dec_cached.past_key_l{layer}"] = key[:, :, :, 0]
    outputs[f"dec_cached.past_value_l{layer}"] = value[:, :, :, 0]
  return outputs


@replay.jit_of_model
def _extend(model, params, ids, cache, states, states_mask):
  call = replay.bound(model, params)
  kv = call("encoder_kv", states)
  hidden, cache = call("extend", ids, cache, kv, states_mask)
  return call("predict", hidden[:, -1:]).logits()[:, 0], cache
