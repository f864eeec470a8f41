"""`pipeline`: results of transformers' shape, with the model's own numbers."""

import numpy as np
import PIL.Image
import pytest

import blip_jax
from tests import helpers

QUESTION = "what is in the image"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  return {
    name: blip_jax.load(helpers.write_golden(name, folder / name))
    for name in ("blip_decoder", "blip_vqa", "blip_retrieval")
  }


@pytest.fixture
def images(tmp_path):
  helpers.write_images(tmp_path / "images")
  return [str(tmp_path / "images" / f"{number}.png") for number in range(2)]


def test_captions(models, images):
  model = models["blip_decoder"]
  pipe = blip_jax.pipeline("image-to-text", model)
  first, second = model.caption(images, max_new_tokens=5)
  start = model.card.prompt.strip()
  expected = [{"generated_text": f"{start} {first.text}"}]
  assert pipe(images[0], max_new_tokens=5) == expected
  with PIL.Image.open(images[0]) as image:
    assert pipe(images=image, max_new_tokens=5) == expected
  found = pipe(images, generate_kwargs={"max_new_tokens": 5})
  assert found == [expected, [{"generated_text": f"{start} {second.text}"}]]
  assert pipe(images[:1], max_new_tokens=5) == [expected]
  prompted = pipe(images[0], prompt="two", max_new_tokens=5)
  assert prompted[0]["generated_text"].startswith("two ")
  several = pipe(images[0], num_beams=3, num_return_sequences=2)
  assert [one.keys() for one in several] == [{"generated_text"}] * 2
  bad, good = pipe(["absent.png", images[0]], on_error="skip", max_new_tokens=5)
  assert bad is None and good == expected


def test_answers(models, images):
  model = models["blip_vqa"]
  pipe = blip_jax.pipeline("vqa", model)
  first, second = model.answer(images, QUESTION, num_answers=1)
  expected = [
    {"score": pytest.approx(answer.prob, rel=1e-3), "answer": answer.text}
    for answer in (first, second)
  ]
  rows = [{"image": image, "question": QUESTION} for image in images]
  for found in (
    pipe(images[0], QUESTION),
    pipe(image=images[0], question=QUESTION, top_k=1),
    pipe(rows[0]),
  ):
    assert found == expected[:1]
  for found in (pipe(images, QUESTION), pipe(rows)):
    assert found == [expected[:1], expected[1:]]
  assert pipe(images[0], [QUESTION, QUESTION]) == [expected[:1]] * 2
  ranked = pipe(images[0], QUESTION, answers=["one", "two", "red"], top_k=3)
  scores = [one["score"] for one in ranked]
  assert {one["answer"] for one in ranked} == {"one", "two", "red"}
  assert scores == sorted(scores, reverse=True)
  assert sum(scores) == pytest.approx(1, abs=1e-5)


def test_matches(models, images):
  model = models["blip_retrieval"]
  pipe = blip_jax.pipeline("image-text-matching", model)
  texts = ["a red shape", "two dogs", "a bowl of soup"]
  probs = model.match(images, texts).itm_prob
  found = pipe(images, texts)
  for row, result in zip(probs, found, strict=True):
    order = np.argsort(-row)
    assert [one["label"] for one in result] == [texts[i] for i in order]
    np.testing.assert_allclose(
      [one["score"] for one in result], row[order], rtol=1e-6
    )
  # Another number of images may change the last bit.
  for one, other in zip(pipe(images[0], texts), found[0], strict=True):
    assert one == other | {"score": pytest.approx(other["score"], rel=1e-6)}
  (one,) = pipe({"image": images[1], "text": texts[1]})
  assert one["label"] == texts[1]
  assert one["score"] == pytest.approx(float(probs[1, 1]), rel=1e-5)


@pytest.mark.parametrize("text", [None, 5, ["a", "b"]])
def test_what_is_no_text_is_refused(models, images, text):
  pipe = blip_jax.pipeline("image-text-matching", models["blip_retrieval"])
  with pytest.raises(ValueError, match="text: expected a text, found"):
    pipe([{"image": images[0], "text": text}])


@pytest.mark.parametrize("seed", [2**31, 2**70])
def test_seeds_are_whole_numbers_of_32_bits(models, images, seed):
  pipe = blip_jax.pipeline("image-to-text", models["blip_decoder"])
  with pytest.raises(ValueError, match=r"seed: .* 32 bits, found \d"):
    pipe(images[0], sample=True, seed=seed)


def test_features(models, images):
  model = models["blip_retrieval"]
  pipe = blip_jax.pipeline("image-feature-extraction", model)
  states = model.features(images).states
  found = pipe(images, return_tensors=True)
  np.testing.assert_array_equal(np.concatenate(found), states)
  np.testing.assert_allclose(pipe(images[1]), states[1:], rtol=1e-5, atol=1e-6)
  pooled = pipe(images[0], pool=True)
  assert isinstance(pooled, list)
  np.testing.assert_allclose(pooled, states[:1, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "call, expected",
  [
    (lambda pipe, model: pipe("summarization", model), "image-to-text"),
    (lambda pipe, model: pipe("image-to-text", device=0), "mesh="),
    (lambda pipe, model: pipe("image-to-text", model, dtype="bfloat16"), "dty"),
    (lambda pipe, model: pipe("image-to-text", model)(), "found none"),
    (
      lambda pipe, model: pipe("image-to-text", model)("a", images="b"),
      "found them twice",
    ),
    (lambda pipe, model: pipe("vqa", model)(None), "'question'.*found None"),
    (lambda pipe, model: pipe("vqa", model)(5), "'question'.*found 5"),
    (
      lambda pipe, model: pipe("image-text-matching", model)(
        np.zeros((4, 4, 3), np.uint8)
      ),
      r"'text'.*found array\(",
    ),
    (lambda pipe, model: pipe("vqa", model)({"image": "a"}), "'question'"),
    (lambda pipe, model: pipe("vqa", model)("a.png"), "'question'"),
    (
      lambda pipe, model: pipe("image-to-text", model)(
        "a.png", max_new_tokens=5, generate_kwargs={"max_new_tokens": 6}
      ),
      "twice",
    ),
    (
      lambda pipe, model: pipe("image-to-text", model)("http://localhost/a"),
      "urls=",
    ),
    (lambda pipe, model: pipe("vqa", model)("a.png", "why"), "no decoder"),
  ],
)
def test_mistakes(models, call, expected):
  with pytest.raises(ValueError, match=expected):
    call(blip_jax.pipeline, models["blip_decoder"])
