"""Labelling: captions depend on seed and key, and every batch is whole."""

import concurrent.futures
import itertools

import numpy as np
import pytest

from blip_jax.capfilt import label
from blip_jax.data import sources
from blip_jax.inference import captioning, matching
from tests import helpers, jobs

PIXELS = jobs.NOISY_SCENES[0]["image"]


def open_rows(keys, caption=()):
  """Records with equal pixels under the given keys."""
  records = [
    {"id": key, "image": PIXELS, "caption": [*caption]} for key in keys
  ]
  return sources.Rows(records, np.arange(len(records)))


def make_labeller(seed=0, captioner=True, batch_size=2):
  return label.Labeller(
    helpers.make_model("caption") if captioner else None,
    helpers.make_model("itm"),
    seed=seed,
    per_device_batch_size=batch_size,
    generation=dict(sample=True, top_p=0.9, max_length=10, min_length=4),
    num_threads=1,
  )


def label_one(labeller, rows):
  """The labelled images of one work unit."""
  batches = [*labeller([("a work unit", rows)])]
  assert {batch.work_unit for batch in batches} == {"a work unit"}
  return [image for batch in batches for image in batch.labelled]


def captions(labeller, keys):
  images = label_one(labeller, open_rows(keys))
  assert [image.key for image in images] == keys
  return [image.texts[-1].text for image in images]


def test_the_seed_of_an_image_is_a_hash_of_its_key():
  # SHA-256 of the empty text and of "abc" begin with e3b0c442 and ba7816bf
  # (FIPS 180-4); the first four bytes count from the lowest.
  assert label.image_seed("") == 0x42C4B0E3
  assert label.image_seed("abc") == 0xBF1678BA


def test_samples_depend_on_the_seed_and_the_key_of_an_image():
  labeller = make_labeller()
  first = captions(labeller, ["a", "b", "c", "a"])
  # Equal pixels: only the keys differ.
  assert len(set(first)) == 3
  assert first[3] == first[0]
  # Neither the position in the batch nor its other images matter.
  assert captions(labeller, ["c", "a"]) == [first[2], first[0]]
  assert captions(make_labeller(seed=1), ["a", "b", "c", "a"]) != first


def record(monkeypatch, owner, name, events):
  """Notes in `events` what a method starts and what is awaited, and when."""
  start, numbers = getattr(owner, name), itertools.count()

  def started(*args):
    number, wait = next(numbers), start(*args)
    events.append(f"{name} {number}")

    def waited():
      events.append(f"wait for {name} {number}")
      return wait()

    return waited

  monkeypatch.setattr(owner, name, started)


def test_devices_always_have_a_next_program_also_between_work_units(
  monkeypatch,
):
  events = []
  record(monkeypatch, captioning.Captioner, "start", events)
  record(monkeypatch, matching.Matcher, "start_score", events)
  labeller = make_labeller()
  units = [(name, open_rows([name], ["a dog"])) for name in "abc"]
  batches = [*labeller(units)]
  assert [batch.work_unit for batch in batches] == ["a", "b", "c"]
  assert all(batch.is_last for batch in batches)
  assert [batch.labelled[0].key for batch in batches] == ["a", "b", "c"]
  # Before anything is awaited, something later has been started.
  assert events == [
    "start 0",
    "start 1",
    "wait for start 0",
    "start_score 0",
    "start 2",
    "wait for start 1",
    "start_score 1",
    "wait for start_score 0",
    "wait for start 2",
    "start_score 2",
    "wait for start_score 1",
    "wait for start_score 2",
  ]


class AtOnce(concurrent.futures.Executor):
  """Runs what it is given before it returns."""

  def submit(self, function, /, *args):
    future = concurrent.futures.Future()
    future.set_result(function(*args))
    return future


def test_a_work_unit_is_opened_when_the_one_before_is_nearly_through():
  opened = []

  def units():
    for name, size in (("a", 20), ("b", 0), ("c", 1)):
      opened.append(name)
      yield name, open_rows([f"{name}{n}" for n in range(size)])

  # Batches of one: the next of twenty is opened when eight are left.
  parts = label._parts(units(), 1, AtOnce())
  for number in range(12):
    assert next(parts).rows == range(number, number + 1)
  assert opened == ["a"]
  assert next(parts).rows == range(12, 13)
  assert opened == ["a", "b"]
  rest = [(part.work_unit, part.rows, part.is_last) for part in parts]
  assert rest[:7] == [("a", range(n, n + 1), n == 19) for n in range(13, 20)]
  assert rest[7:] == [("b", range(0), True), ("c", range(1), True)]
  assert opened == ["a", "b", "c"]


def test_the_last_batch_is_padded():
  rows = open_rows(["a", "b", "c"], ["a dog"])
  batches = [*make_labeller().read([("a work unit", rows)])]
  assert [[image and image.key for image in b.images] for b in batches] == [
    ["a", "b"],
    ["c", None],
  ]
  for batch in batches:
    assert {name: x.shape for name, x in batch.pixels.items()} == {
      "captioner": (2, 16, 16, 3),
      "filter": (2, 16, 16, 3),
    }
  np.testing.assert_array_equal(batches[1].pixels["filter"][1], 0)


def test_without_a_captioner_only_web_texts_are_scored():
  labeller = make_labeller(captioner=False)
  texts = ["a red circle", b"\xff", "a blue star"]
  (image,) = label_one(labeller, open_rows(["a"], texts))
  assert [text.source for text in image.texts] == ["web"] * 3
  assert [text.bad for text in image.texts] == ["", "invalid_utf8", ""]
  assert image.texts[1].itm_prob is None
  assert image.texts[1].log_prob is None
  match = helpers.make_model("itm").match(PIXELS, [texts[0], texts[2]])
  for text, prob, cosine in zip(
    image.texts[::2], match.itm_prob[0], match.itc_cosine[0], strict=True
  ):
    assert text.itm_prob == pytest.approx(prob, rel=1e-4)
    assert text.itc_cosine == pytest.approx(cosine, abs=1e-5)


def test_an_image_that_cannot_be_read_has_a_reason_and_no_texts():
  records = [
    {"id": "a", "image": b"no image", "caption": ["a dog"]},
    {"id": "b", "image": PIXELS, "caption": ["a dog"], "image_id": 7},
  ]
  rows = sources.Rows(records, np.arange(2))
  bad, good = label_one(make_labeller(), rows)
  assert bad.bad.startswith("not_an_image: ")
  assert bad.texts == ()
  assert good.bad == ""
  assert (good.row, good.image_id, good.path) == (1, "7", "")
  assert [text.source for text in good.texts] == ["web", "synthetic"]
