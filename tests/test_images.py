"""Images as users have them: batches, padding, downloads, what is skipped."""

import logging
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest

from blip_jax.data import transforms
from blip_jax.inference import images, urls
from blip_jax.runtime import sharding
from tests.hostile import urls as web

READ = images.ImageReader(transforms.EvalImage(4))


def pixels(number):
  return [np.full((2, 2, 3), 10 + n, np.uint8) for n in range(number)]


def mesh_of(number):
  sizes = {"data": number, "fsdp": 1, "tensor": 1}
  return sharding.make_mesh(sizes, jax.devices()[:number])


@pytest.mark.parametrize(
  "number, batch_size, devices, sizes",
  [
    # A few images make a batch of the next power of two.
    (1, 8, 1, [1]),
    (2, 8, 1, [2]),
    (3, 8, 1, [4]),
    (5, 8, 1, [8]),
    (8, 8, 1, [8]),
    (3, 3, 1, [3]),
    (5, 6, 1, [6]),
    # The last of several batches is padded to the size of the others.
    (9, 8, 1, [8, 8]),
    (16, 8, 1, [8, 8]),
    # Devices share a batch evenly.
    (1, 1, 4, [4]),
    (5, 5, 4, [8]),
    (9, 5, 4, [8, 8]),
    (0, 8, 1, []),
  ],
)
def test_sizes_of_batches(number, batch_size, devices, sizes):
  given = pixels(number)
  found = [*images.batches(given, READ, batch_size, mesh_of(devices))]
  assert [len(batch.pixels) for batch in found] == sizes
  assert sum(len(batch.errors) for batch in found) == number
  assert all(batch.readable.all() for batch in found)
  first = np.concatenate([b.pixels for b in found])[:, 0, 0, 0] if found else []
  order = [
    *(10 + n for n in range(number)),
    *[0] * (sum(sizes) - number),
  ]
  assert list(first) == order


def test_unreadable_images_are_black_and_named(caplog):
  given = [b"" if n % 2 else image for n, image in enumerate(pixels(50))]
  with caplog.at_level(logging.WARNING):
    found = [*images.batches(given, READ, 64, mesh_of(1), on_error="skip")]
  (batch,) = found
  assert batch.readable.tolist() == [True, False] * 25
  assert not batch.pixels[1].any() and batch.pixels[2].all()
  (record,) = caplog.records
  message = record.getMessage()
  assert message.startswith("25 of 50 images cannot be read")
  assert "image 39: " in message and "image 41: " not in message
  assert message.endswith("; ...")
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    list(images.batches(given[:40], READ, 3, mesh_of(1), on_error="skip"))
  (record,) = caplog.records
  assert "image 39: " in record.getMessage()
  assert not record.getMessage().endswith("; ...")
  caplog.clear()
  list(images.batches(given[::2], READ, 3, mesh_of(1), on_error="skip"))
  assert not caplog.records


def test_an_unreadable_image_is_an_error_unless_it_is_skipped():
  with pytest.raises(ValueError, match="image 1: empty"):
    list(images.batches([*pixels(1), b""], READ, 2, mesh_of(1)))
  with pytest.raises(ValueError, match="on_error: expected one of"):
    images.batches(pixels(1), READ, 2, mesh_of(1), on_error="ignore")


@pytest.mark.parametrize(
  "given, number",
  [
    (np.zeros((2, 2), np.uint8), 1),
    (np.zeros((2, 2, 3), np.uint8), 1),
    (np.zeros((5, 2, 2, 3), np.uint8), 5),
    ("a.jpg", 1),
    (pathlib.Path("a.jpg"), 1),
    (b"abc", 1),
    (PIL.Image.new("L", (2, 2)), 1),
    (["a.jpg", b"abc"], 2),
  ],
)
def test_one_image_or_many(given, number):
  assert len(list(images.as_iterable(given))) == number


FRAMES = np.stack([np.full((2, 2, 3), n, np.uint8) for n in range(9)])
OF_VIDEOS = images.ImageReader(transforms.EvalImage(4), num_frames=4)


