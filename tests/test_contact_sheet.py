"""Contact sheets: layout, colours, and texts of any kind."""

import os

import numpy as np
import pytest
from PIL import Image, ImageFont

from blip_jax.data import scenes
from blip_jax.runtime import contact_sheet

IMAGE, GAP, PADDING = (
  contact_sheet.IMAGE,
  contact_sheet.GAP,
  contact_sheet.PADDING,
)


def cells(num, right=True):
  source = scenes.Scenes("val", num=num)
  return [
    contact_sheet.Cell(
      record["image"],
      [
        contact_sheet.Line("true", record["caption"]),
        contact_sheet.Line("top-ranked", record["caption"], right),
      ],
    )
    for record in source
  ]


def read(path):
  with Image.open(path) as sheet:
    assert sheet.format == "PNG"
    return np.asarray(sheet)


def has(sheet, colour):
  return (sheet == colour).all(axis=-1).any()


def test_small_images_are_enlarged_pixel_by_pixel(tmp_path):
  path = tmp_path / "deep" / "samples.png"
  rows = cells(2)
  contact_sheet.contact_sheet(rows, path)
  sheet = read(path)
  factor = IMAGE // 32
  for k, cell in enumerate(rows):
    left = GAP + PADDING + k * (IMAGE + 2 * PADDING + GAP)
    box = sheet[GAP + PADDING :, left:][:IMAGE, :IMAGE]
    np.testing.assert_array_equal(box[::factor, ::factor], cell.image)


def test_cells_are_laid_out_in_a_grid(tmp_path):
  path = tmp_path / "samples.png"
  contact_sheet.contact_sheet(3 * cells(1), path, columns=3)
  one_row, width, _ = read(path).shape
  assert width == GAP + 3 * (IMAGE + 2 * PADDING + GAP)
  contact_sheet.contact_sheet(5 * cells(1), path, columns=3)
  two_rows, width, _ = read(path).shape
  assert width == GAP + 3 * (IMAGE + 2 * PADDING + GAP)
  assert two_rows - GAP == 2 * (one_row - GAP)


@pytest.mark.parametrize("right", [True, False])
def test_right_is_green_and_wrong_is_red(tmp_path, right):
  path = tmp_path / "samples.png"
  contact_sheet.contact_sheet(cells(1, right), path)
  below = read(path)[GAP + PADDING + IMAGE :]
  assert has(below, contact_sheet.GREEN) == right
  assert has(below, contact_sheet.RED) != right


@pytest.mark.parametrize("shape", [(500, 40), (40, 500), (7, 7), (1, 900)])
def test_images_of_any_shape_keep_their_aspect_ratio(shape):
  image = contact_sheet._fit(np.zeros((*shape, 3), np.uint8))
  assert IMAGE / 2 < max(image.size) <= IMAGE
  wide, high = shape[1] / max(shape), shape[0] / max(shape)
  assert image.width == pytest.approx(wide * max(image.size), abs=1)
  assert image.height == pytest.approx(high * max(image.size), abs=1)


@pytest.mark.parametrize(
  "text",
  ["", "x" * 2_000_000, "IMG_" + "0" * 300 + ".jpg tail", "two\nlines " * 99],
)
def test_any_text_fits(text):
  font = ImageFont.load_default(size=contact_sheet.FONT_SIZE)
  lines = contact_sheet._wrap(text, font)
  assert 1 <= len(lines) <= contact_sheet.MAX_LINES
  assert max(font.getlength(line) for line in lines) <= IMAGE
  if len(text) > 200:
    assert lines[-1].endswith("...")


def test_short_texts_are_not_truncated():
  font = ImageFont.load_default(size=contact_sheet.FONT_SIZE)
  text = "a red circle on the left and a blue square on the right"
  assert " ".join(contact_sheet._wrap(text, font)) == text


def test_letters_that_the_font_lacks_become_ascii():
  font = ImageFont.load_default(size=contact_sheet.FONT_SIZE)
  assert contact_sheet._wrap("naïve café 猫", font) == ["naive cafe ?"]


def test_an_interrupted_write_leaves_the_old_sheet(tmp_path, monkeypatch):
  path = tmp_path / "samples.png"
  contact_sheet.contact_sheet(cells(1), path)
  before = path.read_bytes()

  def fail(descriptor):
    raise OSError("No space left on device")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(OSError, match="No space left"):
    contact_sheet.contact_sheet(cells(2), path)
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def test_an_empty_sheet_is_refused(tmp_path):
  with pytest.raises(ValueError, match="at least one cell"):
    contact_sheet.contact_sheet([], tmp_path / "samples.png")
