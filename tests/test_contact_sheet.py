"""Contact sheets: layout, colours, and texts of any kind."""

import itertools
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


def test_an_image_that_is_not_readable_is_said_in_its_box(tmp_path):
  path = tmp_path / "deep" / "samples.png"
  box = slice(GAP + PADDING, GAP + PADDING + IMAGE)
  contact_sheet.contact_sheet([contact_sheet.Cell(None, [])], path)
  assert has(read(path)[box, box], contact_sheet.FAINT)
  contact_sheet.contact_sheet([contact_sheet.Cell(grey(96, 96), [])], path)
  assert not has(read(path)[box, box], contact_sheet.FAINT)


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


def grey(height, width):
  return np.full((height, width, 3), 7, np.uint8)


def test_the_places_of_a_sheet_in_pixels(tmp_path):
  """Two rows of two, and the second has longer texts. Cards are 216 wide (an
  image of 192 between paddings of 12), and 16 apart."""
  path = tmp_path / "samples.png"
  short = contact_sheet.Cell(grey(96, 192), [contact_sheet.Line("a", "b")])
  long = contact_sheet.Cell(
    grey(192, 96),
    [contact_sheet.Line("a", "b"), contact_sheet.Line("c", "d", True)],
  )
  contact_sheet.contact_sheet([short, long, short], path, columns=2)
  sheet = read(path)
  # A line has 12 of padding, a label and a text of 20 each: cards are
  # 192 + 2 * 12 + 2 * 52 = 320 high, then 192 + 2 * 12 + 52 = 268.
  assert sheet.shape == (16 + 320 + 16 + 268 + 16, 16 + 2 * (216 + 16), 3)
  page, card = (238, 240, 243), (255, 255, 255)
  rows, columns = (16 + 160, 352 + 100), (16 + 3, 248 + 3)
  for y in (8, 344, 628):
    assert (sheet[y] == page).all()
  for x in (8, 240, 472):
    assert (sheet[:, x] == page).all()
  for y, x in itertools.product(rows, columns):
    expected = page if (y, x) == (rows[1], columns[1]) else card
    assert (sheet[y, x] == expected).all(), (y, x)
  # Images are in the middle of their box.
  ys, xs = np.nonzero((sheet == 7).all(-1))
  first = (ys < 344) & (xs < 240)
  assert (ys[first].min(), ys[first].max()) == (28 + 48, 28 + 143)
  assert (xs[first].min(), xs[first].max()) == (28, 28 + 191)
  second = (ys < 344) & (xs > 240)
  assert (ys[second].min(), ys[second].max()) == (28, 28 + 191)
  assert (xs[second].min(), xs[second].max()) == (260 + 48, 260 + 143)


def test_a_title_needs_a_line_above(tmp_path):
  path = tmp_path / "samples.png"
  cell = contact_sheet.Cell(grey(8, 8), [])
  contact_sheet.contact_sheet([cell], path)
  plain = read(path)
  contact_sheet.contact_sheet([cell], path, title="H" * 300)
  titled = read(path)
  assert plain.shape == (16 + 216 + 16, 16 + 216 + 16, 3)
  assert titled.shape == (plain.shape[0] + 15 + 16, *plain.shape[1:])
  np.testing.assert_array_equal(titled[47:], plain[16:])
  head = titled[:47]
  ys, xs = np.nonzero((head != (238, 240, 243)).any(-1))
  # One line, between the margins.
  assert ys.min() >= 16 and ys.max() < 16 + 20
  # A letter may begin a pixel early.
  assert xs.min() >= 15 and xs.max() < 248 - 16
  assert has(head, (32, 33, 36))


def test_labels_are_faint_unless_they_judge(tmp_path):
  path = tmp_path / "samples.png"
  for right, inks in (
    (None, [(110, 115, 122), (32, 33, 36)]),
    (True, [(18, 122, 58)]),
    (False, [(196, 38, 38)]),
  ):
    line = contact_sheet.Line("HHH", "HHH", right)
    cell = contact_sheet.Cell(grey(8, 8), [line])
    contact_sheet.contact_sheet([cell], path)
    below = read(path)[16 + 12 + 192 :]
    for ink in ((110, 115, 122), (32, 33, 36), (18, 122, 58), (196, 38, 38)):
      assert has(below, ink) == (ink in inks)
    # Label and text have a line each.
    label, text = below[12:32], below[32:52]
    assert has(label, inks[0]) and has(text, inks[-1])


@pytest.mark.parametrize("max_lines", [1, 2, 3])
def test_as_many_lines_as_fit_and_dots(max_lines):
  font = ImageFont.load_default(size=15)
  words = "one two three four five six"
  width = int(font.getlength("three four")) + 1
  lines = contact_sheet._wrap(words, font, width, max_lines)
  full = ["one two", "three four", "five six"]
  assert lines[: max_lines - 1] == full[: max_lines - 1]
  assert len(lines) == max_lines
  assert lines[-1].endswith("...") == (max_lines < 3)


def test_a_word_as_wide_as_a_line_is_not_broken():
  font = ImageFont.load_default(size=15)
  width = int(np.ceil(font.getlength("abcdef")))
  lines = contact_sheet._wrap("abcdef abcdef", font, width, 9)
  assert lines == ["abcdef", "abcdef"]
  broken = contact_sheet._wrap("abcdefabc", font, width, 9)
  assert broken == ["abcdef", "abc"]
