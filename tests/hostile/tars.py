"""Hostile tar files, each with five good samples in front and five behind.

`cases` gives the same files for the same seed. Nothing in them is larger than
about two megabytes, whatever their headers claim.
"""

import io
import itertools
import random
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
# Types whose content is not that of a file: long names and links, pax headers
# of one member and of all, Solaris's, a sparse file, GNU's folders and volumes.
EXTENDED = b"LKxgXSDMVN"


class Case(NamedTuple):
  """A tar file.

  Attributes:
    name: what is hostile about it.
    content: of the file.
    good: key -> (image, text) of the samples that must be found.
    is_damaged: whether something is lost, so that damage must be reported.
  """

  name: str
  content: bytes
  good: dict[str, tuple[bytes, bytes]]
  is_damaged: bool = False


def cases(seed: int = 0) -> Iterator[Case]:
  """Yields more than 200 cases."""
  rng = random.Random(seed)
  pieces = itertools.chain(
    _sizes(), _extended_sizes(), _chains(), _pax(), _sparse(), _names(),
    _types(), _garbage(rng), _checksums(), _mutations(rng),
  )  # fmt: skip
  for number, (name, piece, is_damaged) in enumerate(pieces):
    style = FORMATS[number % len(FORMATS)]
    before, after = good_samples(rng, 0, 5), good_samples(rng, 5, 5)
    content = b"".join(
      [members(before, style), piece, members(after, style), ending()]
    )
    yield Case(name, content, before | after, is_damaged)


def good_samples(
  rng: random.Random, start: int, count: int
) -> dict[str, tuple[bytes, bytes]]:
  return {
    f"good{n:03d}": (
      b"\xff\xd8\xff" + rng.randbytes(rng.randrange(100, 3000)),
      b"a good caption %d" % n,
    )
    for n in range(start, start + count)
  }


