"""Images and texts against those of the original's preprocessing."""

import io
import itertools
import json
import math
import pickle
import struct
import warnings
import zlib

import cv2
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from blip_jax.data import randaugment, transforms
from blip_jax.inference import images
from blip_jax.tasks import base
from tests import helpers

MAX_PIXELS = 10_000_000
SIZES = (32, 40)


@pytest.mark.parametrize(
  "mode, format",
  [
    ("RGB", "JPEG"),
    ("L", "JPEG"),
    ("CMYK", "JPEG"),
    ("RGB", "PNG"),
    ("RGBA", "PNG"),
    ("P", "PNG"),
    ("I;16", "PNG"),
    ("RGB", "TIFF"),
  ],
)
def test_resized_is_what_is_made_of_the_decoded_image(photo, mode, format):
  image = PIL.Image.fromarray(photo[::2].copy())
  if mode == "I;16":
    image = PIL.Image.fromarray(photo[..., 0].astype(np.uint16) * 257)
  raw = encode(image if mode == "I;16" else image.convert(mode), format)
  sizes = [transforms.EvalImage(16), transforms.EvalImage((9, 30))]
  decoded = helpers.decode(raw, MAX_PIXELS)
  for result, size in zip(
    transforms.resized(raw, sizes, MAX_PIXELS), sizes, strict=True
  ):
    np.testing.assert_array_equal(result, size(decoded))


def test_a_scaled_jpeg_is_no_smaller_than_asked_and_nearly_the_same(
  photo, monkeypatch
):
  large = PIL.Image.fromarray(photo).resize((256, 192))
  raw = encode(large, "JPEG", quality=95)
  used = []
  converted = transforms.rgb.converted

  def watched(image):
    used.append(image.size)
    return converted(image)

  monkeypatch.setattr(transforms.rgb, "converted", watched)
  for height, width, decoded in (
    (97, 10, (256, 192)),
    (96, 10, (128, 96)),
    (10, 64, (64, 48)),
    (20, 20, (32, 24)),
    (8, 8, (32, 24)),  # an eighth is the least
  ):
    size = [transforms.EvalImage((height, width))]
    (full,) = transforms.resized(raw, size, MAX_PIXELS)
    (scaled,) = transforms.resized(raw, size, MAX_PIXELS, scaled=True)
    assert used[-2:] == [(256, 192), decoded]
    assert scaled.shape == (height, width, 3)
    difference = np.abs(scaled.astype(int) - full)
    assert difference.mean() < 2
    assert (difference.max() == 0) == (decoded == (256, 192))
  sizes = [transforms.EvalImage(8), transforms.EvalImage((90, 8))]
  transforms.resized(raw, sizes, MAX_PIXELS, scaled=True)
  assert used[-1] == (128, 96)
  transforms.resized(encode(large, "PNG"), sizes, MAX_PIXELS, scaled=True)
  assert used[-1] == (256, 192)


@pytest.fixture(scope="module")
def golden(golden_dir):
  return np.load(golden_dir / "data" / "image_preprocess.npz")


@pytest.fixture(scope="module")
def files(golden_facts):
  return golden_facts("image_preprocess")["files"]


