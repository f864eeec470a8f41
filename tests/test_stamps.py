"""The stamps of images: what they notice, and what they do not read."""

import os
import tarfile

import numpy as np
import pytest

from blip_jax.data import datasets, sources
from blip_jax.inference import stamps
from tests import helpers


@pytest.fixture
def folder(tmp_path):
  return helpers.write_gallery(tmp_path / "gallery")


def digest(spec, rows=range(3)):
  source = datasets.open_images(str(spec))
  return stamps.Stamps(source).digest(rows)


def test_the_same_images_have_the_same_digest(folder):
  before = digest(folder)
  assert digest(folder) == before
  (folder / "0.png").read_bytes()
  folder.rename(folder.with_name("moved"))
  assert digest(folder.with_name("moved")) == before
  assert digest(folder.with_name("moved"), range(4)) != before


def test_images_of_other_rows_do_not_matter(folder):
  before = digest(folder)
  (folder / "7.png").write_bytes(b"")
  assert digest(folder) == before


def test_the_stamp_of_what_is_not_there(folder):
  known = stamps.Stamps(datasets.open_images(str(folder)))
  for path in (str(folder / "gone.png"), "a\0b", "hdfs://bucket/a.png"):
    assert known.of({"image": path, "id": "a"}) is None
  path = folder / "0.png"
  found = os.stat(path)
  assert known.of({"image": str(path), "id": "0.png"}) == [
    found.st_size,
    found.st_mtime_ns,
    found.st_ctime_ns,
  ]


def test_shards_have_one_stamp_and_one_image_is_read(
  tmp_path, folder, monkeypatch
):
  shards = [tmp_path / f"{number}.tar" for number in range(2)]
  for shard in shards:
    with tarfile.open(shard, "w") as tar:
      for number in range(4):
        tar.add(folder / f"{number}.png", f"{number}.png")
  spec, rows = tmp_path / "*.tar", range(8)
  read = sources.Source.__getitem__
  reads = []
  monkeypatch.setattr(
    sources.Source,
    "__getitem__",
    lambda self, row: reads.append(row) or read(self, row),
  )
  before = digest(spec, rows)
  assert reads == [0]
  assert digest(spec, rows) == before
  content = shards[1].read_bytes()
  shards[1].write_bytes(content)
  assert digest(spec, rows) != before


def test_made_images_are_told_by_the_first():
  known = [digest(f"scenes:val?num=4&seed={seed}") for seed in (0, 0, 1)]
  assert known[0] == known[1] != known[2]
  arrays = [{"image": np.full((2, 2, 3), n, np.uint8), "id": "a"} for n in "12"]
  one, other = (stamps.Stamps([a]).digest([0]) for a in arrays)
  assert one != other


def test_a_row_that_is_bad_has_no_stamp(tmp_path, folder):
  listed = tmp_path / "a.jsonl"
  good = f'{{"image": "{folder}/0.png"}}\n'
  listed.write_text(good + "{}\n" + good)
  before = digest(listed)
  listed.write_text(good + good + good)
  assert digest(listed) != before
