"""Work units: how sources are cut, and when an input has changed."""

import errno
import hashlib
import json
import os
import shutil

import pytest

from blip_jax.capfilt import work_units
from blip_jax.data import datasets, specs
from tests import jobs


@pytest.fixture
def shards(tmp_path):
  return jobs.write_scene_shards(tmp_path / "shards")


def find(*specs, rows=2, root=""):
  return work_units.find([str(spec) for spec in specs], root, True, rows)


def write_list(path, count):
  lines = [{"image": f"{n}.png", "caption": ["a", "b"]} for n in range(count)]
  path.write_text(json.dumps(lines))
  return path


def test_a_shard_is_a_work_unit(shards):
  units = find(shards / "*.tar")
  assert [unit.name for unit in units] == ["00000", "00001", "00002"]
  assert units[1].spec == str(shards / "00001.tar")
  assert units[1].rows is None
  records, damage = units[1].open()
  assert len(records) == 5
  assert damage == []
  assert records[0]["caption"] == [jobs.NOISY_SCENES[5]["caption"].encode()]
  assert records[3]["caption"] == []
  assert records[3]["no_text"] == "missing_caption"


def test_a_list_is_cut_into_ranges_of_rows(tmp_path):
  path = write_list(tmp_path / "web list.json", 5)
  units = find("", path)  # empty sources are skipped
  assert [(unit.name, unit.rows) for unit in units] == [
    ("web-list.json-00000", (0, 2)),
    ("web-list.json-00001", (2, 4)),
    ("web-list.json-00002", (4, 5)),
  ]
  records, _ = units[2].open()
  assert len(records) == 1
  assert records[0]["caption"] == ["a", "b"]
  assert records[0]["id"] == "web list.json:4"


def test_specs_of_shards():
  assert specs.shard_specs("a/{0..1}.tar") == ["a/0.tar", "a/1.tar"]
  assert specs.shard_specs("a.parquet?caption=b") == ["a.parquet?caption=b"]
  assert specs.shard_specs("a.json") == []


def test_shards_of_the_same_name_are_refused(shards, tmp_path):
  other = tmp_path / "more"
  other.mkdir()
  jobs.write_tar(other / "00000.tar", jobs.scene_members(20, 2))
  with pytest.raises(ValueError, match="2 shards are named '00000'"):
    find(shards / "*.tar", other / "*.tar")


def test_no_source_is_refused():
  with pytest.raises(ValueError, match="there is nothing to label"):
    find("")


def test_a_damaged_shard_has_no_rows(tmp_path):
  (tmp_path / "0.tar").write_bytes(b"not a tar")
  (unit,) = find(tmp_path / "0.tar")
  records, damage = unit.open()
  assert len(records) == 0
  assert len(damage) == 1


def write_folder(folder, names, lines):
  folder.mkdir()
  for name in names:
    (folder / name).write_bytes(b"image")
  rows = [{"file_name": name, "caption": text} for name, text in lines]
  (folder / "metadata.jsonl").write_text(
    "".join(json.dumps(r) + "\n" for r in rows)
  )
  return folder