@pytest.fixture(scope="module")
def photo():
  """Smooth colours, which JPEG compression hardly changes."""
  y, x = np.mgrid[0:48, 0:64]
  return np.stack([3 * x, 4 * y, 2 * (x + y)], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def noise():
  """Does not compress, so that every byte of a file is needed."""
  return np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def encode(image, format, **options):
  if isinstance(image, np.ndarray):
    image = PIL.Image.fromarray(image)
  stream = io.BytesIO()
  image.save(stream, format, **options)
  return stream.getvalue()


def bad(image, max_pixels=MAX_PIXELS):
  with pytest.raises(transforms.BadSample) as caught:
    helpers.decode(image, max_pixels)
  return caught.value


# Decoding.


@pytest.mark.parametrize("kind", ["path", "str", "bytes"])
def test_eval_image_equals_the_original(kind, golden, files, golden_dir):
  for name, size in itertools.product(files, SIZES):
    path = golden_dir / "images" / name
    raw = {"path": path, "str": str(path), "bytes": path.read_bytes()}[kind]
    image = helpers.decode(raw, MAX_PIXELS)
    image = transforms.EvalImage(size)(image)
    key = f"{path.stem}.S{size}"
    if f"{key}.uint8" in golden:
      np.testing.assert_array_equal(image, golden[f"{key}.uint8"], key)
    normalised = base.normalise(jnp.asarray(image)[None])[0]
    expected = golden[key].transpose(1, 2, 0)
    np.testing.assert_allclose(normalised, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_converted_as_pil_does(mode, photo):
  image = PIL.Image.fromarray(photo).convert("RGB").convert(mode)
  format = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
  raw = encode(image, format)
  result = helpers.decode(raw, MAX_PIXELS)
  expected = PIL.Image.open(io.BytesIO(raw)).convert("RGB")
  np.testing.assert_array_equal(result, np.asarray(expected))


def test_cmyk_jpeg_keeps_its_colours(photo):
  image = PIL.Image.fromarray(photo).convert("CMYK")
  result = helpers.decode(encode(image, "JPEG", quality=95), MAX_PIXELS)
  assert np.abs(result.astype(int) - photo).mean() < 3


@pytest.mark.parametrize("transparency", [0, bytes(range(256))])
def test_transparent_palettes_are_converted_without_warnings(
  photo, transparency
):
  image = PIL.Image.fromarray(photo).quantize(16)
  raw = encode(image, "PNG", transparency=transparency)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    result = helpers.decode(raw, MAX_PIXELS)
  np.testing.assert_array_equal(result, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_upper_bits(format):
  deep = np.arange(0, 0x10000, 0x101, dtype=np.uint16).reshape(16, 16)
  result = helpers.decode(encode(deep, format), MAX_PIXELS)
  np.testing.assert_array_equal(result, (deep >> 8)[..., None].repeat(3, -1))
  assert result.max() == 255


def test_16_bit_colour_keeps_its_upper_bits():
  deep = np.random.default_rng(0).integers(0, 0x10000, (5, 6, 3), np.uint16)
  encoded, png = cv2.imencode(".png", deep[..., ::-1])
  assert encoded
  result = helpers.decode(png.tobytes(), MAX_PIXELS)
  np.testing.assert_array_equal(result, deep >> 8)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format):
  colors = ["red", "lime", "blue"]
  frames = [PIL.Image.new("RGB", (8, 6), color) for color in colors]
  options = {"lossless": True} if format == "WEBP" else {}
  raw = encode(
    frames[0], format, save_all=True, append_images=frames[1:], **options
  )
  result = helpers.decode(raw, MAX_PIXELS)
  assert result.shape == (6, 8, 3) and (result == [255, 0, 0]).all()


def every_mode(photo):
  """Name -> an image, a lossless format for it, and options of that format."""
  image = PIL.Image.fromarray(photo)
  deep = (photo[..., 0].astype(np.uint16) << 8) + 77
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  alpha = image.convert("RGBA")
  alpha.putalpha(PIL.Image.fromarray(photo[..., 1]))
  return {
    **{m: (image.convert(m), "PNG", {}) for m in ("1", "L", "LA", "P", "RGB")},
    "RGBA": (alpha, "PNG", {}),
    "palette with transparency": (
      *(image.quantize(16), "PNG"),
      {"transparency": bytes(range(256))},
    ),
    "grey with transparency": (image.convert("L"), "PNG", {"transparency": 7}),
    "CMYK": (image.convert("CMYK"), "TIFF", {}),
    "LAB": (PIL.Image.merge("LAB", image.split()), "TIFF", {}),
    "rotated by EXIF": (image, "PNG", {"exif": exif}),
    "I;16": (PIL.Image.fromarray(deep), "PNG", {}),
    "I;16B": (PIL.Image.fromarray(deep.astype(">u2")), "TIFF", {}),
    "I": (PIL.Image.fromarray(deep.astype(np.int32)), "TIFF", {}),
    "F": (PIL.Image.fromarray(photo[..., 0].astype(np.float32)), "TIFF", {}),
  }


@pytest.mark.parametrize(
  "name",
  [
    *("1", "L", "LA", "P", "RGB", "RGBA", "palette with transparency"),
    *("grey with transparency", "CMYK", "LAB", "rotated by EXIF"),
    *("I;16", "I;16B", "I", "F"),
  ],
)
def test_every_way_in_gives_equal_pixels(name, photo, tmp_path):
  image, format, options = every_mode(photo)[name]
  path = tmp_path / "image"
  image.save(path, format, **options)
  expected = helpers.decode(path, MAX_PIXELS)
  grey = photo[..., :1].repeat(3, -1)
  if name in ("I;16", "I;16B", "I", "F"):
    np.testing.assert_array_equal(expected, grey)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    with PIL.Image.open(path) as opened:
      info = dict(opened.info)
      ways = {
        "bytes": path.read_bytes(),
        "opened by PIL": opened,
        "in memory": image,
      }
      if image.mode in ("L", "RGB", "RGBA"):
        ways["array"] = np.asarray(image)
      for way, given in ways.items():
        pixels = helpers.decode(given, MAX_PIXELS)
        np.testing.assert_array_equal(pixels, expected, way)
        size = transforms.EvalImage(expected.shape[:2])
        pixels = images.ImageReader(size)(given)
        np.testing.assert_array_equal(pixels, expected, way)
      assert opened.info == info, "the user's image does not change"


def test_pil_images_are_checked_as_files_are(noise, tmp_path):
  assert bad(PIL.Image.fromarray(noise), 100).reason == "too_large"
  truncated = io.BytesIO(encode(noise, "PNG")[:-2000])
  assert bad(PIL.Image.open(truncated)).reason == "truncated"
  path = tmp_path / "a.png"
  path.write_bytes(encode(noise, "PNG"))
  with PIL.Image.open(path) as image:
    pass
  assert bad(image).reason == "corrupt"  # closed before it was read
  assert bad(PIL.Image.new("RGB", (0, 4))).reason == "empty"


@pytest.mark.parametrize(
  "pixels",
  [
    np.array([[0, 70_000]], np.int32),
    np.array([[-5, 60_000]], np.int32),
    np.array([[0, 233]], np.int32),
    np.array([[7, 255]], np.uint16),
    np.array([[0.0, 0.5, 1.0]], np.float32),
    np.array([[0.0, 300.0]], np.float32),
    np.array([[-20.0, 100.0]], np.float32),
    np.array([[np.nan, 100.0]], np.float32),
    np.array([[np.inf, 100.0]], np.float32),
  ],
)
def test_numbers_of_an_unknown_range_are_refused(pixels):
  """They would become black or white."""
  image = PIL.Image.fromarray(pixels)
  for given in (image, encode(image, "TIFF")):
    error = bad(given)
    assert error.reason == "unknown_range"
    assert "0 to 255" in error.detail or "0 to 65535" in error.detail


@pytest.mark.parametrize(
  "mode, format", [("I", "TIFF"), ("I;16", "TIFF"), ("I;16", "PNG")]
)
def test_8_bits_in_an_image_of_more_are_refused(photo, mode, format):
  """They would all become black."""
  image = PIL.Image.fromarray(photo[..., 0]).convert("I").convert(mode)
  for given in (image, encode(image, format)):
    assert bad(given).reason == "unknown_range"


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float32, bool])
def test_arrays_of_other_types_are_refused_with_what_helps(dtype):
  error = bad(np.ones((4, 4, 3), dtype))
  assert error.reason == "bad_array"
  assert "uint8" in error.detail and "0 to 255" in error.detail
  assert np.dtype(dtype).name in error.detail


