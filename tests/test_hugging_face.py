"""Live against `transformers`, in both directions, with tiny random models."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import blip_jax
from blip_jax.convert import opening, write
from tests import helpers

torch = pytest.importorskip("torch", reason="needs the extra [parity]")

pytestmark = pytest.mark.parity

TINY = helpers.GOLDEN / "tokenizer" / "tiny"
WIDTH, VOCAB = 32, 424


def make_theirs(kind):
  """A random model of theirs, with numbers of heads that no shape tells."""
  text = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    encoder_hidden_size=WIDTH,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=48,
    bos_token_id=422,
    eos_token_id=3,
    sep_token_id=3,
    pad_token_id=0,
    label_smoothing=0.1,
  )
  vision = dict(
    hidden_size=WIDTH,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=8,
    image_size=24,
    patch_size=8,
    layer_norm_eps=1e-6,
  )
  config = transformers.BlipConfig(
    text_config=text, vision_config=vision, image_text_hidden_size=20
  )
  torch.manual_seed(0)
  model = getattr(transformers, write.HF_CLASSES[kind])(config).eval()
  with torch.no_grad():
    # Fresh biases and norms are 0 and 1, which hides a mistaken name.
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def inputs():
  rng = np.random.default_rng(0)
  image = rng.standard_normal((2, 24, 24, 3)).astype(np.float32)
  ids = rng.integers(4, VOCAB - 2, (2, 7))
  mask = np.ones_like(ids)
  mask[1, 5:] = 0
  return image, ids, mask


def theirs_of(image, ids, mask):
  return {
    "pixel_values": torch.from_numpy(image.transpose(0, 3, 1, 2).copy()),
    "input_ids": torch.from_numpy(ids),
    "attention_mask": torch.from_numpy(mask),
  }


def caption(model, image, ids, mask):
  kv = model.apply(
    model.apply(image, method="encode_image"), method="decoder_kv"
  )
  return model.apply(ids, mask, kv, method="decode")


def caption_theirs(model, image, ids, mask):
  return model(**theirs_of(image, ids, mask)).logits


def itm(model, image, ids, mask):
  embeds, image_feat = model.apply(image, method="image_features")
  kv = model.apply(embeds, method="image_kv")
  logits = model.apply(ids, mask, kv, legacy_cls=True, method="match")
  text_feat = model.apply(ids, mask, method="text_feat")
  return jnp.concatenate([logits, image_feat @ text_feat.T], axis=1)


def itm_theirs(model, image, ids, mask):
  given = theirs_of(image, ids, mask)
  logits = model(**given, use_itm_head=True).itm_score
  return torch.cat([logits, model(**given, use_itm_head=False).itm_score], 1)


def vqa(model, image, ids, mask):
  kv = model.apply(model.apply(image, method="encode_image"), method="image_kv")
  question = model.apply(ids, mask, kv, legacy_cls=True, method="fuse")
  kv = model.apply(question, method="decoder_kv")
  answer = ids[:, ::-1]
  return model.apply(
    answer, np.ones_like(mask), kv, encoder_mask=mask, method="decode"
  )


def vqa_theirs(model, image, ids, mask):
  given = theirs_of(image, ids, mask)
  embeds = model.vision_model(given["pixel_values"])[0]
  question = model.text_encoder(
    given["input_ids"],
    attention_mask=given["attention_mask"],
    encoder_hidden_states=embeds,
    encoder_attention_mask=torch.ones(embeds.shape[:2]),
  )[0]
  answer = given["input_ids"].flip(1).clone()
  answer[:, 0] = 422
  return model.text_decoder(
    input_ids=answer,
    attention_mask=torch.ones_like(answer),
    encoder_hidden_states=question,
    encoder_attention_mask=given["attention_mask"],
  ).logits


CASES = {
  "caption": (caption, caption_theirs),
  "itm": (itm, itm_theirs),
  "vqa": (vqa, vqa_theirs),
}


@pytest.mark.parametrize("kind", CASES)
def test_both_directions(tmp_path, kind):
  ours_says, theirs_says = CASES[kind]
  theirs = make_theirs(kind)
  theirs.save_pretrained(tmp_path / "theirs")
  image, ids, mask = inputs()
  # What each side writes itself at position 0, we write in both.
  ids[:, 0] = {"caption": 422}.get(kind, 2)
  if kind == "vqa":
    # transformers 5 loses the question's mask on the way to its decoder.
    mask[:] = 1
  with torch.no_grad():
    expected = theirs_says(theirs, image, ids, mask).numpy()

  ours = blip_jax.load(tmp_path / "theirs", tokenizer=TINY)
  np.testing.assert_allclose(
    ours_says(ours, image, ids, mask), expected, rtol=1e-4, atol=1e-4
  )

  # Out again, as a folder that they load without a word.
  checkpoint = opening.open_checkpoint(tmp_path / "theirs", tokenizer=TINY)
  write.write(checkpoint, tmp_path / "again", "hf")
  again, loading = type(theirs).from_pretrained(
    tmp_path / "again", output_loading_info=True
  )
  assert not loading["missing_keys"] and not loading["unexpected_keys"]
  assert not loading["mismatched_keys"]
  with torch.no_grad():
    found = theirs_says(again.eval(), image, ids, mask).numpy()
  np.testing.assert_array_equal(found, expected)


def test_their_processor_prepares_what_ours_does(tmp_path):
  """Size and statistics beside the weights, and a tokenizer with our ids."""
  theirs = make_theirs("caption")
  theirs.save_pretrained(tmp_path / "theirs")
  checkpoint = opening.open_checkpoint(tmp_path / "theirs", tokenizer=TINY)
  write.write(checkpoint, tmp_path / "ours", "hf")
  texts = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
  expected = checkpoint.tokenizer.encode(["a dog on a beach"], 8)[0]
  found = texts("a dog on a beach", padding="max_length", max_length=8)
  np.testing.assert_array_equal(found["input_ids"], expected[0])
  config = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert config["vision_config"]["num_attention_heads"] == 8
  assert config["text_config"]["bos_token_id"] == 422


def test_eight_text_heads_of_a_base_model_are_twelve():
  """transformers' default for a BLIP text tower that says nothing."""
  from blip_jax.convert import model_configs

  config = transformers.BlipConfig(text_config={"hidden_size": 768}).to_dict()
  config["text_config"]["num_attention_heads"] = 8
  hints = model_configs.read_hints(config)
  assert hints.med["num_heads"] == 12
  assert any("num_attention_heads is 8" in text for text in hints.warnings)
