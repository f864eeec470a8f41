"""Captions through the user's door."""

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
from blip_jax.inference import model as model_lib
from blip_jax.models import med
from blip_jax.runtime import sharding
from tests import helpers


@pytest.fixture(scope="module")
def model():
  return helpers.make_model()


@pytest.fixture(scope="module")
def pictures():
  return [scenes.Scenes("val")[i]["image"] for i in range(5)]


def test_every_way_to_give_a_picture_is_the_same(model, pictures, tmp_path):
  array = pictures[0]
  pil = PIL.Image.fromarray(array)
  pil.save(tmp_path / "a.png")
  content = (tmp_path / "a.png").read_bytes()
  ways = [array, pil, tmp_path / "a.png", str(tmp_path / "a.png"), content]
  captions = model.caption(ways)
  assert len(captions) == 5 and len({c.text for c in captions}) == 1
  assert model.caption(array)[0].text == captions[0].text
  assert model.caption(iter(ways))[4].text == captions[0].text
  assert len(model.caption(np.stack([array, array]))) == 2


def test_a_picture_alone_is_as_in_any_batch(model, pictures):
  for options in ({}, dict(sample=True, num_return_sequences=2)):
    together = model.caption(pictures, batch_size=4, seed=3, **options)
    assert len({caption.text for caption in together}) > 1
    for i in (0, 4):
      (alone,) = model.caption(pictures[i], batch_size=2, seed=3, **options)
      assert alone.text == together[i].text
      assert [o.text for o in alone.others] == [
        o.text for o in together[i].others
      ]


def test_the_last_batch_is_not_compiled_again(model, pictures):
  model.caption(pictures[:4], batch_size=4)
  compiled = model_lib._generate._cache_size()
  model.caption(pictures, batch_size=4, max_length=11)
  assert model_lib._generate._cache_size() == compiled


def test_what_is_said_of_a_caption(model, pictures):
  (caption,) = model.caption(pictures[0], num_return_sequences=3)
  assert len(caption.others) == 2
  ranked = [caption, *caption.others]
  scores = [one.score for one in ranked]
  assert scores == sorted(scores, reverse=True)
  for one in ranked:
    assert len(one.tokens) == len(one.token_log_probs) <= 8
    assert one.log_prob == pytest.approx(sum(one.token_log_probs))
    assert all(p <= 0 for p in one.token_log_probs)
    said = [token for token in one.tokens if token != "[SEP]"]
    assert "".join(said).replace("##", "") == one.text.replace(" ", "")


def test_seeds_and_prompts(model, pictures):
  draw = functools.partial(model.caption, pictures, sample=True)
  texts = lambda captions: [caption.text for caption in captions]
  assert texts(draw(seed=1)) == texts(draw(seed=1)) != texts(draw(seed=2))
  assert texts(model.caption(pictures, prompt="")) != texts(
    model.caption(pictures)
  )


def test_a_mesh_writes_the_same(pictures):
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
  on_mesh, on_one = helpers.make_model(mesh=mesh), helpers.make_model()
  found, expected = on_mesh.caption(pictures), on_one.caption(pictures)
  assert [c.text for c in found] == [c.text for c in expected]


def test_pretraining_writes_too(pictures):
  model = helpers.make_model("pretrain")
  tied = dataclasses.replace(model, params=med.tie(model.params))
  assert len(tied.caption(pictures[:2])) == 2


@pytest.mark.parametrize(
  "model_of, options, message",
  [
    (lambda: helpers.make_model("itm"), {}, "'itm', which has no decoder"),
    (lambda: helpers.make_model(tokenizer=None), {}, "no vocabulary"),
    (helpers.make_model, dict(num_beams=0), "num_beams: expected 1"),
    (helpers.make_model, dict(max_length=4), "no room behind a prompt of 4"),
    (
      helpers.make_model,
      dict(prompt="red " * 20),
      "no room behind a prompt of 21",
    ),
    (helpers.make_model, dict(bems=3), "bems: no option"),
  ],
)
def test_what_cannot_be(model_of, options, message, pictures):
  with pytest.raises(ValueError, match=message):
    model_of().caption(pictures[0], **options)


def test_weights_that_are_damaged_write_nothing(model, pictures):
  params = jax.tree.map(lambda x: x * np.nan, model.params)
  broken = dataclasses.replace(model, params=params)
  for options in ({}, {"num_beams": 3}, {"sample": True}):
    with pytest.raises(ValueError, match="gives NaN; its weights are damaged"):
      broken.caption(pictures, **options)


def test_pictures_that_cannot_be_read_are_named(model, pictures, tmp_path):
  (tmp_path / "b.jpg").write_bytes(b"no picture")
  with pytest.raises(ValueError, match="picture 1: not_an_image"):
    model.caption([pictures[0], tmp_path / "b.jpg"])
  with pytest.raises(ValueError, match=r"picture 0: missing: .*c.jpg"):
    model.caption(tmp_path / "c.jpg")


class _Server(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    found = self.path == "/a.png"
    self.send_response(200 if found else 404)
    self.end_headers()
    if found:
      content = io.BytesIO()
      PIL.Image.new("RGB", (20, 20), "red").save(content, "PNG")
      self.wfile.write(content.getvalue())

  def log_message(self, *args):
    pass


def test_urls_are_fetched_when_asked_for(model):
  with http.server.HTTPServer(("localhost", 0), _Server) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_port}"
    with pytest.raises(ValueError, match="set urls=True"):
      model.caption(f"{url}/a.png")
    (caption,) = model.caption(f"{url}/a.png", urls=True)
    (same,) = model.caption(PIL.Image.new("RGB", (20, 20), "red"))
    assert caption.text == same.text
    with pytest.raises(ValueError, match=r"picture 0: missing: .*404"):
      model.caption(f"{url}/b.png", urls=True)
    server.shutdown()