def test_exif_orientation_is_ignored_as_in_the_original(photo):
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  turned = helpers.decode(encode(photo, "JPEG", exif=exif), MAX_PIXELS)
  plain = helpers.decode(encode(photo, "JPEG"), MAX_PIXELS)
  np.testing.assert_array_equal(turned, plain)


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_arrays_are_converted(channels, photo):
  if channels in (None, 1):
    image = photo[..., 0] if channels is None else photo[..., :1]
    expected = photo[..., :1].repeat(3, -1)
  else:
    alpha = np.full_like(photo[..., :1], 7)
    image = np.concatenate([photo, alpha], -1)[..., :channels]
    expected = photo
  result = helpers.decode(image, MAX_PIXELS)
  np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
  ("image", "reason"),
  [
    (np.zeros((4, 4, 3), np.float32), "bad_array"),
    (np.zeros((4, 4, 2), np.uint8), "bad_array"),
    (np.zeros((2, 4, 4, 3), np.uint8), "bad_array"),
    (np.zeros((0, 4, 3), np.uint8), "empty"),
    (np.zeros((4000, 4000), np.uint8), "too_large"),
    (b"", "empty"),
    (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
    (b"\x00" * 500, "not_an_image"),
    ("/no/such/file.jpg", "missing"),
    ("/", "unreadable"),
    ("nul\x00byte.jpg", "unreadable"),
  ],
)
def test_unusable_images_are_refused(image, reason):
  assert bad(image).reason == reason


