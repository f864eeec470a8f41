"""Parquet as a source: image paths or images, in memory or mapped."""

import errno
import os
import pickle
import sys

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest

from blip_jax.data import offsets, parquet, parquet_file, sources
from blip_jax.runtime import files
from tests.hostile import tables


def _write(path, columns, **options):
  pq.write_table(pyarrow.table(columns), path, **options)
  return str(path)


@pytest.fixture(params=["in memory", "mapped"])
def table(request, tmp_path, monkeypatch):
  """Makes a source of columns, with text in memory or mapped."""
  if request.param == "mapped":
    monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)

  def make(columns, row_group_size=2, **options):
    path = tmp_path / "a.parquet"
    _write(path, columns, row_group_size=row_group_size)
    return parquet.Parquet([str(path)], **options)

  return make


IMAGES = [b"p0", b"p1" * 1000, b"p2", None, b"p4"]
TEXTS = ["zero", "one", 'two "2"', "\u4e09", "four"]


def test_rows_become_records(table):
  source = table(
    {
      "image": ["a.jpg", "/elsewhere/b.jpg", "https://a.org/p/c.jpg"],
      "caption": ["one", "two", ""],
      "image_id": [7, None, 9],
      "width": [1, 2, 3],
    },
    image_root="/data",
  )
  assert list(source) == [
    {
      "image": "/data/a.jpg",
      "caption": "one",
      "image_id": 7,
      "id": "a.parquet:0",
    },
    {"image": "/elsewhere/b.jpg", "caption": "two", "id": "a.parquet:1"},
    {
      "image": "/data/a.org/p/c.jpg",
      "caption": "",
      "image_id": 9,
      "id": "a.parquet:2",
    },
  ]
  assert len(source) == 3 and source[-1] == source[2]
  with pytest.raises(IndexError):
    source[3]


@pytest.mark.parametrize("kind", ["bytes", "struct"])
@pytest.mark.parametrize("row_group_size", [1, 2, 5])
def test_images_may_be_stored_in_the_table(table, kind, row_group_size):
  image = IMAGES
  if kind == "struct":
    image = [{"bytes": b, "path": f"{i}.jpg"} for i, b in enumerate(IMAGES)]
  source = table({"image": image, "text": TEXTS}, row_group_size)
  source = pickle.loads(pickle.dumps(source))
  for index in (4, 0, 2, 1):
    record = source[index]
    assert record["image"] == IMAGES[index]
    assert record["caption"] == TEXTS[index]
  if kind == "struct":
    assert source[3]["image"] == "3.jpg"
    return
  with pytest.raises(sources.BadRow, match="missing_image"):
    source[3]


@pytest.mark.parametrize("kind", [pyarrow.list_, pyarrow.large_list])
def test_a_row_may_have_multiple_captions_or_none(table, kind):
  captions = [["one", "two"], [], None]
  captions = pyarrow.array(captions, kind(pyarrow.string()))
  source = table({"url": ["a"] * 3, "captions": captions})
  assert source[0]["caption"] == ["one", "two"]
  for index in (1, 2):
    with pytest.raises(sources.BadRow, match="empty_caption"):
      source[index]


def test_categories_are_text(table):
  texts = pyarrow.array(TEXTS).dictionary_encode()
  source = table({"image": texts, "caption": texts})
  assert [record["caption"] for record in source] == TEXTS


def test_images_alone_need_no_captions(table):
  ids = {"img_id": [5, 6, 7, 8, 9]}
  source = table({"image": IMAGES, **ids}, with_captions=False)
  with pytest.raises(ValueError, match="text under 'caption'"):
    parquet.Parquet(source.paths)
  assert source[4] == {"image": b"p4", "image_id": 9, "id": "a.parquet:4"}
  source = table({"image": IMAGES}, with_captions=False)
  assert source[0] == {"image": b"p0", "id": "a.parquet:0"}


def test_columns_can_be_named(table):
  columns = {"image": ["a"], "crop": ["b"], "caption": ["one"], "title": ["2"]}
  (record,) = table(columns, image="crop", caption="title")
  assert (record["image"], record["caption"]) == ("b", "2")


