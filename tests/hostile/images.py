"""Hostile images: bombs of memory and time, and damage of every format.

`CASES` has a maker of the bytes of each. `python -m tests.hostile.images FILE
NAME...` decodes them, each in a process of its own, and writes what came out,
with peak memory and seconds.
"""

import io
import json
import os
import pathlib
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import PIL.Image

SIDE = 8900  # squared just below 80,000,000
LONG = 79_000_000


def encoded(image: PIL.Image.Image, format: str, **options) -> bytes:
  stream = io.BytesIO()
  image.save(stream, format, **options)
  return stream.getvalue()


def photo(width: int = 48, height: int = 40) -> PIL.Image.Image:
  y, x = np.mgrid[0:height, 0:width]
  return PIL.Image.fromarray(
    np.stack([3 * x, 4 * y, 2 * (x + y)], -1).astype(np.uint8)
  )


# PNG.


def chunk(kind: bytes, content: bytes) -> bytes:
  crc = zlib.crc32(kind + content)
  return struct.pack(">I", len(content)) + kind + content + crc.to_bytes(4)


def zeros(size: int) -> bytes:
  """So many zeros, as zlib packs them: a thousandth of the size."""
  packer = zlib.compressobj(9)
  block = bytes(1 << 20)
  parts = [packer.compress(block) for _ in range(size >> 20)]
  return b"".join(
    [*parts, packer.compress(bytes(size % (1 << 20))), packer.flush()]
  )