def test_the_content_of_a_file_decides_not_its_name(tmp_path, photo):
  path = tmp_path / "photo.jpg"
  path.write_text("<html>not found</html>")
  error = bad(path)
  assert error.reason == "not_an_image" and "<html>" in error.detail
  path.write_bytes(b"")
  assert bad(path).reason == "empty"
  path.write_bytes(encode(photo, "PNG"))
  np.testing.assert_array_equal(helpers.decode(path, MAX_PIXELS), photo)


@pytest.mark.parametrize(
  ("format", "reasons"),
  [
    ("JPEG", {"truncated"}),
    ("PNG", {"truncated"}),
    ("GIF", {"truncated"}),
    ("BMP", {"truncated"}),
    ("WEBP", {"corrupt", "not_an_image"}),
    ("TIFF", {"truncated"}),
  ],
)
def test_truncated_files_are_refused(format, reasons, noise):
  raw = encode(noise, format)
  for share in (0.5, 0.9):
    assert bad(raw[: int(share * len(raw))]).reason in reasons


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_a_bad_sample_or_an_image(photo):
  """Whatever PIL raises on damaged bytes becomes a `BadSample`."""
  rng = np.random.default_rng(0)
  reasons = set()
  for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000"):
    raw = np.frombuffer(encode(photo, format), np.uint8)
    for _ in range(60):
      broken = raw.copy()
      where = rng.integers(len(raw), size=8)
      broken[where] = rng.integers(0, 256, size=8)
      try:
        result = helpers.decode(broken.tobytes(), 100_000)
        assert result.ndim == 3 and result.dtype == np.uint8
      except transforms.BadSample as error:
        reasons.add(error.reason)
  assert {"corrupt", "not_an_image", "too_large"} <= reasons


def png_claiming(width, height):
  """A file of less than 100 bytes whose header claims this size."""

  def chunk(kind, body):
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
  return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def test_a_tiny_file_that_claims_gigabytes_is_refused():
  error = bad(png_claiming(9000, 9000))
  assert error.reason == "too_large"
  assert "9000 x 9000" in error.detail and str(MAX_PIXELS) in error.detail
  # Here PIL's own guard raises first; it must stay enabled.
  assert bad(png_claiming(60_000, 60_000), 10**12).reason == "too_large"
  assert PIL.Image.MAX_IMAGE_PIXELS


def test_max_pixels_is_inclusive(photo):
  assert helpers.decode(encode(photo, "PNG"), photo[..., 0].size).any()
  raw = encode(photo, "PNG")
  assert bad(raw, photo[..., 0].size - 1).reason == "too_large"


def test_formats_that_start_programs_are_refused():
  eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
  assert PIL.Image.open(io.BytesIO(eps)).format == "EPS"
  assert bad(eps).reason == "not_an_image"


def test_bad_samples_can_be_pickled():
  error = pickle.loads(pickle.dumps(transforms.BadSample("empty", "0 bytes")))
  assert (error.reason, error.detail) == ("empty", "0 bytes")
  assert str(error) == "empty: 0 bytes"


# Training crops.


@pytest.mark.parametrize(
  ("key", "box", "flip"),
  [
    ("crop0", (3, 5, 40, 50), False),
    ("crop1", (0, 0, 60, 60), True),
    ("crop2", (20, 30, 17, 33), True),
  ],
)
def test_resized_crop_equals_the_original(key, box, flip, golden, golden_dir):
  path = golden_dir / "images" / "grad_rgb.png"
  image = helpers.decode(path, MAX_PIXELS)
  result = transforms.resized_crop(image, *box, size=32, flip=flip)
  np.testing.assert_array_equal(result, golden[key])


def test_sizes_can_be_rectangular(photo):
  expected = PIL.Image.fromarray(photo).resize((20, 10), PIL.Image.BICUBIC)
  result = transforms.EvalImage((10, 20))(photo)
  np.testing.assert_array_equal(result, np.asarray(expected))
  train = transforms.TrainImage((10, 20), 0.5, randaugment.RandAugment())
  assert train(photo, np.random.default_rng(0)).shape == (10, 20, 3)


