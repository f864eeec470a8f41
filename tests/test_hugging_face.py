"""Compared with `transformers`, in both directions, on tiny random models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import blip_jax
from blip_jax.convert import model_configs, opening, write
from blip_jax.tasks import dialog as dialog_task
from tests import helpers

torch = pytest.importorskip("torch", reason="needs the extra [parity]")

pytestmark = pytest.mark.parity

WIDTH, VOCAB = 32, 424


def make_hf_model(kind):
  """A random model with numbers of heads that no shape determines."""
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
    # Initial biases and norms are 0 and 1, which would hide swapped names.
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def random_inputs():
  rng = np.random.default_rng(0)
  image = rng.standard_normal((2, 24, 24, 3)).astype(np.float32)
  ids = rng.integers(4, VOCAB - 2, (2, 7))
  mask = np.ones_like(ids)
  mask[1, 5:] = 0
  return image, ids, mask


def hf_inputs(image, ids, mask):
  return {
    "pixel_values": torch.from_numpy(image.transpose(0, 3, 1, 2).copy()),
    "input_ids": torch.from_numpy(ids),
    "attention_mask": torch.from_numpy(mask),
  }


def caption(model, image, ids, mask):
  kv = model.apply(
    model.apply(image, method="encode_image"), method="decoder_kv"
  )
  return model.apply(ids, mask, kv, method="decode").logits()


def hf_caption(model, image, ids, mask):
  return model(**hf_inputs(image, ids, mask)).logits


def itm(model, image, ids, mask):
  embeds, image_feat = model.apply(image, method="image_features")
  kv = model.apply(embeds, method="image_kv")
  logits = model.apply(ids, mask, kv, legacy_cls=True, method="match")
  text_feat = model.apply(ids, mask, method="text_feat")
  return jnp.concatenate([logits, image_feat @ text_feat.T], axis=1)


def hf_itm(model, image, ids, mask):
  inputs = hf_inputs(image, ids, mask)
  logits = model(**inputs, use_itm_head=True).itm_score
  return torch.cat([logits, model(**inputs, use_itm_head=False).itm_score], 1)


def dialog(model, image, ids, mask):
  """The texts are captions, and in reverse order candidates."""
  batch = {
    "image": image,
    "context_ids": ids,
    "context_mask": mask,
    "input_ids": ids[::-1, None, None],
    "attention_mask": mask[::-1, None, None],
  }
  score = jax.jit(dialog_task.score, static_argnums=0)
  return np.asarray(score(model.module, model.params, batch))[:, 0]


def hf_dialog(model, image, ids, mask):
  """Composed of its towers, for it has no such model; one dialog at a time and
  without padding, since transformers 5 loses the mask of what texts attend to.
  """
  scores = []
  for row in range(len(ids)):
    there, other = mask[row] == 1, mask[-1 - row] == 1
    inputs = hf_inputs(*(x[row, None] for x in (image, ids, mask)))
    embeds = model.vision_model(inputs["pixel_values"])[0]
    context = model.text_encoder(torch.from_numpy(ids[row][there][None]))[0]
    text = torch.from_numpy(ids[-1 - row][other][None].copy())
    text[:, 0] = 423
    fused = model.text_encoder(
      text, encoder_hidden_states=torch.cat([embeds, context], dim=1)
    )[0]
    wrong, right = model.itm_head(fused[:, 0])[0]
    scores.append([right - wrong])
  return torch.tensor(scores)


def vqa(model, image, ids, mask):
  kv = model.apply(model.apply(image, method="encode_image"), method="image_kv")
  question = model.apply(ids, mask, kv, legacy_cls=True, method="fuse")
  kv = model.apply(question, method="decoder_kv")
  answer = ids[:, ::-1]
  predicted = model.apply(
    answer, np.ones_like(mask), kv, encoder_mask=mask, method="decode"
  )
  return predicted.logits()


def hf_vqa(model, image, ids, mask):
  inputs = hf_inputs(image, ids, mask)
  return hf_answer(model, model.vision_model(inputs["pixel_values"])[0], inputs)


def hf_answer(model, embeds, inputs):
  question = model.text_encoder(
    inputs["input_ids"],
    attention_mask=inputs["attention_mask"],
    encoder_hidden_states=embeds,
    encoder_attention_mask=torch.ones(embeds.shape[:2]),
  )[0]
  answer = inputs["input_ids"].flip(1).clone()
  answer[:, 0] = 422
  return model.text_decoder(
    input_ids=answer,
    attention_mask=torch.ones_like(answer),
    encoder_hidden_states=question,
    encoder_attention_mask=inputs["attention_mask"],
  ).logits


CASES = {
  "caption": (caption, hf_caption),
  "itm": (itm, hf_itm),
  "vqa": (vqa, hf_vqa),
}


def test_a_dialog_is_what_its_parts_give(tmp_path):
  """Cross-attention to image and caption, of which one has padding."""
  hf_model = make_hf_model("itm")
  hf_model.save_pretrained(tmp_path)
  image, ids, mask = random_inputs()
  ids[:, 0] = 2
  with torch.no_grad():
    expected = hf_dialog(hf_model, image, ids, mask).numpy()
  model = blip_jax.load(
    tmp_path, task="dialog", tokenizer=helpers.GOLDEN_TOKENIZER
  )
  found = dialog(model, image, ids, mask)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CASES)
def test_both_directions(tmp_path, kind):
  predict, predict_hf = CASES[kind]
  hf_model = make_hf_model(kind)
  hf_model.save_pretrained(tmp_path / "hf")
  image, ids, mask = random_inputs()
  # The start token, which one side or the other sets by itself.
  ids[:, 0] = {"caption": 422}.get(kind, 2)
  if kind == "vqa":
    # transformers 5 loses the question's mask before its decoder.
    mask[:] = 1
  with torch.no_grad():
    expected = predict_hf(hf_model, image, ids, mask).numpy()

  model = blip_jax.load(tmp_path / "hf", tokenizer=helpers.GOLDEN_TOKENIZER)
  np.testing.assert_allclose(
    predict(model, image, ids, mask), expected, rtol=1e-4, atol=1e-4
  )

  # Written again, transformers loads it without missing or unexpected keys.
  checkpoint = opening.open_checkpoint(
    tmp_path / "hf", tokenizer=helpers.GOLDEN_TOKENIZER
  )
  write.write(checkpoint, tmp_path / "written", "hf")
  again, loading = type(hf_model).from_pretrained(
    tmp_path / "written", output_loading_info=True
  )
  assert not loading["missing_keys"] and not loading["unexpected_keys"]
  assert not loading["mismatched_keys"]
  with torch.no_grad():
    outputs = predict_hf(again.eval(), image, ids, mask).numpy()
  np.testing.assert_array_equal(outputs, expected)


@pytest.mark.parametrize("kind", ["caption", "vqa"])
def test_a_video_is_all_tokens_of_its_frames(tmp_path, kind):
  """Encoded one by one and concatenated, for attention as of one image."""
  hf_model = make_hf_model(kind)
  hf_model.save_pretrained(tmp_path / "hf")
  image, ids, mask = random_inputs()
  ids[:, 0], mask[:] = {"caption": 422, "vqa": 2}[kind], 1
  video = np.stack([image, image[:, ::-1], 2 * image], axis=1)
  with torch.no_grad():
    frames = [
      hf_model.vision_model(hf_inputs(frame, ids, mask)["pixel_values"])[0]
      for frame in video.swapaxes(0, 1)
    ]
    embeds, inputs = torch.cat(frames, 1), hf_inputs(image, ids, mask)
    if kind == "vqa":
      expected = hf_answer(hf_model, embeds, inputs).numpy()
    else:
      expected = hf_model.text_decoder(
        input_ids=inputs["input_ids"], encoder_hidden_states=embeds
      ).logits.numpy()
  model = blip_jax.load(tmp_path / "hf", tokenizer=helpers.GOLDEN_TOKENIZER)
  found = CASES[kind][0](model, video, ids, mask)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_transformers_tokenizes_like_the_native_tokenizer(tmp_path):
  """The written folder has a tokenizer and a config that transformers reads."""
  hf_model = make_hf_model("caption")
  hf_model.save_pretrained(tmp_path / "hf")
  checkpoint = opening.open_checkpoint(
    tmp_path / "hf", tokenizer=helpers.GOLDEN_TOKENIZER
  )
  write.write(checkpoint, tmp_path / "written", "hf")
  hf_tokenizer = transformers.AutoTokenizer.from_pretrained(
    tmp_path / "written"
  )
  expected = checkpoint.tokenizer.encode(["a dog on a beach"], 8)[0]
  encoded = hf_tokenizer("a dog on a beach", padding="max_length", max_length=8)
  np.testing.assert_array_equal(encoded["input_ids"], expected[0])
  config = json.loads((tmp_path / "written" / "config.json").read_text())
  assert config["vision_config"]["num_attention_heads"] == 8
  assert config["text_config"]["bos_token_id"] == 422


def test_eight_text_heads_of_a_base_model_are_replaced_by_twelve():
  """transformers' default, if the config does not give the number of heads."""
  config = transformers.BlipConfig(text_config={"hidden_size": 768}).to_dict()
  config["text_config"]["num_attention_heads"] = 8
  hints = model_configs.read_hints(config)
  assert hints.med["num_heads"] == 12
  assert any("num_attention_heads is 8" in text for text in hints.warnings)