@pytest.mark.parametrize(
  "columns, message",
  [
    ({"image": ["a"], "title": ["b"]}, r"'caption' .*'title'\].*\?caption="),
    ({"photo": ["a"], "text": ["b"]}, r"'image' .*'photo', .*\?image="),
    ({"image": [1], "text": ["b"]}, r"a path, bytes .* 'image', found int64"),
    ({"image": [["a"]], "text": ["b"]}, r"'image', found list<.*\?image="),
    ({"image": ["a"], "text": [1]}, r"text or a list .* 'text', found int64"),
    ({"image": ["a"], "text": [[1]]}, r"'text', found list<.*\?caption="),
  ],
)
def test_wrong_columns_are_refused(table, columns, message):
  with pytest.raises(ValueError, match=message) as error:
    table(columns)
  assert "a.parquet" in str(error.value)


def test_files_are_one_source(tmp_path):
  paths = []
  for folder in ("a", "b"):
    (tmp_path / folder).mkdir()
    columns = {"image": [f"{folder}0", f"{folder}1"], "text": ["0", "1"]}
    paths.append(_write(tmp_path / folder / "0.parquet", columns))
  source = parquet.Parquet(paths)
  assert [(record["id"], record["image"]) for record in source] == [
    ("a/0.parquet:0", "a0"),
    ("a/0.parquet:1", "a1"),
    ("b/0.parquet:0", "b0"),
    ("b/0.parquet:1", "b1"),
  ]


def test_damage_is_reported(tmp_path):
  good = _write(tmp_path / "a.parquet", {"image": ["a"], "text": ["b"]})
  bad = str(tmp_path / "b.parquet")
  with pytest.raises(ValueError, match=r"1 of 2 Parquet files .*b\.parquet"):
    parquet.Parquet([good, bad])
  whole = (tmp_path / "a.parquet").read_bytes()
  other = tmp_path / "other"
  _write(other, {"picture": ["a"], "title": ["b"]})
  for content in (
    b"", b"<html>" * 100, whole[:-4], whole[:50], b"PAR1" + bytes(90) + b"PAR1",
    whole[:4] + b"\xff" * (len(whole) - 12) + whole[-8:], other.read_bytes(),
  ):  # fmt: skip
    (tmp_path / "b.parquet").write_bytes(content)
    source = parquet.Parquet([bad, good, bad])
    assert [record["caption"] for record in source] == ["b"]
    assert len(source.problems) == 2
    assert all(line.startswith(f"{bad}: ") for line in source.problems)
    with pytest.raises(ValueError, match=r"b\.parquet: "):
      parquet.Parquet([bad])
  empty = pyarrow.table({"image": pyarrow.array([], "string")})
  pq.write_table(empty, bad)
  with pytest.raises(ValueError, match=r"No rows in .*b\.parquet"):
    parquet.Parquet([bad], with_captions=False)


IMAGES_AND_TEXTS = {
  "image": [bytes([65 + i]) * 2000 for i in range(4)],
  "text": [letter * 2000 for letter in "abcd"],
}


def _damage(path, row_group, column):
  """Writes a table of a row per group, and damages one column of one group."""
  _write(path, IMAGES_AND_TEXTS, row_group_size=1, use_dictionary=False)
  chunk = pq.read_metadata(path).row_group(row_group).column(column)
  with open(path, "r+b") as file:
    file.seek(chunk.data_page_offset)
    file.write(b"\xff" * chunk.total_compressed_size)
  return str(path)


def test_a_damaged_row_group_costs_only_its_images(tmp_path):
  path = _damage(tmp_path / "a.parquet", row_group=1, column=0)
  source = parquet.Parquet([path])
  with pytest.raises(sources.BadRow, match="broken_row") as bad:
    source[1]
  assert f"{path}: row 1: " in bad.value.detail
  for row in (0, 2, 3):
    assert source[row]["image"] == IMAGES_AND_TEXTS["image"][row]


@pytest.mark.parametrize("limit", [0, 1 << 26])
def test_damaged_text_costs_its_row_group(tmp_path, monkeypatch, limit):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", limit)
  path = _damage(tmp_path / "a.parquet", row_group=1, column=1)
  source = parquet.Parquet([path])
  (problem,) = source.problems
  assert problem.startswith(f"{path}: row group 1: ")
  with pytest.raises(sources.BadRow, match="broken_row") as bad:
    source[1]
  assert "row group 1: " in bad.value.detail
  for row in (0, 2, 3):
    assert source[row]["caption"] == IMAGES_AND_TEXTS["text"][row]
    assert source[row]["image"] == IMAGES_AND_TEXTS["image"][row]
  assert os.listdir(tmp_path) == ["a.parquet"]  # each start reports it