def test_crops_are_sampled_uniformly_from_their_ranges():
  height, width, scale, ratio = 300, 400, (0.2, 1.0), (3 / 4, 4 / 3)
  rng = np.random.default_rng(0)
  boxes = np.array(
    [
      transforms.sample_crop(height, width, scale, ratio, rng)
      for _ in range(4000)
    ]
  )
  top, left, h, w = boxes.T
  assert (top >= 0).all() and (top + h <= height).all()
  assert (left >= 0).all() and (left + w <= width).all()
  area, shape = h * w / (height * width), w / h
  assert 0.19 < area.min() < 0.21 and area.max() > 0.95
  assert shape.min() > 0.74 and shape.max() < 1.35
  # For areas where every ratio fits, log(ratio) and the area are uniform.
  small = area < 0.5
  np.testing.assert_allclose(np.log(shape[small]).mean(), 0, atol=0.02)
  spread = math.log(16 / 9) / math.sqrt(12)
  np.testing.assert_allclose(np.log(shape[small]).std(), spread, rtol=0.05)
  np.testing.assert_allclose(area[small].mean(), 0.35, atol=0.01)
  # Every position is as likely as any other.
  middle = (left / (width - w + 1))[small]
  np.testing.assert_allclose(middle.mean(), 0.5, atol=0.02)


@pytest.mark.parametrize(
  ("height", "width", "box"),
  [
    (10, 1000, (0, 493, 10, 13)),
    (1000, 9, (494, 0, 12, 9)),
    (1, 1000, (0, 499, 1, 1)),
  ],
)
def test_panoramas_fall_back_to_a_central_crop(height, width, box):
  """Calculated by hand: 10 * 4/3 rounds to 13, 9 / (3/4) is 12."""
  rng = np.random.default_rng(0)
  full = (1.0, 1.0)
  ratio = (3 / 4, 4 / 3)
  assert transforms.sample_crop(height, width, full, ratio, rng) == box


def test_train_image_depends_only_on_the_generator(photo):
  train = transforms.TrainImage(24, 0.2, randaugment.RandAugment())
  images = [train(photo, np.random.default_rng(seed)) for seed in (1, 1, 2)]
  np.testing.assert_array_equal(images[0], images[1])
  assert (images[0] != images[2]).any()
  assert images[0].shape == (24, 24, 3) and images[0].dtype == np.uint8


def test_half_of_the_images_are_flipped(photo):
  train = transforms.TrainImage(8, 1.0, None, ratio=(4 / 3, 4 / 3))
  plain = transforms.EvalImage(8)(photo)
  num_flipped = 0
  for seed in range(400):
    image = train(photo, np.random.default_rng(seed))
    flipped = (image != plain).any()
    np.testing.assert_array_equal(image, plain[:, ::-1] if flipped else plain)
    num_flipped += flipped
  assert 160 < num_flipped < 240


def test_impossible_scale_is_refused():
  with pytest.raises(
    ValueError, match=r"config\.data\.min_scale\): expected .* found 1\.5"
  ):
    transforms.TrainImage(24, 1.5, None)


# Texts.


def test_texts_equal_the_original(golden_dir):
  path = golden_dir / "tokenizer" / "bert_tokenizer.json"
  rows = json.loads(path.read_text())["captions"]
  for row in rows:
    caption = row["caption"]
    assert transforms.pre_caption(caption, 50) == row["pre_caption"]
    assert transforms.pre_caption(caption, 30) == row["pre_caption_30"]
    assert transforms.pre_question(caption) == row["pre_question"]


@pytest.mark.parametrize(
  ("text", "caption", "question"),
  [
    ("A Dog.", "a dog", "a dog"),
    ("What's (this)?", "what's this ?", "what's this?"),
    ("a.b", "a b", "ab"),
    ("what? who, or - an_example/%&", *["what? who, or - an_example/%&"] * 2),
    ("  a  b  ", "a b", "  a  b"),
    ("a \n b", "a b", "a \n b"),
    ("a\nb", "a\nb", "a\nb"),
    ("one line\n", "one line", "one line\n"),
    ("ends in tab\t", "ends in tab\t", "ends in tab\t"),
    ("one two three four", "one two three", "one two three"),
    ("Is * it : so ; ~ ?", "is it so ?", "is  it"),
    ('.!"()*#:;~', "", ""),
  ],
)
def test_texts_equal_those_written_by_hand(text, caption, question):
  assert transforms.pre_caption(text, 3) == " ".join(caption.split(" ")[:3])
  assert transforms.pre_question(text, 3) == " ".join(question.split(" ")[:3])


