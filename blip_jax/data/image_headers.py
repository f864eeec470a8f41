"""Refuses images whose headers ask for much more work than their pixels do.

Formats have fields that multiply the memory or the time of decoding: passes of
JPEG, strips and tiles of TIFF, blocks and layers of JPEG 2000. Ordinary files
are far below these limits. What is no sound header is left to the library that
decodes it.
"""

import math
import re
import struct
from collections.abc import Iterator

from blip_jax.data import image_limits
from blip_jax.data.rejects import BadSample

# Passes over a progressive JPEG; encoders make about ten.
MAX_SCANS = 64
# Numbers in one field of a TIFF, such as the offsets of its strips; fields in a
# folder, folders, and pixels in a tile.
MAX_TIFF_VALUES, MAX_TIFF_TILE = 1 << 18, 1 << 26
MAX_TIFF_FIELDS, MAX_TIFF_FOLDERS = 4096, 8
# Each of these takes kilobytes, or a pass over the image.
MAX_JPEG2000_TILES, MAX_JPEG2000_LAYERS = 1 << 13, 1 << 8
# Code blocks and precincts of a channel of JPEG 2000, each of which takes
# hundreds of bytes; encoders make blocks of 4,096 samples.
MAX_JPEG2000_BLOCKS = 1 << 17

# A marker of JPEG, without restarts and stuffed bytes.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_END_OF_JPEG, _START_OF_SCAN = 0xD9, 0xDA

_TIFF = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
# Types whose values are taken as bytes; folders of more fields; sides of tiles.
_BYTE_TYPES, _FOLDERS, _SIDES = (1, 2, 6, 7), (34665, 34853, 40965), (322, 323)

_CODESTREAM = b"\xff\x4f\xff\x51"
_TILE_PART, _END_OF_HEADER, _STYLE, _COMPONENT_STYLE = 0x90, 0x93, 0x52, 0x53


def check(content: bytes, max_pixels: int) -> None:
  """Checks the headers of an encoded image, given as all bytes of a file.

  Raises:
    BadSample: it asks for too much.
  """
  try:
    if content.startswith(b"\xff\xd8"):
      _check_jpeg(content)
    elif order := _TIFF.get(content[:4]):
      _check_tiff(content, order)
    elif content.startswith(_CODESTREAM) or content[4:8] == b"jP  ":
      _check_jpeg2000(content, max_pixels)
  except (struct.error, IndexError):
    pass  # a header that ends too early; its library says so


def _check_jpeg(content: bytes) -> None:
  # All ordinary files pass here: the count is too high at most.
  if content.count(b"\xff\xda") <= MAX_SCANS:
    return
  scans, position = 0, 2
  # Only of the first image: cameras put others, or videos, behind it.
  while marker := _MARKER.search(content, position):
    position = marker.end()
    kind = marker[1][0]
    scans += kind == _START_OF_SCAN
    if scans > MAX_SCANS:
      raise _too_slow(f"a JPEG of more than {MAX_SCANS} scans")
    if kind == _END_OF_JPEG:
      return
    position += int.from_bytes(content[position : position + 2], "big")


def _check_tiff(content: bytes, order: str) -> None:
  big = content[2:4] in (b"+\0", b"\0+")
  start, count, entry = ("Q", "Q", "HHQQ") if big else ("I", "H", "HHII")
  folders = [struct.unpack_from(order + start, content, 8 if big else 4)[0]]
  seen = set()
  while folders:
    at = folders.pop()
    if at in seen:
      continue
    seen.add(at)
    (number,) = struct.unpack_from(order + count, content, at)
    at += struct.calcsize(order + count)
    if number > MAX_TIFF_FIELDS or len(seen) > MAX_TIFF_FOLDERS:
      raise _too_slow(f"a TIFF of {len(seen)} folders and {number} fields")
    sides = {}
    for field in range(number):
      where = at + field * struct.calcsize(order + entry)
      tag, type, values, value = struct.unpack_from(
        order + entry, content, where
      )
      if values > MAX_TIFF_VALUES and type not in _BYTE_TYPES:
        detail = f"a TIFF field of {values} numbers; at most {MAX_TIFF_VALUES}"
        raise _too_slow(detail)
      if tag in _FOLDERS:
        folders.append(value)
      if tag in _SIDES:
        short = order == ">" and type == 3
        sides[tag] = value >> (48 if big else 16) if short else value
    if math.prod(sides.values()) > MAX_TIFF_TILE:
      raise _too_slow(f"a TIFF in tiles of {sides} pixels")


def _check_jpeg2000(content: bytes, max_pixels: int) -> None:
  start = content.find(_CODESTREAM)
  if start < 0:
    return
  x1, y1, x0, y0, tile_w, tile_h, _, _, channels = struct.unpack_from(
    ">8IH", content, start + 8
  )
  image_limits.check_size(x1 - x0, y1 - y0, max_pixels)
  tiles = -(-x1 // max(tile_w, 1)) * -(-y1 // max(tile_h, 1))
  if tiles > MAX_JPEG2000_TILES or channels > 4:
    raise _too_slow(f"JPEG 2000 of {tiles} tiles and {channels} channels")
  for kind, segment in _jpeg2000_segments(content, start + 2):
    if kind == _STYLE:
      (layers,) = struct.unpack_from(">H", segment, 2)
      if layers > MAX_JPEG2000_LAYERS:
        raise _too_slow(f"JPEG 2000 of {layers} layers")
      _check_blocks((x1 - x0) * (y1 - y0), segment[0], segment[5:])
    if kind == _COMPONENT_STYLE:
      _check_blocks((x1 - x0) * (y1 - y0), segment[1], segment[2:])


def _jpeg2000_segments(
  content: bytes, position: int
) -> Iterator[tuple[int, bytes]]:
  """Yields the segments of the main header and of all tile parts."""
  while position >= 0:
    kind = content[position + 1]
    while kind != _END_OF_HEADER:
      (size,) = struct.unpack_from(">H", content, position + 2)
      yield kind, content[position + 4 : position + 2 + size]
      position += 2 + size
      kind = content[position + 1]
    # Compressed data has no such bytes.
    position = content.find(bytes([0xFF, _TILE_PART]), position)


def _check_blocks(pixels: int, style: int, fields: bytes) -> None:
  levels = fields[0]
  # Base-2 logarithms of samples, of the full resolution.
  sizes = [fields[1] + fields[2] + 4]
  if style & 1:  # precincts of every level, from the smallest on
    sizes += [
      (size & 15) + (size >> 4) + 2 * (levels - level)
      for level, size in enumerate(fields[5 : 6 + levels])
    ]
  blocks = pixels >> min(sizes)
  if blocks > MAX_JPEG2000_BLOCKS:
    raise _too_slow(f"JPEG 2000 of {blocks} blocks")


def _too_slow(detail: str) -> BadSample:
  return BadSample("too_slow", detail)