def png(
  width: int,
  height: int,
  depth: int = 8,
  color: int = 2,
  before: Sequence[bytes] = (),
  content: bytes | None = None,
  interlaced: int = 0,
  after: Sequence[bytes] = (),
) -> bytes:
  """A black PNG; `before` and `after` are chunks around its pixels."""
  channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 1)
  if content is None:
    content = zeros(height * (1 + -(-width * channels * depth // 8)))
  header = struct.pack(
    ">IIBBBBB", width, height, depth, color, 0, 0, interlaced
  )
  palette = [chunk(b"PLTE", bytes(12))] if color == 3 else []
  return b"".join(
    [
      b"\x89PNG\r\n\x1a\n",
      chunk(b"IHDR", header),
      *palette,
      *before,
      chunk(b"IDAT", content),
      *after,
      chunk(b"IEND", b""),
    ]
  )


def animated_png(frames: int) -> bytes:
  control = struct.pack(">IIIIIHHBB", 0, 48, 40, 0, 0, 1, 1, 0, 0)
  frame = chunk(b"fcTL", control) + chunk(b"fdAT", bytes(8))
  return png(
    48,
    40,
    before=[
      chunk(b"acTL", struct.pack(">II", frames, 0)),
      chunk(b"fcTL", control),
    ],
    after=[frame * min(frames, 20_000)],
  )


# JPEG.


def segment(kind: int, content: bytes) -> bytes:
  return struct.pack(">BBH", 0xFF, kind, len(content) + 2) + content


def jpeg_scans(side: int, scans: int) -> bytes:
  """A progressive JPEG of which only the last pass is repeated."""
  small = encoded(photo(), "JPEG", progressive=True)
  at = small.rindex(b"\xff\xda")
  last = small[at : at + 2 + int.from_bytes(small[at + 2 : at + 4])]
  large = bytearray(small[:-2] + scans * (last + bytes(8)) + small[-2:])
  return bytes(_resized_jpeg(large, side, side))


def _resized_jpeg(content: bytes, width: int, height: int) -> bytearray:
  content = bytearray(content)
  for kind in (b"\xff\xc0", b"\xff\xc2"):
    if (at := content.find(kind)) >= 0:
      content[at + 5 : at + 9] = struct.pack(">HH", height, width)
  return content


def jpeg_with(*segments: bytes, **options) -> bytes:
  small = encoded(photo(), "JPEG", **options)
  return small[:2] + b"".join(segments) + small[2:]


def jpeg_sequential_scans(scans: int) -> bytes:
  """A baseline JPEG that has its first component again and again."""
  small = encoded(photo(), "JPEG")
  at = small.rindex(b"\xff\xda")
  scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + bytes(16)
  return bytes(
    _resized_jpeg(small[:at] + scans * scan + b"\xff\xd9", SIDE, SIDE)
  )


def exif(entries: bytes, number: int, next: int) -> bytes:
  body = b"MM\0*\0\0\0\x08" + struct.pack(">H", number) + entries
  return segment(0xE1, b"Exif\0\0" + body + struct.pack(">I", next))


# TIFF.


def tiff(
  tags: dict[int, tuple[int, int, int]],
  data: bytes = b"",
  width: int = 48,
  height: int = 40,
  next: int = 0,
) -> bytes:
  """A little-endian TIFF; tag -> type, count, and value or offset.

  The data begins at byte 1024.
  """
  base = {
    256: (4, 1, width),
    257: (4, 1, height),
    258: (3, 1, 8),
    259: (3, 1, 1),
    262: (3, 1, 1),
    273: (4, 1, 1024),
    277: (3, 1, 1),
    278: (4, 1, height),
    279: (4, 1, len(data)),
  }
  fields = sorted((base | tags).items())
  folder = struct.pack("<H", len(fields)) + b"".join(
    struct.pack("<HHII", tag, *field) for tag, field in fields
  )
  head = b"II*\0\x08\0\0\0" + folder + struct.pack("<I", next)
  return head.ljust(1024, b"\0") + data


def tiff_many_fields() -> bytes:
  field = struct.pack("<HHII", 40_000, 4, 1, 0)
  return b"II*\0\x08\0\0\0\xff\xff" + 65_535 * field + bytes(4)


def tiff_nested_folders() -> bytes:
  """Folders of EXIF that each name thousands of others."""
  fields = b"".join(
    struct.pack("<HHII", 34_665, 4, 1, 8 + 12 * number)
    for number in range(4000)
  )
  return b"II*\0\x08\0\0\0" + struct.pack("<H", 4000) + fields + bytes(4)


# JPEG 2000.


def jpeg2000(
  width: int, height: int, boxed: bool = False, tile: int = 0, **options
) -> bytes:
  """A small file that claims another size in its code stream."""
  small = bytearray(
    encoded(photo(64, 64), "JPEG2000", no_jp2=not boxed, **options)
  )
  at = small.index(b"\xff\x4f\xff\x51") + 8
  small[at : at + 8] = struct.pack(">II", width, height)
  small[at + 16 : at + 24] = struct.pack(">II", tile or width, tile or height)
  return bytes(small)


def jpeg2000_layers(layers: int) -> bytes:
  content = bytearray(jpeg2000(SIDE, SIDE))
  at = content.index(b"\xff\x52")
  content[at + 6 : at + 8] = layers.to_bytes(2)
  return bytes(content)


def jpeg2000_blocks(code: int, precinct: int | None) -> bytes:
  content = bytearray(jpeg2000(SIDE, SIDE))
  at = content.index(b"\xff\x52")
  size = int.from_bytes(content[at + 2 : at + 4])
  content[at + 10 : at + 12] = bytes([code, code])
  if precinct is not None:
    levels = content[at + 9] + 1
    content[at + 4] |= 1
    content[at + 2 : at + 4] = (size + levels).to_bytes(2)
    content[at + 2 + size : at + 2 + size] = bytes([precinct * 17] * levels)
  return bytes(content)


# GIF, BMP, WebP, AVIF, PPM.


def gif(
  width: int,
  height: int,
  frame=None,
  data: bytes = b"",
  code=8,
  frames: int = 1,
  before: bytes = b"",
) -> bytes:
  w, h = frame or (width, height)
  image = (
    b","
    + struct.pack("<HHHHB", 0, 0, w, h, 0)
    + bytes([code])
    + b"".join(
      bytes([len(data[i : i + 255])]) + data[i : i + 255]
      for i in range(0, len(data), 255)
    )
    + b"\0"
  )
  return (
    b"GIF89a"
    + struct.pack("<HHBBB", width, height, 0xF7, 0, 0)
    + bytes(768)
    + before
    + frames * image
    + b";"
  )


def bmp(
  width: int,
  height: int,
  bits: int = 24,
  compression: int = 0,
  data: bytes = b"",
  colors: int = 0,
) -> bytes:
  palette = bytes(4 * 256) if bits <= 8 else b""
  head = struct.pack(
    "<IiiHHIIiiII",
    40,
    width,
    height,
    1,
    bits,
    compression,
    len(data),
    0,
    0,
    colors,
    0,
  )
  offset = 14 + len(head) + len(palette)
  return (
    b"BM"
    + struct.pack("<IHHI", offset + len(data), 0, 0, offset)
    + head
    + palette
    + data
  )


def riff(*chunks: bytes) -> bytes:
  body = b"WEBP" + b"".join(chunks)
  return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_chunk(kind: bytes, content: bytes) -> bytes:
  padding = b"\0" * (len(content) % 2)
  return kind + struct.pack("<I", len(content)) + content + padding


def lossless_webp(width: int, height: int) -> bytes:
  """One colour, in 38 bytes, of any size."""
  bits = (width - 1) | (height - 1) << 14
  data = b"\x2f" + struct.pack("<I", bits) + b"\x88\x88\x08" + bytes(8)
  return riff(webp_chunk(b"VP8L", data))


def animated_webp(width: int, height: int, frames: int) -> bytes:
  inner = webp_chunk(
    b"VP8L",
    b"\x2f" + struct.pack("<I", 15 | 15 << 14) + b"\x88\x88\x08" + bytes(8),
  )
  three = lambda number: number.to_bytes(3, "little")
  frame = webp_chunk(
    b"ANMF", 2 * three(0) + 2 * three(15) + three(1) + b"\0" + inner
  )
  return riff(
    webp_chunk(b"VP8X", b"\x02\0\0\0" + three(width - 1) + three(height - 1)),
    webp_chunk(b"ANIM", bytes(6)),
    frames * frame,
  )


def avif(width: int, height: int, claimed=None) -> bytes:
  content = bytearray(
    encoded(PIL.Image.new("RGB", (width, height)), "AVIF", speed=10)
  )
  if claimed:
    at = content.index(b"ispe") + 8
    content[at : at + 8] = struct.pack(">II", *claimed)
  return bytes(content)


def _icc(size: int) -> bytes:
  return chunk(b"iCCP", b"a\0\0" + zeros(size))


CASES: dict[str, Callable[[], bytes]] = {
  # Sides.
  "png 79,000,000 x 1": lambda: png(LONG, 1, color=0),
  "png 1 x 79,000,000": lambda: png(1, LONG, color=0),
  "png 65,535 x 1,200": lambda: png(65_535, 1200),
  "png 1,200 x 65,535": lambda: png(1200, 65_535),
  "png 1 x 65,535": lambda: png(1, 65_535),
  "png 65,535 x 1": lambda: png(65_535, 1),
  "png 65,536 x 1": lambda: png(65_536, 1),
  "png 9,000 x 9,000": lambda: png(9000, 9000, content=b""),
  "png 2**31 - 1 squared": lambda: png(2**31 - 1, 2**31 - 1, content=b""),
  "png 0 x 5": lambda: png(0, 5, content=b""),
  "png 5 x 0": lambda: png(5, 0, content=b""),
  # The largest of every kind of PNG.
  "png largest grey": lambda: png(SIDE, SIDE, color=0),
  "png largest 1 bit": lambda: png(SIDE, SIDE, 1, 0),
  "png largest 16-bit grey": lambda: png(SIDE, SIDE, 16, 0),
  "png largest RGB": lambda: png(SIDE, SIDE),
  "png largest 16-bit RGB": lambda: png(SIDE, SIDE, 16),
  "png largest palette": lambda: png(SIDE, SIDE, color=3),
  "png largest 16-bit grey and alpha": lambda: png(SIDE, SIDE, 16, 4),
  "png largest 16-bit RGBA": lambda: png(SIDE, SIDE, 16, 6),
  "png largest interlaced": lambda: png(SIDE, SIDE, interlaced=1),
  # Chunks of PNG.
  "png profile of 1 GB": lambda: png(48, 40, before=[_icc(1 << 30)]),
  "png text of 1 GB": lambda: png(
    48, 40, before=[chunk(b"zTXt", b"a\0\0" + zeros(1 << 30))]
  ),
  "png unicode text of 1 GB": lambda: png(
    48, 40, before=[chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(1 << 30))]
  ),
  "png 100 texts of 900 kB": lambda: png(
    48, 40, before=100 * [chunk(b"zTXt", b"a\0\0" + zeros(900_000))]
  ),
  "png 500,000 private chunks": lambda: png(
    48, 40, before=500_000 * [chunk(b"prIv", b"")]
  ),
  "png 500,000 texts behind the pixels": lambda: png(
    48, 40, after=500_000 * [chunk(b"tEXt", b"a\0b")]
  ),
  "png pixels of 1 GB too many": lambda: png(48, 40, content=zeros(1 << 30)),
  "png palette of 5 bytes": lambda: png(
    48, 40, color=3, before=[chunk(b"PLTE", bytes(5))]
  ),
  "png colours outside of the palette": lambda: png(
    48, 40, color=3, content=zlib.compress((b"\0" + b"\xff" * 48) * 40)
  ),
  "png without palette": lambda: png(48, 40, color=3).replace(b"PLTE", b"pLTe"),
  "png two headers": lambda: png(
    48,
    40,
    before=[
      chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    ],
  ),
  "png chunk of 2**31 - 1 bytes": lambda: (
    png(48, 40)[:33] + b"\x7f\xff\xff\xffIDAT" + bytes(99)
  ),
  "png depth 3": lambda: png(48, 40, depth=3),
  "png unknown filter": lambda: png(
    48, 40, content=zlib.compress(b"\x09" * 145 * 40)
  ),
  "png 2**31 frames": lambda: animated_png(2**31 - 1),
  "png 20,000 frames": lambda: animated_png(20_000),
  "png broken exif": lambda: png(
    48, 40, before=[chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 5000)]
  ),
  # JPEG.
  "jpeg 200 more scans": lambda: jpeg_scans(SIDE, 200),
  "jpeg 50 more scans": lambda: jpeg_scans(SIDE, 50),
  "jpeg 5,000 scans of 48 x 48": lambda: jpeg_scans(48, 5000),
  "jpeg 200 sequential scans": lambda: jpeg_sequential_scans(200),
  "jpeg 50 sequential scans": lambda: jpeg_sequential_scans(50),
  "jpeg 65,535 x 65,535": lambda: bytes(
    _resized_jpeg(encoded(photo(), "JPEG"), 65_535, 65_535)
  ),
  "jpeg largest without data": lambda: bytes(
    _resized_jpeg(encoded(photo(), "JPEG"), SIDE, SIDE)
  ),
  "jpeg height 0": lambda: bytes(
    _resized_jpeg(encoded(photo(), "JPEG"), 48, 0)
  ),
  "jpeg two frame headers": lambda: jpeg_with(
    segment(0xC0, b"\x08\xff\xff\xff\xff\x03\x01\x11\0\x02\x11\0\x03\x11\0")
  ),
  "jpeg 2,000,000 comments": lambda: jpeg_with(2_000_000 * segment(0xFE, b"")),
  "jpeg 500,000 profile parts": lambda: jpeg_with(
    500_000 * segment(0xE2, b"ICC_PROFILE\0\1\1")
  ),
  "jpeg broken MPO": lambda: jpeg_with(
    segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 9000)
  ),
  "jpeg exif that names itself": lambda: jpeg_with(
    exif(struct.pack(">HHII", 34_665, 4, 1, 8), 1, 8)
  ),
  "jpeg orientation 99": lambda: jpeg_with(
    exif(struct.pack(">HHIHH", 274, 3, 1, 99, 0), 1, 0)
  ),
  "jpeg resolution 1 / 0": lambda: jpeg_with(
    exif(struct.pack(">HHII", 282, 5, 1, 26), 1, 0)
  ),
  "jpeg garbage in its tables": lambda: jpeg_with(
    segment(0xC4, b"\x00" + b"\xff" * 16 + bytes(400))
  ),
  "jpeg 12 bits": lambda: encoded(photo(), "JPEG").replace(
    b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"
  ),
  "jpeg restarts at every block": lambda: (
    jpeg_with(segment(0xDD, b"\0\1")) + b"\xff\xd0\xff\xd1" * 100_000
  ),
  # GIF.
  "gif 65,535 x 65,535": lambda: gif(65_535, 65_535),
  "gif largest": lambda: encoded(PIL.Image.new("P", (SIDE, SIDE)), "GIF"),
  "gif frame larger than the screen": lambda: gif(5, 5, (60_000, 60_000)),
  "gif 100,000 frames": lambda: gif(8, 8, (1, 1), b"\0\1\4\4", frames=100_000),
  "gif 500,000 comments": lambda: gif(8, 8, before=500_000 * b"!\xfe\x01a\0"),
  "gif comment of 20 MB": lambda: gif(
    8, 8, before=b"!\xfe" + 80_000 * (b"\xff" + b"a" * 255) + b"\0"
  ),
  "gif codes of 13 bits": lambda: gif(99, 99, data=b"\xff" * 999, code=13),
  "gif codes of 0 bits": lambda: gif(99, 99, data=b"\xff" * 999, code=0),
  "gif sides 0": lambda: gif(0, 0),
  # BMP.
  "bmp jumps": lambda: bmp(65_535, 1200, 8, 1, b"\0\2\xff\xff" * 99_999),
  "bmp runs": lambda: bmp(SIDE, SIDE, 8, 1, b"\xff\x01" * 320_000),
  "bmp runs of nothing": lambda: bmp(SIDE, SIDE, 8, 1, b"\0\2\0\0" * 2_000_000),
  "bmp 2**31 - 1 squared": lambda: bmp(2**31 - 1, 2**31 - 1),
  "bmp height -40": lambda: bmp(48, -40, data=bytes(48 * 40 * 3)),
  "bmp 2**32 - 1 colours": lambda: bmp(48, 40, 8, colors=2**32 - 1),
  "bmp 0 bits": lambda: bmp(48, 40, 0),
  # TIFF.
  "tiff largest": lambda: tiff({259: (3, 1, 8)}, zeros(SIDE**2), SIDE, SIDE),
  "tiff largest, turned": lambda: tiff(
    {259: (3, 1, 8), 274: (3, 1, 6)}, zeros(SIDE**2), SIDE, SIDE
  ),
  "tiff largest float": lambda: tiff(
    {258: (3, 1, 32), 339: (3, 1, 3), 259: (3, 1, 8)},
    zeros(4 * SIDE**2),
    SIDE,
    SIDE,
  ),
  "tiff 4,000,000 strips": lambda: tiff(
    {273: (4, 4_000_000, 1024), 279: (4, 4_000_000, 1024)}, bytes(16_000_000)
  ),
  "tiff 4,000,000 numbers in exif": lambda: tiff(
    {34_665: (4, 1, 1024)},
    struct.pack("<HHHIII", 1, 40_000, 4, 4_000_000, 1048, 0).ljust(24, b"\0")
    + bytes(16_000_000),
  ),
  "tiff 65,535 fields": tiff_many_fields,
  "tiff nested folders": tiff_nested_folders,
  "tiff that follows itself": lambda: tiff({}, bytes(1920), next=8),
  "tiff exif that names itself": lambda: tiff({34_665: (4, 1, 8)}, bytes(1920)),
  "tiff big, 2**60 fields": lambda: (
    b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60) + bytes(99)
  ),
  "tiff tiles of 2**30 pixels": lambda: tiff(
    {
      322: (4, 1, 1 << 15),
      323: (4, 1, 1 << 15),
      324: (4, 1, 1024),
      325: (4, 1, 9999),
      259: (3, 1, 8),
    },
    zeros(1 << 24),
  ),
  "tiff strip of 2**32 - 1 bytes": lambda: tiff({279: (4, 1, 2**32 - 1)}),
  "tiff 65,535 channels": lambda: tiff({277: (3, 1, 65_535)}, bytes(1920)),
  "tiff 65,535 bits": lambda: tiff({258: (3, 1, 65_535)}, bytes(1920)),
  "tiff not a number": lambda: tiff(
    {258: (3, 1, 32), 339: (3, 1, 3)}, b"\xff" * 4 * 1920
  ),
  "tiff lab": lambda: encoded(
    PIL.Image.new("LAB", (48, 40)), "TIFF", compression="tiff_lzw"
  ),
  # WebP.
  "webp largest in 38 bytes": lambda: lossless_webp(SIDE, SIDE),
  "webp 16,384 x 16,384": lambda: lossless_webp(16_384, 16_384),
  "webp canvas of 2**48 pixels": lambda: animated_webp(1 << 24, 1 << 24, 1),
  "webp largest canvas": lambda: animated_webp(SIDE, SIDE, 2),
  "webp 50,000 frames": lambda: animated_webp(48, 40, 50_000),
  "webp chunks that end too early": lambda: riff(
    webp_chunk(b"VP8X", b"\x20\0\0\0" + bytes(6)), b"ICCP\xff\xff\xff\x7f"
  ),
  # JPEG 2000.
  "jpeg2000 largest": lambda: encoded(
    PIL.Image.new("RGBA", (SIDE, SIDE)), "JPEG2000"
  ),
  "jpeg2000 largest without data": lambda: jpeg2000(SIDE, SIDE),
  "jpeg2000 60,000 x 60,000 in a small box": lambda: jpeg2000(
    60_000, 60_000, boxed=True
  ),
  "jpeg2000 largest in a small box": lambda: jpeg2000(SIDE, SIDE, boxed=True),
  "jpeg2000 tiles of 1 pixel": lambda: jpeg2000(SIDE, SIDE, tile=1),
  "jpeg2000 tiles of 110 pixels": lambda: jpeg2000(SIDE, SIDE, tile=110),
  "jpeg2000 code blocks of 4 x 4": lambda: jpeg2000_blocks(0, None),
  "jpeg2000 code blocks of 16 x 16": lambda: jpeg2000_blocks(2, None),
  "jpeg2000 precincts of 1 x 1": lambda: jpeg2000_blocks(4, 0),
  "jpeg2000 precincts of 16 x 16": lambda: jpeg2000_blocks(4, 4),
  "jpeg2000 65,535 layers": lambda: jpeg2000_layers(65_535),
  "jpeg2000 256 layers": lambda: jpeg2000_layers(256),
  "jpeg2000 tiles of 0": lambda: jpeg2000(48, 48)[:24] + bytes(200),
  # PPM.
  "ppm 65,535 x 65,535": lambda: b"P6 65535 65535 255\n",
  "ppm plain, largest": lambda: b"P1 8900 8900\n" + b"0 " * SIDE**2,
  "ppm plain, one long number": lambda: b"P3 8 8 255\n" + b"1" * 5_000_000,
  "ppm endless comment": lambda: b"P6 #" + b"a" * 20_000_000,
  "ppm maximum 70,000": lambda: b"P6 48 40 70000\n" + bytes(48 * 40 * 6),
  "ppm float": lambda: b"PF\n48 40\n-1.0\n" + b"\xff" * 48 * 40 * 12,
  "ppm sides -1": lambda: b"P6 -1 -1 255\n" + bytes(99),
  # What is not read at all.
  "eps": lambda: encoded(photo(), "EPS"),
  "eps in disguise": lambda: (
    b"\xc5\xd0\xd3\xc6" + bytes(28) + encoded(photo(), "EPS")
  ),
  "ico": lambda: encoded(photo(), "ICO"),
  "icns": lambda: encoded(photo(128, 128), "ICNS"),
  "pcx": lambda: encoded(photo(), "PCX"),
  "tga": lambda: encoded(photo(), "TGA"),
  "dds": lambda: encoded(photo(), "DDS"),
  "pdf": lambda: encoded(photo(), "PDF"),
  "im": lambda: encoded(photo(), "IM"),
  "xbm": lambda: encoded(photo().convert("1"), "XBM"),
  "psd": lambda: (
    b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\xff\xff\0\0\xff\xff\0\x08"
    b"\0\3" + bytes(99)
  ),
  "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
  "html": lambda: b"<!doctype html><title>404</title>",
  "wmf": lambda: b"\xd7\xcd\xc6\x9a" + bytes(99),
  "hdf5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(99),
  "zip": lambda: b"PK\x03\x04" + bytes(99),
  "zeros": lambda: bytes(1 << 20),
  "nothing": lambda: b"",
}
if "AVIF" in PIL.Image.registered_extensions().values():
  CASES |= {
    "avif largest": lambda: avif(SIDE, SIDE),
    "avif that claims 16 x 16": lambda: avif(6000, 6000, (16, 16)),
    "avif that claims 32,000 x 32,000": lambda: avif(64, 64, (32_000, 32_000)),
    "avif that claims 0 x 0": lambda: avif(64, 64, (0, 0)),
  }