@pytest.mark.parametrize(
  ("text", "cleaned"),
  [
    ("a dog", "a dog"),
    ("café".encode(), "café"),
    ("a\x00b\x07\x1b[0m\x7f\x85c", "ab[0mc"),
    ("tab\tand\r\nlines", "tab\tand\r\nlines"),
    ("日本 😀\u200b", "日本 😀\u200b"),
    ("x" * transforms.MAX_TEXT_BYTES, "x" * transforms.MAX_TEXT_BYTES),
  ],
)
def test_control_characters_are_removed(text, cleaned):
  assert transforms.clean_text(text) == cleaned


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("", "empty_caption"),
    (b"", "empty_caption"),
    (" \n\t ", "empty_caption"),
    ("\x00\x01", "empty_caption"),
    ("...", "empty_caption"),
    ("x" * (transforms.MAX_TEXT_BYTES + 1), "too_long"),
    ("é" * (transforms.MAX_TEXT_BYTES // 2 + 1), "too_long"),
    (b"x" * 1_000_000, "too_long"),
    (b"caf\xe9", "invalid_utf8"),
    ("half a pair \ud83d", "invalid_utf8"),
  ],
)
def test_unusable_texts_are_refused(text, reason):
  with pytest.raises(transforms.BadSample) as caught:
    transforms.clean_text(text)
  assert caught.value.reason == reason
  assert len(json.dumps(caught.value.detail)) < 500


def test_clean_texts_have_a_word_left_after_pre_caption():
  for text in ("?", ". a", "\xa0a", "~'~", "-"):
    assert transforms.pre_caption(transforms.clean_text(text), 30)


@pytest.mark.parametrize(
  "pixels, expected",
  [
    (np.array([[0, 65_535]], np.int32), [0, 255]),
    (np.array([[255, 256]], np.int32), [0, 1]),
    (np.array([[0, 256]], np.uint16), [0, 1]),
    (np.array([[0, 0]], np.int32), [0, 0]),
    (np.array([[-1.0, 256.0]], np.float32), [0, 255]),
    (np.array([[0.0, 1.01]], np.float32), [0, 1]),
    (np.array([[0.0, 0.0]], np.float32), [0, 0]),
  ],
)
def test_the_ends_of_the_known_ranges(pixels, expected):
  result = helpers.decode(PIL.Image.fromarray(pixels), MAX_PIXELS)
  assert result[0, :, 0].tolist() == expected
  assert (result == result[..., :1]).all()


@pytest.mark.parametrize(
  "pixels",
  [
    np.array([[0, 65_536]], np.int32),
    np.array([[-1, 65_535]], np.int32),
    np.array([[0, 255]], np.int32),
    np.array([[0, 1]], np.uint16),
    np.array([[-1.01, 100.0]], np.float32),
    np.array([[0.0, 256.1]], np.float32),
    np.array([[0.5, 1.0]], np.float32),
  ],
)
def test_just_beyond_the_known_ranges(pixels):
  assert bad(PIL.Image.fromarray(pixels)).reason == "unknown_range"


@pytest.mark.parametrize("scale, is_refused", [(1.0, False), (0.0, True)])
def test_a_crop_is_some_of_the_image_up_to_all(scale, is_refused):
  transforms.TrainImage(24, 1e-6, None)
  if is_refused:
    with pytest.raises(ValueError, match=r"\(0, 1\], found 0"):
      transforms.TrainImage(24, scale, None)
  else:
    transforms.TrainImage(24, scale, None)


def test_ten_boxes_are_tried_before_the_largest_is_taken():
  """Of a strip no box of this ratio fits; each try draws area and ratio."""
  drawn = []

  class Generator(np.random.Generator):
    def uniform(self, low, high):
      drawn.append((low, high))
      return high

  box = transforms.sample_crop(
    10, 1000, (0.5, 1.0), (0.75, 1.25), Generator(np.random.PCG64())
  )
  assert len(drawn) == 20 and drawn[0] == (0.5, 1.0)
  # 10 * 1.25 is 12.5, which rounds to even.
  assert box == (0, 494, 10, 12)


def test_a_box_may_be_as_large_as_the_image():
  class Generator(np.random.Generator):
    def uniform(self, low, high):
      return high

    def integers(self, high):
      assert high == 1
      return 0

  box = transforms.sample_crop(
    8, 8, (1.0, 1.0), (1.0, 1.0), Generator(np.random.PCG64())
  )
  assert box == (0, 0, 8, 8)


def test_questions_are_cut_at_fifty_words():
  assert transforms.pre_question("a " * 60) == " ".join(["a"] * 50)
