"""Which rows of a split are one image, and which texts are its captions."""

import pytest

from blip_jax.data import sources
from blip_jax.evaluators import by_image


def row(number, image, caption, **further):
  record = {"image": image, "caption": caption, "id": f"x:{number}"}
  return record | further


def test_rows_of_one_path_are_one_image_if_only_some_have_an_id():
  rows = [
    row(0, "a.png", "a"),
    row(1, "b.png", "b", image_id=7),
    row(2, "./a.png", "c", image_id=8),
    row(3, "b.png", "d"),
    row(4, "other.png", "e", image_id="8"),
  ]
  images = by_image.ByImage(rows)
  assert (len(images), images.num_captions) == (2, 5)
  assert images[0] == row(0, "a.png", ["a", "c", "e"], image_id=8)
  assert images[1] == row(1, "b.png", ["b", "d"], image_id=7)


def test_texts_that_are_no_captions_are_dropped_and_named():
  rows = [
    row(0, "a.png", ""),
    row(1, "a.png", "a dog"),
    row(2, "b.png", ["a cat", "", "..."]),
    row(3, "c.png", [""]),
    row(4, "a.png", b"\xff"),
  ]
  images = by_image.ByImage(rows)
  assert (images.images, images.num_captions) == ([1, 2], 2)
  captions = [images[n]["caption"] for n in images.images]
  assert captions == [["a dog"], ["a cat"]]
  found = [(bad.id, bad.reason) for bad in images.bad]
  assert found == [
    ("x:0", "empty_caption"),
    ("x:2#1", "empty_caption"),
    ("x:2#2", "empty_caption"),
    ("x:3", "empty_caption"),
    ("x:4", "invalid_utf8"),
  ]
  # Rows without a caption remain, so that a pass counts them.
  assert len(images) == 5
  for n in (0, 3, 4):
    with pytest.raises(sources.BadRow):
      images[n]