@pytest.mark.parametrize(
  "given, number",
  [
    (FRAMES, 1),
    (FRAMES[None], 1),
    (np.stack([FRAMES] * 3), 3),
    ([FRAMES, "a.mp4"], 2),
    ("a.mp4", 1),
  ],
)
def test_one_video_or_many(given, number):
  assert len(list(images.as_iterable(given, num_frames=4))) == number


@pytest.mark.parametrize("as_given", [np.array, list, tuple])
def test_frames_of_arrays_and_lists(as_given):
  found = OF_VIDEOS(as_given(FRAMES))
  assert found.shape == (4, 4, 4, 3)
  assert found[:, 0, 0, 0].tolist() == [0, 2, 4, 6]
  one = images.ImageReader(transforms.EvalImage(4), num_frames=1)
  np.testing.assert_array_equal(one(FRAMES[5:])[0], READ(FRAMES[5]))


@pytest.mark.parametrize(
  "given, reason",
  [
    (FRAMES[:3], "too_few_frames: .*expected 4 frames or more, found 3"),
    (FRAMES[0], "not_a_video: .*found ndarray; for images leave out num_f"),
    (PIL.Image.new("L", (2, 2)), "not_a_video"),
    (b"content", "not_a_video"),
    ([*FRAMES[:3], b"content"], "not_an_image|unreadable|corrupt"),
  ],
)
def test_what_is_no_video_is_refused(given, reason):
  with pytest.raises(transforms.BadSample, match=reason):
    OF_VIDEOS(given)


@pytest.mark.parametrize("given", ["a.mp4", pathlib.Path("b.MKV"), FRAMES])
def test_a_video_in_place_of_an_image_says_what_helps(tmp_path, given):
  if not isinstance(given, np.ndarray):
    given = tmp_path / given
    given.write_bytes(b"nothing that is an image")
  with pytest.raises(transforms.BadSample, match="num_frames=8 takes 8 frames"):
    READ(given)


def test_black_stands_for_images_and_for_videos():
  size = transforms.EvalImage((4, 6))
  assert images.ImageReader(size).black().shape == (4, 6, 3)
  assert images.ImageReader(size, num_frames=2).black().shape == (2, 4, 6, 3)
  assert READ.black().shape == (4, 4, 3)


@pytest.mark.parametrize("extra, is_refused", [(0, False), (1, True)])
def test_downloads_are_limited(monkeypatch, extra, is_refused):
  monkeypatch.setattr(urls, "MAX_BYTES", len(web.IMAGE) - extra)
  with web.served() as (port, questions):
    url = f"http://127.0.0.1:{port}/image"
    fetching = images.ImageReader(READ.size, urls=True, allow_private=True)
    with pytest.raises(ValueError, match="set urls=True"):
      READ(url)
    assert not questions
    if is_refused:
      with pytest.raises(transforms.BadSample, match="too_large"):
        fetching(url)
    else:
      fetching(url)
    assert len(questions) == 1


@pytest.mark.parametrize("image", [5, None, True, 1.5, np.int64(3), object()])
def test_what_is_no_image_is_refused_by_its_number(image):
  given = iter([*pixels(2), image])
  expected = (
    "image 2: not_an_image: expected a path, bytes, array or PIL image, found "
    f"{type(image).__name__}"
  )
  with pytest.raises(ValueError, match=expected):
    list(images.batches(given, READ, 8, mesh_of(1)))
  given = iter([*pixels(2), image])
  (batch,) = images.batches(given, READ, 8, mesh_of(1), "skip")
  assert batch.errors == (None, None, expected)


def test_a_url_that_was_not_asked_for_is_like_an_image_that_cannot_be_read():
  given = [*pixels(1), "https://a.org/b.png"]
  expected = "image 1: not_requested: https://a.org/b.png: .*set urls=True"
  with pytest.raises(ValueError, match=expected):
    list(images.batches(given, READ, 8, mesh_of(1)))
  (batch,) = images.batches(given, READ, 8, mesh_of(1), "skip")
  assert batch.readable.tolist() == [True, False]
