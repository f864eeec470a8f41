"""Offsets of rows and tar members: computed and cached."""

import io
import itertools
import json
import os
import pickle
import random
import tarfile

import numpy as np
import pytest

from blip_jax.data import offsets
from blip_jax.runtime import files

ROWS = [
  {"image": "a.jpg", "caption": 'a "quoted" word'},
  {"image": "b.jpg", "caption": "braces } ] { [ , and a backslash \\"},
  {"image": "c.jpg", "caption": '\\" \\\\" \\\\\\', "nested": [{"a": [1]}, {}]},
  {"image": "d.jpg", "caption": ["zwölf Boxkämpfer", "\u4e00\u4e8c", ""]},
  {},
]


def _write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def _parse(path, index):
  for start, end in itertools.pairwise(index.tolist()):
    raw = files.read_range(path, start, end - start)
    yield json.loads(raw.decode().rstrip().removesuffix(","))


# Chunks of one byte put a boundary between any two characters.
@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"ensure_ascii": False}])
def test_json_rows_are_those_of_json(tmp_path, monkeypatch, chunk, style):
  rows = ROWS * 3
  random.Random(0).shuffle(rows)
  path = _write(tmp_path / "a.json", json.dumps(rows, **style) + "\n")
  monkeypatch.setattr(offsets, "_CHUNK", chunk)
  index, damage = offsets.json_rows(path)
  assert list(_parse(path, index)) == rows
  assert damage == []


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
def test_jsonl_rows_are_the_lines(tmp_path, monkeypatch, chunk, newline):
  text = newline.join(json.dumps(row) for row in ROWS)
  path = _write(tmp_path / "a.jsonl", text)
  monkeypatch.setattr(offsets, "_CHUNK", chunk)
  index, _ = offsets.jsonl_rows(path)
  assert list(_parse(path, index)) == ROWS
  with_end, _ = offsets.jsonl_rows(_write(tmp_path / "b.jsonl", text + newline))
  np.testing.assert_array_equal(with_end[:-1], index[:-1])


def test_byte_order_marks_are_skipped(tmp_path):
  bom = b"\xef\xbb\xbf"
  path = _write(tmp_path / "a.json", bom + json.dumps(ROWS).encode())
  assert list(_parse(path, offsets.json_rows(path)[0])) == ROWS
  path = _write(tmp_path / "a.jsonl", bom + b'{"a": 1}\n')
  assert list(_parse(path, offsets.jsonl_rows(path)[0])) == [{"a": 1}]


@pytest.mark.parametrize(
  "content, message",
  [
    ("", "found nothing"),
    (" \n", "found nothing"),
    ('{"images": []}', r"expected a JSON list of rows \('\['\), found b'\{"),
    ("[]", "row 0: expected an object"),
    ('["a", "b"]', "row 0: expected an object"),
    ('[{"a": 1}, {"b": 2}', r"end of the file .* in or after row 1 \(byte 11"),
    ('[{"a": 1}, {"b": "2', r"end of the file .* in or after row 1 \(byte 11"),
    ('[{"a": 1}, {"b": 2}, ', r"truncated"),
    ('[{"a": 1}] [{"b": 2}]', "more after the list's end"),
  ],
)
def test_a_file_that_is_not_a_json_list_is_refused(tmp_path, content, message):
  path = _write(tmp_path / "bad.json", content)
  with pytest.raises(ValueError, match=message) as error:
    offsets.json_rows(path)
  assert path in str(error.value)


def test_a_json_list_is_refused_as_jsonl(tmp_path):
  path = _write(tmp_path / "a.jsonl", '[\n{"a": 1}\n]')
  with pytest.raises(ValueError, match="one JSON object per line"):
    offsets.jsonl_rows(path)


def _count_builds(monkeypatch):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  builds = []

  def build(path):
    builds.append(path)
    return offsets.jsonl_rows(path)

  return builds, build


def test_an_index_is_built_once_and_rebuilt_if_the_file_changes(
  tmp_path, monkeypatch
):
  builds, build = _count_builds(monkeypatch)
  path = _write(tmp_path / "a.jsonl", '{"a": 1}\n')
  first, _ = offsets.cached(path, "rows", build)
  second, _ = offsets.cached(path, "rows", build)
  assert len(builds) == 1
  np.testing.assert_array_equal(first, second)

  _write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\n')
  third, _ = offsets.cached(path, "rows", build)
  assert len(builds) == 2 and len(third) == 3

  # Same size, another time of modification.
  os.utime(path, ns=(0, 12345))
  offsets.cached(path, "rows", build)
  assert len(builds) == 3
  assert len(list(tmp_path.glob(".*.npy"))) == 1, "outdated indices are removed"
  assert not list(tmp_path.glob("*.tmp"))


def test_small_files_are_not_cached(tmp_path):
  path = _write(tmp_path / "a.jsonl", '{"a": 1}\n')
  offsets.cached(path, "rows", offsets.jsonl_rows)
  assert os.listdir(tmp_path) == ["a.jsonl"]


