"""Offsets of rows and tar members: computed and cached."""

import errno
import os
import pickle

import numpy as np
import pytest

from blip_jax.data import json_index, offsets
from blip_jax.runtime import files


def _write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def _count_builds(monkeypatch):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  builds = []

  def build(path):
    builds.append(path)
    return json_index.line_rows(path)

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
  offsets.cached(path, "rows", json_index.line_rows)
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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch, caplog, number):
  _, build = _count_builds(monkeypatch)
  path = _write(tmp_path / "a.jsonl", '{"a": 1}\n')

  def fail(file, index):
    file.write(b"half")
    raise OSError(number, "No")

  monkeypatch.setattr(np, "save", fail)
  for _ in range(2):
    index, damage = offsets.cached(path, "rows", build)
    assert index.tolist() == [0, 9] and damage == []
  assert os.listdir(tmp_path) == ["a.jsonl"]
  assert caplog.text.count("no cache can be written") == 1
  assert str(tmp_path) in caplog.text and "XDG_CACHE_HOME" in caplog.text


@pytest.mark.parametrize("obstacle", ["a file", "a link to itself", "a folder"])
def test_an_index_without_a_place_for_its_cache_stays_in_memory(
  tmp_path, monkeypatch, obstacle
):
  _, build = _count_builds(monkeypatch)
  path = _write(tmp_path / "a.jsonl", '{"a": 1}\n')
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(files, "is_writable", lambda _: False)
  match obstacle:
    case "a file":
      (tmp_path / "cache").write_bytes(b"")
    case "a link to itself":
      (tmp_path / "cache").symlink_to("cache")
    case "a folder":
      offsets.cache_path(path, "rows", ".npy").mkdir(parents=True)
  mapped = offsets.Mapped(offsets.cached(path, "rows", build)[0])
  assert pickle.loads(pickle.dumps(mapped)).array.tolist() == [0, 9]


def test_a_mapped_index_is_pickled_by_name(tmp_path, monkeypatch):
  _, build = _count_builds(monkeypatch)
  path = _write(tmp_path / "a.jsonl", '{"a": 1}\n' * 10_000)
  mapped = offsets.Mapped(offsets.cached(path, "rows", build)[0])
  pickled = pickle.dumps(mapped)
  assert len(pickled) < 1000
  np.testing.assert_array_equal(pickle.loads(pickled).array, mapped.array)


def _builds_at(monkeypatch, tmp_path, size):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 10)
  path = _write(tmp_path / f"{size}.jsonl", "{" + " " * (size - 2) + "}")
  offsets.cached(path, "rows", json_index.line_rows)
  return len(list(tmp_path.glob(f".{size}.*")))


def test_files_are_cached_from_the_limit_on(monkeypatch, tmp_path):
  assert [_builds_at(monkeypatch, tmp_path, n) for n in (9, 10)] == [0, 1]


def test_only_files_of_64_mb_are_worth_a_cache():
  assert offsets.MIN_CACHED_BYTES == 64 * 2**20


def test_a_damaged_file_is_indexed_at_every_start(monkeypatch, tmp_path):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  path = _write(tmp_path / "a.jsonl", "{}")
  damaged = lambda _: (np.arange(2), ["cut off"])
  for _ in range(2):
    index, damage = offsets.cached(path, "rows", damaged)
    assert damage == ["cut off"] and index.tolist() == [0, 1]
  assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(
  "content, blank, size, first",
  [
    (b"", None, 0, None),
    (b" \n\t", None, 3, None),
    (b"a", None, 1, 0),
    (b" \n a", None, 4, 3),
    (b"\xef\xbb\xbfa", None, 4, 3),
    (b"\xef\xbb\xbf\n a", None, 6, 5),
    (b"\n\t a", b"\n", 4, 1),
  ],
)
def test_the_first_content_of_a_text(tmp_path, content, blank, size, first):
  data, found = offsets.open_text(_write(tmp_path / "a", content), blank)
  assert (len(data), found) == (size, first)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 1000])
def test_lines_and_quotes_are_found_across_chunks(monkeypatch, chunk):
  monkeypatch.setattr(offsets, "_CHUNK", chunk)
  text = b'x\na"b\n\n\r\nc""d\n"e\nf"\n'
  data = np.frombuffer(text, np.uint8)
  starts = offsets.line_starts(data, 0)
  lines = [text[s:].split(b"\n")[0] for s in starts]
  assert lines == [b"x", b'a"b', b'c""d', b'"e', b'f"']
  assert offsets.odd_quotes(data, starts).tolist() == [1, 3, 4]
  assert offsets.line_starts(data, 2).tolist() == starts[1:].tolist()


def test_a_text_without_quotes_or_line_ends():
  data = np.frombuffer(b"abc", np.uint8)
  starts = offsets.line_starts(data, 1)
  assert starts.tolist() == [1]
  assert offsets.odd_quotes(data, starts).size == 0


def test_a_glimpse_is_forty_bytes():
  data = np.frombuffer(b"0123456789" * 5, np.uint8)
  assert offsets.glimpse(data, 3) == repr(bytes(data[3:43]))
  assert offsets.glimpse(data, None) == "nothing"


def test_caches_of_other_columns_have_other_names():
  digests = {offsets.digest(c) for c in (("a", "b"), ("ab",), ("b", "a"), ())}
  assert len(digests) == 4 and {len(d) for d in digests} == {8}


@pytest.mark.parametrize("damage", [b"", b"not an array", None])
def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, damage):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"{}\n" * 3)
  build = lambda path: (np.arange(1000), [])
  offsets.cached(str(path), "rows", build)
  (cache,) = tmp_path.glob(".*.npy")
  whole = cache.read_bytes()
  cache.write_bytes(whole[:300] if damage is None else damage)
  index, _ = offsets.cached(str(path), "rows", build)
  np.testing.assert_array_equal(index, np.arange(1000))
  assert cache.read_bytes() == whole


@pytest.mark.parametrize(
  "start, end", [(0, None), (128, None), (4096, 8192), (-3, -2), (-100, None)]
)
def test_zeros_in_a_cache_are_found(tmp_path, monkeypatch, start, end):
  """As a power cut leaves them."""
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  path = _write(tmp_path / "a.jsonl", b"{}\n")
  build = lambda path: (np.arange(1, 2000), [])
  offsets.cached(path, "rows", build)
  (cache,) = tmp_path.glob(".*.npy")
  sound = cache.read_bytes()
  damaged = bytearray(sound)
  damaged[start:end] = bytes(len(damaged[start:end]))
  assert damaged != sound
  cache.write_bytes(damaged)
  index, _ = offsets.cached(path, "rows", build)
  np.testing.assert_array_equal(index, np.arange(1, 2000))
  assert cache.read_bytes() == sound


def test_a_checksum_is_compared_once(tmp_path, monkeypatch):
  _, build = _count_builds(monkeypatch)
  path = _write(tmp_path / "a.jsonl", '{"a": 1}\n')
  offsets.cached(path, "rows", build)
  monkeypatch.setattr(offsets, "_checked", set())  # as in a new process
  crc, compared = offsets._crc, []
  monkeypatch.setattr(
    offsets, "_crc", lambda *args: compared.append(args) or crc(*args)
  )
  for _ in range(3):
    offsets.cached(path, "rows", build)
  assert len(compared) == 1
