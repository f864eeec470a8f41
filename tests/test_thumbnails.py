"""Thumbnails: their sizes, and images that are gone when they are shown."""

import errno

import numpy as np
import pytest

from blip_jax.data import thumbnails
from blip_jax.inference import search
from tests import helpers


def grey(height, width):
  return np.full((height, width, 3), 7, np.uint8)


@pytest.mark.parametrize(
  "shape, expected",
  [
    ((96, 96), (192, 192)),  # twice
    ((95, 95), (190, 190)),  # a whole factor
    ((97, 97), (192, 192)),  # resampled
    ((192, 48), (192, 48)),
    ((384, 192), (192, 96)),
    ((64, 32), (192, 96)),
    ((1, 1), (192, 192)),
    ((3, 2000), (1, 192)),
  ],
)
def test_the_size_of_a_thumbnail(shape, expected):
  assert thumbnails.fit(grey(*shape), 192).shape == (*expected, 3)


def test_small_images_are_enlarged_pixel_by_pixel():
  image = np.random.default_rng(0).integers(0, 255, (32, 20, 3), np.uint8)
  found = thumbnails.read(lambda: image, 100, "a")
  np.testing.assert_array_equal(found, image.repeat(3, 0).repeat(3, 1))


def raises(error):
  def get():
    raise error

  return get


@pytest.mark.parametrize(
  "get_image",
  [
    lambda: "no/such.png",
    lambda: b"garbage",
    lambda: None,
    raises(IndexError("row 9")),
    raises(RuntimeError("any\nother")),
    raises(OSError(errno.EIO, "a bad disk")),
  ],
)
def test_an_image_that_is_gone_costs_its_thumbnail_only(get_image, caplog):
  assert thumbnails.read(get_image, 10, "name\x1b of it") is None
  (message,) = [record.getMessage() for record in caplog.records]
  assert "name\\x1b of it" in message and "\n" not in message


def test_what_hits_all_images_is_raised():
  with pytest.raises(OSError, match="too many"):
    thumbnails.read(raises(OSError(errno.EMFILE, "too many")), 10, "a")


def test_a_search_draws_what_is_left(tmp_path):
  gallery = [{"image": grey(96, 96)}, {"image": str(tmp_path / "gone.png")}]
  found = [{"row": n, "id": str(n), "cosine": 0.5} for n in range(2)]
  sheet = tmp_path / "found.png"
  search._draw([{"query": "q", "found": found}], gallery, 0, sheet)
  pixels = helpers.decode(sheet, 10**7)
  left, right = np.split(pixels[:, :480], 2, axis=1)
  assert (left == 7).all(-1).sum() == 192 * 192
  assert not (right == 7).all(-1).any()