def ordinary() -> dict[str, bytes]:
  """A small sound file of each format that is read."""
  formats = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
  files = {format: encoded(photo(), format) for format in formats}
  if "AVIF" in PIL.Image.registered_extensions().values():
    files["AVIF"] = encoded(photo(), "AVIF")
  files["progressive"] = encoded(photo(), "JPEG", progressive=True)
  files["packed TIFF"] = encoded(photo(), "TIFF", compression="tiff_lzw")
  files["CMYK"] = encoded(photo().convert("CMYK"), "JPEG")
  return files


def damaged(seed: int, number: int) -> Iterator[tuple[str, bytes]]:
  """Cut, flipped, doubled and overwritten files, (name, content)."""
  rng = random.Random(seed)
  files = sorted(ordinary().items())
  for index in range(number):
    name, content = rng.choice(files)
    content = bytearray(content)
    kind = rng.choice(["cut", "flipped", "doubled", "overwritten"])
    at = rng.randrange(len(content))
    if kind == "cut":
      del content[at:]
    elif kind == "flipped":
      for _ in range(rng.randrange(1, 9)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "doubled":
      content[at:at] = content[at : at + rng.randrange(1, 99)]
    else:
      size = rng.choice([1, 2, 4, 8])
      content[at : at + size] = rng.choice([b"\0", b"\xff", b"\x7f"]) * size
    yield f"{name} {kind} {seed}.{index}", bytes(content)


def _in_child(work: Callable[[], object]) -> object:
  """What a function returns, as JSON, in a process that ends with it."""
  read, write = os.pipe()
  if not (child := os.fork()):
    os.write(write, json.dumps(work()).encode())
    os._exit(0)
  os.close(write)
  with os.fdopen(read) as answer:
    text = answer.read()
  _, status = os.waitpid(child, 0)
  return json.loads(text) if text else [f"DIED: {status}", 0, 0]


def _cost(path: str) -> tuple[str, float, float]:
  """What came out of a file, its peak of memory in MB, and its seconds."""
  from blip_jax.data import transforms

  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  seconds = time.thread_time()
  try:
    with transforms.decoded(path, transforms.MAX_PIXELS) as pixels:
      transforms.EvalImage(384)(pixels)
      reason = f"{pixels.shape[1]} x {pixels.shape[0]}"
  except transforms.BadSample as error:
    reason = error.reason
  except BaseException as error:
    reason = f"FAILED: {type(error).__name__}: {error}"
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  return reason, peak / 1024, time.thread_time() - seconds


def main(names: Sequence[str]) -> None:
  from blip_jax.data import transforms

  for content in ordinary().values():  # loads all plugins of PIL
    with transforms.decoded(content, transforms.MAX_PIXELS):
      pass
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "image")
    for name in names or CASES:
      # Memory that this process had used would be used again, uncounted.
      size = _in_child(
        lambda name=name: pathlib.Path(path).write_bytes(CASES[name]())
      )
      reason, mb, seconds = _in_child(lambda: _cost(path))
      row = {"name": name, "bytes": size, "reason": reason, "mb": mb}
      print(json.dumps(row | {"seconds": seconds}), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