def test_a_row_group_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
  """A bomb of equal rows; what has its size in the file is no bomb."""
  images = {"image": [b"j" * 5000] * 1000, "text": ["t"] * 1000}
  path = _write(tmp_path / "a.parquet", images)
  monkeypatch.setattr(parquet_file, "MAX_GROUP_BYTES", 100_000)
  source = parquet.Parquet([path])
  with pytest.raises(sources.BadRow, match="more than") as bad:
    source[7]
  assert bad.value.id == "a.parquet:7"
  noise = np.random.default_rng(0).bytes(5_000_000)
  images["image"] = [noise[n * 5000 : (n + 1) * 5000] for n in range(1000)]
  path = _write(tmp_path / "b.parquet", images)
  assert parquet.Parquet([path])[7]["image"] == images["image"][7]


def test_few_large_rows_are_unpacked_at_once(tmp_path, monkeypatch):
  """A bomb is refused when it is a little too large, not 64 times."""
  row = np.random.default_rng(0).bytes(50_000)
  columns = {"image": [row] * 100, "text": ["t"] * 100}
  path = _write(tmp_path / "a.parquet", columns)
  monkeypatch.setattr(parquet_file, "MAX_GROUP_BYTES", 100_000)
  monkeypatch.setattr(parquet_file, "_BATCH_BYTES", 100_000)
  sizes = []

  class ParquetFile(pyarrow.parquet.ParquetFile):
    def iter_batches(self, *args, **options):
      for batch in super().iter_batches(*args, **options):
        sizes.append(batch.nbytes)
        yield batch

  source = parquet.Parquet([path])
  monkeypatch.setattr(pyarrow.parquet, "ParquetFile", ParquetFile)
  with pytest.raises(sources.BadRow, match="more than"):
    source[7]
  assert sizes and max(sizes) < 110_000


def test_an_error_that_hits_all_files_ends_the_job(tmp_path, monkeypatch):
  path = _write(tmp_path / "a.parquet", {"image": ["a"], "text": ["b"]})

  def open_read(path):
    raise OSError(errno.EMFILE, "Too many open files")

  monkeypatch.setattr(parquet.files, "open_read", open_read)
  with pytest.raises(OSError, match="Too many open files"):
    parquet.Parquet([path])


def test_text_is_unpacked_once_and_again_if_the_file_changes(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  columns = {"image": [f"{i}.jpg" for i in range(5000)], "text": ["a"] * 5000}
  path = _write(tmp_path / "a.parquet", columns)
  source = parquet.Parquet([path])
  (unpacked,) = tmp_path.glob(".a.parquet.columns-*.arrow")
  modified = unpacked.stat().st_mtime_ns
  assert len(pickle.dumps(source)) < 1000
  assert pickle.loads(pickle.dumps(source))[4999]["image"] == "4999.jpg"
  assert unpacked.stat().st_mtime_ns == modified
  _write(tmp_path / "a.parquet", {"image": ["b"], "text": ["b"]})
  assert len(parquet.Parquet([path])) == 1
  assert not unpacked.exists() and len(os.listdir(tmp_path)) == 2


def test_images_are_not_unpacked(tmp_path, monkeypatch):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 1000)
  images = [{"bytes": b"p" * 2000, "path": "p" * 2000}]
  columns = {"image": images, "captions": [["t" * 100]]}
  path = _write(tmp_path / "a.parquet", columns, compression=None)
  parquet.Parquet([path])
  assert os.listdir(tmp_path) == ["a.parquet"]
  columns["captions"] = [["t" * 1000]]
  parquet.Parquet([_write(tmp_path / "a.parquet", columns)])
  (unpacked,) = tmp_path.glob(".a.parquet.columns-*.arrow")
  assert 1000 < unpacked.stat().st_size < 2000


