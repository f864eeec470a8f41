"""Which members of a tar shard are samples, and what happens to the others."""

import gzip
import io
import os
import pickle
import tarfile

import pytest

from blip_jax.data import offsets, tar_index
from blip_jax.runtime import files


def _tar(path, members, **options):
  with tarfile.open(path, "w", **options) as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return str(path)


def _samples(*numbers):
  parts = (("jpg", b"image %d" * 100), ("txt", b"caption %d"))
  return [
    (f"{number:04d}.{extension}", content.replace(b"%d", b"%d" % number))
    for number in numbers
    for extension, content in parts
  ]


def _read(path, index):
  return {
    index.key(row): {
      part: files.read_range(path, *index.span(row, part))
      for part in ("image", "text", "json")
      if index.span(row, part)[0] >= 0
    }
    for row in range(len(index))
  }


def read(path, names, keep=()):
  """Key -> part -> name of its member, and what is not used.

  The content of each member is its name.
  """
  path = _tar(path, [(name, name.encode()) for name in names])
  index, damage = tar_index.samples(path, keep)
  assert damage == []
  samples = {
    key: {part: content.decode() for part, content in parts.items()}
    for key, parts in _read(path, index).items()
  }
  return samples, dict(index.unused())


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_with_the_same_name_are_one_sample(tmp_path, style):
  long = "folder/" + "n" * 150 + "ü"
  members = [
    *_samples(1),
    ("0002.json", b"{}"),
    ("0002.PNG", b"png"),
    ("0002.seg.png", b"another part"),
    ("0003.pkl", b"pickle"),
    ("0001.pyd", b"pickle"),
    (long + ".webp", b"long"),
    ("other/0001.jpg", b"in a folder"),
  ]
  path = _tar(tmp_path / "a.tar", members, format=style)
  index, damage = tar_index.samples(path)
  assert damage == []
  assert _read(path, index) == {
    "0001": {"image": b"image 1" * 100, "text": b"caption 1"},
    "0002": {"image": b"png", "json": b"{}"},
    long: {"image": b"long"},
    "other/0001": {"image": b"in a folder"},
  }


def test_names_may_have_dots(tmp_path):
  names = ["22.05.jpg", "22.05.txt", "22.06.JPG", "22.06.json"]
  names += ["a/shot.v2.png", "a/shot.v2.txt", "a.b/c.jpg", "1.2.3.webp"]
  assert read(tmp_path / "a.tar", names) == (
    {
      "22.05": {"image": "22.05.jpg", "text": "22.05.txt"},
      "22.06": {"image": "22.06.JPG", "json": "22.06.json"},
      "a/shot.v2": {"image": "a/shot.v2.png", "text": "a/shot.v2.txt"},
      "a.b/c": {"image": "a.b/c.jpg"},
      "1.2.3": {"image": "1.2.3.webp"},
    },
    {},
  )


def test_a_second_image_of_a_sample_is_no_sample(tmp_path):
  names = ["a.seg.png", "a.jpg", "a.txt", "b.jpg", "b.seg.png", "b.depth.png"]
  names += ["b.en.txt", "c.seg.png", "d.jpg", "d.v2.jpg", "d.v2.txt", "e.1.txt"]
  samples, unused = read(tmp_path / "a.tar", names)
  assert samples == {
    "a": {"image": "a.jpg", "text": "a.txt"},
    "b": {"image": "b.jpg"},
    "c.seg": {"image": "c.seg.png"},  # there is no other image of c
    "d": {"image": "d.jpg"},
    "d.v2": {"image": "d.v2.jpg", "text": "d.v2.txt"},  # it has a caption
  }
  assert unused == {"a.seg.png": 3, "b.en.txt": 2}


def test_what_is_not_used_is_counted(tmp_path):
  names = ["a.jpg", "a.cls", "b.jpg", "b.cls", "c.heic", "c.txt", "d.2.npy"]
  names += ["._a.jpg", "README", "b.CLS"]
  samples, unused = read(tmp_path / "a.tar", names)
  assert samples == {
    "a": {"image": "a.jpg"},
    "b": {"image": "b.jpg"},
    "c": {"text": "c.txt"},
  }
  assert unused == {
    "a.cls": 3,
    "c.heic": 1,
    "d.2.npy": 1,
    "._a.jpg": 1,
    "README": 1,
  }


def test_a_link_is_not_used(tmp_path):
  path = _tar(tmp_path / "a.tar", _samples(1))
  with tarfile.open(path, "a") as tar:
    for name, kind in (("0002.jpg", tarfile.LNKTYPE), ("x", tarfile.DIRTYPE)):
      link = tarfile.TarInfo(name)
      link.type, link.linkname = kind, "0001.jpg"
      tar.addfile(link)
  index, damage = tar_index.samples(path)
  assert (damage, len(_read(path, index))) == ([], 1)
  assert index.unused() == [("0002.jpg", 1)]


def test_images_of_many_formats_are_used(tmp_path):
  endings = [
    "jfif",
    "jpe",
    "JPG",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "avif",
    "jp2",
    "j2k",
    "ppm",
    "pgm",
    "pbm",
    "apng",
  ]
  samples, unused = read(
    tmp_path / "a.tar", [f"{n}.{ending}" for n, ending in enumerate(endings)]
  )
  assert [sample["image"].partition(".")[2] for sample in samples.values()] == (
    endings
  )
  assert unused == {}


