"""Captioning through `blip_jax.load(...)`: inputs, batches, seeds, errors."""

import dataclasses
import functools
import http.server
import io
import threading

import jax
import numpy as np
import PIL.Image
import pytest

from blip_jax.data import scenes
from blip_jax.inference import captioning
from blip_jax.inference import model as model_lib
from blip_jax.models import families, med
from blip_jax.runtime import sharding
from tests import helpers


@pytest.fixture(scope="module")
def model():
  return helpers.make_model()


@pytest.fixture(scope="module")
def images():
  return [scenes.Scenes("val")[i]["image"] for i in range(5)]


def test_every_kind_of_input_gives_the_same_caption(model, images, tmp_path):
  array = images[0]
  pil = PIL.Image.fromarray(array)
  pil.save(tmp_path / "a.png")
  content = (tmp_path / "a.png").read_bytes()
  inputs = [array, pil, tmp_path / "a.png", str(tmp_path / "a.png"), content]
  captions = model.caption(inputs)
  assert len(captions) == 5 and len({c.text for c in captions}) == 1
  assert model.caption(array)[0].text == captions[0].text
  assert model.caption(iter(inputs))[4].text == captions[0].text
  assert len(model.caption(np.stack([array, array]))) == 2


def test_a_caption_does_not_depend_on_the_batch(model, images):
  for options in ({}, dict(sample=True, num_return_sequences=2)):
    together = model.caption(images, batch_size=4, seed=3, **options)
    assert len({caption.text for caption in together}) > 1
    for i in (0, 4):
      (alone,) = model.caption(images[i], batch_size=2, seed=3, **options)
      assert alone.text == together[i].text
      assert [o.text for o in alone.others] == [
        o.text for o in together[i].others
      ]


def test_the_last_batch_is_not_compiled_separately(model, images):
  model.caption(images[:4], batch_size=4)
  compiled = captioning._generate._cache_size()
  model.caption(images, batch_size=4, max_length=11)
  assert captioning._generate._cache_size() == compiled


def test_the_fields_of_a_caption_are_consistent(model, images):
  (caption,) = model.caption(images[0], num_return_sequences=3)
  assert len(caption.others) == 2
  ranked = [caption, *caption.others]
  scores = [one.score for one in ranked]
  assert scores == sorted(scores, reverse=True)
  for one in ranked:
    assert len(one.tokens) == len(one.token_log_probs) <= 8
    assert one.log_prob == pytest.approx(sum(one.token_log_probs))
    assert all(p <= 0 for p in one.token_log_probs)
    words = [token for token in one.tokens if token != "[SEP]"]
    assert "".join(words).replace("##", "") == one.text.replace(" ", "")


def test_seeds_and_prompts_change_the_captions(model, images):
  sample = functools.partial(model.caption, images, sample=True)
  texts = lambda captions: [caption.text for caption in captions]
  assert texts(sample(seed=1)) == texts(sample(seed=1)) != texts(sample(seed=2))
  assert texts(model.caption(images, prompt="")) != texts(model.caption(images))


def test_samples_depend_on_the_seed_of_the_image(model, images):
  """The seed of an image decides, not where it is in the batch."""
  generate = model.captioner(sample=True, max_new_tokens=6)
  pixels = np.stack([model.image(image) for image in images])
  texts = lambda *seeds: [c.text for c in generate(pixels, 7, [*seeds])]
  same = np.stack([pixels[0]] * 5)
  sampled = generate(same, 7, image_seeds=[0, 1, 2, 3, 4])
  assert len({caption.text for caption in sampled}) > 1
  sampled = generate(same, 7, image_seeds=[3] * 5)
  assert len({caption.text for caption in sampled}) == 1
  assert texts(0, 1, 2, 3, 4) == texts(0, 1, 2, 3, 4) != texts(5, 6, 7, 8, 9)


def test_a_mesh_generates_the_same_captions(images):
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
  on_mesh, on_one = helpers.make_model(mesh=mesh), helpers.make_model()
  captions, expected = on_mesh.caption(images), on_one.caption(images)
  assert [c.text for c in captions] == [c.text for c in expected]


def test_a_pretrained_model_captions_too(images):
  model = helpers.make_model("pretrain")
  tied = dataclasses.replace(model, params=med.tie(model.params))
  assert len(tied.caption(images[:2])) == 2


@pytest.mark.parametrize(
  "model_of, options, message",
  [
    (lambda: helpers.make_model("itm"), {}, "'itm', which has no decoder"),
    (lambda: helpers.make_model(tokenizer=None), {}, "no vocabulary"),
    (helpers.make_model, dict(num_beams=0), "num_beams: expected 1"),
    (helpers.make_model, dict(max_length=4), "no room after a prompt of 4"),
    (
      helpers.make_model,
      dict(prompt="red " * 20),
      "no room after a prompt of 21",
    ),
    (helpers.make_model, dict(bems=3), "bems: no such decoding option"),
  ],
)
def test_impossible_requests_are_refused(model_of, options, message, images):
  with pytest.raises(ValueError, match=message):
    model_of().caption(images[0], **options)


def test_damaged_weights_generate_nothing(model, images):
  params = jax.tree.map(lambda x: x * np.nan, model.params)
  broken = dataclasses.replace(model, params=params)
  for options in ({}, {"num_beams": 3}, {"sample": True}):
    with pytest.raises(ValueError, match="gives NaN; its weights are damaged"):
      broken.caption(images, **options)


def test_unreadable_images_are_named(model, images, tmp_path):
  (tmp_path / "b.jpg").write_bytes(b"not an image")
  with pytest.raises(ValueError, match="image 1: not_an_image"):
    model.caption([images[0], tmp_path / "b.jpg"])
  with pytest.raises(ValueError, match=r"image 0: missing: .*c.jpg"):
    model.caption(tmp_path / "c.jpg")


class _Server(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    exists = self.path == "/a.png"
    self.send_response(200 if exists else 404)
    self.end_headers()
    if exists:
      content = io.BytesIO()
      PIL.Image.new("RGB", (20, 20), "red").save(content, "PNG")
      self.wfile.write(content.getvalue())

  def log_message(self, *args):
    pass


def test_urls_are_downloaded_on_request_only(model):
  with http.server.HTTPServer(("localhost", 0), _Server) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_port}"
    with pytest.raises(ValueError, match="set urls=True"):
      model.caption(f"{url}/a.png")
    (caption,) = model.caption(f"{url}/a.png", urls=True)
    (same,) = model.caption(PIL.Image.new("RGB", (20, 20), "red"))
    assert caption.text == same.text
    with pytest.raises(ValueError, match=r"image 0: missing: .*404"):
      model.caption(f"{url}/b.png", urls=True)
    server.shutdown()


@pytest.mark.parametrize(
  "family, method, can",
  [
    ("itm", "captioner", "match and embed images and texts"),
    ("caption", "match", "caption images"),
    ("caption", "embed_texts", "caption images"),
  ],
)
def test_a_wrong_family_says_what_it_can_do(family, method, can):
  arguments = {"match": ([], []), "embed_texts": (["a dog"],)}.get(method, ())
  with pytest.raises(ValueError, match=f"family '{family}'.*it can {can}"):
    getattr(helpers.make_model(family), method)(*arguments)


def test_abilities_of_all_families_are_known():
  assert sorted(model_lib._ABILITIES) == sorted(families.FAMILIES)