def test_a_pass_in_order_reads_each_row_group_once(tmp_path, monkeypatch):
  path = _write(
    tmp_path / "a.parquet",
    {"image": [b"p"] * 20, "text": ["t"] * 20},
    row_group_size=5,
  )
  source = parquet.Parquet([path])
  assert len(list(source)) == 20
  assert source._group.cache_info().misses == 4


def test_large_row_groups_give_a_warning(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(parquet, "_LARGE_GROUP_BYTES", 10)
  images = {"image": [b"p" * 100], "text": ["t"]}
  paths = {"image": ["p" * 100], "text": ["t"]}
  parquet.Parquet([_write(tmp_path / "b.parquet", paths)])
  assert "row_group_size" not in caplog.text
  parquet.Parquet([_write(tmp_path / "a.parquet", images)])
  assert "row_group_size=100" in caplog.text


def test_the_error_without_pyarrow_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  monkeypatch.delitem(sys.modules, "blip_jax.data.parquet")
  monkeypatch.delitem(sys.modules, "blip_jax.data.parquet_file")
  with pytest.raises(ImportError, match=r"pip install 'blip_jax\[parquet\]'"):
    import blip_jax.data.parquet  # noqa: F401


def test_further_columns_can_be_kept(table):
  columns = {
    "image": ["a.jpg", "b.jpg", "c.jpg"],
    "caption": ["one", "two", "three"],
    "answers": [[{"text": "yes", "weight": 0.5}], [], None],
    "size": [1, 2, 3],
    "other": ["x", "y", "z"],
    "category": pyarrow.array(["p", "q", "p"]).dictionary_encode(),
  }
  keep = ("answers", "size", "category")
  source = table(columns, keep=keep)
  source = pickle.loads(pickle.dumps(source))
  assert source[0] == {
    "image": "a.jpg",
    "caption": "one",
    "answers": [{"text": "yes", "weight": 0.5}],
    "size": 1,
    "category": "p",
    "id": "a.parquet:0",
  }
  assert source[1]["answers"] == []
  with pytest.raises(sources.BadRow, match=r"row 2: .*'answers'") as bad:
    source[2]
  assert bad.value.reason == "missing_column"
  source = table(columns, keep=("size",), with_captions=False)
  assert source[2] == {"image": "c.jpg", "size": 3, "id": "a.parquet:2"}
  with pytest.raises(
    ValueError, match=r"a\.parquet: .*\['title'\].*'category'"
  ):
    table(columns, keep=("size", "title"))


@pytest.mark.parametrize("image", ["a.jpg", b"encoded"])
def test_images_may_be_kept_and_are_not_unpacked(table, tmp_path, image):
  other = [{"bytes": b"other", "path": "other.jpg"}]
  columns = {"image": [image], "text": ["one"], "image2": other, "mask": [b"m"]}
  (record,) = table(columns, keep=("image2", "mask"))
  assert record == {
    "image": image,
    "caption": "one",
    "image2": {"bytes": b"other", "path": "other.jpg"},
    "mask": b"m",
    "id": "a.parquet:0",
  }
  for unpacked in tmp_path.glob(".a.parquet.columns-*.arrow"):
    assert b"other" not in unpacked.read_bytes()


def test_columns_that_are_not_needed_are_not_read(tmp_path, monkeypatch):
  path = _damage(tmp_path / "a.parquet", row_group=1, column=1)
  assert len(parquet.Parquet([path], with_captions=False)) == 4
  with pytest.raises(sources.BadRow):
    parquet.Parquet([path], with_captions=False, keep=("text",))[1]


@pytest.mark.parametrize("name", [b"caf\xe9", b"x" * 247])
def test_a_file_may_have_any_name(tmp_path, monkeypatch, name):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  path = tmp_path / os.fsdecode(name + b".parquet")
  table = pyarrow.table({"image": ["a.jpg"], "caption": ["a dog"]})
  with path.open("wb") as file:
    pq.write_table(table, file)
  (record,) = parquet.Parquet([str(path)])
  assert record["caption"] == "a dog"
  assert record["id"] == f"{files.printable(path.name)}:0"


@pytest.mark.parametrize(
  "rows, rows_of_group, column",
  [
    (1 << 41, 4, b"image"),
    (4, 1 << 41, b"image"),
    (1 << 41, 1 << 41, b"image"),
    (1 << 41, 1 << 41, "image"),
    (0, 4, b"image"),
    (-4, -4, "image"),
  ],
)
def test_a_footer_that_lies_about_its_rows_costs_its_file(
  tmp_path, rows, rows_of_group, column
):
  good = _write(tmp_path / "a.parquet", {"image": [column], "text": ["b"]})
  columns = {"image": [column] * 4, "text": ["b"] * 4}
  (tmp_path / "b.parquet").write_bytes(
    tables.with_rows(tables.parquet(columns), 4, rows, rows_of_group)
  )
  source = parquet.Parquet([good, str(tmp_path / "b.parquet")])
  assert len(source) == 1
  (problem,) = source.problems
  assert "b.parquet: damaged: the footer has " in problem


def test_a_row_group_without_the_rows_of_its_footer_has_no_rows(tmp_path):
  """Else an image would go with the caption of another row."""
  path = tmp_path / "a.parquet"
  columns = {"image": [b"0", b"1", b"2", b"3"]}
  path.write_bytes(tables.with_rows(tables.parquet(columns), 4, 5, 5))
  source = parquet.Parquet([str(path)], with_captions=False)
  for row in range(5):
    with pytest.raises(sources.BadRow, match="has 4 rows, expected 5"):
      source[row]


@pytest.mark.parametrize("rows", [10, 100])
@pytest.mark.parametrize("is_list", [False, True])
def test_text_that_unpacks_to_too_much_costs_its_file(
  tmp_path, monkeypatch, rows, is_list
):
  """A megabyte of text in each row, of which the file has one."""
  for name in ("MAX_TEXT_BYTES", "MAX_TEXT_EXPANSION"):
    monkeypatch.setattr(parquet_file, name, 5 << 20 if name[9] == "B" else 1)
  good = _write(tmp_path / "a.parquet", {"image": ["a"], "text": ["b"]})
  text = "a" * (1 << 20)
  texts = [[text]] * rows if is_list else [text] * rows
  bad = _write(tmp_path / "b.parquet", {"image": ["a"] * rows, "text": texts})
  assert os.path.getsize(bad) < 100_000
  source = parquet.Parquet([good, bad])
  assert len(source) == 1
  assert "is more than 5242880 bytes once it is unpacked" in source.problems[0]


def test_text_of_categories_is_measured_as_text(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet_file, "MAX_TEXT_BYTES", 1 << 20)
  text = pyarrow.array(["a" * 1000] * 2000).dictionary_encode()
  columns = {"image": ["a"] * 2000, "text": text}
  with pytest.raises(ValueError, match="is more than"):
    parquet.Parquet([_write(tmp_path / "a.parquet", columns)])
  monkeypatch.setattr(parquet_file, "MAX_TEXT_BYTES", 1 << 22)
  source = parquet.Parquet([str(tmp_path / "a.parquet")])
  assert source[1999]["caption"] == "a" * 1000


@pytest.mark.parametrize("damage", ["page", "all", "end"])
def test_damaged_text_in_a_cache_is_unpacked_again(
  tmp_path, monkeypatch, damage
):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  texts = [f"a good caption {n}" for n in range(1000)]
  path = _write(tmp_path / "a.parquet", {"image": texts, "text": texts})
  parquet.Parquet([path])
  (cache,) = tmp_path.glob(".*.arrow")
  sound = bytearray(cache.read_bytes())
  zeros = {"page": (4096, 8192), "all": (0, len(sound)), "end": (-9, -8)}
  damaged = sound.copy()
  start, end = zeros[damage]
  damaged[slice(start, end)] = bytes(end - start)
  assert damaged != sound
  cache.write_bytes(damaged)
  source = parquet.Parquet([path])
  assert [record["caption"] for record in source] == texts
  assert cache.read_bytes() == sound


def test_a_worker_process_does_not_read_all_text_again(tmp_path, monkeypatch):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  path = _write(tmp_path / "a.parquet", {"image": ["a"], "text": ["b"]})
  pickled = pickle.dumps(parquet.Parquet([path]))
  monkeypatch.setattr(offsets, "_checked", set())  # as in a new process
  monkeypatch.setattr(offsets, "_crc", lambda *_: pytest.fail("read again"))
  assert pickle.loads(pickled)[0]["caption"] == "b"
