"""Captioning through `blip_jax.load(...)`: inputs, batches, seeds, errors."""

import dataclasses
import functools
import http.server
import io
import itertools
import threading

import jax
import numpy as np
import PIL.Image
import pytest

from blip_jax.convert import write
from blip_jax.data import scenes
from blip_jax.inference import captioning, loading
from blip_jax.inference import images as images_lib
from blip_jax.inference.abilities import base
from blip_jax.models import families, tying
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


def test_captions_of_videos(model, images, tmp_path):
  """From files and arrays of frames; one frame is an image."""
  frames = np.stack([*images, *images])[:, :16, :16]
  helpers.write_video(tmp_path / "a.mkv", frames)
  (tmp_path / "broken.mkv").write_text("nothing")
  taken = frames[[0, 2, 5, 7]]
  inputs = [tmp_path / "a.mkv", tmp_path / "broken.mkv", frames, [*taken]]
  caption = functools.partial(model.caption, num_frames=4)
  found = caption(iter(inputs), batch_size=2, on_error="skip")
  assert found.pop(1) is None
  assert len(found) == 3 and len({each.text for each in found}) == 1
  shuffled = caption(taken[[2, 3, 1, 0]])[0]
  assert shuffled.log_prob == pytest.approx(found[0].log_prob, rel=1e-4)
  other = caption(frames[:4])[0]
  assert other.log_prob != pytest.approx(found[0].log_prob, rel=1e-4)
  (one,) = model.caption(frames[2:4], num_frames=1)
  assert one == model.caption(frames[2])[0]


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
  compiled = captioning.generate_captions._cache_size()
  model.caption(images, batch_size=4, max_length=11)
  assert captioning.generate_captions._cache_size() == compiled


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
  tied = dataclasses.replace(model, params=tying.tie(model.params))
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
  params = jax.tree.map(lambda x: np.full_like(x, np.nan), model.params)
  broken = dataclasses.replace(model, params=params)
  for options in ({}, {"num_beams": 3}, {"sample": True}):
    with pytest.raises(ValueError, match="gives NaN; its weights are damaged"):
      broken.caption(images, **options)


def test_unreadable_images_are_named(model, images, tmp_path):
  (tmp_path / "b.jpg").write_bytes(b"not an image")
  with pytest.raises(ValueError, match=r"image 1, .*b.jpg: not_an_image"):
    model.caption([images[0], tmp_path / "b.jpg"])
  with pytest.raises(ValueError, match="image 1: not_an_image"):
    model.caption([images[0], b"not an image"])
  with pytest.raises(ValueError, match=r"image 0: missing: .*c.jpg"):
    model.caption(tmp_path / "c.jpg")


@pytest.fixture
def mixed(images, tmp_path):
  """Readable images at 1, 3 and 4; a truncated file, text and nothing."""
  content = io.BytesIO()
  PIL.Image.fromarray(images[0]).resize((200, 200)).save(content, "JPEG")
  cut = tmp_path / "cut.jpg"
  cut.write_bytes(content.getvalue()[:2000])
  (tmp_path / "text.png").write_text("not an image")
  missing = str(tmp_path / "missing.png")
  return [cut, images[1], tmp_path / "text.png", images[3], images[4], missing]


@pytest.mark.parametrize("batch_size", [2, 8])
def test_unreadable_images_are_skipped_on_request(
  model, images, mixed, batch_size, caplog
):
  captions = model.caption(iter(mixed), on_error="skip", batch_size=batch_size)
  expected = model.caption([images[i] for i in (1, 3, 4)])
  texts = [caption and caption.text for caption in captions]
  one, two, three = (caption.text for caption in expected)
  assert texts == [None, one, None, two, three, None]
  (record,) = caplog.records
  for words in (
    "3 of 6 images",
    "image 0, ",
    "cut.jpg: truncated",
    "image 2, ",
    "text.png: not_an_image",
    "image 5: missing",
  ):
    assert words in record.getMessage()


def test_no_readable_image_is_no_caption(model, mixed):
  assert model.caption([mixed[0], b"", mixed[2]], on_error="skip") == [None] * 3
  assert model.caption([], on_error="skip") == []
  assert model.caption(iter(())) == []


def test_a_stream_reads_little_ahead(model, images):
  """Of an iterator without an end."""
  taken = []

  def endless():
    for number in itertools.count():
      taken.append(number)
      yield images[number % 5]

  stream = model.caption_stream(endless(), batch_size=2)
  assert not taken
  texts = [caption.text for caption in itertools.islice(stream, 7)]
  stream.close()
  assert len(taken) < 20
  expected = [caption.text for caption in model.caption(images)]
  assert texts == [*expected, *expected[:2]]


def test_a_stream_yields_what_comes_before_an_unreadable_image(model, images):
  stream = model.caption_stream([*images[:2], b"?", images[3]], batch_size=2)
  assert [next(stream).text, next(stream).text] == [
    caption.text for caption in model.caption(images[:2])
  ]
  with pytest.raises(ValueError, match="image 2: not_an_image"):
    next(stream)