def test_the_cache_of_a_read_only_folder_is_elsewhere(tmp_path, monkeypatch):
  builds, build = _count_builds(monkeypatch)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(files, "is_writable", lambda _: False)
  for name in ("one", "two"):  # same file name, another folder
    (tmp_path / name).mkdir()
    path = _write(tmp_path / name / "a.jsonl", '{"a": 1}\n')
    for _ in range(2):
      offsets.cached(path, "rows", build)
    assert os.listdir(tmp_path / name) == ["a.jsonl"]
  assert len(builds) == 2
  assert len(os.listdir(tmp_path / "cache" / "blip_jax")) == 2


def test_a_cached_index_is_readable_by_other_users(tmp_path, monkeypatch):
  _, build = _count_builds(monkeypatch)
  path = _write(tmp_path / "a[1].jsonl", '{"a": 1}\n')
  offsets.cached(path, "rows", build)
  (index,) = tmp_path.glob(".*.npy")
  assert index.stat().st_mode & 0o777 == 0o644
  _write(tmp_path / "a[1].jsonl", '{"a": 1}\n{"a": 2}\n')
  offsets.cached(path, "rows", build)
  assert not index.exists() and len(os.listdir(tmp_path)) == 2


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
  _, build = _count_builds(monkeypatch)
  path = _write(tmp_path / "a.jsonl", '{"a": 1}\n')

  def fill_the_disk(file, index):
    file.write(b"half")
    raise OSError("No space left on device")

  monkeypatch.setattr(np, "save", fill_the_disk)
  with pytest.raises(OSError, match="No space"):
    offsets.cached(path, "rows", build)
  assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_mapped_index_is_pickled_by_name(tmp_path, monkeypatch):
  _, build = _count_builds(monkeypatch)
  path = _write(tmp_path / "a.jsonl", '{"a": 1}\n' * 10_000)
  mapped = offsets.Mapped(offsets.cached(path, "rows", build)[0])
  pickled = pickle.dumps(mapped)
  assert len(pickled) < 1000
  np.testing.assert_array_equal(pickle.loads(pickled).array, mapped.array)


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
  keys = [os.fsdecode(bytes(key)) for key in index["key"]]
  spans = {part: index[part].tolist() for part in ("image", "text", "json")}
  return {
    key: {
      part: files.read_range(path, *spans[part][row])
      for part in spans
      if spans[part][row][0] >= 0
    }
    for row, key in enumerate(keys)
  }


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
  index, damage = offsets.tar_samples(path)
  assert damage == []
  assert _read(path, index) == {
    "0001": {"image": b"image 1" * 100, "text": b"caption 1"},
    "0002": {"image": b"png", "json": b"{}"},
    long: {"image": b"long"},
    "other/0001": {"image": b"in a folder"},
  }


def test_samples_before_a_truncation_are_kept(tmp_path):
  members = _samples(*range(10))
  path = _tar(tmp_path / "a.tar", members)
  samples = _read(path, offsets.tar_samples(path)[0])
  with tarfile.open(path) as tar:
    cut = tar.getmember("0006.jpg").offset_data + 17
  os.truncate(path, cut)
  index, damage = offsets.tar_samples(path)
  names = [f"{n:04d}" for n in range(6)]
  assert _read(path, index) == {name: samples[name] for name in names}
  assert len(damage) == 1 and "0006.jpg: truncated" in damage[0]
  os.truncate(path, cut - 17 - 300)  # within a header
  index, damage = offsets.tar_samples(path)
  assert len(index) == 6 and len(damage) == 1


def test_samples_after_damage_are_kept(tmp_path):
  members = _samples(*range(10))
  path = _tar(tmp_path / "a.tar", members)
  with tarfile.open(path) as tar:
    hole = tar.getmember("0004.jpg").offset
  with open(path, "r+b") as file:
    file.seek(hole)
    file.write(b"\xff" * 600)
  index, damage = offsets.tar_samples(path)
  samples = _read(path, index)
  assert [name for name in samples if "image" in samples[name]] == [
    f"{n:04d}" for n in range(10) if n != 4
  ]
  assert len(damage) == 1 and f"bytes {hole} to" in damage[0]


@pytest.mark.parametrize("content", [b"", b"<html>not a tar</html>" * 100])
def test_a_file_that_is_not_a_tar_is_reported(tmp_path, content):
  path = _write(tmp_path / "a.tar", content)
  index, damage = offsets.tar_samples(path)
  assert len(index) == 0 and damage and all(path in line for line in damage)


def test_the_index_of_a_damaged_shard_is_not_cached(tmp_path, monkeypatch):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  path = _tar(tmp_path / "a.tar", _samples(*range(3)))
  os.truncate(path, 3000)
  for _ in range(2):
    _, damage = offsets.cached(path, "samples", offsets.tar_samples)
    assert damage