@pytest.mark.parametrize(
  "names, lines, unlisted",
  [
    # More images than rows.
    (["0.png", "1.png", "2.png"], [("0.png", "a"), ("2.png", "b")], 1),
    # A row for each caption.
    (["0.png", "1.png"], [("0.png", "a"), ("0.png", "b"), ("1.png", "c")], 0),
    # A row without a caption, in another order than that of the names.
    (["a.png", "b.png"], [("b.png", None), ("a.png", "of a")], 0),
    # A row without a file, and a name in another spelling.
    (["a.png"], [("gone.png", "x"), ("./a.png", "of a")], 0),
  ],
)
@pytest.mark.parametrize("with_texts", [True, False])
def test_the_rows_of_a_table_in_a_folder_are_labelled(
  tmp_path, caplog, names, lines, unlisted, with_texts
):
  folder = write_folder(tmp_path / "set", names, lines)
  units = work_units.find([str(folder)], "", with_texts, 2)
  assert [unit.name for unit in units] == ["set-00000", "set-00001"][
    : -(-len(lines) // 2)
  ]
  records = [record for unit in units for record in unit.open()[0]]
  texts = [[text] if text else [] for _, text in lines]
  assert [(record["image"], record["caption"]) for record in records] == [
    (f"{folder}/{name}", text if with_texts else [])
    for (name, _), text in zip(lines, texts, strict=True)
  ]
  reasons = [record.get("no_text") for record in records]
  assert reasons == [
    "empty_caption" if with_texts and not text else None for text in texts
  ]
  warned = f"{folder}: {unlisted} of its {len(names)} images are not in"
  assert (warned in caplog.text) == bool(unlisted)


def test_a_changed_table_in_a_folder_is_a_change(tmp_path):
  folder = write_folder(tmp_path / "set", ["a.png"], [("a.png", "old")])
  (unit,) = find(folder)
  fingerprint = unit.fingerprint()
  assert unit.unchanged(fingerprint)
  write_folder(tmp_path / "other", [], [("a.png", "new")])
  os.replace(tmp_path / "other/metadata.jsonl", folder / "metadata.jsonl")
  assert not unit.unchanged(fingerprint)


def test_the_fingerprint_of_a_file_has_its_hash(tmp_path):
  path = write_list(tmp_path / "web.json", 3)
  content = path.read_bytes()
  _, unit = find(path)
  assert unit.fingerprint() == {
    "source": str(path),
    "rows": [2, 3],
    "bytes": len(content),
    "sha256": hashlib.sha256(content).hexdigest(),
  }
  (scenes,) = find("scenes:train?num=2")
  assert scenes.fingerprint() == {
    "source": "scenes:train?num=2",
    "rows": [0, 2],
  }


def test_an_input_has_changed_if_its_content_has(tmp_path, monkeypatch):
  path = write_list(tmp_path / "web.json", 2)
  content, read = path.read_bytes(), []
  (unit,) = find(path)
  before = unit.input().as_json()
  assert before == unit.fingerprint() | {
    "modified_ns": path.stat().st_mtime_ns,
    "changed_ns": path.stat().st_ctime_ns,
  }
  sha256 = work_units.files.sha256
  monkeypatch.setattr(
    work_units.files, "sha256", lambda path: read.append(path) or sha256(path)
  )
  assert unit.unchanged(before) and read == []
  os.utime(path, (100, 100))
  assert unit.unchanged(before)  # other times, equal content
  assert unit.unchanged(before) and read == [str(path)]  # once

  path.write_bytes(content.replace(b"1.png", b"2.png"))  # of the same size
  os.utime(path, (50, 50))
  assert not unit.unchanged(before)

  path.write_bytes(content + b" ")
  os.utime(path, (100, 100))
  assert not unit.unchanged(before)


@pytest.mark.parametrize("how", ["mv", "cp -p", "link", "symbolic link"])
def test_files_of_equal_size_and_times_that_are_swapped_have_changed(
  tmp_path, how
):
  """As mv, cp -p, rsync -a and tar -x keep their times."""
  for name in "ab":
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps([{"image": f"{name}.png", "caption": name}]))
    os.utime(path, (100, 100))
  units = find(tmp_path / "a.json", tmp_path / "b.json")
  before = [unit.input().as_json() for unit in units]
  a, b, other = (tmp_path / name for name in ("a.json", "b.json", "other"))
  if how == "mv":
    a.rename(other), b.rename(a), other.rename(b)
  elif how == "cp -p":
    shutil.copy2(b, other), shutil.copy2(a, b), shutil.copy2(other, a)
  elif how == "link":
    a.unlink(), os.link(b, a)
  else:
    a.unlink(), a.symlink_to(b)
  assert not units[0].unchanged(before[0])
  assert units[1].unchanged(before[1]) == ("link" in how)


def test_an_input_without_times_is_read(tmp_path):
  """As done-files of earlier versions have it."""
  path = write_list(tmp_path / "web.json", 2)
  (unit,) = find(path)
  before = unit.fingerprint()
  assert unit.unchanged(before)
  path.write_bytes(path.read_bytes().replace(b"1.png", b"2.png"))
  os.utime(path, (100, 100))
  assert not unit.unchanged(before)


def test_another_range_of_rows_is_a_change():
  (unit,) = find("scenes:train?num=2")
  fingerprint = unit.fingerprint()
  assert unit.unchanged(fingerprint)
  _, changed, *_ = find("scenes:train?num=6")
  assert not changed.unchanged(fingerprint)


@pytest.mark.parametrize(
  "error", [MemoryError(), OverflowError("x"), RecursionError(), KeyError("x")]
)
def test_whatever_opening_a_shard_raises_is_its_damage(
  shards, monkeypatch, error
):
  def fail(*_, **__):
    raise error

  unit = find(shards / "*.tar")[1]
  monkeypatch.setattr(datasets, "open_source", fail)
  records, (problem,) = unit.open()
  assert len(records) == 0
  assert problem.startswith(f"{type(error).__name__}:")


def test_a_full_disk_is_no_damage_of_a_shard(shards, monkeypatch):
  def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(datasets, "open_source", fail)
  with pytest.raises(OSError, match="No space left"):
    find(shards / "*.tar")[1].open()


def test_input_that_changed_is_noticed(tmp_path):
  path = write_list(tmp_path / "web.json", 2)
  (unit,) = find(path)
  before, content = unit.input(), path.read_bytes()
  stat = path.stat()
  unit.check_unchanged(before)
  os.utime(path, (100, 100))
  unit.check_unchanged(before)  # other times, equal content

  path.write_bytes(content.replace(b"1.png", b"2.png"))  # of the same size
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  with pytest.raises(work_units.Unusable) as raised:
    unit.check_unchanged(before)
  then = hashlib.sha256(content).hexdigest()[:16]
  now = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  message = str(raised.value)
  assert message.startswith(f"{path}: changed while it was labelled")
  assert message.index(then) < message.index(now)

  path.unlink()
  with pytest.raises(work_units.Unusable, match="and is no file"):
    unit.check_unchanged(before)


def test_input_that_cannot_be_read_is_not_damaged(shards, monkeypatch):
  unit = find(shards / "*.tar")[1]
  fingerprint = unit.fingerprint()

  def sha256(path):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(work_units.files, "sha256", sha256)
  with pytest.raises(work_units.Unusable, match=r"00001\.tar: .*Input/output"):
    unit.input()
  assert not unit.unchanged(fingerprint)


@pytest.mark.parametrize("rows", [0, -1])
def test_work_units_have_rows(tmp_path, rows):
  with pytest.raises(ValueError, match=f"config.work_unit_rows.* {rows}"):
    find(write_list(tmp_path / "web.json", 2), rows=rows)