def test_a_stream_refuses_impossible_requests_at_once(model, images):
  with pytest.raises(ValueError, match="num_beams: expected 1"):
    model.caption_stream(images, num_beams=0)
  read = images_lib.ImageReader(model.image)
  with pytest.raises(ValueError, match=r"on_error: expected one of .*'ignore'"):
    images_lib.batches(images, read, 8, model.mesh, on_error="ignore")


def test_progress_is_shown_on_request(model, images, capsys):
  model.caption(images, batch_size=2)
  assert not capsys.readouterr().err
  model.caption(images, batch_size=2, progress=True)
  assert "5/5" in capsys.readouterr().err
  model.caption(iter(images), batch_size=2, progress=True)
  assert "5img" in capsys.readouterr().err


def test_a_model_is_shown_in_four_lines(images):
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
  model = helpers.make_model("pretrain", mesh=mesh, dtype="bfloat16")
  model = dataclasses.replace(
    model,
    params=tying.tie(model.params),
    card=dataclasses.replace(model.card, source="my.pth"),
  )
  abstract = families.abstract("pretrain", model.card.config)
  number = sum(x.size for x in jax.tree.leaves(abstract))
  lines = repr(model).splitlines()
  assert len(lines) == 4
  assert lines[0] == "pretrain model from my.pth"
  assert "16 x 16 pixels" in lines[1] and "369 tokens" in lines[2]
  assert f"{number:,} parameters" in lines[3] and "bfloat16" in lines[3]
  assert "data=4, fsdp=2, tensor=1" in lines[3]


def test_captions_and_scores_are_shown_in_a_line(model, images):
  caption = model.caption(images[0], num_return_sequences=3)[0]
  assert repr(caption) == (
    f"Caption({caption.text!r}, log_prob={caption.log_prob:.3f}, 2 others)"
  )
  itm = helpers.make_model("itm")
  match = itm.match(images, ["red", "blue", "a star"])
  assert repr(match).startswith("Match(itc_cosine=float32[5, 3] from ")
  assert len(repr(match)) < 200
  hidden = itm.features(texts=["a red circle"])
  assert repr(hidden).startswith("HiddenStates(states=float32[1, 8, ")
  assert len(repr(hidden)) < 200 > len(repr(itm.matcher))


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
    (caption,) = model.caption(f"{url}/a.png", urls=True, allow_private=True)
    (same,) = model.caption(PIL.Image.new("RGB", (20, 20), "red"))
    assert caption.text == same.text
    with pytest.raises(ValueError, match=r"image 0: refused: .*allow_private"):
      model.caption(f"{url}/a.png", urls=True)
    with pytest.raises(ValueError, match=r"image 0: missing: .*404"):
      model.caption(f"{url}/b.png", urls=True, allow_private=True)
    urls = [f"{url}/b.png", "http://[", f"{url}/a.png", "http://é.invalid/a"]
    skipped = model.caption(
      urls, urls=True, allow_private=True, on_error="skip"
    )
    assert [c and c.text for c in skipped] == [None, None, same.text, None]
    assert model.caption([f"{url}/a.png"], on_error="skip") == [None]
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
  assert sorted(base.ABILITIES) == sorted(families.FAMILIES)


@pytest.mark.parametrize("size", [33, 0, -8, True])
def test_an_image_size_is_the_side_of_a_square_of_patches(tmp_path, size):
  folder = write.write(
    helpers.open_golden("blip_decoder"), tmp_path / "model", "orbax"
  )
  expected = rf"image_size: expected .*multiple of .*size, 8, found {size!r}"
  with pytest.raises(ValueError, match=expected):
    loading.load(folder, image_size=size)


def test_more_beams_than_tokens_are_refused(model, images):
  with pytest.raises(ValueError, match=r"num_beams: expected at most .*tokens"):
    model.caption(images[0], num_beams=100_000)


def test_programs_for_several_lengths_give_the_same():
  model = helpers.make_model("caption", text_depth=1)
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
  for options in (
    dict(num_return_sequences=3, length_norm="generated"),
    dict(sample=True, num_return_sequences=2),
  ):
    own = model.captioner("a", max_length=14, **options)
    shared = model.captioner(
      "a", max_length=14, num_positions=24, prompt_positions=8, **options
    )
    for one, two in zip(own(pixels, 3), shared(pixels, [3, 3]), strict=True):
      assert one.tokens == two.tokens
      for a, b in zip((one, *one.others), (two, *two.others), strict=True):
        assert a.text == b.text
        np.testing.assert_allclose(
          a.token_log_probs, b.token_log_probs, atol=1e-4
        )
  with pytest.raises(ValueError, match="prompt: expected at most 8 tokens"):
    model.captioner("a red star, a blue star and a ring", prompt_positions=8)
