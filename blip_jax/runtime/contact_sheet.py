"""Contact sheets: images with reference texts and what a model generated."""

import bisect
import dataclasses
import io
import os
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from blip_jax.runtime import files

IMAGE = 192  # side of an image's box in pixels, a multiple of 32, 64 and 96
GAP = 16
PADDING = 12
FONT_SIZE = 15
LINE_HEIGHT = 20
MAX_LINES = 4  # per text: a caption of a megabyte must not fill the sheet

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK = (32, 33, 36)
FAINT = (110, 115, 122)
GREEN = (18, 122, 58)
RED = (196, 38, 38)
PAGE = (238, 240, 243)
CARD = (255, 255, 255)


class Line(NamedTuple):
  """A labelled text below an image; `right` adds a colour and a word."""

  label: str
  text: str
  right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
  """An image that fits into its box, None for "not readable", and its lines."""

  image: UInt8[np.ndarray, "h w 3"] | None
  lines: Sequence[Line]


def contact_sheet(
  cells: Sequence[Cell],
  path: str | os.PathLike,
  title: str = "",
  columns: int = 6,
) -> None:
  """Writes a PNG that shows every cell, row by row.

  The file appears complete or not at all.

  Args:
    cells: in reading order.
    path: of the PNG.
    title: at the top; "" for none.
    columns: cells per row, at most.

  Raises:
    ValueError: there is no cell.
  """
  if not cells:
    raise ValueError(f"A contact sheet needs at least one cell: {path}")
  font = ImageFont.load_default(size=FONT_SIZE)
  small = ImageFont.load_default(size=FONT_SIZE - 2)
  columns = min(columns, len(cells))
  rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
  heights = [max(_text_height(cell, font) for cell in row) for row in rows]

  card_width = IMAGE + 2 * PADDING
  head = GAP + (FONT_SIZE + GAP if title else 0)
  sheet = Image.new(
    "RGB",
    (
      GAP + columns * (card_width + GAP),
      head + sum(IMAGE + height + 2 * PADDING + GAP for height in heights),
    ),
    PAGE,
  )
  draw = ImageDraw.Draw(sheet)
  if title:
    (title,) = _wrap(title, font, sheet.width - 2 * GAP, max_lines=1)
    draw.text((GAP, GAP), title, INK, font)
  top = head
  for row, height in zip(rows, heights, strict=True):
    bottom = top + IMAGE + height + 2 * PADDING
    for column, cell in enumerate(row):
      left = GAP + column * (card_width + GAP)
      draw.rounded_rectangle(
        (left, top, left + card_width, bottom), radius=8, fill=CARD
      )
      x, y = left + PADDING, top + PADDING
      if cell.image is None:
        center = x + IMAGE // 2, y + IMAGE // 2
        draw.text(center, "not readable", FAINT, small, anchor="mm")
      else:
        image = Image.fromarray(cell.image)
        margins = (IMAGE - image.width) // 2, (IMAGE - image.height) // 2
        sheet.paste(image, (x + margins[0], y + margins[1]))
      _draw_lines(draw, (x, y + IMAGE), cell, font, small)
    top = bottom + GAP
  content = io.BytesIO()
  sheet.save(content, "PNG")
  files.make_folder(files.as_path(path).parent)
  files.write_bytes(path, content.getvalue())


def _text_height(cell: Cell, font: Font) -> int:
  texts = [_wrap(line.text, font) for line in cell.lines]
  return sum(PADDING + LINE_HEIGHT * (1 + len(text)) for text in texts)


def _draw_lines(
  draw: ImageDraw.ImageDraw,
  corner: tuple[int, int],
  cell: Cell,
  font: Font,
  small: Font,
) -> None:
  x, y = corner
  for line in cell.lines:
    y += PADDING
    label, ink = line.label, INK
    if line.right is not None:
      # In words too, for readers who cannot tell red from green.
      label += ": right" if line.right else ": wrong"
      ink = GREEN if line.right else RED
    draw.text((x, y), label, FAINT if line.right is None else ink, small)
    y += LINE_HEIGHT
    for text in _wrap(line.text, font):
      draw.text((x, y), text, ink, font)
      y += LINE_HEIGHT


def _wrap(
  text: str,
  font: Font,
  width: int = IMAGE,
  max_lines: int = MAX_LINES,
) -> list[str]:
  """Breaks a text into lines of at most `width` pixels, "..." if truncated."""
  # No line has more characters than pixels, so the rest is not measured.
  text = _plain(text[: width * (max_lines + 1)])
  words = text.split()
  lines = [""]
  while words:
    word = words.pop(0)
    joined = f"{lines[-1]} {word}" if lines[-1] else word
    if font.getlength(joined) <= width:
      lines[-1] = joined
    elif lines[-1]:
      lines.append("")
      words.insert(0, word)
    else:
      # A word wider than a line, such as a URL, is broken anywhere.
      fits = bisect.bisect_right(
        range(len(word)), width, key=lambda n: font.getlength(word[:n])
      )
      lines[-1] = word[: fits - 1]
      words.insert(0, word[fits - 1 :])
  if len(lines) > max_lines:
    last = lines[max_lines - 1]
    while font.getlength(last + "...") > width:
      last = last[:-1]
    lines = [*lines[: max_lines - 1], last + "..."]
  return lines


def _plain(text: str) -> str:
  """Reduces a text to ASCII, which PIL's built-in font can draw."""
  letters = unicodedata.normalize("NFKD", text)
  bare = "".join(c for c in letters if not unicodedata.combining(c))
  return bare.encode("ascii", "replace").decode()