def members(
  samples: dict[str, tuple[bytes, bytes]], style: int = tarfile.USTAR_FORMAT
) -> bytes:
  """The members of samples, without the end of an archive."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=style) as tar:
    for key, (image, text) in samples.items():
      for name, content in ((f"{key}.jpg", image), (f"{key}.txt", text)):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return file.getvalue()[: tar.offset]


def ending() -> bytes:
  return bytes(2 * BLOCK)


def header(
  name: bytes = b"bad.jpg",
  size: int | bytes = 0,
  type: bytes = b"0",
  *,
  link: bytes = b"",
  magic: bytes = b"ustar\x0000",
  prefix: bytes = b"",
  rest: bytes = b"",
  checksum: bytes | None = None,
) -> bytes:
  """A header; `size` in octal, or as its field has it.

  Args:
    rest: from byte 345 on, in place of `prefix`.
    checksum: of another header.
  """
  if isinstance(size, int):
    size = b"%011o\0" % size
  fields = b"".join(
    [
      name[:100].ljust(100, b"\0"),
      b"0000644\x000001750\x000001750\x00",
      size.ljust(12, b"\0"),
      b"14705416234\0",
      b" " * 8,
      type,
      link[:100].ljust(100, b"\0"),
      magic,
      bytes(32 + 32 + 8 + 8),
      (rest or prefix)[: BLOCK - 345],
    ]
  ).ljust(BLOCK, b"\0")
  assert len(fields) == BLOCK
  return with_checksum(fields, checksum)


def with_checksum(fields: bytes, checksum: bytes | None = None) -> bytes:
  blank = fields[:148] + b" " * 8 + fields[156:]
  field = checksum or b"%06o\0 " % sum(blank)
  return blank[:148] + field.ljust(8, b"\0") + blank[156:]


def padded(content: bytes) -> bytes:
  return content + bytes(-len(content) % BLOCK)


def base_256(number: int, width: int = 12) -> bytes:
  if number < 0:
    return number.to_bytes(width, "big", signed=True)
  return b"\x80" + number.to_bytes(width - 1, "big")


def member(
  name: bytes = b"bad.jpg", content: bytes = b"bad", **options
) -> bytes:
  return header(name, len(content), **options) + padded(content)


_Pieces = Iterator[tuple[str, bytes, bool]]


def _sizes() -> _Pieces:
  content = padded(b"bad content" * 50)
  for number in (-1, -511, -512, -513, -1024, -(2**31), -(2**63), -(2**80)):
    yield f"size {number}", header(size=base_256(number)) + content, True
  for power in (31, 32, 33, 40, 48, 62, 63, 64, 80, 87):
    for less in (0, 1):
      number = 2**power - less
      yield f"size 2^{power}-{less}", header(size=base_256(number)), True
  for field in (b"7" * 11, b"7" * 12, b"77777777777 ", b"00777777777\0"):
    yield f"size {field!r}", header(size=field) + content, True
  for field in (
    b"abc", b"-0000000001\0", b"+0000000001\0", b"1_0", b"99999999999\0",
    b"0x10", b"1e3", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\xfe" * 12,
    b"\xd9\xa1\xd9\xa2", b"1 2 3", b"0o17",
  ):  # fmt: skip
    yield f"size {field!r}", header(size=field) + content, True
  for field in (b"", b" " * 12, b"0", b"\0" + b"7" * 11):
    yield f"size {field!r}", header(size=field), False
  # Ends in the middle of a good sample, or of a block.
  for number in (700, 1300, 2100, 5000, 9999):
    yield f"size {number} of none", header(size=number), True


def _extended_sizes() -> _Pieces:
  for type in map(bytes, zip(EXTENDED, strict=True)):
    for field in (
      base_256(-512), base_256(2**40), base_256(2**63), b"77777777777\0", b"abc"
    ):  # fmt: skip
      piece = header(b"././@x", field, type) + member()
      yield f"size {field!r} of type {type!r}", piece, True


def _chains() -> _Pieces:
  pax = padded(b"19 path=renamed.jp\n")
  content = {
    b"L": padded(b"long.jpg\0"), b"K": padded(b"long\0"), b"x": pax, b"g": pax,
    b"X": pax,
  }  # fmt: skip
  for types in (b"L", b"K", b"x", b"g", b"X", b"LK", b"xg", b"LKxg"):
    for length in (2, 200, 2000):
      chain = b"".join(
        header(b"././@x", 19, type) + content[type]
        for n in range(length)
        for type in [types[n % len(types) :][:1]]
      )
      name = f"{length} chained {types!r}"
      yield f"{name} and a member", chain + member(), length > 2
      none = bytes(BLOCK) if length == 2 else b""  # two may be meant
      yield f"{name} and none", chain + none, length > 2
      empty = b"".join(
        header(b"././@x", 0, types[n % len(types) :][:1]) for n in range(length)
      )
      yield f"{name}, empty", empty + member(), False


def _pax() -> _Pieces:
  for records in (
    b"9999999999999999999999 path=a.jpg\n", b"9" * 500, b"0 path=a.jpg\n",
    b"-5 path=a.jpg\n", b"16 path=a.jpg\n0 path=b\n", b"17 path=a.jpg\n",
    b"14 path=a.jpg", b"1 \n", b"3 \n", b"path=a.jpg\n", b"\xff\xfe\xff",
    b" 14 path=a.jpg\n", b"+14 path=a.jpg\n", b"1_4 path=a.jpg\n",
    b"\xd9\xa1\xd9\xa4 path=a.jpg\n", b"14 pathsa.jpg\n", b"14\tpath=a.jpg\n",
    b"11 size=-1\n", b"12 size=abc\n", b"18 size=-99999999\n",
    b"10 size=\n", b"30 size=" + b"9" * 21 + b"\n", b"13 size=1e99\n",
    b"13 size=0x10\n",
  ):  # fmt: skip
    for type in (b"x", b"X"):
      piece = member(b"pax", records, type=type) + member()
      yield f"pax {type!r} {records[:24]!r}", piece, True
  for records in (
    b"14 path=\xff.jpg\n", b"16 path=a\0b.jpg\n", b"8 path=\n",
    b"20 hdrcharset=BINAR\n", b"13 mtime=abc\n", b"13 uid=-1e400\n",
    b"9 =value\n", b"19 path=../../x.jpg\n", b"11 a=" + b"\n" * 6,
  ):  # fmt: skip
    piece = member(b"pax", records, type=b"x") + member()
    yield f"pax {records[:24]!r}", piece, False
  for size in (2**40, 2**63, 10**19, 10**30):
    value = b" size=%d\n" % size
    records = b"%d%s" % (len(value) + 2, value)
    piece = member(b"pax", records, type=b"x") + member()
    yield f"pax size {size}", piece, True
  for records in (b"9999 path=a\n", b"11 size=-1\n", b"16 size=9999999999\n"):
    piece = member(b"pax", records, type=b"g")
    yield f"pax of all {records!r}", piece, False
  big = b"%d comment=%s\n" % (2_000_018, b"c" * 2_000_000)
  yield "a pax header of 2 MB", member(b"pax", big, type=b"x") + member(), True


def _record(keyword: bytes, value: bytes) -> bytes:
  rest = b" %s=%s\n" % (keyword, value)
  length = len(rest) + 2
  length += len(str(length)) - 2
  return b"%d%s" % (length, rest)


def _sparse() -> _Pieces:
  for keyword, value in (
    (b"GNU.sparse.map", b"abc"), (b"GNU.sparse.map", b"1,2,3"),
    (b"GNU.sparse.map", b"9" * 400), (b"GNU.sparse.size", b"abc"),
    (b"GNU.sparse.size", b"-1"), (b"GNU.sparse.numblocks", b"9" * 30),
    (b"GNU.sparse.offset", b"abc"), (b"GNU.sparse.major", b"one"),
    (b"GNU.sparse.realsize", b"-9"), (b"GNU.sparse.name", b"../../x"),
    (b"GNU.sparse.name", b"good007.jpg"),
  ):  # fmt: skip
    records = _record(b"GNU.sparse.major", b"1") + _record(keyword, value)
    records += _record(b"GNU.sparse.minor", b"0")
    piece = member(b"pax", records, type=b"x") + member(content=b"9\n" * 500)
    yield f"{keyword!r} {value[:16]!r}", piece, False
  blocks = b"\xff" * 96
  for name, rest in (
    ("nonsense", bytes(41) + b"\xff" * 126),
    ("negative", bytes(41) + base_256(-5) * 8 + b"\0" + base_256(-1)),
    ("more than there is", bytes(41) + blocks + b"\1" + base_256(2**60)),
  ):
    piece = header(b"bad.jpg", 100, b"S", magic=b"ustar  \0", rest=rest)
    if name == "more than there is":
      piece += (b"\xff" * 504 + b"\1" + bytes(7)) * 20
    yield f"old sparse, {name}", piece + padded(b"b" * 100), False


def _names() -> _Pieces:
  for name in (
    b"../../x.jpg", b"/etc/x.jpg", b"", b".", b"..", b"/", b"//.jpg", b".jpg",
    b"a\nb.jpg", b"\xff\xfe.jpg", b"\x1b[31m.jpg", b"n" * 100,
    b"a" * 96 + b".jpg",
    b"." * 100, b"/" * 100, b"a.b.c.d.e.jpg", b"bad\0good.jpg", b"C:\\x.jpg",
    b"bad.jpg/", b"bad.pkl", b"bad.tar.gz",
  ):  # fmt: skip
    yield f"name {name[:20]!r}", member(name), False
  yield "a prefix", member(b"x.jpg", prefix=b"p" * 155), False
  yield "twice", member() * 2, True
  yield "the name of a good one", member(b"good001.jpg", b"other"), True
  yield "empty members", header(b"bad.jpg") + header(b"bad.txt"), False
  for size in (300, 4_000, 1 << 20):
    name = member(b"././@L", b"n" * size + b".jpg\0", type=b"L")
    yield f"a name of {size} bytes", name + member(), size > 1 << 16
  for content in (b"", b"\0", b"a.jpg", b"\xff" * 100, b"a\0" * 100):
    name = member(b"././@L", content, type=b"L")
    yield f"long name {content[:8]!r}", name + member(), False


def _types() -> _Pieces:
  for type in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"\0", b"Z", b"\xff"):
    for link in (b"good001.jpg", b"/etc/passwd", b"../../x"):
      piece = header(b"bad.jpg", 0, type, link=link)
      yield f"type {type!r} to {link!r}", piece, False
    piece = header(size=base_256(2**50), type=type)
    yield f"type {type!r} that claims", piece, type not in b"123456"


def _garbage(rng: random.Random) -> _Pieces:
  for length in (1, 100, 511, 512, 513, 1024, 5000, 1_000_000):
    yield f"{length} random bytes", rng.randbytes(length), True
    yield f"{length} times 255", b"\xff" * length, True
  for blocks in (1, 2, 3, 20, 2000):
    yield f"{blocks} blocks of zeros", bytes(blocks * BLOCK), False
  yield "zeros and a letter", bytes(700) + b"x" + bytes(835), True
  for word in (b"ustar", b"ustar\x0000", b"0000000\0", b"good001.jpg"):
    yield f"{word!r} many times", word * (200_000 // len(word)), True
  bad = header(checksum=b"000000\0 ")
  yield "2000 headers of another checksum", bad * 2000, True
  whole = member(content=rng.randbytes(3000))
  yield "a header of zeros", bytes(BLOCK) + whole[BLOCK:], True
  yield "a header alone", header(size=3000), True
  yield "half a header", header()[:256], True
  yield "content that is cut", whole[:1800], True
  nested = members(good_samples(rng, 90, 2)) + ending()
  yield "a tar in a tar", member(b"bad.tar", nested), False
  yield "gzip", b"\x1f\x8b\x08\0" + rng.randbytes(3068), True
  yield "zip", b"PK\3\4" + rng.randbytes(3068), True


def _checksums() -> _Pieces:
  right = header()
  for field in (
    b"000000\0 ", b"777777\0 ", b"abcdef\0 ", b"\0" * 8, b" " * 8, b"-00001\0 ",
    b"%06o\0 " % (int(right[148:154], 8) + 1), base_256(-1, 8),
    base_256(2**40, 8),
  ):  # fmt: skip
    piece = header(size=600, checksum=field) + padded(b"b" * 600)
    yield f"checksum {field!r}", piece, True


def _mutations(rng: random.Random) -> _Pieces:
  """Bytes of a header changed by chance; its checksum is right in half."""
  for number in range(80):
    content = padded(rng.randbytes(1500))
    fields = bytearray(header(b"bad.jpg", 1500))
    for _ in range(rng.choice((1, 3, 30))):
      # The fields that are read: sizes and types more often.
      at = rng.choice((*range(124, 136), 156, rng.randrange(BLOCK)))
      fields[at] = rng.randrange(256)
    is_right = number % 2 == 0
    block = with_checksum(bytes(fields)) if is_right else bytes(fields)
    yield f"mutation {number}", block + content, False