def test_the_usual_endings_take_precedence(tmp_path):
  names = [
    "a.gif",
    "a.caption",
    "a.jpg",
    "a.txt",
    "b.bmp",
    "b.tif",
    "c.caption",
  ]
  names += ["c.gif"]
  samples, unused = read(tmp_path / "a.tar", names)
  assert samples == {
    "a": {"image": "a.jpg", "text": "a.txt"},
    "b": {"image": "b.bmp"},
    "c": {"text": "c.caption", "image": "c.gif"},
  }
  assert unused == {"a.gif": 1, "a.caption": 1, "b.tif": 1}


def test_a_member_to_keep_is_used(tmp_path):
  names = ["a.jpg", "a.seg.png", "a.cls", "22.05.jpg", "22.05.cls"]
  path = _tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
  index, _ = tar_index.samples(path, keep=("seg.png", "cls"))
  assert _read(path, index).keys() == {"a", "22.05"}
  assert index.unused() == []
  field = tar_index.member_field("cls")
  assert index.has(field) and not index.has("json")
  spans = [index.span(row, field) for row in range(len(index))]
  assert [files.read_range(path, *span) for span in spans] == [
    b"a.cls",
    b"22.05.cls",
  ]


def test_samples_before_a_truncation_are_kept(tmp_path):
  members = _samples(*range(10))
  path = _tar(tmp_path / "a.tar", members)
  samples = _read(path, tar_index.samples(path)[0])
  with tarfile.open(path) as tar:
    cut = tar.getmember("0006.jpg").offset_data + 17
  os.truncate(path, cut)
  index, damage = tar_index.samples(path)
  names = [f"{n:04d}" for n in range(6)]
  assert _read(path, index) == {name: samples[name] for name in names}
  assert len(damage) == 1 and "0006.jpg: truncated" in damage[0]
  os.truncate(path, cut - 17 - 300)  # within a header
  index, damage = tar_index.samples(path)
  assert len(index) == 6 and len(damage) == 1


def test_samples_after_damage_are_kept(tmp_path):
  members = _samples(*range(10))
  path = _tar(tmp_path / "a.tar", members)
  with tarfile.open(path) as tar:
    hole = tar.getmember("0004.jpg").offset
  with open(path, "r+b") as file:
    file.seek(hole)
    file.write(b"\xff" * 600)
  index, damage = tar_index.samples(path)
  samples = _read(path, index)
  assert [name for name in samples if "image" in samples[name]] == [
    f"{n:04d}" for n in range(10) if n != 4
  ]
  assert len(damage) == 1 and f"bytes {hole} to" in damage[0]


@pytest.mark.parametrize("content", [b"", b"<html>not a tar</html>" * 100])
def test_a_file_that_is_not_a_tar_is_reported(tmp_path, content):
  path = str(tmp_path / "a.tar")
  files.write_bytes(path, content)
  index, damage = tar_index.samples(path)
  assert len(index) == 0 and damage and all(path in line for line in damage)


def test_the_index_of_a_damaged_shard_is_not_cached(tmp_path, monkeypatch):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  path = _tar(tmp_path / "a.tar", _samples(*range(3)))
  os.truncate(path, 3000)
  for _ in range(2):
    _, damage = tar_index.cached(path)
    assert damage


def test_rubbish_in_front_of_the_first_member_is_reported(tmp_path):
  """A header that starts later than at byte 0."""
  tar = io.BytesIO()
  with tarfile.open(fileobj=tar, mode="w") as archive:
    info = tarfile.TarInfo("a.jpg")
    info.size = 3
    archive.addfile(info, io.BytesIO(b"abc"))
  path = tmp_path / "a.tar"
  path.write_bytes(b"x" + b"\0" * 511 + tar.getvalue())
  index, damage = tar_index.samples(str(path))
  assert len(index) == 1
  assert len(damage) == 1 and "bytes 0 to 512" in damage[0]


@pytest.mark.parametrize("keep", [(), ("cls",)])
def test_an_index_is_the_same_from_the_cache(tmp_path, monkeypatch, keep):
  members = [*_samples(*range(3)), ("0001.cls", b"7"), ("x.pkl", b"")]
  path = _tar(tmp_path / "a.tar", members)
  index, _ = tar_index.samples(path, keep)
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  for _ in range(2):
    cached, damage = tar_index.cached(path, keep)
    again = pickle.loads(pickle.dumps(cached))
    assert _read(path, again) == _read(path, index) and damage == []
    assert again.unused() == index.unused()
  assert len(pickle.dumps(cached)) < 1000  # the name of its file
  assert index.has("image") and not index.has("json")


def test_one_long_name_takes_no_room_in_other_rows(tmp_path):
  """60 KB each for 2,000 samples would be 120 MB."""
  names = [*(f"{n:05d}.jpg" for n in range(2_000)), "n" * 60_000 + ".jpg"]
  path = _tar(
    tmp_path / "a.tar",
    [(name, b"") for name in names],
    format=tarfile.GNU_FORMAT,
  )
  index, damage = tar_index.samples(path)
  assert (len(index), damage) == (2_001, [])
  assert [index.key(row) for row in (7, 2_000)] == ["00007", "n" * 60_000]
  assert len(pickle.dumps(index)) < 300_000


def test_a_compressed_shard_is_said_to_be_one(tmp_path):
  path = _tar(tmp_path / "a.tar", _samples(1))
  (tmp_path / "b.tar").write_bytes(gzip.compress(files.read_bytes(path)))
  index, damage = tar_index.samples(str(tmp_path / "b.tar"))
  assert len(index) == 0 and "compressed" in damage[-1]
